"""Splits that do not leak: what says the same thing never falls on both sides.

Every function is pure: the same arguments give the same positions on every machine (numpy's PCG64).
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
SPLITS = ("train", "val", "test")


class _Punctuation(dict[int, str]):
    """`str.translate` table that drops punctuation, signs and invisible characters."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        drop = category[0] == "P" or category in ("Sc", "Sk", "Sm", "Cf")  # So, the emoji, stay
        self[code] = "" if drop else chr(code)
        return self[code]


_PUNCTUATION = _Punctuation()


def canonical_key(text: str, *, mask_digits: bool) -> str:
    """Texts of equal key count as equal: of the same words but for case, punctuation and digits.

    Punctuation between two words joins them; masked, a number keeps how many digits it has.
    """
    text = text.casefold().translate(_PUNCTUATION)
    if mask_digits:
        text = re.sub(r"\d", "0", text)
    return " ".join(text.split())


def check_fractions(train_fraction: float, val_fraction: float) -> None:
    """ValueError unless train, validation and the rest, the test set, all get a share."""
    for key, value in (("train_fraction", train_fraction), ("val_fraction", val_fraction)):
        if not 0 < value < 1:
            raise ValueError(f"data.{key} is {value}; give a number between 0 and 1.")
    if train_fraction + val_fraction >= 1 - 1e-9:
        raise ValueError(
            f"data.train_fraction {train_fraction} and data.val_fraction {val_fraction} leave "
            "nothing to test on; lower one of them."
        )


def split_groups(
    keys: Sequence[str],
    fractions: Sequence[float],
    seed: int,
    *,
    labels: Sequence[int] | None = None,
) -> list[Positions]:
    """Random split that keeps items of equal key together, as near to `fractions` as they allow.

    Args:
        keys: one for each item.
        fractions: the share of each part, summing to 1.
        seed: random seed of the order of groups.
        labels: where given, each label is split on its own (a group counts as its first item).

    Returns:
        For each part the sorted positions of its items; together every item once.
    """
    _, first, group, sizes = np.unique(
        np.asarray(keys, dtype=object), return_index=True, return_inverse=True, return_counts=True
    )
    strata = np.zeros(len(first), dtype=np.int64) if labels is None else np.asarray(labels)[first]
    generator = np.random.default_rng(seed)
    part_of_group = np.empty(len(first), dtype=np.int64)
    for stratum in np.unique(strata):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        part_of_group[members] = _parts_of(sizes[members], fractions)
    part = part_of_group[group]
    return [np.flatnonzero(part == index) for index in range(len(fractions))]


def _parts_of(sizes: Positions, fractions: Sequence[float]) -> Positions:
    """Part of each group in a row of groups: the one in which its middle lies."""
    middles = np.cumsum(sizes) - sizes / 2
    return np.searchsorted(np.cumsum(fractions)[:-1] * sizes.sum(), middles, side="right")


def split_in_order(keys: Sequence[str], fractions: Sequence[float]) -> list[Positions]:
    """Split by position, but an item whose key occurred before joins the first one's part."""
    first_seen: dict[str, int] = {}
    first = np.array([first_seen.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)
    part = _part_of_position(len(keys), fractions)[first]
    return [np.flatnonzero(part == index) for index in range(len(fractions))]


def naive_split(n_items: int, fractions: Sequence[float], seed: int | None) -> list[Positions]:
    """The split blind to equal items: shuffled, or in file order where `seed` is None."""
    order = np.arange(n_items) if seed is None else np.random.default_rng(seed).permutation(n_items)
    part = _part_of_position(n_items, fractions)
    return [np.sort(order[part == index]) for index in range(len(fractions))]


def _part_of_position(n_items: int, fractions: Sequence[float]) -> Positions:
    """Part of each position; every part but the last has its share rounded to whole items."""
    *_, last = np.flatnonzero(fractions).tolist()
    sizes = [round(n_items * fraction) for fraction in fractions[:last]]
    return np.searchsorted(np.cumsum(sizes), np.arange(n_items), side="right")


def refuse_empty(parts: dict[str, Positions]) -> None:
    """ValueError where a split got nothing."""
    for name, positions in parts.items():
        if not len(positions):
            n_items = sum(map(len, parts.values()))
            raise ValueError(
                f"the {name} split of {n_items} items is empty; "
                "give more data, or change data.train_fraction and data.val_fraction."
            )


def count_leaked(keys: Sequence[str], train: Positions, test: Positions) -> int:
    """Test items whose key occurs in training too."""
    seen = {keys[position] for position in train}
    return sum(keys[position] in seen for position in test)


def balance(labels: Sequence[int] | Positions, seed: int) -> Positions:
    """Sorted positions of a random subset with as many items of each label as the rarest has."""
    values = np.asarray(labels)
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(values, return_counts=True)
    kept = [
        generator.choice(np.flatnonzero(values == label), counts.min(), replace=False)
        for label in classes
    ]
    return np.sort(np.concatenate(kept))
