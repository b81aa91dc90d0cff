"""Base of the data modules that read rows: files of rows, split so that nothing leaks."""

import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import splits
from datamodules.batching import Sample, Samples, digest_of
from datamodules.files import file_digests
from datamodules.progress import with_progress
from datamodules.sources import resolve
from datamodules.splits import SPLITS, Positions
from datamodules.step_data_module import StepDataModule, check_seed, described, report
from datamodules.tables import refused_together

MANY_ALIKE = 0.1  # share of all rows that say the same; beyond it splits may miss their shares


class SplitDataModule(StepDataModule):
    """Base of the data modules of rows; the test set is what training and validation leave.

    Args:
        source: files for all sets that have no source of their own.
        train_fraction: share of source's rows to train on.
        val_fraction: share of source's rows to validate on. If a set has a source of its own, the
            others divide all rows of source in proportion to their shares.
        split_seed: random seed of the split.
        val_source: files of the validation set, given like source; null takes a share of source.
        test_source: files of the test set, likewise; its repeats are left out of the other sets.
        **options: those of `StepDataModule`.
    """

    max_length: int
    cut = "their ends are"  # what samples longer than that lose, in a message
    units = "texts"  # what no two splits share
    differ = "in more than punctuation"  # how two entries have to, not to count as one
    order: Sequence[str] = SPLITS  # in which splits get their shares
    shuffle_split = True

    def __init__(
        self,
        *,
        source: str | None,
        train_fraction: float,
        val_fraction: float,
        split_seed: int,
        val_source: str | None = None,
        test_source: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_seed("split_seed", split_seed)
        self.source, self.val_source, self.test_source = source, val_source, test_source
        self.train_fraction, self.val_fraction = train_fraction, val_fraction
        self.split_seed = split_seed
        named = {"val": val_source, "test": test_source}
        own = [split for split, given in named.items() if given is not None]
        self.fractions = tuple(splits.shares(train_fraction, val_fraction, own).values())

    def prepare_data(self) -> None:
        """Downloads what is missing; called by Lightning on one process."""
        self._resolve()

    def _resolve(self) -> dict[str, list[Path]]:
        """Files by split; those of `source` are under "train", even if other splits share them."""
        given = zip(SPLITS, (self.source, self.val_source, self.test_source), strict=True)
        return {split: [] if name is None else resolve(name) for split, name in given}

    def _read(
        self, rows_of: Callable[[Path], Iterable[tuple[str, Any]]], made: Callable[[int, Any], Any]
    ) -> list[Any]:
        """What `made` returns for the rows of all files, by position, those of `source` first."""
        rows: list[Any] = []
        self._files, self._own, self._places = self._resolve(), dict[str, Positions](), list[str]()
        with refused_together() as row:
            for split, paths in self._files.items():
                start = len(self._places)
                for place, found in itertools.chain.from_iterable(map(rows_of, paths)):
                    with row(place):
                        rows.append(made(len(self._places), found))
                    self._places.append(place)
                self._own[split] = np.arange(start, len(self._places))
        return rows

    def setup(self, stage: str) -> None:
        """Reads, splits and encodes the rows; does nothing when called again."""
        if hasattr(self, "fingerprint"):
            return
        self.check(stage)
        self.read()
        samples: dict[int, Sample] = {}
        n_cut = 0
        with refused_together() as row:
            for i in with_progress(self._to_encode(), "rows encoded", report):
                with row(self._places[i]):
                    samples[i], is_cut = self._sample(i)
                    n_cut += is_cut
        del self._places
        self._finish(samples, {**self._counts(), "n_cut": n_cut})
        if n_cut:
            report(
                f"{n_cut} of {len(samples)} samples are longer than data.max_length "
                f"{self.max_length}; {self.cut} left out."
            )

    def _to_encode(self) -> Sequence[int]:
        """Positions of the rows to encode."""
        return np.sort(np.concatenate(list(self._rows.values()))).tolist()

    @abstractmethod
    def _sample(self, row: int) -> tuple[Sample, bool]:
        """The sample of a row, and whether it was cut."""

    @abstractmethod
    def _counts(self) -> dict[str, int]:
        """Number of rows that were read, and in each split."""

    def _learned(self) -> Sequence[str]:
        """Keys of all that is trained on."""
        return self.keys("train")

    def file_facts(self) -> dict[str, Any]:
        """SHA-256 of all `sources` by path, and, by split, of the files of its own (`apart`)."""
        files = {split: file_digests(paths) for split, paths in self._files.items() if paths}
        sources = {path: sha256 for found in files.values() for path, sha256 in found.items()}
        files.pop("train", None)
        return {"sources": sources, **({"apart": files} if files else {})}

    def _split(self, keys: list[str], labels: Sequence[int] | None = None) -> None:
        """Decides what is in each split, by keys of all rows, and by labels of those of `source`.

        It also counts what a split that ignores the keys would have leaked.
        """
        shared = keys[: len(self._own["train"])]
        for key, n in Counter(shared).most_common(1):
            if n > max(1, MANY_ALIKE * len(shared)):
                report(
                    f"{self.source}: {n} of {len(shared)} {self.units} count as the same one, "
                    f"{key[:40]!r}, and stay in one split; others differ {self.differ}."
                )
        fractions = [self.fractions[SPLITS.index(split)] for split in self.order]
        seed = self.split_seed if self.shuffle_split else None
        if seed is None:
            parts = splits.split_in_order(shared, fractions)
        else:
            parts = splits.split_groups(shared, fractions, seed, labels=labels)
        by_name = dict(zip(self.order, parts, strict=True))
        self._rows, self._n_repeated = splits.keep_apart(by_name, self._own, keys)
        try:
            self._refuse_empty(keys)
        except ValueError as error:
            if not self._n_repeated:
                raise
            raise ValueError(
                f"{error} {self._n_repeated} rows were left out: they repeat what data.val_source "
                "or data.test_source holds out."
            ) from error
        blind = splits.naive_split(len(shared), fractions, seed)
        naive = dict(zip(self.order, blind, strict=True))
        test = self._own["test"] if self.test_source else naive["test"]
        self._leaked_naive = splits.count_leaked(keys, naive["train"], test), len(test)

    def _refuse_empty(self, keys: list[str]) -> None:
        rows = self._rows if self.source else {"test": self._rows["test"]}
        splits.refuse_empty(rows, keys, self.differ)

    def _finish(self, samples: Mapping[int, Sample], counts: dict[str, int]) -> None:
        """Makes the data sets and the fingerprint, and reports what is in them."""
        sets = [Samples([samples[row] for row in self._rows[split].tolist()]) for split in SPLITS]
        self.train_set, self.val_set, self.test_set = sets
        n_leaked, n_test = self._leaked_naive
        counts["n_leaked_naive"] = n_leaked
        if self._n_repeated:
            counts["n_repeated"] = self._n_repeated
            report(
                f"{self._n_repeated} rows repeat what is held out in files of its own, and are "
                "left out."
            )
        self.fingerprint = {
            "digest": digest_of(sets),
            "split": f"{self.units} ({splits.KEYS})",
            "learned": splits.packed(self._learned()),
            "counts": counts,
            **self.file_facts(),
        }
        report(
            f"{self.source or self.test_source}: {described(counts)}; with a naive split "
            f"{n_leaked} of its {n_test} test {self.units} would be in training too, here none is."
        )
