"""A misbehaving judge: each item ends scored or unscored, in bounded time and memory.

`test_judge.py` covers bad replies; here are bad connections, and the whole command.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.endpoint import MAX_REPLY_BYTES
from pipeline.evaluation.judge import Judgement, judge_responses
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.evaluation.responses import Response
from tests.faults import servers
from tests.faults.servers import Answer, Server
from tests.journey import Journey, said


@pytest.fixture
def server() -> Iterator[Server]:
    with servers.serving() as running:
        yield running


def chat(content: object) -> Answer:
    return servers.whole(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


def verdict(score: object) -> str:
    return json.dumps({"rationale": "It is so.", "score": score})


def judge(server: Server, folder: Path, *answers: Answer, **changes: Any) -> list[Judgement]:
    """Two items; the first is asked about before the second."""
    server.answers = list(answers)
    quick: dict[str, Any] = {"timeout_s": 0.5, "max_attempts": 2, "max_wait_s": 0.01}
    config = JudgeConfig(base_url=f"{server.url}/v1", model="judge-1", **(quick | changes))
    items = [Response(id=i, instruction="?", reference="10", response=str(i)) for i in (1, 2)]
    return judge_responses(items, config, cache=folder / "cache.jsonl")


CONNECTIONS: dict[str, tuple[Answer, str]] = {
    "reset in the middle": (servers.reset(b'{"choices": [{"mess'), "the connection broke off"),
    "shorter than announced": (servers.short(b'{"choices": []}'), "the connection broke off"),
    "hangs up": (servers.hang_up, "the connection broke off"),
    "no HTTP": (servers.no_http, "the connection broke off"),
    "never answers": (servers.silence, "the reply did not end within judge.timeout_s"),
    "a header without end": (
        servers.endless_header,
        "the reply did not end within judge.timeout_s",
    ),
    "interim answers without end": (servers.endless_continue, "the reply did not end within"),
    "a slow body without end": (servers.endless_slow_body, "the reply did not end within"),
    "a body without end": (
        servers.endless_body,
        f"the reply is longer than {MAX_REPLY_BYTES} bytes",
    ),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_connection_that_does_harm(name: str, server: Server, tmp_path: Path) -> None:
    """It costs its item alone: the next one, on the same thread or another, is asked anew."""
    answer, problem = CONNECTIONS[name]
    n_attempts = 1 if answer is servers.endless_body else 2
    good = chat(verdict(7))
    first, second = judge(server, tmp_path, *[answer] * n_attempts, good)
    assert first.score is None
    assert first.rationale.startswith(problem)
    assert "\n" not in first.rationale
    assert second.score == 7
    assert len(server.requests) == n_attempts + 1
    assert server.n_sent < 16 << 20  # what lies in the buffers of sockets


def test_one_that_is_late_breaks_off_no_other(server: Server, tmp_path: Path) -> None:
    """Requests at the same time have clocks of their own."""

    def late_for_one(to: Any) -> None:
        item = json.loads(json.loads(to.body)["messages"][1]["content"])
        if item["response"] == "1":
            servers.silence(to)
        to.server.closing.wait(0.4)  # so that another one is under way when that one is ended
        chat(verdict(8))(to)

    server.answers = [chat(verdict(5)), late_for_one]
    config = JudgeConfig(
        base_url=f"{server.url}/v1", model="m", timeout_s=1.0, max_attempts=1, max_concurrency=2
    )
    items = [Response(id=i, instruction="?", reference="10", response=i) for i in "0123456"]
    judgements = judge_responses(items, config, cache=tmp_path / "cache.jsonl")
    scores = [j.score for j in judgements]
    assert scores == [5, None, 8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "asked",
    ["9" * 5000, "1e999", "-1", "NaN", "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"],
    ids=lambda asked: asked[:20],
)
def test_a_wait_that_cannot_be_meant(asked: str, server: Server, tmp_path: Path) -> None:
    busy = servers.status(429, b"busy", b"Retry-After: " + asked.encode())
    first, _ = judge(server, tmp_path, busy, chat(verdict(7)))
    assert first.score is not None


def test_what_the_transport_unpacks_is_not_unpacked(server: Server, tmp_path: Path) -> None:
    bomb = servers.whole(gzip.compress(bytes(64 << 20)), b"Content-Encoding: gzip")
    with servers.little_memory():
        first, _ = judge(server, tmp_path, bomb, chat(verdict(7)))
    assert first.rationale == "the reply is not a chat completion."


SHAPES = [
    "",
    "<html>busy</html>",
    "[]",
    '{"error": "overloaded"}',
    '{"choices": []}',
    "null",
    "1e999",
    "NaN",
    "9" * 5000,
    '"<script>alert(1)</script>"',
    '{"choices": null}',
    '{"choices": {"0": 1}}',
    '{"choices": [null]}',
    '{"choices": [{"message": "x"}]}',
    '{"choices": [{"message": {"content": 7}}]}',
    '{"choices": [{"message": {"content": {"score": 7}}}]}',
    '{"a":' * 50_000,
]


@pytest.mark.parametrize("body", SHAPES, ids=lambda body: body[:30])
def test_json_of_another_shape(body: str, server: Server, tmp_path: Path) -> None:
    first, second = judge(server, tmp_path, servers.whole(body.encode()), chat(verdict(7)))
    assert first.rationale in (
        "the reply is not a chat completion.",
        "the reply's content is not text.",
    )
    assert first.raw == body[:20_000]
    assert second.score is not None


@pytest.fixture
def command(server: Server, home: Path, tmp_path: Path) -> list[str]:
    """`score` on three responses, with a judge; MLflow left to the next run."""
    rows = [
        {"id": i, "instruction": "?", "reference": "10 cm", "response": f"{i} cm"} for i in "abc"
    ]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": "judge-1", "timeout_s": 1, "max_attempts": 1, "max_concurrency": 1}
    words = [f"--judge.{key}={value}" for key, value in options.items()]
    return ["score", f"--responses={path}", f"--judge.base_url={server.url}/v1", *words]


def test_an_evaluation_ends_with_what_could_be_scored(
    command: list[str], server: Server, home: Path
) -> None:
    server.answers = [chat(verdict(40)), servers.reset(b"{"), chat(verdict(60))]
    code, out, err = said(*command)
    assert code == 0, err
    assert "\njudge (1 unscored): 50.0000 [" in out
    (path,) = home.glob("score/*/summary.json")
    scored = json.loads(path.read_text())["measures"]["judge"]["after"]
    assert (scored["n_unscored"], scored["estimate"]["value"]) == (1, 50)
    rows = map(json.loads, (path.parent / "scores.jsonl").read_text().splitlines())
    (unscored,) = (row for row in rows if row["score"] is None)
    assert (unscored["id"], unscored["scorer"], unscored["status"]) == ("b", "judge", "unscored")
    assert "broke off" in unscored["rationale"]


def test_empty_answers_alone_are_no_mean(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They get 0 unasked; where nothing that was asked about has a verdict, that would be all."""
    config = JudgeConfig(base_url=f"{server.url}/v1", model="judge-1", max_attempts=1)
    items = [
        Response(id=i, instruction="?", reference="10", response="" if i else "1") for i in (0, 1)
    ]
    scores = {}
    for name, reply in (("fails", "nonsense"), ("works", verdict(50))):
        server.answers = [chat(reply)]
        found = judge_responses(items, config, cache=tmp_path / name)
        scores[name] = [one.score for one in found]
    assert scores == {"fails": [None, None], "works": [50, 0]}
    found = judge_responses(items[1:], config, cache=tmp_path / "empty")
    assert [one.score for one in found] == [0]


