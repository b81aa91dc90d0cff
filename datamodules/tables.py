"""Tables and lists of rows: read with errors that name the row, written so as to be read back."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.files import decode, replacing

if TYPE_CHECKING:
    import pandas as pd

JSONL = (".jsonl", ".ndjson")
ROWS = (*JSONL, ".parquet", ".csv", ".tsv")  # what `read_rows` reads
_SHOWN = 10  # values in a message
_ROW_NUMBERS = re.compile(r"__index_level_\d+__")  # pandas' name for a nameless index
_WRITTEN = (".csv", ".tsv", ".jsonl", ".parquet")
_HALF = re.compile(  # a lone surrogate, after plain text, pairs of them and other escapes
    r"(?:[^\\]++|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\(?!u[dD][89a-fA-F]).)*+(\\u....)"
)


def some(values: Sequence[Any]) -> str:
    """The first of some rows or texts, for a message."""
    return ", ".join(map(str, values[:_SHOWN])) + (" ..." if len(values) > _SHOWN else "")


@contextmanager
def refused_together() -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """Gives a context manager per row, by its place; raises the errors of all rows at the end.

    Raises:
        ValueError: the first row's error, and the places of the other rows that had one.
    """
    unusable: dict[str, Exception] = {}

    @contextmanager
    def row(place: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            unusable[place] = error

    yield row
    if unusable:
        first, *others = unusable
        more = f" {len(others)} more have problems too: {some(others)}." if others else ""
        raise ValueError(f"{first}: {unusable[first]}{more}") from unusable[first]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSONL file, streamed; empty lines are left out.

    Raises:
        ValueError: naming the file, and the line that is no JSON object or the byte not UTF-8.
    """
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = decode(line, path, offset).strip()
            offset += len(line)
            if not text:
                continue
            value = parse_json(text, path, "fix the line.", number)
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise ValueError(f"{path}:{number}: a {kind}, not a JSON object; fix the line.")
            yield number, value


