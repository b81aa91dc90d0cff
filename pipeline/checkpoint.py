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

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.files import file_digests

FORMAT = 1
MANIFEST, META, WEIGHTS, TRAINING = "manifest.json", "meta.json", "model.safetensors", "training.pt"
TOKENIZER = "tokenizer.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DRAFT = ".draft"  # how hidden folders end that are on their way in or out


class CheckpointError(ValueError):
    """A checkpoint that is not whole."""


def step_name(step: int) -> str:
    """The folder's name for an optimizer step; names sort as steps do."""
    return f"step-{step:08d}"


def write_checkpoint(path: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes a directory of files that is there whole or not at all, even if the machine stops.

    Each file is written and flushed to disk in a hidden folder beside the target, the manifest
    last, and the folder renamed into place. A checkpoint that stands there already is replaced.
    What an earlier process left half-written in the same folder is removed: one writes at a time.

    Args:
        path: the checkpoint's directory.
        writers: file name -> function that writes that file.
    """
    for leftover in path.parent.glob(f".*{DRAFT}"):
        shutil.rmtree(leftover)
    draft = _hidden(path)
    draft.mkdir(parents=True)
    try:
        for name, write in writers.items():
            write(draft / name)
        files = {name: _facts(draft / name) for name in sorted(writers)}
        (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for name in (*files, MANIFEST, "."):
            _flush(draft / name)
        replaced = path.rename(_hidden(path)) if path.exists() else None
        draft.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if replaced:
        shutil.rmtree(replaced)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; it stops being one before its files go."""
    shutil.rmtree(path.rename(_hidden(path)))


def verify_checkpoint(path: Path) -> None:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: naming what is missing or differs.
        ValueError: where it is of another version's format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no whole checkpoint: its {MANIFEST} is missing or damaged; "
            "take another checkpoint."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {FORMAT}; "
            "use the version that wrote it."
        )
    for name, facts in files.items():
        if not (path / name).is_file() or _facts(path / name) != facts:
            raise CheckpointError(f"{path / name} is missing or damaged; take another checkpoint.")


def newest_valid(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder; damaged ones are set aside, loudly."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            aside = path.rename(path.parent / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            print(f"warning: {error} Set aside as {aside.name}.", file=sys.stderr)
        else:
            return path
    return None


def path_digest(path: Path) -> str:
    """SHA-256 of a file, of a checkpoint's manifest, or of all that another folder holds."""
    if path.is_file():
        return file_digests([path])[str(path)]
    if (path / MANIFEST).is_file():
        return file_digests([path / MANIFEST])[str(path / MANIFEST)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.relative_to(path).as_posix() for file in files]
    listed = json.dumps(list(zip(names, file_digests(files).values(), strict=True)))
    return hashlib.sha256(listed.encode()).hexdigest()


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


def read_meta(path: Path) -> dict[str, Any]:
    """What the checkpoint is: model, data, precision, base."""
    return json.loads((path / META).read_bytes())


def read_tensors(path: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Weights by name, on the CPU."""
    return load_file(path / name)


def read_training(path: Path) -> dict[str, Any]:
    """Training state; tensors and primitives only."""
    return torch.load(path / TRAINING, map_location="cpu", weights_only=True)


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}{DRAFT}"


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
