"""Reading a model of others: every tensor used once, shapes checked, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from pipeline.gpt import GPT, GPTConfig
from pipeline.weights.names import Entry


@dataclass(frozen=True)
class Foreign:
    """A model in a file of others, not read yet.

    Attributes:
        config: of the model.
        tokenizer: its own.
        entries: the tensors that it must have.
        shapes: of the tensors that it has, by name.
        read: a tensor by name, read from the file when it is asked for.
        skipped: tensors that carry nothing (masks that old files kept).
        license: of the weights, where the file says.
    """

    config: GPTConfig
    tokenizer: Tokenizer
    entries: list[Entry]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    skipped: Iterable[str] = ()
    license: str | None = None


def build(foreign: Foreign, dtype: torch.dtype) -> GPT:
    """The model, its tensors read one by one into that dtype.

    Raises:
        ValueError: naming a tensor that is missing, unknown, of another shape, or not finite.
    """
    _check_names({entry.theirs for entry in foreign.entries}, set(foreign.shapes))
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in GPT(foreign.config).named_parameters()}
    tensors: dict[str, Tensor] = {}
    for entry in foreign.entries:
        for name, part in entry.split(foreign.read(entry.theirs)).items():
            if tuple(part.shape) != wanted[name]:
                raise ValueError(
                    f"its tensor {entry.theirs} gives {name} the shape {tuple(part.shape)}, but "
                    f"its configuration asks for {wanted[name]}."
                )
            tensors[name] = torch.empty(part.shape, dtype=dtype).copy_(part)
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"its tensor {entry.theirs} holds values that are not finite.")
    _check_vocabulary(foreign)
    return GPT.from_tensors(foreign.config, tensors)


def _check_names(wanted: set[str], found: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise ValueError(
            f"{len(missing)} of its {len(wanted)} tensors are missing, such as {missing[0]}."
        )
    if unknown:
        raise ValueError(f"{len(unknown)} of its tensors are not known, such as {unknown[0]}.")


def _check_vocabulary(foreign: Foreign) -> None:
    n_vocab, n_rows = foreign.tokenizer.n_vocab, foreign.config.vocab_size
    if n_rows is None or n_vocab > n_rows:
        raise ValueError(
            f"its tokenizer has {n_vocab} tokens but its embedding only {n_rows} rows; "
            "the two do not belong together."
        )
