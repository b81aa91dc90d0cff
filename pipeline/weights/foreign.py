"""Reading a third-party model: every tensor used once, shapes checked, a few rows at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from pipeline.gpt import GPT, GPTConfig
from pipeline.weights.names import Entry, Format, entries

_CHUNK_VALUES = 1 << 18  # read at a time, if rows of a tensor are rows of a parameter
_MAX_CONTEXT = 1 << 20  # its table of rotations takes 1 GiB; a longer one is refused


@dataclass(frozen=True)
class Foreign:
    """A third-party model whose tensors have not been read yet."""

    config: GPTConfig
    tokenizer: Tokenizer
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by name
    read: Callable[[str, slice], Tensor]  # rows of a matrix, or a whole vector, from the file
    form: Format
    skipped: Mapping[str, str] = field(default_factory=dict)  # unused tensors -> why
    stored_as: Mapping[str, str] = field(default_factory=dict)  # name in `shapes` -> in the file
    license: str | None = None  # of the weights, if stated
    trained_on: Sequence[Mapping[str, Any]] = ()  # `held_out.published` of an export of ours
    lineage: Sequence[dict[str, Any]] = ()  # of the model that an export of ours was made from

    @property
    def entries(self) -> list[Entry]:
        """The tensors that it must have; ValueError if it has fewer tensors than layers."""
        if self.config.n_layer > len(self.shapes):
            raise ValueError(
                f"its configuration has {self.config.n_layer} layers, but there are only "
                f"{len(self.shapes)} tensors."
            )
        return entries(self.config, self.form)


def parameter_shapes(foreign: Foreign) -> dict[str, tuple[int, ...]]:
    """Our parameters' shapes; ValueError names a missing, unknown or wrongly shaped tensor."""
    _check_sizes(foreign)
    _check_names({entry.theirs for entry in foreign.entries}, set(foreign.shapes))
    parameters = dict(GPT.skeleton(foreign.config).named_parameters())
    for entry in foreign.entries:
        wanted, found = tuple(entry.join(parameters).shape), foreign.shapes[entry.theirs]
        if wanted != found:
            raise ValueError(
                f"its tensor {entry.theirs} has the shape {found}, but its configuration asks for "
                f"{wanted}."
            )
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def mapping(foreign: Foreign) -> dict[str, dict[str, Any]]:
    """What becomes of every tensor of the file, by its name there, as primitives."""
    used = {
        foreign.stored_as.get(entry.theirs, entry.theirs): {
            "ours": list(entry.ours),
            "shape": list(foreign.shapes[entry.theirs]),
        }
        for entry in foreign.entries
    }
    return used | {name: {"left_out": why} for name, why in foreign.skipped.items()}


def read_parameters(foreign: Foreign, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields our parameters by name, in `dtype`, reading one tensor of the file at a time.

    ValueError as from `parameter_shapes`, or for values that are not finite.
    """
    shapes = parameter_shapes(foreign)
    for entry in foreign.entries:
        # allocated before reading, so that freed buffers lie behind them and leave no holes
        ours = {name: torch.empty(shapes[name], dtype=dtype) for name in entry.ours}
        _fill(ours, entry, foreign)
        yield from ours.items()


def _fill(ours: Mapping[str, Tensor], entry: Entry, foreign: Foreign) -> None:
    n_rows, *row = foreign.shapes[entry.theirs]
    step = max(1, _CHUNK_VALUES // math.prod(row)) if entry.keeps_rows and row else n_rows
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        for name, part in entry.split(foreign.read(entry.theirs, rows)).items():
            place = ours[name][rows] if entry.keeps_rows else ours[name]
            place.copy_(part)
            # only the extremes are tested, which takes no memory of the tensor's size
            if not bool(torch.isfinite(torch.stack(place.aminmax())).all()):
                raise ValueError(f"its tensor {entry.theirs} holds values that are not finite.")


def _check_sizes(foreign: Foreign) -> None:
    config = foreign.config
    if config.block_size > _MAX_CONTEXT:
        raise ValueError(f"its context is {config.block_size} tokens; supported: {_MAX_CONTEXT:,}.")
    n_vocab, n_rows = foreign.tokenizer.n_vocab, config.vocab_size or 0
    sizes = {"vocab_size": n_rows, "n_embd": config.n_embd, "mlp_hidden": config.mlp_hidden}
    sizes["n_head x head_dim"] = config.n_head * config.head_size
    longest = max((n for shape in foreign.shapes.values() for n in shape), default=0)
    for key, size in sizes.items():
        if size > longest:
            raise ValueError(f"its {key} is {size}, more than any of its tensors has.")
    if n_vocab > n_rows:
        raise ValueError(
            f"its tokenizer has {n_vocab} tokens but its embedding only {n_rows} rows; "
            "the two do not belong together."
        )


def _check_names(wanted: set[str], found: set[str]) -> None:
    if missing := wanted - found:
        raise ValueError(
            f"{len(missing)} of its {len(wanted)} tensors are missing, such as {min(missing)}."
        )
    if unknown := found - wanted:
        raise ValueError(f"{len(unknown)} of its tensors are not known, such as {min(unknown)}.")
