"""Splits that do not leak: texts that say the same thing never fall on both sides.

Every function is pure: the same arguments give the same positions on every machine (numpy's PCG64).
"""

import base64
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import regex
from numpy.typing import NDArray

Positions = NDArray[np.int64]
SPLITS = ("train", "val", "test")


_SIGNS = regex.compile(r"[\p{P}\p{Cf}\p{Sc}\p{Sk}\p{Sm}]")  # _PUNCTUATION, currency, mathematics
_PUNCTUATION = regex.compile(r"[\p{P}\p{Cf}\p{Sk}]")  # with invisible characters, without emoji
KEYS = "keys of form 2"  # increase it when other texts count as equal, which changes splits
_OPERATOR = re.compile(  # signs with a meaning, as in 3 - 4, a * b, -1, 3.5, 10:30, 5 %, c#
    r"((?:(?<=[\d)])|(?<=\b\w))[ \t]?[-*/](?=[ \t]?(?:[\d(]|\w\b))|(?<!\w)-(?=\d)"
    r"|(?<=\d)[.:](?=\d)|(?<=\d)[ \t]?%|(?<=\w)\#|\^)"
)
_AS_TYPED = str.maketrans("–−⁄", "--/")  # other forms of operators


def canonical_key(text: str, *, mask_digits: bool) -> str:
    """Key of a text, equal for texts that differ in case, punctuation, space or Unicode form only.

    With `mask_digits`, signs and the values of digits (not their number) make no difference either;
    without it, they and operators do. A text of punctuation alone equals only itself.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if mask_digits:
        key = re.sub(r"\d", "0", _SIGNS.sub("", folded))
    else:
        parts = _OPERATOR.split(folded.translate(_AS_TYPED))  # every other one is an operator
        parts[::2] = [_PUNCTUATION.sub("", part) for part in parts[::2]]
        key = "".join(parts)
    words = " ".join((key if key.strip() else folded).split())
    return re.sub(r"(?<!\d) | (?!\d)", "", words)  # 1 23 is not 12 3


def joined(keys: Sequence[Sequence[str]]) -> list[str]:
    """One key per item, from its one or more; items that share any, even indirectly, get one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    items = np.repeat(np.arange(len(keys)), [len(own) for own in keys])
    numbers: dict[str, int] = {}
    nodes = [numbers.setdefault(key, len(keys) + len(numbers)) for own in keys for key in own]
    n_nodes = len(keys) + len(numbers)
    edges = coo_array((np.ones(len(nodes)), (items, nodes)), shape=(n_nodes, n_nodes))
    _, parts = connected_components(edges, directed=False)
    first: dict[int, str] = {}
    return [first.setdefault(part, own[0]) for part, own in zip(parts.tolist(), keys, strict=False)]


def shares(train_fraction: float, val_fraction: float, apart: Collection[str]) -> dict[str, float]:
    """Each split's share of `data.source`; if some splits are `apart`, the others divide it all.

    Raises:
        ValueError: unless training, validation and the rest (the test set) all get a share.
    """
    for key, value in (("train_fraction", train_fraction), ("val_fraction", val_fraction)):
        if not 0 < value < 1:
            raise ValueError(f"data.{key} is {value}; give a number between 0 and 1.")
    if train_fraction + val_fraction >= 1 - 1e-9:
        raise ValueError(
            f"data.train_fraction {train_fraction} and data.val_fraction {val_fraction} leave "
            "nothing to test on; lower one of them."
        )
    fractions = (train_fraction, val_fraction, 1 - train_fraction - val_fraction)
    given = dict(zip(SPLITS, fractions, strict=True))
    if not apart:
        return given
    left = {split: fraction for split, fraction in given.items() if split not in apart}
    return {split: left.get(split, 0.0) / sum(left.values()) for split in SPLITS}


