"""Environments of peers: their packages, apart from ours, in a folder of the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from datamodules.files import cache_dir

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
HUGGING_FACE = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft", "datasets")


def python_with(packages: tuple[str, ...]) -> str:
    """The interpreter of an environment with these packages, which is made where it is missing."""
    name = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    folder = cache_dir() / "benchmarks" / f"peers-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {', '.join(packages)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(CONSTRAINTS), *packages], check=True)
        (folder / "complete").touch()
    return str(python)
