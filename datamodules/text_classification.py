"""Labelled texts from a table, split without leaks, and the preset for spam."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from datamodules import splits
from datamodules.batching import Sample
from datamodules.prompts import encode_text
from datamodules.split_data_module import SplitDataModule
from datamodules.step_data_module import report
from datamodules.tables import read_table, some


class TextClassificationDataModule(SplitDataModule):
    r"""Texts of any number of classes; the test set is what training and validation leave.

    Texts that differ only in case, digits and punctuation stay on one side of the split, which is
    stratified by label. A text longer than `max_length` loses its end, and is counted.

    Args:
        source: a file, folder or glob, bundled:sms, or download:sms-spam; each file is a .csv,
            .tsv, .jsonl or .parquet table.
        text_column: column of the texts.
        label_column: column of the labels.
        label_names: the labels as the table has them; their order gives the class indices. null
            takes those that are found: whole numbers in their order, others sorted.
        max_length: maximum tokens per text; longer ones are cut. At most the model's block_size.
        suffix: text put after every text; the head reads the last token, and learns better if that
            is always the same, such as a line end: "\n" in YAML, $'\n' in a shell.
        balance: in each split, keep as many rows of every class as the rarest one has; split_seed
            decides which.
        **options: those of `SplitDataModule`.

    Raises:
        ValueError: for an invalid argument, before any data is read; from `read` and `setup` for
            unusable data, naming file and row.
    """

    other_columns = "set data.text_column and data.label_column to some of them"  # for a message

    def __init__(
        self,
        *,
        source: str,
        text_column: str,
        label_column: str,
        label_names: list[str | int] | None,
        max_length: int,
        suffix: str,
        balance: bool,
        **options: Any,
    ) -> None:
        super().__init__(source=source, **options)
        if max_length < 1:
            raise ValueError(f"data.max_length is {max_length}; give at least 1 token.")
        names = None if label_names is None else [str(name) for name in label_names]
        if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(
                f"data.label_names is {label_names}; give two or more, all different, or null."
            )
        self.max_length, self.suffix, self.balance = max_length, suffix, balance
        self.text_column, self.label_column = text_column, label_column
        self.label_names = names or []  # until the texts are read, if they are to be found
        self._are_found = names is None
        self._met: Counter[str] = Counter()  # labels in the tables, and in how many rows

    def read(self) -> None:
        """Reads and splits the texts."""
        self._met.clear()
        try:
            rows = self._read(self._rows_of, self._text_and_label)
        except ValueError as error:
            if self._are_found or self._met.keys() <= set(self.label_names):
                raise
            met = self._labels_met(name for name, _ in self._met.most_common())
            raise ValueError(f"{error} The labels read are {met}.") from error
        if self._are_found:
            self.label_names = self._find_labels(len(rows))
        index = {name: i for i, name in enumerate(self.label_names)}
        self._texts, self._labels = [text for text, _ in rows], [index[name] for _, name in rows]
        self._keys = [splits.canonical_key(text, mask_digits=True) for text in self._texts]
        self._split(self._keys, self._labels[: len(self._own["train"])])
        if self.balance:
            for split, part in self._rows.items():
                labels = np.asarray(self._labels)[part]
                self._rows[split] = part[splits.balance(labels, self.split_seed)]
        if odd := self._contradictions():
            report(f"{len(odd)} texts appear with different labels: {some(odd)}.")

    def text(self, sample_id: int) -> str:
        """The text of a sample."""
        return self._texts[sample_id]

    def texts(self, split: str) -> list[str]:
        """Texts of the train, val or test split, in the order of its samples."""
        return [self._texts[row] for row in self._rows[split]]

    def labels(self, split: str) -> list[int]:
        """Class indices, one for each of `texts`."""
        return [self._labels[row] for row in self._rows[split]]

    def keys(self, split: str) -> list[str]:
        """One key for each of `texts`, equal for texts that say the same."""
        return [self._keys[row] for row in self._rows[split]]

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to classify: class names, maximum tokens per text, suffix."""
        return {
            "label_names": self.label_names,
            "max_length": self.max_length,
            "suffix": self.suffix,
        }

    def read_frame(self, path: Path) -> pd.DataFrame:
        """The table in a file; a preset overrides it where a file has no header."""
        return read_table(path)

    def _rows_of(self, path: Path) -> Iterator[tuple[str, tuple[Any, Any]]]:
        """The place of every row of a file, and its cells of text and label."""
        frame = self.read_frame(path) if path.stat().st_size else pd.DataFrame()
        if frame.empty:
            raise ValueError(f"{path} holds no rows; fill it, or leave it out.")
        for column in (self.label_column, self.text_column):
            if column not in frame:
                raise ValueError(
                    f"{path} has no column {column!r}, only {list(frame)}; {self.other_columns}."
                )
        cells = zip(frame[self.text_column], frame[self.label_column], strict=True)
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(cells, start=1))

    def _text_and_label(self, row: int, cells: tuple[Any, Any]) -> tuple[str, str]:
        return _text(cells[0], self.text_column), self._label(cells[1])

    def _contradictions(self) -> list[str]:
        """Texts that occur with different labels, shortened for a message."""
        labels: dict[str, set[int]] = {}
        for text, label in zip(self._texts, self._labels, strict=True):
            labels.setdefault(text.strip(), set()).add(label)
        return [repr(text[:40]) for text, found in labels.items() if len(found) > 1]

    def _label(self, cell: Any) -> str:
        if _missing(cell) or not str(cell).strip():
            raise ValueError(f"it has no {self.label_column!r}; give it a label, or drop it.")
        if not pd.api.types.is_scalar(cell):
            raise ValueError(f"{self.label_column!r} is {cell}; give it a single label.")
        if isinstance(cell, float) and cell.is_integer():  # an integer in a column with gaps
            cell = int(cell)
        label = str(cell)
        self._met[label] += 1
        if not self._are_found and label not in self.label_names:
            raise ValueError(
                f"it has label {label!r}, data.label_names is {self.label_names}; "
                "add it there, or correct the row."
            )
        return label

    def _find_labels(self, n_rows: int) -> list[str]:
        column, met = f"the column {self.label_column!r}", self._labels_met(sorted(self._met))
        if len(self._met) == 1:
            raise ValueError(f"{column} holds one label alone, {met}; give rows of another one.")
        if len(self._met) > n_rows / 2:
            raise ValueError(
                f"{column} holds {len(self._met)} labels in {n_rows} rows: {met}; set "
                "data.label_column to one of labels that recur, or give data.label_names."
            )
        names = sorted(self._met)
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            names.sort(key=int)
        report(f"{self.source}: {len(names)} labels, in order: {self._labels_met(names)}")
        return names

    def _absent(self, label: int, split: str) -> str:
        name = self.label_names[label]
        text = f"the {split} split of {self.source} has no row of label {name!r}"
        found = [place for i, place in enumerate(self._places) if self._labels[i] == label]
        if found:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            text += f", only {found[0]} has it{more}"
        others = "correct or drop these" if self._are_found else "take it out of data.label_names"
        return f"{text}; add such rows, or {others}."

    def _labels_met(self, names: Iterable[str]) -> str:
        return some([f"{name[:40]!r} ({self._met[name]})" for name in names])

    def _refuse_empty(self, keys: list[str]) -> None:
        for split in splits.SPLITS if self.balance else ("train",):
            present = set(self.labels(split))
            for label in range(len(self.label_names)):
                if label not in present:
                    raise ValueError(self._absent(label, split))
        super()._refuse_empty(keys)

    def _sample(self, row: int) -> tuple[Sample, bool]:
        ids, is_cut = encode_text(self.tokenizer, self._texts[row], self.suffix, self.max_length)
        label = self._labels[row]
        return Sample(sample_id=row, input_ids=torch.tensor(ids), label=label), is_cut

    def _counts(self) -> dict[str, int]:
        counts = {"rows": len(self._texts)}
        for split in splits.SPLITS:
            found = Counter(self.labels(split))
            of_classes = {f"{split}/{n}": found[i] for i, n in enumerate(self.label_names)}
            counts |= {split: found.total(), **of_classes}
        return counts


