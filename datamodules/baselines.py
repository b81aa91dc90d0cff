"""The baselines that a model has to beat to be worth its price.

For text the bits that xz and a 5-gram model of bytes need, for labels what a bag of words achieves.
"""

import lzma
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_TRAIN_BYTES = 8 << 20  # the last ones of a longer training text
MAX_HELDOUT_BYTES = 2 << 20  # the first ones of a longer held-out text
MAX_COEFFICIENTS = 4_000_000  # of a bag of words; its solver holds some ten vectors of this size
INVERSE_REGULARISATION = (1.0, 10.0, 100.0)

_ORDER = 5
_XZ_MIN_DICTIONARY = 4096


def compression_baselines(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of held-out text, by compressors and by a model of the training text.

    Returns:
        `xz`: the held-out text compressed alone; `xz_primed`: what it adds to the compressed
        training text, all of which xz may copy from; `5gram`: cross-entropy by `ngram_bits`.
    """
    train, heldout = train[-MAX_TRAIN_BYTES:], heldout[:MAX_HELDOUT_BYTES]
    if not heldout:
        raise ValueError("the held-out text is empty; raise data.val_fraction.")
    history = train[-(_ORDER - 1) :]
    bits = ngram_bits(train, history + heldout)[len(history) :]
    return {
        "xz": _xz_bits_per_byte(b"", heldout),
        "5gram": float(bits.mean()),
        "xz_primed": _xz_bits_per_byte(train, heldout),
    }


def _xz_bits_per_byte(train: bytes, heldout: bytes) -> float:
    dictionary = max(_XZ_MIN_DICTIONARY, len(train) + len(heldout))
    preset = 9 | lzma.PRESET_EXTREME
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[lzma2]))

    return 8 * (size(train + heldout) - size(train)) / len(heldout)


def ngram_bits(train: bytes, text: bytes) -> NDArray[np.float64]:
    """-log2 p of each byte of a text, given up to four bytes before it: (len(text),).

    An interpolated Witten-Bell model (Witten and Bell 1991; Chen and Goodman 1999, 2.4):
    p(w | h) = (c(hw) + t(h) p(w | h')) / (c(h) + t(h)), with t(h) the number of distinct bytes
    seen after h, and h' the context without its oldest byte; the empty context backs off to the
    uniform distribution.
    """
    probability = np.full(len(text), 1 / 256)
    for order in range(1, min(_ORDER, len(train)) + 1):
        seen, counts = np.unique(_grams(train, order), return_counts=True)
        contexts, first, followers = np.unique(
            seen >> np.uint64(8), return_index=True, return_counts=True
        )
        asked = _grams(text, order)
        count = _looked_up(seen, counts, asked)
        totals = np.stack([np.add.reduceat(counts, first), followers])
        total, different = _looked_up(contexts, totals, asked >> np.uint64(8))
        lower = probability[order - 1 :]
        mixed = (count + different * lower) / np.maximum(total + different, 1)
        probability[order - 1 :] = np.where(total, mixed, lower)
    return -np.log2(probability)


def _grams(text: bytes, order: int) -> NDArray[np.uint64]:
    """Every window of `order` bytes as an integer, big-endian: (len(text) - order + 1,)."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    n_windows = max(0, len(data) - order + 1)
    packed = np.zeros(n_windows, np.uint64)
    for i in range(order):
        packed = packed << np.uint64(8) | data[i : i + n_windows]
    return packed


def _looked_up(
    table: NDArray[np.uint64], values: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Values of keys in a sorted table, 0 for missing ones: (..., len(keys))."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return values[..., at] * (table[at] == keys)


def tfidf_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    val_texts: Sequence[str],
    val_labels: Sequence[int],
    test_texts: Sequence[str],
) -> NDArray[np.float64]:
    """Class probabilities of texts by logistic regression on TF-IDF of words and word pairs.

    The regularisation strength is the one with the lowest log loss on the validation texts. Labels
    are class indices 0..n_classes-1, all of which occur in training. Nothing is random. If no
    training text has a word (only emoji, say), characters and their pairs take the place of words.
    With more than two classes only the most frequent ones are used, for MAX_COEFFICIENTS in all.

    Returns:
        (n_test, n_classes) probabilities; column i is class i.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    n_classes = len(set(train_labels))
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=r"(?u)\b\w+\b",
        max_features=MAX_COEFFICIENTS // n_classes if n_classes > 2 else None,
    )
    if not any(map(vectorizer.build_analyzer(), train_texts)):
        vectorizer.set_params(analyzer="char_wb", token_pattern=None)
    train = vectorizer.fit_transform(train_texts)
    val, test = vectorizer.transform(val_texts), vectorizer.transform(test_texts)
    models = [
        LogisticRegression(C=strength, solver="newton-cg", max_iter=1000).fit(train, train_labels)
        for strength in INVERSE_REGULARISATION
    ]
    classes = models[0].classes_
    best = min(
        models, key=lambda model: log_loss(val_labels, model.predict_proba(val), labels=classes)
    )
    return np.asarray(best.predict_proba(test))
