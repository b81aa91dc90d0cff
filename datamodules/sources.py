"""Where data comes from: files, folders, globs, samples, downloads."""

import glob
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.downloads import DOWNLOADS, download
from datamodules.files import cache_dir, expanded, file_digests, replacing
from datamodules.python_docs import python_docs

PYTHON_DOCS = "bundled:python-docs"
SOURCES = ("source", "val_source", "test_source")  # arguments of data modules
_SAMPLES = Path(__file__).parent / "samples"
_PYTHON_DOCS_FORM = 1  # increase it when python_docs() gives other documents


def resolve(source: str) -> list[Path]:
    """Files of a source, sorted.

    Args:
        source: `bundled:NAME`, `download:NAME`, a file, a folder (all files below it, except
            hidden ones; links to folders are followed) or a glob (`**` crosses folders); `~` and
            environment variables are expanded.

    Raises:
        FileNotFoundError: if there is no such file, nothing matches, or a link leads nowhere.
        ValueError: for an unknown bundled or download name.
        OSError: if a download fails.
    """
    kind, _, name = source.partition(":")
    if kind == "bundled":
        return [_bundled(name)]
    if kind == "download":
        return [download(_known(DOWNLOADS, name, kind))]
    path = expanded(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(_files_below(path))
    else:
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207, Path.glob matches hidden files
    for file in files:
        if not file.exists() and file.is_symlink():
            raise FileNotFoundError(
                f"source {source!r}: {file} is a link to {file.readlink()}, which is not there; "
                "restore it, or remove the link."
            )
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(_missing(source, path))
    return found


def check(source: str) -> None:
    """Raises what `resolve` would for an unknown or missing source, but downloads nothing."""
    kind, _, name = source.partition(":")
    if kind == "download":
        _known(DOWNLOADS, name, kind)
    elif source != PYTHON_DOCS:
        resolve(source)


def source_digests(sources: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every file of the sources by path; that of python-docs by Python's version.

    Raises:
        FileNotFoundError, ValueError, OSError: as `resolve` does.
    """
    digests: dict[str, str] = {}
    for source in sources:
        of_files = file_digests(resolve(source))
        if source == PYTHON_DOCS:
            (digest,) = of_files.values()
            of_files = {f"{PYTHON_DOCS}@{platform.python_version()}": digest}
        digests |= of_files
    return digests


def _missing(source: str, path: Path) -> str:
    if "$" in str(path):
        return f"source {source!r} has an environment variable that is not set; set it."
    if path.is_dir():
        return f"source {source!r} is a folder without files; give one that holds data."
    if glob.has_magic(str(path)):
        return f"source {source!r} matches no file; correct the pattern, or give a folder."
    place = "" if path.is_absolute() else f" in {Path.cwd()}"
    return f"source {source!r} does not exist{place}; give a file, a folder or a glob."


def _files_below(folder: Path) -> Iterator[Path]:
    """Files that are not hidden; each folder once, by its own name rather than a link's."""
    tops, seen = [folder], set()
    for top in tops:  # grows by the links to folders
        for parent, names, files in os.walk(top):
            real = os.path.realpath(parent)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if not name.startswith("."))
            tops += [link for name in names if (link := Path(parent, name)).is_symlink()]
            yield from (Path(parent, name) for name in files if not name.startswith("."))


def _known(choices: dict[str, Any], name: str, kind: str) -> Any:
    if name not in choices:
        known = ", ".join(f"{kind}:{choice}" for choice in sorted(choices))
        raise ValueError(f"source '{kind}:{name}' is unknown; give {known}, or a path.")
    return choices[name]


def _bundled(name: str) -> Path:
    build = hashlib.sha256(f"{sys.version} {sys.base_prefix}".encode()).hexdigest()[:8]
    version = f"{platform.python_version()}-{build}-{_PYTHON_DOCS_FORM}"
    docs = cache_dir() / "python-docs" / f"{version}.jsonl"
    if name == "python-docs" and not docs.is_file():
        with replacing(docs) as temporary, temporary.open("w", encoding="utf-8") as lines:
            for document, text in python_docs():
                lines.write(json.dumps({"name": document, "text": text}) + "\n")
    files = {file.stem: file for file in _SAMPLES.iterdir() if file.is_file()}
    return Path(_known({**files, "python-docs": docs}, name, "bundled"))
