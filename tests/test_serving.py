"""`serve`, tested over HTTP with OpenAI's own client: a real process, a real port."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from datamodules.prompts import Message, encode_prompt
from pipeline.decoding.generate import generate
from pipeline.decoding.sampling import Sampling
from pipeline.gpt import GPT
from pipeline.inference import (
    label_probabilities,
    label_texts,
    load_classifier,
    load_language_model,
    prompt_style,
    settings_for,
)
from pipeline.models import Loaded, load
from pipeline.serving import app, serve
from pipeline.serving.app import Labelled, Labels, make_app
from pipeline.serving.engine import Limits
from pipeline.serving.protocol import Delta
from pipeline.serving.writer import Writer
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.workers import Workers
from tests.exporting import MakeGPT, loaded, vocabulary, write
from tests.journey import ROOT, Journey, said
from tests.serving import Served

QUESTIONS = [f"What is {n} and {n}, and who says so?" for n in range(12)]
N_NEW = 24
EXACT = "--precision=32-true"
LABELS = ("/classify", "input")


@pytest.fixture(scope="module")
def published(tiny_gpt: MakeGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, which has something else to say to everybody."""
    tokenizer = vocabulary()
    gpt = tiny_gpt("llama", vocab_size=tokenizer.n_vocab, block_size=256)
    source = loaded(gpt, tokenizer, prompt_style="chatml")
    folder = tmp_path_factory.mktemp("published") / "babbler"
    return write(huggingface_writers(source, torch.float32), folder)


