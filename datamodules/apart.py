"""Validation and test sets that come in files of their own, and are kept apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datamodules.files import file_digests
from datamodules.sources import resolve
from datamodules.splits import SPLITS, Positions

T = TypeVar("T")


@dataclass(frozen=True)
class Files:
    """Files by split; "train" has those of `data.source`, which other splits may have shares of."""

    paths: dict[str, list[Path]]

    @classmethod
    def of(cls, source: str | None, val_source: str | None, test_source: str | None) -> Files:
        """Those that sources stand for; see `datamodules.sources.resolve`."""
        given = dict(zip(SPLITS, (source, val_source, test_source), strict=True))
        return cls({split: [] if name is None else resolve(name) for split, name in given.items()})

    def read(self, rows_of: Callable[[Path], Iterable[T]]) -> tuple[list[T], dict[str, Positions]]:
        """The rows of all files, those of `data.source` first; which of them are of which files."""
        rows: list[T] = []
        own: dict[str, Positions] = {}
        for split, paths in self.paths.items():
            start = len(rows)
            rows += [row for path in paths for row in rows_of(path)]
            own[split] = np.arange(start, len(rows))
        return rows, own

    def facts(self) -> dict[str, Any]:
        """SHA-256 of all `sources` by path; and, if there are any, of those `apart` by split."""
        digests = {split: file_digests(paths) for split, paths in self.paths.items() if paths}
        apart = {split: found for split, found in digests.items() if split != "train"}
        sources = {path: sha256 for found in digests.values() for path, sha256 in found.items()}
        return {"sources": sources, **({"apart": apart} if apart else {})}


def named(val_source: str | None, test_source: str | None) -> set[str]:
    """The splits that have files of their own."""
    given = {"val": val_source, "test": test_source}
    return {split for split, source in given.items() if source is not None}


def shares(train_fraction: float, val_fraction: float, apart: Collection[str]) -> dict[str, float]:
    """Each split's share of `data.source`: where some are apart, the others have it all."""
    fractions = (train_fraction, val_fraction, 1 - train_fraction - val_fraction)
    given = dict(zip(SPLITS, fractions, strict=True))
    if not apart:
        return given
    left = {split: fraction for split, fraction in given.items() if split not in apart}
    return {split: left.get(split, 0.0) / sum(left.values()) for split in SPLITS}


def keep(
    shared: Mapping[str, Positions], own: Mapping[str, Positions], keys: Sequence[str]
) -> tuple[dict[str, Positions], int]:
    """Splits that do not leak: a test set stays whole, what repeats it is left out of the others.

    Args:
        shared: what each split has of `data.source`, by position.
        own: what it has of files of its own.
        keys: of all items; those of equal key say the same.

    Returns:
        Positions by split, and how many items were left out.
    """
    if not any(len(own[split]) for split in ("val", "test")):  # nothing of source repeats itself
        return {split: shared[split] for split in SPLITS}, 0
    kept: dict[str, Positions] = {}
    seen: set[str] = set()
    for split in reversed(SPLITS):
        rows = shared[split] if split == "train" else np.concatenate([shared[split], own[split]])
        kept[split] = rows[np.array([keys[row] not in seen for row in rows], bool)]
        seen.update(keys[row] for row in kept[split])
    n_left_out = len(keys) - sum(map(len, kept.values()))
    return {split: kept[split] for split in SPLITS}, n_left_out


def left_out(n_rows: int) -> str:
    """What is said of that."""
    return f"{n_rows} rows repeat what is held out in files of its own, and are left out."
