"""Streamed text: complete, without stop sequences, and with nothing taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.text_stream import TextStream, text_of
from tests.exporting import vocabulary

TOKENIZER = vocabulary()
TEXTS = st.text("ab \n\u00e9\u20ac\U0001f600", max_size=30)


def parts(text: str, stops: list[str]) -> tuple[list[str], bool]:
    """A text byte by byte, as the longest way through it."""
    stream = TextStream(TOKENIZER, [], stops)
    came = [stream.push(byte) for byte in text.encode()]
    return [*came, stream.close()], stream.stopped


@given(TEXTS, st.lists(st.text("ab \u00e9", min_size=1, max_size=3), max_size=3))
def test_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    """Of several the one that is whole first; in one piece it is the same as byte by byte."""
    came, stopped = parts(text, stops)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(found)
    assert "".join(came) == (text[: min(found)[1]] if found else text)


def test_no_more_is_held_back_than_may_have_to_be() -> None:
    came, stopped = parts("a\u20acbab", ["bb"])
    assert came == ["a", "", "", "\u20ac", "", "ba", "", "b"]
    assert not stopped
    came, stopped = parts("abba", ["bb"])
    assert came == ["a", "", "", "", ""]
    assert stopped


def test_a_stop_within_one_token() -> None:
    """As if its characters had come one by one."""
    tokens = TOKENIZER.vocabulary.tokens
    token = next(i for i, spelled in enumerate(tokens) if spelled.isalpha() and len(spelled) > 2)
    word = tokens[token].decode()
    stream = TextStream(TOKENIZER, [], [word[:3], word[1]])
    assert stream.push(token) + stream.close() == word[0]
    assert stream.stopped


@pytest.mark.parametrize("n_bytes", [1, 2])
def test_half_a_character_at_the_end_is_marked(n_bytes: int) -> None:
    stream = TextStream(TOKENIZER, [])
    assert [stream.push(byte) for byte in "\u20ac".encode()[:n_bytes]] == [""] * n_bytes
    assert stream.close() == "\ufffd"


def test_an_id_that_the_vocabulary_leaves_out_says_nothing() -> None:
    a, b = b"ab"
    assert text_of(TOKENIZER, [a, TOKENIZER.n_vocab + 3, b]) == "ab"


@pytest.mark.timeout(20)
def test_a_stop_of_any_length_costs_what_it_can_match() -> None:
    """Before, a request with one of 400,000 characters kept everyone waiting for 20 seconds."""
    came, stopped = parts("abc", ["a" * 1_000_000])
    assert (came, stopped) == (["", "ab", "c", ""], False)