@pytest.fixture(scope="module")
def chatty(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("chatty")
    words = [f"--max_new_tokens={N_NEW}", "--max_rows=4", "--name=tiny", EXACT]
    served = Served(folder, f"--ckpt={published}", *words)
    yield served
    served.process.kill()


@pytest.fixture(scope="module")
def labelling(tiny: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("labelling")
    words = [f"--ckpt={tiny.best('spam')}", "--api_key_env=SECRET", EXACT]
    served = Served(folder, *words, SECRET="sesame")
    yield served
    served.process.kill()


@pytest.fixture(scope="module")
def model(published: Path) -> Loaded:
    return load_language_model(published, "32-true")


def said_by(model: Loaded, question: str, **settings: Any) -> str:
    """What the model says to a question without a server."""
    prompt = encode_prompt(
        model.tokenizer, prompt_style(model), [Message(role="user", content=question)]
    )
    sampling = settings_for(model, **{"max_new_tokens": N_NEW, **settings})
    return model.tokenizer.decode(generate(model.gpt, [prompt], sampling)[0])


def ask(served: Served, question: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return served.client().chat.completions.create(model="tiny", messages=messages, **options)


def test_a_chat_is_what_generate_says(chatty: Served, model: Loaded) -> None:
    answer = ask(chatty, QUESTIONS[0])
    (choice,) = answer.choices
    assert choice.message.content == said_by(model, QUESTIONS[0]) != ""
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == N_NEW
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + N_NEW
    assert [model.id for model in chatty.client().models.list()] == ["tiny"]
    assert chatty.client().models.retrieve("tiny").id == "tiny"


def test_a_conversation_is_in_the_models_template(chatty: Served, model: Loaded) -> None:
    turns = [("developer", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?")]
    messages: list[Any] = [{"role": role, "content": text} for role, text in turns]
    messages[1]["content"] = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    messages[2] |= {"refusal": None, "tool_calls": [], "annotations": []}  # as clients echo them
    answer = chatty.client().chat.completions.create(model="tiny", messages=messages)
    said = [Message(role="system", content="Be brief.")]
    said += [Message(role=role, content=text) for role, text in turns[1:]]
    said[1]["content"] = "Hi\nyou"
    ids = encode_prompt(model.tokenizer, prompt_style(model), said)
    assert answer.usage
    assert answer.usage.prompt_tokens == len(ids)
    written = generate(model.gpt, [ids], settings_for(model, max_new_tokens=N_NEW))[0]
    assert answer.choices[0].message.content == model.tokenizer.decode(written)


def test_a_turn_reads_what_is_new(chatty: Served, model: Loaded) -> None:
    messages: list[Any] = [{"role": "user", "content": "A question that nobody has asked yet."}]
    first = chatty.client().chat.completions.create(model="tiny", messages=messages)
    messages += [{"role": "assistant", "content": "No."}, {"role": "user", "content": "No?"}]
    turn = {"model": "tiny", "messages": messages}
    usages = [first.usage]
    for options in ({"n": 4}, {"n": 2, "stream": True, "stream_options": {"include_usage": True}}):
        answer = chatty.client().chat.completions.create(**turn, **options)
        usages.append([*answer][-1].usage if "stream" in options else answer.usage)
    known = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    read = [usage.prompt_tokens for usage in usages]
    opening = encode_prompt(model.tokenizer, "chatml", [Message(role="user", content="")])
    assert known[0] < len(opening), "others have asked before, in the same template"
    assert read[0] <= known[1] < read[1]
    assert known[2] == read[2] - 1 == read[1] - 1
    noted = f"{read[2]} tokens read ({known[2]} were known)"
    until(lambda: noted in chatty.log.read_text())  # a stream is noted after its last event


def test_a_stream_says_the_same(chatty: Served) -> None:
    whole = ask(chatty, QUESTIONS[1])
    events = list(ask(chatty, QUESTIONS[1], stream=True, stream_options={"include_usage": True}))
    parts = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) > N_NEW // 2, "it came in one piece"
    assert [e.choices[0].finish_reason for e in events[:-1]] == [None] * (len(parts) - 1) + [
        "length"
    ]
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert {event.usage for event in events[:-1]} == {None}
    assert all("usage" in event.model_fields_set for event in events), "as OpenAI has it"
    roles = [event.choices[0].delta.role for event in events if event.choices]
    assert roles == ["assistant"] + [None] * (len(parts) - 1), "who adds it up gets it once"
    assert len({event.id for event in events}) == 1


def test_an_event_is_one_line_to_whoever_reads_it() -> None:
    """`str.splitlines`, by which httpx reads lines, ends them at more than LF and CR."""
    said = "".join(map(chr, range(0x3000)))
    body = app._event({"text": said}).encode()
    (line, blank) = httpx.Response(200, content=body).iter_lines()
    assert (json.loads(line.removeprefix("data: ")), blank) == ({"text": said}, "")
    assert "好" in app._event({"text": "好"}), "no more is escaped than has to be"


def test_draws_follow_the_seed_and_choices_differ(chatty: Served, model: Loaded) -> None:
    options = {"n": 3, "seed": 5, "temperature": 1.2, "top_p": 0.9, "extra_body": {"top_k": 50}}
    texts = [choice.message.content for choice in ask(chatty, QUESTIONS[2], **options).choices]
    drawn = {"temperature": 1.2, "top_p": 0.9, "top_k": 50}
    assert texts == [said_by(model, QUESTIONS[2], seed=5 + i, **drawn) for i in range(3)]
    assert len(set(texts)) == 3
    del options["seed"]
    again = [choice.message.content for choice in ask(chatty, QUESTIONS[2], **options).choices]
    assert again != texts, "drawn anew where there is no seed"


def test_what_ends_a_text(chatty: Served) -> None:
    text = ask(chatty, QUESTIONS[3]).choices[0].message.content
    middle = text[len(text) // 2 : len(text) // 2 + 4]
    for stream in (False, True):
        answer = ask(chatty, QUESTIONS[3], stop=["never that", middle], stream=stream)
        if stream:
            parts = [event.choices[0] for event in answer]
            got, why = "".join(part.delta.content for part in parts), parts[-1].finish_reason
        else:
            got, why = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (got, why) == (text[: text.index(middle)], "stop")
    short = ask(chatty, QUESTIONS[3], max_completion_tokens=3)
    assert short.usage.completion_tokens == 3
    assert text.startswith(short.choices[0].message.content)


def test_texts_are_continued_as_they_stand(chatty: Served, model: Loaded) -> None:
    prompts = ["The quick brown fox", "It returns"]
    answer = chatty.client().completions.create(model="tiny", prompt=prompts, n=2, max_tokens=8)
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    rows = generate(model.gpt, ids, settings_for(model, max_new_tokens=8))
    expected = [model.tokenizer.decode(row) for row in rows for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    one = chatty.client().completions.create(model="tiny", prompt=prompts[0], stream=True)
    assert "".join(event.choices[0].text for event in one).startswith(expected[0])


@torch.inference_mode()
def logprobs_of(model: Loaded, ids: list[int]) -> list[list[float]]:
    """Of every token that may follow the first ids, the first two, and so on."""
    logits = model.gpt.head(model.gpt(torch.tensor([ids[:-1]], device=model.device)))[
        0, :, : model.tokenizer.n_vocab
    ]
    return logits.float().log_softmax(dim=-1).tolist()


def near(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(("seed", "end"), [(7, "<|im_end|>"), (8, "")])
def test_logprobs_of_a_chat(chatty: Served, model: Loaded, seed: int, end: str) -> None:
    """Of every token that was written, and of the one that ended it; a stream has the same."""
    options = {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": seed}
    (choice,) = ask(chatty, QUESTIONS[4], **options).choices
    told = choice.logprobs.content
    pieces = b"".join(bytes(one.bytes) for one in told).decode(errors="replace")
    assert pieces == choice.message.content + end
    said = [Message(role="user", content=QUESTIONS[4])]
    prompt = encode_prompt(model.tokenizer, prompt_style(model), said)
    sampling = settings_for(model, max_new_tokens=N_NEW, temperature=1.0, seed=seed)
    ids = generate(model.gpt, [prompt], sampling)[0]
    ids += [model.tokenizer.special_ids[end]] if end else []
    every = logprobs_of(model, prompt + ids)[-len(ids) :]
    assert [one.logprob for one in told] == near([e[i] for e, i in zip(every, ids, strict=True)])
    assert [one.token for one in told] == [model.tokenizer.decode([i]) for i in ids]
    for one, row in zip(told, every, strict=True):
        best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:3]
        assert [bytes(other.bytes) for other in one.top_logprobs] == [
            model.tokenizer.decode_bytes([i]) for i in best
        ]
        assert [other.logprob for other in one.top_logprobs] == near([row[i] for i in best])
    events = [event.choices[0] for event in ask(chatty, QUESTIONS[4], **options, stream=True)]
    streamed = [one for event in events if event.logprobs for one in event.logprobs.content]
    assert [one.logprob for one in streamed] == near([one.logprob for one in told])
    (alone,) = ask(chatty, QUESTIONS[4], logprobs=True, max_tokens=1).choices
    assert [one.top_logprobs for one in alone.logprobs.content] == [[]]
    assert ask(chatty, QUESTIONS[4]).choices[0].logprobs is None


@pytest.mark.parametrize("form", ["texts", "ids"])
def test_logprobs_of_what_was_asked(chatty: Served, model: Loaded, form: str) -> None:
    """As harnesses ask for the likelihood of a text: it is said again, with a token behind it."""
    texts = ["The quick brown fox", "It returns 12 times."]
    prompts: Any = texts if form == "texts" else [model.tokenizer.encode(text) for text in texts]
    asked = {"model": "tiny", "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True}
    answer = chatty.client().completions.create(**asked)
    for text, choice in zip(texts, answer.choices, strict=True):
        told, ids = choice.logprobs, model.tokenizer.encode(text)
        assert choice.text.startswith(text)
        assert len(told.tokens) == len(ids) + 1
        assert "".join(told.tokens[:-1]) == text
        for token, start in zip(told.tokens[:-1], told.text_offset, strict=False):
            assert choice.text[start:].startswith(token)
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        every = logprobs_of(model, [*ids, 0])
        expected = [every[i - 1][ids[i]] for i in range(1, len(ids))] + [max(every[-1])]
        assert told.token_logprobs[1:] == near(expected)
        assert [max(top.values()) for top in told.top_logprobs[1:]] == near(list(map(max, every)))
        assert all(len(top) in (1, 2) for top in told.top_logprobs[1:])
    (event, *_) = chatty.client().completions.create(**asked, stream=True)
    assert event.choices[0].text == answer.choices[0].text
    assert event.choices[0].logprobs.text_offset == answer.choices[0].logprobs.text_offset
    plain = chatty.client().completions.create(**{**asked, "logprobs": None}).choices
    assert [choice.text for choice in plain] == [choice.text for choice in answer.choices]
    assert plain[0].logprobs is None
    one = chatty.client().completions.create(**{**asked, "prompt": prompts[0], "logprobs": 0})
    assert [len(top) for top in one.choices[0].logprobs.top_logprobs[1:]] == [1] * len(
        one.choices[0].logprobs.tokens[1:]
    )


def test_many_at_a_time_are_each_as_alone(chatty: Served, model: Loaded) -> None:
    """Twelve who ask at once, four of whom are written at a time."""
    expected = [said_by(model, question) for question in QUESTIONS]
    assert len(set(expected)) > 3
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda question: ask(chatty, question), QUESTIONS))
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_whoever_hangs_up_is_not_written_for(chatty: Served) -> None:
    """240 texts of 200 tokens, four at a time, would take 20 s."""
    asked = {"model": "tiny", "prompt": ["The quick brown fox"] * 15, "max_tokens": 200, "n": 16}
    url, before = f"{chatty.url}/v1/completions", len(chatty.notes())
    with httpx.stream("POST", url, json={**asked, "stream": True}) as reply:
        next(reply.iter_lines())
    until(lambda: len(chatty.notes()) > before)
    assert chatty.notes()[-1] < 240 * 200 / 2
    began = time.monotonic()
    ask(chatty, "Is there a place?", max_tokens=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=asked, timeout=0.3)
    ask(chatty, "And now?", max_tokens=1)
    assert time.monotonic() - began < 5


def until(is_so: Any, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, None, "this server has no model 'gpt-4', only 'tiny'"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 9}, 400, "temperature", "less than or equal to 2"),
        ({"n": 17}, 400, "n", "less than or equal to 16"),
        ({"stop": [""]}, 400, "stop.0", "at least 1 character"),
        ({"stop": list("abcde")}, 400, "stop", "at most 4"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "does not offer it"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "does not offer it"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"echo": True}, 400, "echo", "does not offer it"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "does not offer it"),
        ({"anything": 1}, 400, "anything", "does not offer it"),
        (
            {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]},
            400,
            "messages.0.name",
            "does not offer it",
        ),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": "Hi"}, 400, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role", "'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type",
            "Input should be 'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "end it with a user's"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "system", "user")]},
            400,
            None,
            "message 1 is a system message",
        ),
        (
            {"messages": [{"role": "user", "content": "fox " * 300}]},
            400,
            None,
            "but model.gpt.block_size is 256",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(
    chatty: Served,
    changes: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
    stream: bool,
) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    reply = httpx.post(f"{chatty.url}/v1/chat/completions", json={**asked, **changes})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_let_pass(chatty: Served) -> None:
    habits: dict[str, Any] = {"frequency_penalty": 0, "logprobs": False, "tools": [], "user": "me"}
    habits |= {"function_call": "none", "functions": [], "modalities": ["text"], "seed": -1}
    habits["extra_body"] = {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0}
    habits |= {"stop": "", "n": None, "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    assert ask(chatty, "Hi", **habits).choices[0].message.content
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False}
    assert [*ask(chatty, "Hi", stream=True, stream_options=options)][-1].usage
    plain: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "logprobs": False, "echo": False}
    (choice,) = chatty.client().completions.create(**plain).choices
    assert choice.logprobs is None


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body: not valid JSON from character 1 on (Expecting property name"),
        (b"[" * 100_000, 400, "error parsing the body"),
        (b'{"model": "tiny", "prompt": "%s"}' % (b"x" * 5_000_000), 413, "larger than 4194304"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "error parsing the body"),
        (b'{"model": "tiny", "prompt": ""}', 400, "prompt is empty"),
        (b'{"model": "tiny", "prompt": ["a", 3]}', 400, "prompt.1"),
        (b'{"model": "tiny", "prompt": [3, "a"]}', 400, "prompt.0"),
        (b'{"model": "tiny", "prompt": []}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": [[]]}', 400, "prompt.0"),
        (b'{"model": "tiny", "prompt": [-1]}', 400, "prompt.0"),
        (b'{"model": "tiny", "prompt": [true]}', 400, "prompt.0"),
        (b'{"model": "tiny", "prompt": [1, 2147483647]}', 400, "not among the 348 tokens"),
        (b'{"model": "tiny", "prompt": [1, 99999999999999999999]}', 400, "prompt.0"),
        (
            b'{"model": "tiny", "prompt": [%s"a"], "n": 16}' % (b'"a", ' * 16),
            400,
            "at most 256 may",
        ),
        (b'{"model": "tiny", "prompt": "a", "logprobs": 21}', 400, "logprobs"),
        (b'{"model": "tiny", "prompt": "a", "logprobs": true}', 400, "logprobs"),
    ],
)
def test_bodies_that_are_none(chatty: Served, body: bytes, status: int, words: str) -> None:
    for content in (body, iter([body])):  # with a length, and without
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(f"{chatty.url}/v1/completions", content=content, headers=headers)
        assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True)