def parse_json(text: str, path: Path, remedy: str, line: int | None = None) -> Any:
    """Parses a file's JSON, or a line's; refuses half characters, which UTF-8 cannot encode.

    Raises:
        ValueError: naming file and line, and the remedy.
    """
    try:
        value = json.loads(text)
        if ("\\ud" in text or "\\uD" in text) and (half := _HALF.match(text)):
            message = f"{half[1]} is half a character (a lone surrogate)"
            raise json.JSONDecodeError(message, text, half.start(1))
    except json.JSONDecodeError as error:
        place = f"{path}:{line or error.lineno}"
        raise ValueError(f"{place}: {error.msg} at column {error.colno}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
        place = f"{path}:{line}" if line else f"{path}"
        raise ValueError(f"{place}: {error}; {remedy}") from error
    return value


def text_in(row: Mapping[str, Any], name: str, remedy: str) -> str:
    """A row's field, which has to be a text.

    Raises:
        ValueError: saying what it is instead, and the remedy.
    """
    if name not in row:
        raise ValueError(f"it has no {name!r}, only {list(row)}; {remedy}")
    if not isinstance(row[name], str):
        kind = "null" if row[name] is None else type(row[name]).__name__
        raise ValueError(f"{name!r} is {kind}, not a text; {remedy}")
    return row[name]


def read_table(path: Path, names: list[str] | None = None) -> pd.DataFrame:
    """Rows of a .csv, .tsv (also without suffix), .jsonl or .parquet file.

    Cells of CSV and TSV stay strings ("NA" and "" included). A CSV is separated by commas, or by
    semicolons if its first line has more of those. Tab-separated cells are never quoted, so that a
    lone quotation mark in a text swallows no rows.

    Args:
        path: the file.
        names: column names, where a CSV or TSV file has no header line.

    Raises:
        ValueError: naming the file, if it cannot be read as what its suffix says.
    """
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix in JSONL:
        return pd.DataFrame([row for _, row in read_jsonl(path)], dtype=object)
    if suffix not in (".csv", ".tsv", "", ".parquet"):
        raise ValueError(f"{path} is not a table; give a .csv, .tsv, .jsonl or .parquet file.")
    text = "" if suffix == ".parquet" else _lines(decode(path.read_bytes(), path), suffix)
    try:
        return _parquet(path) if suffix == ".parquet" else _parsed(text, suffix, names)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as {suffix or '.tsv'}: {reason}") from error


def _parquet(path: Path) -> pd.DataFrame:
    from pyarrow import parquet

    _refuse_twice(parquet.read_schema(path).names)
    columns = parquet.read_table(path)
    numbers = [name for name in columns.column_names if _ROW_NUMBERS.fullmatch(name)]
    return columns.drop_columns(numbers).to_pandas(
        integer_object_nulls=True,
        ignore_metadata=True,  # a named index is a column like any other
    )


def _parsed(text: str, suffix: str, names: list[str] | None) -> pd.DataFrame:
    """Parses a text of separated cells."""
    import pandas as pd

    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "lineterminator": "\n"}
    if suffix == ".csv":
        form |= {"delimiter": _separator(text), "quoting": csv.QUOTE_MINIMAL}
    table = pd.read_csv(io.StringIO(text), names=names, dtype=str, keep_default_na=False, **form)
    if names is None and suffix == ".tsv":  # pandas would number duplicates
        _refuse_twice(text.lstrip("\n").partition("\n")[0].split("\t"))
    elif names is None:
        with contextlib.suppress(csv.Error):  # pandas may read what csv cannot
            rows = csv.reader(io.StringIO(text), **form)
            _refuse_twice(next((row for row in rows if row), []))
    if not isinstance(table.index, pd.RangeIndex):  # made of surplus fields
        n_columns = len(table.columns)
        n_fields = n_columns + table.index.nlevels
        remedy = "quote the text with a comma" if suffix == ".csv" else "drop a tab"
        raise ValueError(
            f"row 1 has {n_fields} fields but there are {n_columns} columns; {remedy}."
        )
    return table


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := [name for name, n in Counter(names).items() if n > 1 and name]:
        raise ValueError(f"it has {twice[0]!r} twice among its columns; rename one.")


def _lines(text: str, suffix: str) -> str:
    """A table's text with LF as line end, where it has CR LF, or CR alone."""
    if "\r" not in text:
        return text
    unquoted = re.sub(r'"[^"]*"', "", text) if suffix == ".csv" else text
    return text.replace("\r\n", "\n") if "\n" in unquoted else text.replace("\r", "\n")


def _separator(text: str) -> str:
    """The separator of a CSV: a comma, or the semicolon that some spreadsheets write."""
    header = text.partition("\n")[0]
    return ";" if header.count(";") > header.count(",") else ","


