"""Chats in the terminal: what is dropped from the context, and what ends an answer."""

import io
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.gpt import GPT
from pipeline.inference import converse, pieces
from tests.exporting import loaded, vocabulary

CONTEXT, ROOM = 320, 60
SYSTEM = "Be brief."
Answer = Callable[..., Iterator[str]]


class Chat:
    """A tiny model that is talked with, and the prompts that it got.

    Attributes:
        answer: what answers; by default the model.
    """

    def __init__(self, gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        self.answer: Answer = pieces
        self._patch = monkeypatch
        self._model = loaded(gpt, vocabulary(), prompt_style="chatml")
        monkeypatch.setattr("pipeline.inference.load_language_model", lambda *_: self._model)
        monkeypatch.setattr("pipeline.inference.pieces", self._noting)

    def _noting(self, loaded: Any, ids: list[int], *rest: Any) -> Iterator[str]:
        self.prompts.append(ids)
        return self.answer(loaded, ids, *rest)

    @property
    def texts(self) -> list[str]:
        """The prompts as text."""
        return list(map(self._model.tokenizer.decode, self.prompts))

    def say(self, *lines: str, system: str = SYSTEM, max_new_tokens: int = 8) -> None:
        """A whole conversation."""
        said = "".join(f"{line}\n" for line in (*lines, ""))
        self._patch.setattr("sys.stdin", io.StringIO(said))
        converse("", precision="auto", system=system, max_new_tokens=max_new_tokens)


@pytest.fixture
def chat(tiny_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> Chat:
    gpt = tiny_gpt("llama", vocab_size=vocabulary().n_vocab, block_size=CONTEXT)
    return Chat(gpt, monkeypatch)


def test_what_does_not_fit_is_forgotten(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.say(*[f"Question {i}?" for i in range(24)], max_new_tokens=ROOM)
    assert len(chat.prompts) == 24
    assert CONTEXT // 2 < max(map(len, chat.prompts)) <= CONTEXT - ROOM
    assert all(SYSTEM in text and f"Question {i}?" in text for i, text in enumerate(chat.texts))
    assert "Question 0?" in chat.texts[1]
    assert "Question 0?" not in chat.texts[-1]
    n_times = capsys.readouterr().err.count("(the context is full: ")
    assert 2 <= n_times <= len(chat.prompts) // 2, "seldom"


def test_a_message_that_is_too_long_is_said_and_left_out(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.say("First.", "long " * 300, "Last.")
    assert "(too long: " in capsys.readouterr().err
    assert len(chat.prompts) == 2
    assert "First." in chat.texts[1]
    assert "long" not in chat.texts[1]


def test_a_system_message_that_leaves_no_room(chat: Chat) -> None:
    with pytest.raises(ValueError, match=r"system leaves no room: .* the context 320; shorten it"):
        chat.say("Hello.", system="Be brief. " * 200)


def test_an_interrupt_ends_the_answer_alone(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> Iterator[str]:
        if len(chat.prompts) == 1:
            signal.raise_signal(signal.SIGINT)
        yield "I am"
        if len(chat.prompts) == 2:
            signal.raise_signal(signal.SIGINT)
        yield " here"

    chat.answer = interrupted
    chat.say("Are you there?", "Who are you?", "Go on.")
    out, err = capsys.readouterr()
    assert out == "\nI am\nI am here\n"
    assert err.count("(interrupted)") == 2
    assert "there" not in chat.texts[1], "what got no answer was never asked"
    assert "I am" in chat.texts[2], "what was said stays said"
