"""Documents of any source, one after the other: what a corpus and a tokenizer are made from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import decode
from datamodules.sources import PYTHON_DOCS, resolve
from datamodules.tables import ROWS, read_rows

_DOCUMENT_BYTES = 16 << 20  # a longer text file becomes several documents, cut at line ends
_NO_TEXT = {".json", ".gz", ".zip", ".zst"}


def documents(sources: Sequence[str], text_column: str) -> Iterator[str]:
    """Documents of the sources, streamed: a text file, a line of JSONL or a row of a table each.

    Raises:
        FileNotFoundError: for a source that is not there.
        ValueError: naming the file and byte, line or row that is not text.
    """
    for source in sources:
        column = "text" if source == PYTHON_DOCS else text_column
        for path in resolve(source):
            suffix = path.suffix.lower()
            if suffix in _NO_TEXT:
                raise ValueError(
                    f"{path} is not plain text; give text, .jsonl, .parquet, .csv or .tsv files."
                )
            if suffix in ROWS:
                yield from (_text(row, column, at) for at, row in read_rows(path, column))
            else:
                yield from _text_documents(path)


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        names = ", ".join(row)
        raise ValueError(f"{place} has no {column!r}, but {names}; correct text_column.")
    value = row[column]
    if value is None:
        raise ValueError(f"{place}: {column!r} is null; give it a text, or drop the row.")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{place}: {column!r} is {kind}, not text; correct text_column.")
    return value


def _text_documents(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        while block := file.read(_DOCUMENT_BYTES):
            block += file.readline(1 << 16)
            while file.peek(1)[:1] and 0x80 <= file.peek(1)[0] < 0xC0:  # to the character's end
                block += file.read(1)
            yield decode(block, path, offset)
            offset += len(block)
