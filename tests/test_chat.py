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


def say(monkeypatch: pytest.MonkeyPatch, *lines: str, max_new_tokens: int = 8) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in (*lines, ""))))
    converse("", precision="auto", system=SYSTEM, max_new_tokens=max_new_tokens)


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
    assert max(map(len, prompts)) > CONTEXT // 2, "no more than has to be"
    texts = [model.tokenizer.decode(ids) for ids in prompts]
    assert all(SYSTEM in text and f"Question {i}?" in text for i, text in enumerate(texts))
    assert "Question 0?" in texts[1]
    assert "Question 0?" not in texts[-1]
    assert "(the context is full: 2 messages before are forgotten)" in err


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


def test_an_interrupt_ends_the_answer_alone(
    model: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def interrupted(loaded: Any, ids: list[int], *rest: Any) -> Iterator[str]:
        seen.append(loaded.tokenizer.decode(ids))
        yield "I am"
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        yield " here"

    monkeypatch.setattr("pipeline.inference.pieces", interrupted)
    say(monkeypatch, "Who are you?", "Go on.")
    out, err = capsys.readouterr()
    assert out == "I am\nI am here\n"
    assert "(interrupted)" in err
    assert "I am" in seen[1], "what was said stays said"