def test_a_page_in_a_browser_cannot_ask(chatty: Served) -> None:
    """Without a question first, browsers send text alone for pages of others; that is refused."""
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    elsewhere = {"Origin": "https://example.org"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, **elsewhere}
        reply = httpx.post(f"{chatty.url}/v1/completions", content=body, headers=headers)
        assert reply.status_code == 400
        assert "not sent as application/json" in reply.json()["error"]["message"]
    asked = httpx.options(f"{chatty.url}/v1/completions", headers=elsewhere)
    assert asked.status_code == 405
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_a_page_whose_name_leads_here_cannot_ask(chatty: Served, labelling: Served) -> None:
    """DNS rebinding: to a browser it asks its own server, so that it may send and read all."""
    asked = {"prompt": "a", "max_tokens": 1}
    port = chatty.url.rpartition(":")[2]
    for host, status in {
        f"rebound.example.org:{port}": 403,
        "localhost.example.org": 403,
        "[": 400,
        "LOCALHOST": 200,
        f"tiny.localhost:{port}": 200,
        f"host.docker.internal:{port}": 200,
        f"[::1]:{port}": 200,
        "192.168.1.7": 200,
    }.items():
        said = {"Host": host}
        assert httpx.get(f"{chatty.url}/v1/models", headers=said).status_code == status, host
        reply = httpx.post(f"{chatty.url}/v1/completions", headers=said, json=asked)
        assert reply.status_code == status, host
    with_key = {"Host": "models.example.org", "Authorization": "Bearer sesame"}  # of a proxy, say
    assert httpx.get(f"{labelling.url}/v1/models", headers=with_key).status_code == 200