def _missing(value: Any) -> bool:
    """Whether a cell is null: None, NaN or pandas' NA; a list never is."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _text(value: Any, column: str) -> str:
    if _missing(value):
        raise ValueError(f"it has no {column!r}; give it a text, or drop it.")
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {value!r}, not a text; correct or drop the row.")
    if not value.strip():
        raise ValueError(f"{column!r} is empty; correct or drop the row.")
    return value


class SpamDataModule(TextClassificationDataModule):
    """SMS messages, ham or spam: the SMS Spam Collection, and any file in its format.

    The original file has no header, `bundled:sms` has one; both are read, as is any other table
    with the columns label and text. For the arguments see `TextClassificationDataModule`.
    """

    other_columns = "rename it, or name columns of your own, as configs/data/table.yaml does (-c)"

    def __init__(self, **options: Any) -> None:
        super().__init__(
            text_column="text", label_column="label", label_names=["ham", "spam"], **options
        )

    def read_frame(self, path: Path) -> pd.DataFrame:
        """The table in a file, whose first line may already be a message."""
        with path.open("rb") as file:
            first_cell = file.readline().removeprefix(codecs.BOM_UTF8).partition(b"\t")[0]
        has_header = first_cell.decode(errors="replace") not in self.label_names
        columns = [self.label_column, self.text_column]
        return read_table(path, None if has_header else columns)
