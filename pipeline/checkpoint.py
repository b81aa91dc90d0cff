"""Checkpoint directories: whole or absent, verified by digest, loaded without pickles.

step-00000500/
model.safetensors      weights (of a LoRA run: only what is trained beside the adapter)
adapter_model.safetensors, adapter_config.json    a LoRA run's adapter, in PEFT's standard form
training.pt            optimizer, schedule, loops, sampler position, RNG: primitives and tensors
meta.json              model configuration, precision, data fingerprint, prompt style, labels, base
tokenizer.json         the tokenizer itself
manifest.json          size and SHA-256 of each file, written last
"""

import hashlib
import json
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.files import MALFORMED, resolved
from datamodules.tokenizer import FILE_NAME as TOKENIZER
from datamodules.tokenizer import Tokenizer
from pipeline.console import warn
from pipeline.directories import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    Writers,
    damaged,
    hidden,
    sweep,
    write_files,
    writing_directory,
)

FORMAT = 3  # increased whenever earlier checkpoints would not resume exactly
META, WEIGHTS, TRAINING = "meta.json", "model.safetensors", "training.pt"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAMELESS = ("exported", "model.gguf")  # said by the folder that they lie in
_STEP = r"step-\d{8,}"


def step_name(step: int) -> str:
    """The folder name of an optimizer step; names sort in the order of steps."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints in a folder by step; other names, such as those of copies, are skipped."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(_STEP, path.name))


def stem_of(source: str | Path) -> str:
    """A model's name: that of its run, without the digest; for others their file's or hub name."""
    path = resolved(Path(source))
    if not path.exists():
        return str(source).partition("@")[0].rpartition("/")[2]
    if path.parent.name == CHECKPOINTS:
        path = path.parents[1]
    while path.name in _NAMELESS:
        path = path.parent
    return re.sub(r"-[0-9a-f]{8}(-\d+)?$", "", path.name if path.is_dir() else path.stem)


def write_checkpoint(path: Path, writers: Writers) -> None:
    """Writes a directory of files, whole or not at all, its manifest last.

    Half-written checkpoints of earlier processes are removed: one process writes at a time.
    CheckpointNotWritten where the disk is full or refuses to write.
    """
    if path.parent.is_dir():
        sweep(path.parent, _STEP)
    with writing_directory(path) as draft:
        files = write_files(draft, writers)
        (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, renamed first so that nobody finds a part of one."""
    shutil.rmtree(path.rename(hidden(path)))


def verify_checkpoint(path: Path) -> None:
    """Checks every file against the manifest: CheckpointError names what is missing or differs.

    ValueError where it is of another version's format.
    """
    refuse_folder_of_checkpoints(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, *MALFORMED) as error:
        state = f"its {MANIFEST} is missing or damaged" if path.exists() else "it does not exist"
        if (path / ADAPTER_CONFIG).is_file():
            state += " (an adapter in PEFT's form alone is not read: peft merges it into its base)"
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {state}; take another checkpoint."
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
    """CheckpointError for a folder that holds checkpoints but is none itself; names the newest."""
    if not (path / MANIFEST).exists():
        if found := [*steps_in(path), *steps_in(path / CHECKPOINTS)]:
            newest = max(found, key=lambda step: step.name)
            raise CheckpointError(
                f"{path} is not a checkpoint but holds some; give one, as {newest}."
            )
        if runs := sorted(run.parent for run in path.glob(f"*/{CHECKPOINTS}")):
            raise CheckpointError(f"{path} is a folder of runs; give one, as {runs[-1]}.")


def newest_valid(folder: Path, *, set_aside: bool = True) -> Path | None:
    """The newest whole checkpoint below a folder; damaged ones are set aside with a warning.

    Of several processes only one may set aside.
    """
    for path in reversed(steps_in(folder)):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            if set_aside:
                aside = path.rename(path.parent / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
                warn(f"{error} Set aside as {aside.name}.")
    return None


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by name, shape and float32 value, whatever the file format."""
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


def model_writers(tensors: Mapping[str, Tensor], meta: Any, tokenizer: Tokenizer) -> Writers:
    """The files of a checkpoint for use, without the state to resume training."""
    return {WEIGHTS: tensors_writer(tensors), META: json_writer(meta), TOKENIZER: tokenizer.save}


def read_meta(path: Path) -> dict[str, Any]:
    """Reads meta.json: model, data, precision, base."""
    return json.loads((path / META).read_bytes())


def read_tensors(path: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Weights by name, on the CPU; CheckpointError if the file does not hold tensors."""
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path / name} holds no tensors ({error}); take another checkpoint."
        ) from error


def read_training(path: Path) -> dict[str, Any]:
    """Training state of tensors and primitives; CheckpointError for anything else, unexecuted."""
    try:
        return torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{path / TRAINING} holds more than tensors and numbers, or no training state "
            f"({str(error).partition('.')[0]}); it was not executed. Take another checkpoint."
        ) from error
