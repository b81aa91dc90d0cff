"""Conversations in a terminal: what is forgotten, what ends an answer."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.gpt import GPT
from pipeline.inference import converse, pieces
from pipeline.models import Loaded
from tests.exporting import loaded, vocabulary

CONTEXT, ROOM = 320, 60
SYSTEM = "Be brief."


@pytest.fixture
def model(tiny_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> Loaded:
    tokenizer = vocabulary()
    gpt = tiny_gpt("llama", vocab_size=tokenizer.n_vocab, block_size=CONTEXT)
    model = loaded(gpt, tokenizer, prompt_style="chatml")
    monkeypatch.setattr("pipeline.inference.load_language_model", lambda *_: model)
    return model


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ids that answers continue, in order."""
    seen: list[list[int]] = []

    def noting(loaded: Any, ids: list[int], *rest: Any) -> Iterator[str]:
        seen.append(ids)
        return pieces(loaded, ids, *rest)

    monkeypatch.setattr("pipeline.inference.pieces", noting)
    return seen


def say(
    monkeypatch: pytest.MonkeyPatch, *lines: str, system: str = SYSTEM, max_new_tokens: int = 8
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in (*lines, ""))))
    converse("", precision="auto", system=system, max_new_tokens=max_new_tokens)


def test_what_does_not_fit_is_forgotten(
    model: Loaded,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(monkeypatch, *[f"Question {i}?" for i in range(24)], max_new_tokens=ROOM)
    err = capsys.readouterr().err
    assert len(prompts) == 24
    assert max(map(len, prompts)) <= CONTEXT - ROOM
    assert max(map(len, prompts)) > CONTEXT // 2
    texts = [model.tokenizer.decode(ids) for ids in prompts]
    assert all(SYSTEM in text and f"Question {i}?" in text for i, text in enumerate(texts))
    assert "Question 0?" in texts[1]
    assert "Question 0?" not in texts[-1]
    assert 2 <= err.count("(the context is full: ") <= len(prompts) // 2, "seldom"


def test_a_message_that_is_too_long_is_said_and_left_out(
    model: Loaded,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(monkeypatch, "First.", "long " * 300, "Last.")
    assert "(too long: " in capsys.readouterr().err
    assert len(prompts) == 2
    last = model.tokenizer.decode(prompts[1])
    assert "First." in last
    assert "long" not in last


def test_a_system_message_that_leaves_no_room(
    model: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"system leaves no room: .* the context 320; shorten it"):
        say(monkeypatch, "Hello.", system="Be brief. " * 200)


def test_an_interrupt_ends_the_answer_alone(
    model: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def interrupted(loaded: Any, ids: list[int], *rest: Any) -> Iterator[str]:
        seen.append(loaded.tokenizer.decode(ids))
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        yield "I am"
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        yield " here"

    monkeypatch.setattr("pipeline.inference.pieces", interrupted)
    say(monkeypatch, "Are you there?", "Who are you?", "Go on.")
    out, err = capsys.readouterr()
    assert out == "\nI am\nI am here\n"
    assert err.count("(interrupted)") == 2
    assert "there" not in seen[1], "what got no answer was never asked"
    assert "I am" in seen[2], "what was said stays said"
