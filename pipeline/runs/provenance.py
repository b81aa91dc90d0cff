"""Facts by which a result can be traced: command, code, versions, hardware. Never secrets."""

import functools
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from datamodules.files import digest, sha256

PACKAGES = ("torch", "lightning", "peft", "mlflow", "torchmetrics", "tiktoken", "transformers")
_GIT_TIMEOUT_S = 10

_NO_SECRET = r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!tik)"  # before "token"
_SECRET = rf"{_NO_SECRET}(token|api_?key|password|passwd|secret|credentials?)"
_SECRET_KEY = re.compile(rf"{_SECRET}$", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"(--\S*{_SECRET}[= ])('[^']*'|\S+)", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def redact(value: Any) -> Any:
    """A copy with secrets masked: values of keys like `api_key`, `hf_token` or `password`.

    In text, logins in URLs and options like `--judge.api_key KEY` are masked.
    """
    if isinstance(value, Mapping):
        return {
            key: "***" if item and _SECRET_KEY.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _URL_LOGIN.sub("***@", _SECRET_OPTION.sub(r"\1***", value))
    return value


def environment() -> dict[str, str]:
    """What the process runs: command line, code, versions and hardware, each left out if unknown.

    A GPU is named only if torch is already imported.
    """
    facts = {
        "command": redact(f"python -m pipeline {shlex.join(sys.argv[1:])}"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware.cpu": _cpu_model(),
        "hardware.cores": str(psutil.cpu_count()),
        "hardware.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["hardware.gpu"] = ", ".join(names)
    return facts | _git_facts(Path(__file__).parent) | _versions()


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources of both packages, templates included, as of the first call."""
    folder = Path(__file__).parents[2]
    files = sorted(
        file
        for name in ("datamodules", "pipeline")
        for file in folder.glob(f"{name}/**/*")
        if file.suffix in (".py", ".j2") and file.is_file()  # an editor's lock is a dangling link
    )
    return digest([[file.relative_to(folder).as_posix(), sha256(file)] for file in files])


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[f"version.{package}"] = "not installed"
    return versions


def _git_facts(folder: Path) -> dict[str, str]:
    """Commit of the code, and whether it was changed since; empty where there is no commit."""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
    try:
        status = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = next(line.split()[-1] for line in status if line.startswith("# branch.oid"))
    if commit == "(initial)":
        return {}
    return {
        "git.commit": commit,
        "git.dirty": str(any(not line.startswith("#") for line in status)),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
