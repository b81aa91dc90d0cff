"""Checkpoint directories: whole or absent, verified by digest, loaded without pickles.

step-00000500/
model.safetensors      weights (of a LoRA run: only what is trained beside the adapter)
adapter_model.safetensors, adapter_config.json    a LoRA run's adapter, in PEFT's standard form
training.pt            optimizer, schedule, loops, sampler position, RNG: primitives and tensors
meta.json              model configuration, precision, data fingerprint, prompt style, labels, base
tokenizer.json         the tokenizer itself
manifest.json          size and SHA-256 of each file, written last
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.files import digest, remembered_sha256, resolved, sha256
from datamodules.tokenizer import FILE_NAME as TOKENIZER
from datamodules.tokenizer import Tokenizer

FORMAT = 2  # raise it when an earlier checkpoint would not resume exactly
MANIFEST, META, WEIGHTS, TRAINING = "manifest.json", "meta.json", "model.safetensors", "training.pt"
CHECKPOINTS = "checkpoints"  # folder of a run directory
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAMELESS = ("exported", "model.gguf")  # said by the folder that they lie in
_OF_A_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: what libraries raise
_STEP = r"step-\d{8,}"
DRAFT = ".draft"  # how hidden folders end that are on their way in or out
Writers = Mapping[str, Callable[[Path], object]]  # file name -> what writes that file


class CheckpointError(ValueError):
    """A checkpoint that is not whole."""


class CheckpointNotWritten(OSError):
    """A checkpoint, or what is exported, that could not be written; what was there is as it was."""


def step_name(step: int) -> str:
    """The folder's name for an optimizer step; names sort as steps do."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints in a folder by step, as they are named here; copies of a user's are not among."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(_STEP, path.name))


def stem_of(source: str | Path) -> str:
    """What a model is called: what a run made by the run, without its digest; others by their file,
    or by their name on the hub.
    """
    path = resolved(Path(source))
    if not path.exists():
        return str(source).partition("@")[0].rpartition("/")[2]
    if path.parent.name == CHECKPOINTS:
        path = path.parents[1]
    while path.name in _NAMELESS:
        path = path.parent
    return re.sub(r"-[0-9a-f]{8}(-\d+)?$", "", path.name if path.is_dir() else path.stem)