def keep_apart(
    shared: Mapping[str, Positions], own: Mapping[str, Positions], keys: Sequence[str]
) -> tuple[dict[str, Positions], int]:
    """Splits without leaks: leaves repeats of the test set, then of validation, out of the others.

    Args:
        shared: the positions of each split in `data.source`.
        own: its positions in files of its own.
        keys: of all items; equal keys mean equal items.

    Returns:
        Positions by split, and how many items were left out (0 if no split has its own files).
    """
    kept: dict[str, Positions] = {}
    seen: set[str] = set()
    for split in reversed(SPLITS):
        rows = shared[split] if split == "train" else np.concatenate([shared[split], own[split]])
        kept[split] = rows[np.array([keys[row] not in seen for row in rows], bool)]
        seen.update(keys[row] for row in kept[split])
    n_left_out = len(keys) - sum(map(len, kept.values()))
    return {split: kept[split] for split in SPLITS}, n_left_out


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
        seed: of the order of groups.
        labels: if given, each label is split on its own (a group has its first item's label).

    Returns:
        The sorted positions of the items of each part; every item is in one part.
    """
    _, first, group, sizes = np.unique(
        np.asarray(keys, dtype=object), return_index=True, return_inverse=True, return_counts=True
    )
    strata = np.zeros(len(first), dtype=np.int64) if labels is None else np.asarray(labels)[first]
    generator = np.random.default_rng(seed)
    part_of_group, bounds = np.empty(len(first), dtype=np.int64), np.cumsum(fractions)[:-1]
    for stratum in np.unique(strata):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        n = sizes[members]
        middles = np.cumsum(n) - n / 2  # a group's part is the one in which its middle lies
        part_of_group[members] = np.searchsorted(bounds * n.sum(), middles, side="right")
    part = part_of_group[group]
    return [np.flatnonzero(part == index) for index in range(len(fractions))]


def split_in_order(keys: Sequence[str], fractions: Sequence[float]) -> list[Positions]:
    """Split by position, but an item whose key has occurred before joins the first one's part."""
    first_seen: dict[str, int] = {}
    first = np.array([first_seen.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)
    part = _part_of_position(len(keys), fractions)[first]
    return [np.flatnonzero(part == index) for index in range(len(fractions))]


def naive_split(n_items: int, fractions: Sequence[float], seed: int | None) -> list[Positions]:
    """A split that ignores keys: shuffled, or in file order if `seed` is None."""
    order = np.arange(n_items) if seed is None else np.random.default_rng(seed).permutation(n_items)
    part = _part_of_position(n_items, fractions)
    return [np.sort(order[part == index]) for index in range(len(fractions))]


def _part_of_position(n_items: int, fractions: Sequence[float]) -> Positions:
    """Part of each position; every part but the last has its share rounded to whole items."""
    *_, last = np.flatnonzero(fractions).tolist()
    sizes = [round(n_items * fraction) for fraction in fractions[:last]]
    return np.searchsorted(np.cumsum(sizes), np.arange(n_items), side="right")


def refuse_empty(
    parts: dict[str, Positions], keys: Sequence[str], differ: str = "in more than punctuation"
) -> None:
    """ValueError if a split is empty; `differ` says what makes two keys differ."""
    counts = Counter(keys[row] for positions in parts.values() for row in positions.tolist())
    for name, positions in parts.items():
        if not len(positions):
            (most, n), *_ = counts.most_common(1) or [("", 0)]
            often = f"; {n} count as {most[:40]!r}" if n > 1 else ""
            raise ValueError(
                f"the {name} split of {counts.total()} items, {len(counts)} of them different"
                f"{often}, is empty; give more that differ ({differ}), or change "
                "data.train_fraction and data.val_fraction."
            )


def count_leaked(keys: Sequence[str], train: Positions, test: Positions) -> int:
    """Number of test items whose key also occurs in training."""
    seen = {keys[position] for position in train}
    return sum(keys[position] in seen for position in test)


def packed(keys: Sequence[str]) -> str:
    """Packs keys into a text for `n_among`: a 64-bit hash of each, in Base64."""
    return base64.b64encode(np.unique(_hashes(keys)).tobytes()).decode()


def n_among(keys: Sequence[str], known: str) -> int:
    """Number of keys that are among those packed in `known`."""
    return int(np.isin(_hashes(keys), np.frombuffer(base64.b64decode(known), "<u8")).sum())


def _hashes(keys: Sequence[str]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(digests), "<u8")


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
