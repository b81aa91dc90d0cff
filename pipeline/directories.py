"""Directories of files: written whole or not at all, verified and told apart by digest."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from datamodules.files import digest, remembered_sha256, sha256

CHECKPOINTS = "checkpoints"  # folder of a run
MANIFEST = "manifest.json"  # of a checkpoint: size and SHA-256 of its files
FOR_PEOPLE = ("README.md", "Modelfile")  # beside weights, to be edited
ASIDE = ".aside"  # suffix of a directory that is about to be replaced
DRAFT = ".draft"  # suffix of hidden folders that are being written or removed
_OF_A_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: what libraries raise
# of flock where a file system locks no folders; EBADF over NFS, for a folder opened to read
_OF_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
Writers = Mapping[str, Callable[[Path], object]]  # file name -> what writes that file


class CheckpointError(ValueError):
    """A checkpoint that is not whole."""


class CheckpointNotWritten(OSError):
    """A checkpoint or export that could not be written; what was there before is untouched."""


@contextmanager
def writing_directory(path: Path) -> Iterator[Path]:
    """A hidden folder that becomes `path` when the block ends without an error, flushed to disk.

    So the directory is there whole or not at all, even if the machine stops. An existing one is
    replaced. Half-written drafts of earlier processes are removed, those of living ones (on this
    machine) are not.

    Args:
        path: the directory to be.

    Raises:
        CheckpointNotWritten: the disk is full or refuses to write.
    """
    path = path.resolve()
    try:
        with _draft_of(path) as draft:
            yield draft
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last
        there = next(parent for parent in path.parents if parent.exists())
        free_mib = shutil.disk_usage(there).free / 2**20
        reason = str(error).partition("\n")[0]
        is_full = getattr(error, "errno", None) in _OF_A_FULL_DISK
        remedy = "Make room" if is_full else "Correct that"
        raise CheckpointNotWritten(
            f"{path} could not be written ({reason}; {free_mib:,.0f} MiB are free); what was there "
            f"before is whole. {remedy}, then repeat the command."
        ) from error


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, re.escape(path.name))
    draft, aside = hidden(path), path.with_name(f".{path.name}{ASIDE}")
    with _holding(path.parent):
        _put_back(aside, path)
    with contextlib.ExitStack() as held:
        with _holding(path.parent):  # no sweep sees the draft before it is held
            draft.mkdir()
            held.enter_context(_holding(draft))
        try:
            yield draft
            for file in (*draft.iterdir(), draft):
                _flush(file)
            with _holding(path.parent):
                _put_back(aside, path)
                if path.exists():
                    path.rename(aside)
                draft.rename(path)
                _flush(path.parent)
                _put_back(aside, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _put_back(aside: Path, path: Path) -> None:
    """Restores a directory that a process put aside but was killed before it replaced it."""
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(path)


def write_files(folder: Path, writers: Writers) -> dict[str, dict[str, Any]]:
    """Writes files into a folder; size and SHA-256 of each by its name."""
    for name, write in writers.items():
        write(folder / name)
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps its own private
    return {name: _facts(folder / name) for name in sorted(writers)}


def check_output(path: Path, *, is_own: bool) -> Path:
    """The absolute path of a directory that a command may write or replace.

    ValueError where something is there that the command did not write.
    """
    absolute = path.resolve()
    if Path.cwd().is_relative_to(absolute):
        raise ValueError(f"output {path} holds the current directory; give a new one.")
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_own and not is_empty:
        raise ValueError(f"output {path} exists and was not written by this command; give another.")
    return absolute


def damaged(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Names of the files that are missing, or differ from what `write_files` wrote.

    Raises:
        CheckpointError: for a name that is a path: nothing outside the folder is looked at.
    """
    for name, facts in files.items():
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder} lists a file of another folder, {name!r}; take another."
            )
        if not (folder / name).is_file() or _facts(folder / name) != facts:
            yield name


def path_digest(path: Path) -> str:
    """SHA-256 of a file, of a checkpoint's manifest, or of another folder's visible files, except
    those that people edit.
    """
    if path.is_file():
        return remembered_sha256(path)
    if (path / MANIFEST).is_file():
        return remembered_sha256(path / MANIFEST)
    found = (file for file in path.rglob("*") if file.name not in FOR_PEOPLE and file.is_file())
    files = {file.relative_to(path): file for file in found}
    shown = [name for name in sorted(files) if not any(part[0] == "." for part in name.parts)]
    return digest([(name.as_posix(), remembered_sha256(files[name])) for name in shown])


def hidden(path: Path) -> Path:
    """A hidden name beside a directory, for while it is written or removed."""
    return path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}{DRAFT}"


def sweep(folder: Path, name: str) -> None:
    """Removes what `hidden` named in a folder, by a pattern of names, unless a process holds it."""
    pattern = re.compile(rf"\.{name}-[0-9a-f]{{8}}{re.escape(DRAFT)}")
    with _holding(folder):
        for leftover in [path for path in folder.glob(".*") if pattern.fullmatch(path.name)]:
            with (
                contextlib.suppress(BlockingIOError, FileNotFoundError),
                _holding(leftover, fcntl.LOCK_NB),
            ):
                shutil.rmtree(leftover)


@contextmanager
def _holding(folder: Path, how: int = 0) -> Iterator[None]:
    """Holds a folder's lock, which ends with the process; BlockingIOError with `LOCK_NB`.

    Without a lock on file systems that lock no folders: one process may write there at a time.
    """
    with contextlib.ExitStack() as after:
        descriptor = os.open(folder, os.O_RDONLY)
        after.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | how)
            after.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a fork has it, too
        except OSError as error:
            if error.errno not in _OF_NO_LOCKS:
                raise
        yield


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
