import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import splits

FRACTIONS = (0.7, 0.1, 0.2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("WIN £1000 now!!", "win £2500 now"),
        ("Straße", "STRASSE"),
        ("don't   go\there", "dont go here"),
        ("code 07 or 7", "code 12 or 3"),
        ("免费，加入！", "免费加入"),
        ("zero​width", "zerowidth"),
        ("٣ days", "3 days"),  # Arabic-Indic digits are digits
        ("café, là", "cafe\u0301 la\u0300"),  # composed or not
        ("ＷＩＮ！", "win"),  # full width
        ("call X29. Your code", "Call x49.Your code"),
    ],
)
def test_texts_that_say_the_same_share_a_key(one: str, other: str) -> None:
    assert splits.canonical_key(one, mask_digits=True) == splits.canonical_key(
        other, mask_digits=True
    )


@pytest.mark.parametrize(
    ("one", "other"), [("call 12", "call 123"), ("see you 😀", "see you 😡"), ("नमस्ते", "नमस्त")]
)
def test_texts_that_differ_keep_their_keys(one: str, other: str) -> None:
    assert splits.canonical_key(one, mask_digits=True) != splits.canonical_key(
        other, mask_digits=True
    )


def test_digits_count_where_they_are_not_masked() -> None:
    keys = {splits.canonical_key(text, mask_digits=False) for text in ("What is 3?", "what is 4")}
    assert keys == {"whatis3", "whatis4"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("3 + 4", "3 - 4"), ("10 * 2", "10 / 2"), ("(1+2)*3", "(1+2)/3"), ("a * b", "a / b")],
        *[("5 > 3", "5 < 3"), ("a == b", "a != b"), ("-3", "3"), ("2^3", "23"), ("5 %", "5")],
        *[("C++", "C#"), ("3.5", "35"), ("10:30", "1030"), ("$5", "5 €"), ("1, 23", "12, 3")],
    ],
)
def test_operators_and_signs_count_where_digits_do(one: str, other: str) -> None:
    assert _question(one) != _question(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("**Bold** text", "bold text"), ("well-known", "well known"), ("e-mail", "email")],
        *[("Hello, world!", "hello world"), ("item - two", "item two"), ("#topic", "topic")],
        *[("He left. 3 days", "he left 3 days"), ("x = 'y'", 'X="y"'), ("1,000", "1000")],
        *[("3 – 4", "3 - 4"), ("3 − 4", "3 - 4"), ("½ cup", "1/2 cup"), ("- 3\n- 1", "* 3\n* 1")],
    ],
)
def test_punctuation_does_not_count_in_a_question(one: str, other: str) -> None:
    assert _question(one) == _question(other)


def _question(text: str) -> str:
    return splits.canonical_key(text, mask_digits=False)


@pytest.mark.parametrize("mask_digits", [True, False])
def test_texts_of_punctuation_alone_differ(mask_digits: bool) -> None:
    keys = {splits.canonical_key(text, mask_digits=mask_digits) for text in (":-)", ":-(", ": - )")}
    assert len(keys) == 2