@contextmanager
def writing_directory(path: Path) -> Iterator[Path]:
    """A hidden folder that becomes `path` when the block ends well, flushed to disk.

    So the directory is there whole or not at all, even if the machine stops. One that stands there
    already is replaced. What an earlier process left half-written of it is removed; what a living
    one (of this machine) writes at the same time is not.

    Args:
        path: the directory to be.

    Raises:
        CheckpointNotWritten: the disk is full, or refuses.
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
            f"before is whole. {remedy}; the same command goes on."
        ) from error


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, re.escape(path.name))
    draft, replaced = _hidden(path), None
    with contextlib.ExitStack() as held:
        with _holding(path.parent):  # no sweep sees the draft before it is held
            draft.mkdir()
            held.enter_context(_holding(draft))
        try:
            yield draft
            for file in (*draft.iterdir(), draft):
                _flush(file)
            replaced = path.rename(_hidden(path)) if path.exists() else None
            draft.rename(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)  # another's sweep may be at it


def write_checkpoint(path: Path, writers: Writers) -> None:
    """Writes a directory of files, whole or not at all, its manifest last.

    What an earlier process left half-written of other steps is removed: one writes at a time.

    Args:
        path: the checkpoint's directory.
        writers: what writes each file, by file name.

    Raises:
        CheckpointNotWritten: the disk is full, or refuses.
    """
    if path.parent.is_dir():
        _sweep(path.parent, _STEP)
    with writing_directory(path) as draft:
        files = write_files(draft, writers)
        (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def write_files(folder: Path, writers: Writers) -> dict[str, dict[str, Any]]:
    """Writes files into a folder; size and SHA-256 of each by its name."""
    for name, write in writers.items():
        write(folder / name)
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps its own private
    return {name: _facts(folder / name) for name in sorted(writers)}


def check_output(path: Path, *, is_own: bool) -> None:
    """ValueError where a directory cannot be this command's to write, or to replace.

    Args:
        path: the directory.
        is_own: whether what lies there is this command's.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"output {path} is a folder that you are in; give a new one.")
    if path.exists() and not is_own and not _is_empty(path):
        raise ValueError(f"output {path} exists and was not written by this command; give another.")


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; it stops being one before its files go."""
    shutil.rmtree(path.rename(_hidden(path)))


def verify_checkpoint(path: Path) -> None:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: naming what is missing or differs.
        ValueError: where it is of another version's format.
    """
    refuse_folder_of_checkpoints(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        state = f"its {MANIFEST} is missing or damaged" if path.exists() else "it does not exist"
        if (path / ADAPTER_CONFIG).is_file():
            state += " (an adapter in PEFT's form alone is not read: peft merges it into its base)"
        raise CheckpointError(
            f"{path} is no whole checkpoint: {state}; take another checkpoint."
        ) from error
    if version != FORMAT:
        age = "an earlier" if version in range(FORMAT) else "another"
        raise ValueError(
            f"{path} is of {age} form ({version}; this version reads {FORMAT}); go on with the "
            "version that wrote it, or train anew (--run.resume never)."
        )
    for name in damaged(path, files):
        raise CheckpointError(f"{path / name} is missing or damaged; take another checkpoint.")


def refuse_folder_of_checkpoints(path: Path) -> None:
    """Refuses what is taken for a checkpoint and holds some.

    Raises:
        CheckpointError: naming the newest.
    """
    if not (path / MANIFEST).exists():
        found = [*steps_in(path), *steps_in(path / CHECKPOINTS)]
        if found:
            newest = max(found, key=lambda step: step.name)
            raise CheckpointError(f"{path} is no checkpoint but holds some; give one, as {newest}.")


def damaged(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Names of the files that are missing, or are not what `write_files` wrote.

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


def newest_valid(folder: Path, *, set_aside: bool = True) -> Path | None:
    """The newest whole checkpoint below a folder; damaged ones are set aside, loudly.

    Args:
        folder: the folder that holds the checkpoints.
        set_aside: of several processes, one alone does that.
    """
    for path in reversed(steps_in(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if not set_aside:
                continue
            aside = path.rename(path.parent / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            print(f"warning: {error} Set aside as {aside.name}.", file=sys.stderr)
        else:
            return path
    return None


def path_digest(path: Path) -> str:
    """SHA-256 of a file, of a checkpoint's manifest, or of all that another folder shows."""
    if path.is_file():
        return remembered_sha256(path)
    if (path / MANIFEST).is_file():
        return remembered_sha256(path / MANIFEST)
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    shown = [name for name in sorted(files) if not any(part[0] == "." for part in name.parts)]
    return digest([(name.as_posix(), remembered_sha256(files[name])) for name in shown])


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by name, shape and float32 value, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def json_writer(value: Any) -> Callable[[Path], object]:
    """Writes a value as JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return lambda path: path.write_text(text, encoding="utf-8")


def tensors_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], object]:
    """Writes tensors as safetensors."""
    return lambda path: save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)


def training_writer(state: Any) -> Callable[[Path], object]:
    """Writes training state with torch.save."""
    return lambda path: torch.save(state, path)


def model_writers(tensors: Mapping[str, Tensor], meta: Any, tokenizer: Tokenizer) -> Writers:
    """The files of a checkpoint that is used but not resumed."""
    return {
        WEIGHTS: tensors_writer(tensors),
        META: json_writer(meta),
        TOKENIZER: tokenizer.save,
    }


def read_meta(path: Path) -> dict[str, Any]:
    """What the checkpoint is: model, data, precision, base."""
    return json.loads((path / META).read_bytes())


def read_tensors(path: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Weights by name, on the CPU.

    Raises:
        CheckpointError: where the file holds something else.
    """
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path / name} holds no tensors ({error}); take another checkpoint."
        ) from error


def read_training(path: Path) -> dict[str, Any]:
    """Training state; tensors and primitives only.

    Raises:
        CheckpointError: where the file holds anything else; it is not executed.
    """
    try:
        return torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{path / TRAINING} holds more than tensors and numbers, or no training state "
            f"({str(error).partition('.')[0]}); nothing of it ran. Take another checkpoint."
        ) from error


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}{DRAFT}"


def _sweep(folder: Path, name: str) -> None:
    """Removes what `_hidden` named and nobody holds; `name` is a pattern."""
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
    """Holds a folder's lock, which ends with the process; BlockingIOError with `LOCK_NB`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_held = _lock(descriptor, fcntl.LOCK_EX | how)
        try:
            yield
        finally:
            if is_held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork has the descriptor, too
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Locks a folder, if its file system can; over NFS one that is open to read cannot be."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