def test_other_addresses(chatty: Served) -> None:
    assert httpx.get(f"{chatty.url}/health").json() == {"status": "ok"}
    for path in ("/v1/embeddings", "/classify", "/docs"):
        reply = httpx.post(f"{chatty.url}{path}", json={})
        assert reply.status_code == 404
        assert "/v1/chat/completions" in reply.json()["error"]["message"]
    reply = httpx.get(f"{chatty.url}/v1/completions")
    assert (reply.status_code, reply.headers["Allow"]) == (405, "POST"), "RFC 9110 wants it told"


def test_a_classifier_labels(labelling: Served, tiny: Journey) -> None:
    texts = ["WIN a FREE prize now!!! Call 0900 123", "see you at lunch, then?", "ok"]
    reply = httpx.post(
        f"{labelling.url}/classify",
        json={"model": "spam", "input": texts},
        headers={"Authorization": "bearer sesame"},  # the scheme in any case (RFC 9110, 11.1)
    )
    loaded = load_classifier(str(tiny.best("spam")))
    expected = label_probabilities(loaded, texts)
    data = reply.json()["data"]
    assert [row["probs"] for row in data] == [pytest.approx(row, abs=1e-6) for row in expected]
    names = loaded.meta["label_names"]
    assert [row["label"] for row in data] == [names[row.index(max(row))] for row in expected]
    assert not any(row["truncated"] for row in data)
    assert httpx.get(f"{labelling.url}/v1/models", headers={"Authorization": "Bearer sesame"})