def read_rows(path: Path, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields places, for messages, and rows as dicts of primitives; streams JSONL and Parquet.

    Args:
        path: a file with a suffix of `ROWS`.
        column: the only column needed; if a Parquet file has it, no other column is read.

    Raises:
        ValueError: naming the file, if it cannot be read as what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix in JSONL:
        yield from ((f"{path}:{line}", row) for line, row in read_jsonl(path))
        return
    rows: Iterable[Any] = ()
    if suffix == ".parquet":
        rows = _parquet_rows(path, column)
    elif path.stat().st_size:
        rows = read_table(path).to_dict("records")
    yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def _parquet_rows(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            _refuse_twice(table.schema_arrow.names)
            wanted = [column] if column in table.schema_arrow.names else None
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:  # OSError for damaged pages
        raise ValueError(f"{path} is not a Parquet file, or not whole: {error}") from error


def write_table(frame: pd.DataFrame, path: Path, like: Path | None = None) -> None:
    """Writes a table that `read_table` can read, whole or not at all; see `check_writable`.

    A CSV takes the format of the CSV `like`: a spreadsheet that writes semicolons reads neither
    commas nor decimal points.
    """
    with replacing(path) as temporary:  # if killed here, it is not in the way of the next write
        if path.suffix == ".parquet":
            with _as_parquet(str(path)):
                frame.to_parquet(temporary, index=False)
        elif path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                for row in frame.to_dict("records"):
                    file.write(json.dumps(_in_json(row), ensure_ascii=False) + "\n")
        elif path.suffix == ".tsv":
            _as_text(frame).to_csv(temporary, index=False, sep="\t", quoting=csv.QUOTE_NONE)
        else:
            form = _form_of(like) if like and like.suffix.lower() == ".csv" else {}
            cells = (cell for name in frame for cell in (name, *frame[name]))
            if any(isinstance(cell, str) and "\r" in cell for cell in cells):
                form["lineterminator"] = "\r\n"  # else Python before 3.13 would not quote it
            _as_text(frame).to_csv(temporary, index=False, **form)


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Writes lists and objects as JSON: their `str` leaves out the middle of long ones."""
    import pandas as pd

    def text(cell: Any) -> Any:
        is_nested = isinstance(cell, dict | list) or bool(getattr(cell, "shape", ()))
        return json.dumps(_in_json(cell), ensure_ascii=False) if is_nested else cell

    written = frame.copy(deep=False)
    for i in range(frame.shape[1]):
        column = frame.iloc[:, i]
        if column.dtype == object:  # stays so: `map` would turn integers with gaps into floats
            cells = pd.Series([*map(text, column)], frame.index, dtype=object)
            written.isetitem(i, cells)  # type: ignore[arg-type]  # not in pandas' stubs
    return written


def _form_of(path: Path) -> dict[str, Any]:
    """The format of a CSV, as options of pandas."""
    data = path.read_bytes()
    separator = _separator(_lines(decode(data, path), path.suffix.lower()))
    return {
        "sep": separator,
        "decimal": "," if separator == ";" else ".",
        "encoding": "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8",
        "lineterminator": "\r\n" if data.partition(b"\n")[0].endswith(b"\r") else "\n",
    }


@contextmanager
def _as_parquet(place: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OverflowError) as error:  # for too large integers
        reason = str(error).splitlines()[0]
        raise ValueError(f"output is {place}: {reason}; give a .jsonl file.") from error


def _in_json(value: Any) -> Any:
    """A cell as a JSON value: exact numbers, times in ISO 8601, null for missing values."""
    import pandas as pd

    if isinstance(value, dict):
        return {str(name): _in_json(cell) for name, cell in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        cells = value.tolist() if hasattr(value, "tolist") else value
        return [_in_json(cell) for cell in cells] if isinstance(cells, list) else _in_json(cells)
    if pd.isna(value):
        return None
    if isinstance(value, str | bool | int | float):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def check_writable(path: Path, columns: Mapping[Any, Iterable[Any]] | None = None) -> None:
    """Refuses what `write_table` could not write, as far as is known, before the work is done.

    Raises:
        ValueError: for an unknown suffix, a text that a tab-separated file cannot hold, as it has
            no quotes, or a column that Parquet has no type for.
    """
    import pyarrow

    if path.suffix not in _WRITTEN:
        raise ValueError(f"output is {path}; give a file that ends in {', '.join(_WRITTEN)}.")
    for name, cells in (columns or {}).items():
        if path.suffix == ".parquet":
            with _as_parquet(f"{path} (column {name!r})"):
                pyarrow.array(list(cells), from_pandas=True)
        for cell in (name, *cells) if path.suffix == ".tsv" else ():
            if isinstance(cell, str) and any(character in cell for character in "\t\n\r"):
                raise ValueError(
                    f"output is {path}, which cannot hold the tab or line break in {cell[:60]!r} "
                    f"(column {name!r}); give a .csv or .jsonl file."
                )
