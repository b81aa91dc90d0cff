"""Documents of any source, one after the other: what a corpus and a tokenizer are made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import decode
from datamodules.sources import JSONL, PYTHON_DOCS, read_jsonl, read_rows, resolve

_DOCUMENT_BYTES = 16 << 20  # a longer text file becomes several documents, cut at line ends
_NO_TEXT = {".json", ".gz", ".zip", ".zst"}


def documents(sources: Sequence[str], text_column: str) -> Iterator[str]:
    """Documents of the sources, streamed: a text file, a line of JSONL or a row of a table each.

    Args:
        sources: see `datamodules.sources.resolve`.
        text_column: field of JSONL, or column of Parquet, CSV or TSV, that holds the text.

    Raises:
        FileNotFoundError: for a source that is not there.
        ValueError: naming the file and byte, line or row that is no text.
    """
    for source in sources:
        column = "text" if source == PYTHON_DOCS else text_column
        for path in resolve(source):
            suffix = path.suffix.lower()
            if suffix in _NO_TEXT:
                raise ValueError(
                    f"{path} is no plain text; give text, .jsonl, .parquet, .csv or .tsv files."
                )
            read = _READERS.get(suffix)
            yield from read(path, column) if read else _text_documents(path)


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    with table:
        if column not in table.schema_arrow.names:
            raise ValueError(_no_column(str(path), column, table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(columns=[column], batch_size=1024):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _string(value, f"{path}, row {number}", column)


def _row_documents(path: Path, column: str) -> Iterator[str]:
    is_jsonl = path.suffix.lower() in JSONL
    for number, row in read_jsonl(path) if is_jsonl else enumerate(read_rows(path), start=1):
        place = f"{path}:{number}" if is_jsonl else f"{path}, row {number}"
        if column not in row:
            raise ValueError(_no_column(place, column, row))
        yield _string(row[column], place, column)


def _no_column(place: str, column: str, names: Iterable[str]) -> str:
    return f"{place} has no {column!r}, but {', '.join(names)}; correct text_column."


def _string(value: Any, place: str, column: str) -> str:
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


_READERS = {
    **dict.fromkeys(JSONL, _row_documents),
    ".csv": _row_documents,
    ".tsv": _row_documents,
    ".parquet": _parquet_documents,
}
