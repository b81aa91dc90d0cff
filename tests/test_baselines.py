import lzma
import math
from fractions import Fraction

import numpy as np
import pytest

from datamodules.baselines import compression_baselines, ngram_bits

TEXT = b"it was the best of times, it was the worst of times, it was the age of wisdom. " * 3


def by_hand(train: bytes, text: bytes, order: int) -> Fraction:
    """Witten-Bell from its definition: of the last byte of `text` after the bytes before it."""
    if order == 0:
        return Fraction(1, 256)
    lower = by_hand(train, text, order - 1)
    context = text[-order:-1]
    if len(text) < order:
        return lower
    after = [
        train[i + len(context)]
        for i in range(len(train) - len(context))
        if train[i : i + len(context)] == context
    ]
    if not after:
        return lower
    return (after.count(text[-1]) + len(set(after)) * lower) / Fraction(
        len(after) + len(set(after))
    )


@pytest.mark.parametrize("context", [b"", b"t", b"was the ", b"\xff\xfe", b"xq the"])
def test_probabilities_of_all_bytes_sum_to_one(context: bytes) -> None:
    bits = [ngram_bits(TEXT, context + bytes([byte]))[-1] for byte in range(256)]
    assert math.isclose(np.exp2(-np.array(bits)).sum(), 1, rel_tol=1e-12)  # 256 roundings


def test_the_definition_gives_the_same_probabilities() -> None:
    text = b"it was a best time \x00"
    expected = [-math.log2(by_hand(TEXT, text[: i + 1], 5)) for i in range(len(text))]
    np.testing.assert_allclose(ngram_bits(TEXT, text), expected, rtol=1e-12)


def test_baselines_know_the_training_text() -> None:
    generator = np.random.default_rng(0)
    noise = generator.bytes(4096)
    fresh, known = compression_baselines(TEXT, noise), compression_baselines(noise + TEXT, noise)
    assert fresh["5gram"] > 8  # noise has 8 bits a byte, and English is a wrong guess
    assert 8 <= fresh["xz"] < 8.1
    assert known["5gram"] < 4
    assert known["xz_primed"] < 0.2
    assert known["xz"] == fresh["xz"]


def test_the_5_gram_starts_from_the_end_of_the_training_text() -> None:
    assert compression_baselines(b"abcdefgh" * 20, b"a")["5gram"] < 1


def test_xz_is_the_difference_of_two_archives() -> None:
    heldout = b"it was the epoch of belief, it was the epoch of incredulity"
    sizes = [
        len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (TEXT, TEXT + heldout)
    ]
    expected = 8 * (sizes[1] - sizes[0]) / len(heldout)
    assert compression_baselines(TEXT, heldout)["xz_primed"] == pytest.approx(expected)


@pytest.mark.parametrize("train", [b"", b"ab"])
def test_little_training_text_is_enough(train: bytes) -> None:
    assert compression_baselines(train, b"abc")["5gram"] <= 9


def test_without_training_text_all_bytes_are_equal() -> None:
    assert compression_baselines(b"", b"abc")["5gram"] == 8


def test_an_empty_held_out_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"held-out text is empty; raise data\.val_fraction"):
        compression_baselines(TEXT, b"")
