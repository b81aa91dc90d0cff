"""Streams the documents of any source, to make a corpus or a tokenizer from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.files import at, decode
from datamodules.sources import PYTHON_DOCS, resolve
from datamodules.tables import ROWS, read_rows, text_in

_DOCUMENT_BYTES = 16 << 20  # a longer text file becomes several documents, cut at line ends
_NO_TEXT = {".json", ".gz", ".zip", ".zst"}


def documents(sources: Sequence[str], text_column: str) -> Iterator[str]:
    """Streams the documents of the sources: text files, lines of JSONL or rows of tables.

    Raises:
        FileNotFoundError: for a missing source.
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
                for place, row in read_rows(path, column):
                    with at(place):
                        yield text_in(row, column, "correct text_column, or drop the row.")
            else:
                yield from _text_documents(path)


def _text_documents(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        while block := file.read(_DOCUMENT_BYTES):
            block += file.readline(1 << 16)
            while file.peek(1)[:1] and 0x80 <= file.peek(1)[0] < 0xC0:  # rest of a character
                block += file.read(1)
            yield decode(block, path, offset)
            offset += len(block)
