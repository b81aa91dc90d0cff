"""The common way to read third-party weights: a Hugging Face directory or a GGUF file."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.files import cache_dir, expanded
from datamodules.tokenizer import FILE_NAME
from pipeline.checkpoint import refuse_folder_of_checkpoints
from pipeline.directories import FOR_PEOPLE, damaged
from pipeline.gpt import GPT
from pipeline.weights.fetch import locate
from pipeline.weights.foreign import Foreign, parameter_shapes, read_parameters
from pipeline.weights.gguf_in import open_gguf
from pipeline.weights.huggingface_in import CONFIG, open_huggingface

EXPORT = "export.json"  # digests of an export's files, and its lineage
_BYTES = 4  # of a float32


def is_foreign(path: Path) -> bool:
    """Whether a path holds weights in a third-party format."""
    return path.suffix == ".gguf" if path.is_file() else (path / CONFIG).is_file()


def open_foreign(path: Path) -> Foreign:
    """Opens third-party weights and reads their metadata; ValueError names path and problem."""
    if not is_foreign(path):
        raise ValueError(
            f"{path} holds no model: it is neither a .gguf file nor a directory with a {CONFIG}."
        )
    with _naming(path):
        stated = _verify_export(path)
        foreign = open_huggingface(path) if path.is_dir() else open_gguf(path)
        trained_on, lineage = (list(stated.get(key, [])) for key in ("trained_on", "lineage"))
        return replace(foreign, trained_on=trained_on, lineage=lineage)


def _verify_export(path: Path) -> dict[str, Any]:
    """What an export of ours states; empty for others, which have no digests, either.

    ValueError if the files are not as they were written.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / EXPORT).is_file():
        return {}
    stated = json.loads((folder / EXPORT).read_bytes())
    read = {name: facts for name, facts in stated["files"].items() if name not in FOR_PEOPLE}
    if path.is_file():
        if path.name not in read:  # made from it by a tool such as llama-quantize
            return {}
        read = {path.name: read[path.name]}
    for name in damaged(folder, read):
        raise ValueError(f"its {name} is missing or damaged; export it anew.")
    for step in stated.get("lineage", []):
        facts = [step["name"], step["digest"]]
        if data := step.get("data"):
            facts += [data["source"], data["digest"]]
        if not all(isinstance(fact, str) for fact in facts):
            raise TypeError(f"lineage: {facts}")
    return stated


def read_model(foreign: Foreign, path: Path, dtype: torch.dtype) -> GPT:
    """Reads the tensors of opened weights; ValueError as from `open_foreign`."""
    with _naming(path):
        return GPT.from_tensors(foreign.config, dict(read_parameters(foreign, dtype)))


def weights_writer(foreign: Foreign, path: Path) -> Callable[[Path], object]:
    """A writer of opened weights as float32 safetensors, which never holds all of them in memory.

    It raises ValueError as `read_model` does, but possibly half-way through the file.
    """

    def write(file: Path) -> None:
        with _naming(path):
            _write_one_by_one(file, parameter_shapes(foreign), tensors())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        try:
            yield from read_parameters(foreign, torch.float32)
        except OSError as error:  # else it would look like one of writing
            raise ValueError(f"it could not be read ({error}).") from error

    return write


def _write_one_by_one(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes float32 tensors, given in any order, byte for byte as `safetensors`' `save_file`."""
    facts: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + _BYTES * math.prod(shapes[name])
        facts[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": (start, end)}
    header = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            file.seek(8 + len(header) + facts[name]["data_offsets"][0])
            file.write(tensor.numpy().data)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes errors name the path; a value of the wrong type in a file becomes a ValueError, too."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())  # names in a file may hold anything
        raise ValueError(f"{path} cannot be used: {said}") from error
    except KeyError as error:
        raise ValueError(f"{path} cannot be used: it lacks {error}.") from error
    except (LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: its metadata is damaged ({error}).") from error


def tokenizer_of(source: str | Path) -> str:
    """The argument with which `Tokenizer.load` loads the tokenizer of a source (see `locate`)."""
    path = locate(source)
    if is_foreign(path):
        tokenizer = open_foreign(path).tokenizer
        copy = cache_dir() / "tokenizers" / tokenizer.digest[:16] / FILE_NAME
        tokenizer.save(copy)  # always: an existing copy may be damaged
        return str(copy)
    refuse_folder_of_checkpoints(path)
    return str(source if expanded(source).resolve() == path else path)