def test_what_a_judge_says_moves_no_cursor(command: list[str], server: Server) -> None:
    server.answers = [servers.status(401, b"\x1b]0;owned\x07\x1b[2J all good")]
    code, _, err = said(*command)
    assert code == 2
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "all good" in err


def test_without_a_judge_there_is_one_line_and_no_report(
    command: list[str], server: Server, home: Path
) -> None:
    """Refused at the first item: nothing was judged, and what is written so far is whole."""
    server.answers = [servers.status(401, b'{"error": "who are you?"}')]
    code, out, err = said(*command)
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "HTTP 401" in line
    assert "judge.api_key_env" in line
    assert len(server.requests) == 1
    (run,) = home.glob("score/*")
    assert not {"scores.jsonl", "summary.json", "report.html", "outcome.json"} & {
        path.name for path in run.iterdir()
    }
    assert not [path for path in home.rglob("*") if path.name.endswith((".tmp", ".draft"))]
    server.answers = [chat(verdict(40))]
    code, _, err = said(*command)  # the same command goes on
    assert code == 0, err
    assert (run / "report.html").exists()


def test_items_without_a_verdict_are_asked_for_by_the_same_command(
    command: list[str], server: Server, home: Path
) -> None:
    """However patient it is then; those with one are not asked about again."""
    server.answers = [chat(verdict(50)), servers.hang_up]
    code, _, err = said(*command)
    assert code == 0, err
    n_asked = len(server.requests)
    (first,) = home.glob("score/*/report.html")
    assert "2 of 3 verdicts of the judge are missing (see the report, such as: the conn" in err
    assert "; repeat the command to ask for them again." in err

    server.answers = [chat(verdict(70))]
    code, _, err = said(*command, "--judge.max_attempts=3", "--judge.timeout_s=20")
    assert code == 0, err
    assert "verdicts" not in err
    (second,) = set(home.glob("score/*/report.html")) - {first}
    scored = json.loads((second.parent / "summary.json").read_text())["measures"]["judge"]["after"]
    assert scored["n_unscored"] == 0
    assert len(server.requests) == n_asked + 2

    assert "already finished" in said(*command)[2]
    assert len(server.requests) == n_asked + 2


def test_why_a_verdict_is_missing_is_told_of_one_that_was_asked_for(
    server: Server, home: Path, tmp_path: Path
) -> None:
    """Empty responses, of which the first is one, have none for want of another's."""
    rows = [{"id": i, "instruction": "?", "reference": "a", "response": "a" * i} for i in range(3)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.answers = [chat(5)]
    words = ["score", f"--responses={path}", f"--judge.base_url={server.url}/v1"]
    code, _, err = said(*words, "--judge.model=judge-1")
    assert code == 0, err
    assert "3 of 3 verdicts of the judge are missing (see the report, such as: the reply's" in err


def test_what_was_answered_is_kept_until_there_are_all_verdicts(
    tiny: Journey, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path))
    ckpt = f"--ckpt={tiny.best('instruct')}"
    words = ["score", ckpt, "--max_new_tokens=4", f"--judge.base_url={server.url}/v1"]
    words += ["--judge.model=judge-1", "--judge.max_attempts=1", "--precision=32-true"]
    server.answers = [chat(verdict(50)), chat("no verdict"), chat("none again"), chat(verdict(50))]
    code, _, err = said(*words, "--judge.max_concurrency=1")
    assert code == 0, err
    assert "verdicts of the judge are missing" in err

    (path,) = tmp_path.glob("score/*/answers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = "as it was kept"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = said(*words)
    assert code == 0, err
    texts = [
        json.loads(line)["response"]
        for again in tmp_path.glob("score/*-2/responses*.jsonl")
        for line in again.read_text().splitlines()
    ]
    assert texts.count("as it was kept") == 1
    assert not list(tmp_path.glob("score/*/answers.jsonl"))