def test_a_text_whose_end_counts_for_nothing_is_told(labelling: Served) -> None:
    asked = {"model": "spam", "input": ["ok", "lunch " * 2000]}
    headers = {"Authorization": "Bearer sesame"}
    reply = httpx.post(f"{labelling.url}/classify", json=asked, headers=headers)
    assert [row["truncated"] for row in reply.json()["data"]] == [False, True]


def test_the_command_to_try_shows_the_key_by_its_name(labelling: Served) -> None:
    while "curl" not in (log := labelling.log.read_text()):  # after the address
        time.sleep(0.01)
    (command,) = (line.strip() for line in log.splitlines() if "curl" in line)
    assert 'Bearer $SECRET"' in command
    tried = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "SECRET": "sesame"}, capture_output=True
    )
    assert json.loads(tried.stdout)["data"][0]["label"] in ("ham", "spam")


def test_a_client_that_hung_up_is_worked_for_no_more() -> None:
    """Its request waits behind another's."""
    asked: list[Future[list[Labelled]]] = []

    def of(texts: Sequence[str]) -> Future[list[Labelled]]:
        asked.append(Future())
        return asked[-1]

    app = make_app("spam", Labels(["ham", "spam"], of), "")
    body = json.dumps({"model": "spam", "input": ["hi"]}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/classify", "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert asked[0].cancelled()


def test_a_classifier_answers_in_float32(tiny: Journey) -> None:
    """Whatever a language model would be in, so that `serve` and `classify` agree."""
    spam = tiny.best("spam")
    assert load(spam, torch.bfloat16).gpt.token_embedding.weight.dtype == torch.float32
    assert (
        load(tiny.best("pretrain"), torch.bfloat16).gpt.token_embedding.weight.dtype
        == torch.bfloat16
    )
    code, _, err = said("serve", f"--ckpt={spam}", "--port=0", "--precision=bf16-true")
    assert (code, err.count("\n")) == (2, 1)
    assert "a classifier answers only in 32-true" in err


def test_what_labels_keeps_nothing_for_a_backward_pass(tiny: Journey) -> None:
    """In a thread of its own, too, as `serve` has it."""
    learns: list[bool] = []
    loaded = load_classifier(str(tiny.best("spam")))
    loaded.model.register_forward_hook(lambda *_: learns.append(torch.is_grad_enabled()))
    label_probabilities(loaded, ["ok"])
    Workers("label").run(label_texts, loaded, ["ok"])
    assert learns == [False, False]


def test_weights_that_are_no_numbers_decide_nothing(tiny: Journey) -> None:
    classifier, writer = load_classifier(str(tiny.best("spam"))), load(tiny.best("pretrain"))
    for model in (classifier, writer):
        with torch.no_grad():
            model.gpt.token_embedding.weight[5:] = torch.nan
    with pytest.raises(ValueError, match="not made of numbers"):
        label_probabilities(classifier, ["see you at lunch, then?"])
    with pytest.raises(ValueError, match="not made of numbers"):
        generate(writer.gpt, [[5, 6]], Sampling(max_new_tokens=2))


@pytest.mark.parametrize("header", [None, "Bearer wrong", "sesame", "Bearer s\u00e9same"])
def test_without_the_key_nothing_is_told(labelling: Served, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    assert httpx.get(f"{labelling.url}/openapi.json", headers=headers).status_code == 404
    for method, path in (("GET", "/v1/models"), ("POST", "/classify")):
        reply = httpx.request(method, f"{labelling.url}{path}", headers=headers)
        assert reply.status_code == 401
        assert "sesame" not in reply.text
    assert httpx.get(f"{labelling.url}/health").status_code == 200


def test_it_ends_when_what_is_written_is_done(published: Path, tmp_path: Path) -> None:
    served = Served(tmp_path, f"--ckpt={published}")
    events = served.client().completions.create(
        model="babbler", prompt="The quick brown fox", max_tokens=200, stream=True
    )
    next(events)
    served.process.send_signal(signal.SIGTERM)
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    assert served.process.wait(60) == -signal.SIGTERM
    assert served.notes() == [200]


def test_who_is_not_done_when_patience_ends_is_told(published: Path, tmp_path: Path) -> None:
    served = Served(tmp_path, f"--ckpt={published}", "--max_rows=4", patience_s=0.5)
    asked = {"model": "babbler", "prompt": ["The fox"] * 15, "max_tokens": 240, "n": 16}
    body = {**asked, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        *_, last = filter(None, lines)
    assert "the server has ended" in last
    assert served.process.wait(60) == -signal.SIGTERM


def test_a_second_interrupt_ends_it_at_once(published: Path, tmp_path: Path) -> None:
    served = Served(tmp_path, f"--ckpt={published}", "--max_rows=4")
    asked = {"model": "babbler", "prompt": ["The fox"] * 15, "max_tokens": 240, "n": 16}
    with (
        contextlib.suppress(httpx.HTTPError),  # or the end, as it comes
        httpx.stream("POST", f"{served.url}/v1/completions", json={**asked, "stream": True}) as r,
    ):
        lines = r.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGINT)
        until(lambda: not listens(served))  # two signals at a time are one
        began = time.monotonic()
        served.process.send_signal(signal.SIGINT)
        for _ in lines:
            pass
    assert time.monotonic() - began < 10
    assert served.process.wait(10) == 130
    assert "Traceback" not in served.log.read_text()


def test_an_interrupt_does_not_wait_for_the_model() -> None:
    code = """if True:
        import sys, time
        from pipeline.__main__ import main
        from pipeline.serving import serve
        serve.load_for_use = lambda *_: (print("loading", flush=True), time.sleep(60))
        sys.exit(main(["serve", "--ckpt=any", "--port=0"]))
    """
    words, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()


def listens(served: Served) -> bool:
    try:
        httpx.get(served.url)
    except httpx.HTTPError:
        return False
    return True


@pytest.mark.parametrize("kind", ["writes", "labels"])
def test_one_thread_loads_and_runs_the_model(
    kind: str, published: Path, tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread that computes has OpenMP's threads of its own, more than there are cores."""
    threads: list[str] = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*args, **options)

        return noted

    class Asking:
        def __init__(self, app: FastAPI, give_up: Any = None) -> None:
            self.app = app

        def run(self, _: Any) -> None:
            client = TestClient(self.app, base_url="http://localhost")
            for _ in range(2):
                route, asked = ("/v1/completions", "prompt") if kind == "writes" else LABELS
                client.post(route, json={"model": "it", asked: "Hello"}).raise_for_status()

    monkeypatch.setattr(serve, "load_for_use", noting(serve.load_for_use))
    monkeypatch.setattr(GPT, "forward", noting(GPT.forward))
    monkeypatch.setattr(serve, "_Server", Asking)
    serve.serve(
        str(published if kind == "writes" else tiny.best("spam")),
        name="it",
        address=("127.0.0.1", 0),
        api_key_env="",
        precision="32-true",
        limits=Limits(max_rows=4, max_tokens=1024),
        defaults=Sampling(max_new_tokens=4, temperature=0.0),
    )
    assert len(threads) >= 3
    assert set(threads) == {"model"}


class Silent(Writer):
    """Ends every text before its first token."""

    def __init__(self) -> None:
        """Nothing."""

    def prompts(self, asked: Any) -> list[list[int]]:
        return [[1, 2]]

    def settings(self, asked: Any) -> Sampling:
        return Sampling(max_new_tokens=4, temperature=0.0)

    async def write(self, *_: Any) -> AsyncGenerator[Delta, None]:
        yield Delta(0, "", "stop", 0, 0, [])


@pytest.mark.parametrize("stream", [True, False])
def test_an_empty_answer_is_noted(stream: bool, capsys: pytest.CaptureFixture[str]) -> None:
    client = TestClient(make_app("it", Silent(), ""))
    asked = {"model": "it", "prompt": "Hello", "stream": stream}
    client.post("/v1/completions", json=asked).raise_for_status()
    assert capsys.readouterr().err.startswith("2 tokens read (0 were known), 0 written")


def test_precision_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(ckpt: str, precision: str) -> None:
        raise ValueError(f"{ckpt} in {precision}")

    monkeypatch.setattr(serve, "load_for_use", load)
    for precision in ("auto", "32-true", "bf16-true", "f16-weights"):
        code, _, err = said("serve", "--ckpt=it", "--port=0", f"--precision={precision}")
        assert (code, err) == (2, f"error: it in {precision}\n")


def test_what_cannot_be_served_is_said_in_one_line(chatty: Served, published: Path) -> None:
    port = chatty.url.rpartition(":")[2]
    for words, expected in (
        ([f"--port={port}"], f"cannot listen on 127.0.0.1:{port}"),
        (["--api_key_env=NOT_SET"], "api_key_env names is not set"),
        (["--max_rows=0"], "max_rows is 0"),
        (["--temperature=-1"], "temperature is -1"),
        (["--ckpt=/nowhere"], "/nowhere"),
    ):
        code, out, err = said("serve", f"--ckpt={published}", "--port=0", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err
