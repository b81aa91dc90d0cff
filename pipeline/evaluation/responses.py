"""`responses.jsonl`: the responses of any model, one JSON object per item."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datamodules.files import at, write_atomically
from datamodules.tables import read_jsonl

Primitive = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Response:
    """A model's response to an instruction, and the reference to compare it with.

    `settings` are those of the generation. `reference_nats` and `reference_tokens` say how well the
    model predicts the reference itself: the sum of its next-token losses and their number.
    ValueError names a field with a wrong type or an invalid value.
    """

    id: int | str
    instruction: str
    input: str = ""
    reference: str
    response: str
    settings: dict[str, Primitive] = field(default_factory=dict)
    reference_nats: float | None = None
    reference_tokens: int | None = None

    def __post_init__(self) -> None:
        if type(self.id) not in (int, str):  # a bool is refused, too
            raise ValueError(f"'id' is {self.id!r}; it must be a number or a string.")
        for name in ("instruction", "input", "reference", "response"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name!r} is {value!r}; it must be a string.")
        if not self.reference.strip():
            raise ValueError("'reference' is empty, so there is nothing to compare with.")
        if not isinstance(self.settings, dict):
            raise ValueError(f"'settings' is {self.settings!r}; it must be an object.")
        nats, tokens, highest = self.reference_nats, self.reference_tokens, sys.float_info.max
        are_numbers = type(nats) in (int, float) and type(tokens) is int
        is_sum = are_numbers and 0 <= (nats or 0) <= highest and 1 <= (tokens or 0) <= highest
        if not is_sum and (nats, tokens) != (None, None):
            raise ValueError(
                f"'reference_nats' is {nats!r} over {tokens!r} 'reference_tokens'; "
                "it takes a finite sum >= 0 over at least one token, or neither."
            )

    @property
    def is_empty(self) -> bool:
        """Whether the model said nothing but whitespace."""
        return not self.response.strip()


def read_responses(path: Path) -> list[Response]:
    """Reads a `responses.jsonl` of any model; ignores fields that `Response` lacks, and nulls.

    ValueError names the first invalid line or repeated id, or says that there are no responses.
    """
    lines_of_ids: dict[int | str, int] = {}
    responses = []
    for number, row in read_jsonl(path):
        with at(f"{path}:{number}"):
            response = _response(row)
        if response.id in lines_of_ids:
            raise ValueError(
                f"{path}:{number}: id {response.id!r} was already on line "
                f"{lines_of_ids[response.id]}; every item needs its own."
            )
        lines_of_ids[response.id] = number
        responses.append(response)
    if not responses:
        raise ValueError(f"{path} holds no responses; expected one JSON object a line.")
    return responses


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines (UTF-8) atomically, so that the file is never incomplete."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, (line.encode() for line in lines))


def _response(row: Mapping[str, Any]) -> Response:
    needed = {"id", "instruction", "reference", "response"}
    if missing := needed - row.keys():
        raise ValueError(f"missing {', '.join(map(repr, sorted(missing)))}.")
    said = {key for key, value in row.items() if value is not None or key in needed}
    return Response(**{f.name: row[f.name] for f in fields(Response) if f.name in said})