def test_packed_keys_are_found_again() -> None:
    known = splits.packed([f"key {i}" for i in range(1000)] * 2)
    assert len(known) == -(-8 * 1000 // 3) * 4
    assert splits.n_among(["key 7", "key 7", "key 1000", "other"], known) == 2
    assert splits.n_among([], known) == splits.n_among(["key 7"], splits.packed([])) == 0


def test_items_that_share_a_key_through_others_are_joined() -> None:
    keys = [["a"], ["b", "x"], ["c"], ["x", "y"], ["y", "z"], ["a", "w"]]
    assert splits.joined(keys) == ["a", "b", "c", "b", "b", "a"]
    assert splits.joined([]) == []


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    n_classes=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_groups_stay_whole_and_nothing_is_lost(
    groups: list[int], n_classes: int, seed: int
) -> None:
    keys = [f"key {group}" for group in groups]
    labels = [i % n_classes for i in range(len(keys))]
    parts = splits.split_groups(keys, FRACTIONS, seed, labels=labels)
    assert sorted(np.concatenate(parts)) == list(range(len(keys)))
    seen = [{keys[position] for position in part} for part in parts]
    assert sum(map(len, seen)) == len(set(keys))


def test_shares_are_met_for_every_label() -> None:
    labels = [0] * 900 + [1] * 100
    parts = splits.split_groups([str(i) for i in range(1000)], FRACTIONS, 0, labels=labels)
    counts = [np.bincount(np.asarray(labels)[part]).tolist() for part in parts]
    assert counts == [[630, 70], [90, 10], [180, 20]]


def test_a_split_depends_on_the_seed_alone() -> None:
    keys = [str(i % 40) for i in range(100)]
    once, again = (splits.split_groups(keys, FRACTIONS, 1) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    other = splits.split_groups(keys, FRACTIONS, 2)
    assert not np.array_equal(once[2], other[2])
    # stored from a run: a change means that every split of every user changes
    assert splits.split_groups([str(i) for i in range(10)], FRACTIONS, 1)[2].tolist() == [3, 6]


def test_in_order_repeats_join_the_first_one() -> None:
    keys = ["a", "b", "c", "d", "e", "f", "a", "g", "f", "h"]
    parts = splits.split_in_order(keys, (0.6, 0.2, 0.2))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 4, 5, 6, 8], [7], [9]]
    parts = splits.split_in_order([str(i) for i in range(100)], (0.58, 0.29, 0.13))
    assert [len(part) for part in parts] == [58, 29, 13], "100 * 0.29 is 28.999999999999996"


def test_the_naive_split_leaks_and_is_counted() -> None:
    keys = ["a", "b", "c", "d", "e", "f", "a", "g", "f", "h"]
    train, test, _ = splits.naive_split(10, (0.6, 0.2, 0.2), None)
    assert [train.tolist(), test.tolist()] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert splits.count_leaked(keys, train, test) == 1
    parts = splits.naive_split(1000, FRACTIONS, 3)
    assert [len(part) for part in parts] == [700, 100, 200]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert not np.array_equal(parts[0], np.arange(700))


def test_balancing_keeps_the_rarest_class_whole() -> None:
    labels = [0] * 50 + [1] * 7 + [2] * 9
    kept = splits.balance(labels, seed=0)
    assert np.bincount(np.asarray(labels)[kept]).tolist() == [7, 7, 7]
    assert set(range(50, 57)) <= set(kept.tolist())
    assert len(set(kept.tolist())) == 21
    assert np.array_equal(kept, splits.balance(labels, seed=0))
    assert not np.array_equal(kept, splits.balance(labels, seed=1))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (0.0, 0.1, "data.train_fraction is 0.0"),
        (0.7, 1.0, "data.val_fraction is 1.0"),
        (0.9, 0.1, "data.train_fraction 0.9 and data.val_fraction 0.1 leave nothing"),
    ],
)
def test_impossible_fractions_are_refused(train: float, val: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splits.shares(train, val, ())


def test_an_empty_split_is_refused() -> None:
    train, val, test = splits.split_groups(["a", "b"], FRACTIONS, 0)
    parts = {"train": train, "val": val, "test": test}
    with pytest.raises(ValueError, match=r"2 items, 1 .*; 2 count as 'a', is empty; .*\(by far\)"):
        splits.refuse_empty(parts, ["a", "a"], "by far")


def test_the_books_spam_split_leaks(real_data: Path) -> None:
    """The split of chapter 6 by the book's own pandas calls: balanced, shuffled, cut 70/10/20."""
    path = real_data / "sms_spam" / "SMSSpamCollection"
    table = pd.read_csv(path, sep="\t", header=None, names=["label", "text"])
    assert len(table) == 5572  # quotes swallow two rows of 5,574
    spam = table[table.label == "spam"]
    ham = table[table.label == "ham"].sample(len(spam), random_state=123)
    texts = list(pd.concat([ham, spam]).sample(frac=1, random_state=123).text)
    n_train, n_val = int(len(texts) * 0.7), int(len(texts) * 0.1)
    train, test = np.arange(n_train), np.arange(n_train + n_val, len(texts))
    keys = [splits.canonical_key(text, mask_digits=True) for text in texts]
    assert len(test) == 300
    assert splits.count_leaked(texts, train, test) == 37  # word for word
    assert splits.count_leaked(keys, train, test) == 48  # by our key

    quoted = pd.read_csv(path, sep="\t", header=None, quoting=csv.QUOTE_NONE)
    assert len(quoted) == 5574
