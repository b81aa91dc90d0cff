"""Chains: what runs, what is reused, and where a broken one resumes. Stages are real processes."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.__main__ import main
from pipeline.arguments import parse
from pipeline.commands import FUNCTIONS
from pipeline.interrupts import PARENT_VARIABLE
from pipeline.runs.journal import read_journal
from pipeline.runs.run_directory import OUTCOME, Run, is_open, read_outcome
from pipeline.runs.tracking import tracking_uri
from pipeline.stages import preflight
from pipeline.stages.chain import _finished, _plan, _to_come, run_chain
from pipeline.stages.chain_config import Stage, load_chain
from tests.journey import CONFIGS

Write = Callable[[str, str | bytes], Path]
WORDS = "the cat sat on the mat and the dog barked at the cat. "


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mlruns"


@pytest.fixture
def chain(write: Write) -> Path:
    """Two vocabularies: `small` from a.txt, `big` from texts/."""
    write("a.txt", WORDS * 50)
    write("texts/b.txt", WORDS * 40)
    write("configs/vocab.yaml", "source: a.txt\nvocab_size: 270\nmin_frequency: 2\n")
    return write(
        "configs/run/two.yaml",
        """
experiment: demo
stages:
  - {name: small, command: tokenizer train, config: ../vocab.yaml}
  - name: big
    command: tokenizer train
    config: [../vocab.yaml]
    set: {source: "${TEXTS:-texts}", vocab_size: 280}
""",
    )


def runs(home: Path, name: str) -> list[Path]:
    """Run directories of a stage or of a chain, oldest first."""
    found = [
        path for path in (home / "demo").iterdir() if re.match(rf"{name}-[0-9a-f]{{8}}", path.name)
    ]
    return sorted(found, key=lambda path: path.stat().st_ctime)


def starts(run: Path) -> int:
    """How often a run was opened."""
    lines = [line for line, _ in read_journal(run)]
    return sum(line["kind"] == "event" and line["name"] in ("created", "resumed") for line in lines)


def status(run: Path) -> str:
    """Of a run, by its journal."""
    return [line["status"] for line, _ in read_journal(run) if line["kind"] == "status"][-1]


def test_a_chain_from_start_to_table(
    chain: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_chain(chain) == 0
    captured = capfd.readouterr()
    (small,), (big,), (parent,) = runs(home, "small"), runs(home, "big"), runs(home, "two")

    outcomes = {path.name.split("-")[0]: read_outcome(path) for path in (small, big)}
    metrics = {name: outcome["metrics"] for name, outcome in outcomes.items() if outcome}
    assert metrics["small"]["n_vocab"] == 270
    assert metrics["big"]["n_vocab"] == 280
    assert str(small / "tokenizer.json") in captured.out  # the stage's own output streams through
    row = next(line for line in captured.out.splitlines() if "big" in line and "bytes per" in line)
    assert f"{metrics['big']['bytes_per_token']:.4g}" in row
    assert captured.out.splitlines()[-1] == "next: python -m pipeline ui"
    assert "[1/2] small: python -m pipeline tokenizer train" in captured.err

    ended = read_outcome(parent)
    assert ended is not None
    assert ended["outputs"] == {"small": str(small), "big": str(big)}
    assert ended["metrics"]["big/n_vocab"] == 280
    events = [line for line, _ in read_journal(parent) if line.get("name") == "stage"]
    assert [(e["stage"], e["state"]) for e in events] == [
        (stage, state) for stage in ("small", "big") for state in ("started", "finished")
    ]
    made = read_outcome(big)
    assert made is not None
    assert made["command"].split()[-2:] == ["--source=texts", "--vocab_size=280"]

    client = MlflowClient(tracking_uri(home))
    ids = {path: json.loads((path / "mlflow.json").read_text())["run_id"] for path in (parent, big)}
    child = client.get_run(ids[big])
    assert child.data.tags["mlflow.parentRunId"] == ids[parent]
    assert child.info.status == client.get_run(ids[parent]).info.status == "FINISHED"
    assert client.get_run(ids[parent]).data.metrics["big/n_vocab"] == 280


def test_only_what_changed_runs_again(
    chain: Path, home: Path, write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_chain(chain) == 0
    (big,) = runs(home, "big")
    capfd.readouterr()

    write("configs/vocab.yaml", "# a comment\nmin_frequency: 2\nvocab_size: 270\nsource: a.txt\n")
    before = time.time()
    assert run_chain(chain) == 0  # nothing that matters has changed
    captured = capfd.readouterr()
    assert "every stage is done already" in captured.err
    assert "(earlier)" in captured.out
    assert all(p.stat().st_mtime < before for p in home.rglob("journal.jsonl"))

    write("a.txt", WORDS * 50 + "new words. ")
    assert run_chain(chain) == 0
    captured = capfd.readouterr()
    assert len(runs(home, "small")) == 2
    assert runs(home, "big") == [big]
    assert starts(big) == 1
    assert "done before" in captured.err
    assert len(runs(home, "two")) == 2

    write("a.txt", WORDS * 50)
    assert run_chain(chain) == 0  # as it once was: what was made of it then still holds
    assert "every stage is done already" in capfd.readouterr().err

    write("texts/c.txt", "a file joins the folder. " * 40)
    assert run_chain(chain) == 0
    assert len(runs(home, "big")) == 2
    assert len(runs(home, "small")) == 2


def test_a_chain_is_run_anew_or_must_go_on(
    chain: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-c", str(chain), "--resume=must"]) == 2
    assert "resume is must, but no run of" in capfd.readouterr().err
    assert main(["run", "-c", str(chain)]) == 0
    assert main(["run", "-c", str(chain), "--resume=never"]) == 0
    assert [len(runs(home, name)) for name in ("small", "big", "two")] == [2, 2, 2]
    assert main(["run", "-c", str(chain), "--resume=must"]) == 0  # finished: nothing to do
    assert [len(runs(home, name)) for name in ("small", "big", "two")] == [2, 2, 2]


def test_lost_output_and_other_options_run_again(
    chain: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_chain(chain) == 0
    (big,) = runs(home, "big")
    (big / "tokenizer.json").unlink()
    capfd.readouterr()
    assert run_chain(chain) == 0
    assert len(runs(home, "big")) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "anew" in line]
    gone = big / "tokenizer.json"
    assert lines == [f"[2/2] big: anew, {big} is finished, but {gone} is gone"]

    assert main(["run", "-c", str(chain), "--set", "big.vocab_size=275"]) == 0
    outcome = read_outcome(runs(home, "big")[-1])
    assert outcome is not None
    assert outcome["metrics"]["n_vocab"] == 275
    assert len(runs(home, "small")) == 1

    record = runs(home, "small")[0] / OUTCOME
    record.write_text(json.dumps({**json.loads(record.read_text()), "code": "older"}))
    capfd.readouterr()
    assert run_chain(chain) == 0
    assert "warning: the code has changed since small ran" in capfd.readouterr().err
    assert len(runs(home, "small")) == 1


def test_a_copy_that_is_lost_is_made_again(chain: Path, home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    for _ in range(2):
        assert run_chain(chain, [f"small.output={copy}"]) == 0
        copy.unlink()
    assert len(runs(home, "small")) == 2
    assert len(runs(home, "big")) == 1


def test_another_file_in_the_place_of_a_copy_is_not_taken_for_it(
    chain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = f"small.output={tmp_path / 'copy.json'}"
    assert run_chain(chain, [copy]) == 0
    (tmp_path / "copy.json").unlink()
    assert run_chain(chain, [copy, "small.vocab_size=275"]) == 0
    assert run_chain(chain, [copy]) != 0
    assert "copy.json, which is there and is not this tokenizer" in capfd.readouterr().err


def test_labels_in_brackets_are_words(
    chain: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_chain(chain) == 0
    (path,) = runs(home, "small")
    outcome = json.loads((path / "outcome.json").read_text())
    for row, label in zip(outcome["headline"], ("[/spam]",), strict=True):
        row["metric"] = f"f1 of {label}"
    (path / "outcome.json").write_text(json.dumps(outcome))
    assert run_chain(chain) == 0
    assert "f1 of [/spam]" in capfd.readouterr().out


def test_a_broken_chain_goes_on_where_it_stopped(
    chain: Path,
    home: Path,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write("bad/latin.txt", b"caf\xe9 " * 100)
    monkeypatch.setenv("TEXTS", "bad")
    assert run_chain(chain) == 2
    captured = capfd.readouterr()
    assert "error: bad/latin.txt: byte 3 (0xe9) is not UTF-8" in captured.err
    last = captured.err.splitlines()[-1]
    assert last.startswith(
        "stage big failed with exit code 2; correct that and go on: python -m pipeline run -c"
    )
    assert last.endswith(str(chain))
    (parent,), (big,) = runs(home, "two"), runs(home, "big")
    assert status(parent) == status(big) == "FAILED"
    assert read_outcome(parent) is None

    write("bad/latin.txt", "café " * 100)
    assert run_chain(chain) == 0
    assert starts(parent) == 2
    assert starts(big) == 2
    assert starts(runs(home, "small")[0]) == 1
    assert status(parent) == "FINISHED"


def test_inputs_are_what_earlier_stages_left(chain: Path, home: Path, write: Write) -> None:
    document = yaml.safe_load(chain.read_text())
    inputs = {"tokenizer": "small"}
    document["stages"][1:] = [{"name": "pretrain", "command": "fit", "inputs": inputs}]
    longer = write("configs/run/longer.yaml", yaml.safe_dump(document))
    document["stages"].pop()
    assert run_chain(write("configs/run/two.yaml", yaml.safe_dump(document))) == 0
    vocab = runs(home, "small")[0] / "tokenizer.json"

    def planned() -> Any:
        todo = load_chain(longer)
        return _plan(todo.stages[1], home / "demo", _finished(todo, home / "demo"))

    pretrain = planned()
    assert pretrain.outcome is None
    assert pretrain.stage.arguments(pretrain.inputs) == ["fit", f"--data.tokenizer={vocab}"]
    vocab.write_text(vocab.read_text() + "\n")
    assert planned().path != pretrain.path  # another vocabulary: another run


def test_paths_that_options_name_are_told_by_their_content(
    chain: Path, home: Path, write: Write
) -> None:
    vocab = write("own.json", "one")
    fit = {"name": "pretrain", "command": "fit", "set": {"data.tokenizer": str(vocab)}}
    document = {"experiment": "demo", "stages": [{**fit, "config": "../spam.yaml"}]}
    write("configs/spam.yaml", "model: {init_args: {init_from: base}}\n")
    path = write("configs/run/own.yaml", yaml.safe_dump(document))
    planned = []
    for name, content in (("own.json", "two"), ("base", "one"), ("base", "two"), ("own.json", "")):
        planned.append(_plan(load_chain(path).stages[0], home / "demo", {}).path)
        write(name, content)
    assert len(set(planned)) == len(planned)


VOCAB = {"name": "vocab", "command": "tokenizer train", "config": "../vocab.yaml"}
FIT = {"name": "pretrain", "command": "fit", "inputs": {"tokenizer": "vocab"}}
CLASSIFY = {"name": "label", "command": "classify", "set": {"ckpt": "spam", "file": "no.csv"}}
SCORE = {"name": "score", "command": "score", "set": {"responses": "no.jsonl"}}


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"stages": [VOCAB]}, ["experiment"]),
        ({"experiment": "x", "stages": [VOCAB], "stage": 1}, ["stage"]),
        ({"experiment": "x/y", "stages": [VOCAB]}, ["experiment: 'x/y' is not a name"]),
        ({"experiment": "x", "stages": []}, ["stages: is empty"]),
        ({"experiment": "x", "stages": {"vocab": VOCAB}}, ["stages", "list"]),
        ({"experiment": "x", "stages": [VOCAB, "fit"]}, ["stages", "fit"]),
        ({"experiment": "x", "stages": [{"name": "a"}]}, ["stages[0]", "command"]),
        ({"experiment": "x", "stages": [VOCAB | {"sett": {}}]}, ["stages[0]", "sett"]),
        ({"experiment": "x", "stages": [VOCAB | {"name": "a b"}]}, ["stages[0].name: 'a b'"]),
        ({"experiment": "x", "stages": [VOCAB, VOCAB]}, ["stages[1].name", "two stages 'vocab'"]),
        ({"experiment": "x", "stages": [VOCAB | {"command": "train"}]}, ["stages[0].command"]),
        (
            {"experiment": "x", "stages": [VOCAB | {"config": "no.yaml"}]},
            ["stages[0].config", "no"],
        ),
        ({"experiment": "x", "stages": [VOCAB | {"set": ["a"]}]}, ["stages[0].set"]),
        ({"experiment": "x", "stages": [VOCAB | {"set": {"vocab_size": "x"}}]}, ["vocab_size: "]),
        ({"experiment": "x", "stages": [VOCAB | {"set": {"vocabsize": 3}}]}, ["--vocabsize=3"]),
        ({"experiment": "x", "stages": [VOCAB | {"config": []}]}, ["'vocab'", "source"]),
        (
            {"experiment": "x", "stages": [FIT, VOCAB]},
            ["stages[0].inputs", "not an earlier"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, FIT | {"inputs": {"token": "vocab"}}]},
            ["stages[1].inputs.token", "init_from, tokenizer"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, FIT | {"inputs": {"init_from": "vocab"}}]},
            ["stages[1].inputs.init_from", "'vocab' (tokenizer train) has no output 'best'"],
        ),
        (
            {
                "experiment": "x",
                "stages": [
                    VOCAB,
                    FIT,
                    FIT | {"name": "b", "inputs": {"init_from": "pretrain.first"}},
                ],
            },
            ["stages[2].inputs.init_from", "no output 'first'", "best, last"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, FIT | {"set": {"data.source": ["no.txt"]}}]},
            ["stage 'pretrain': source 'no.txt' does not exist"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, FIT | {"config": "../fit.yaml"}]},
            ["stage 'pretrain': source 'bundled:smss' is unknown"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, CLASSIFY]},
            ["stage 'label': file: ", "no.csv does not exist"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, SCORE]},
            ["stage 'score': responses: ", "no.jsonl does not exist"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB, SCORE | {"set": {"responses": "/"}}]},
            ["stage 'score': responses: / is no file"],
        ),
        (
            {"experiment": "x", "stages": [VOCAB | {"set": {"source": "${NOWHERE_SET}/x"}}]},
            ["chain.stages[0].set.source", "NOWHERE_SET"],
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    document: Any,
    parts: list[str],
    chain: Path,
    home: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("configs/fit.yaml", "data: {init_args: {source: bundled:smss}}")
    path = write("configs/run/bad.yaml", yaml.safe_dump(document))
    assert main(["run", "-c", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error
    assert not home.exists()


def test_options_of_later_stages_are_read_before_the_first_runs(
    chain: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A test without a config has the options of its fit, and nothing to complain of."""
    document = yaml.safe_load(chain.read_text())
    spam = {"name": "spam", "command": "fit", "config": f"{CONFIGS}/spam.yaml"}
    spam |= {"inputs": {"tokenizer": "big"}, "set": {"model.init_from": "texts"}}
    tested = {"name": "tested", "command": "test", "inputs": {"ckpt": "spam"}}
    document["stages"] += [spam, tested, {**spam, "name": "twice", "set": {"data.batchsize": 3}}]
    chain.write_text(yaml.safe_dump(document))
    assert run_chain(chain) == 2
    said, error = capfd.readouterr().err.splitlines()
    assert said == "reading the options and rows of later stages ..."
    assert error.startswith("error: stage 'twice': data: Option 'batchsize' is not accepted")
    assert not home.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("checkpoints.every_n_steps", 0, "checkpoints.every_n_steps is 0; give at least 1"),
        ("trainer.logger", False, "trainer.logger is False; a run always keeps a journal"),
        ("trainer.max_steps", 3, "warmup_steps is 20 but the run has only 3 steps"),
        ("model.gpt.n_head", 3, "model.gpt.n_head (3) does not divide"),
        ("model.optimizer.lr", -1, "model.optimizer.lr is -1"),
        ("data.block_size", 4096, "data.block_size is 4096 but model.gpt.block_size is"),
        ("run.name", "a/b", "run.name: 'a/b' is not a name"),
    ],
)
def test_parts_of_later_stages_are_checked_before_the_first_runs(
    key: str, value: Any, message: str, chain: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: the test above has it started by a chain."""
    document = yaml.safe_load(chain.read_text())
    options = {"data.source": ["a.txt"], "model.optimizer.warmup_steps": 20, key: value}
    wrong = {"name": "wrong", "command": "fit", "config": f"{CONFIGS}/pretrain.yaml"}
    document["stages"].append({**wrong, "set": options, "inputs": {"tokenizer": "big"}})
    chain.write_text(yaml.safe_dump(document))
    read = load_chain(chain)
    assert preflight.main({"wrong": _to_come(read, read.stages[-1])}) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: stage 'wrong': ")
    assert message in error
    assert not home.exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {
                "command": "fit",
                "config": f"{CONFIGS}/spam.yaml",
                "set": {"model.init_from": "no.gguf"},
            },
            "no.gguf does not exist; give a checkpoint",
        ),
        (
            {"command": "export", "set": {"ckpt": "/no/such", "format": "gguf"}},
            "/no/such does not exist; give a",
        ),
        (
            {"command": "score", "set": {"ckpt": "a.txt", "data.test_source": "questions.json"}},
            "questions.json: entry 1: it has no 'output'",
        ),
        ({"command": "export", "set": {"ckpt": "copies/mine", "format": "gguf"}}, None),
    ],
)
def test_models_and_entries_of_later_stages_are_looked_at_before_the_first_runs(
    stage: dict[str, Any],
    message: str | None,
    chain: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But not what an earlier one will write."""
    good = {"instruction": "Name it.", "output": "An owl."}
    write("questions.json", json.dumps([good, {"instruction": "Name it.", "outptu": "An owl."}]))
    document = yaml.safe_load(chain.read_text())
    vocab = {**document["stages"][0], "name": "copied", "set": {"output": "copies"}}
    document["stages"] = [vocab, {"name": "later", **stage}]
    chain.write_text(yaml.safe_dump(document))
    read = load_chain(chain)
    to_come = _to_come(read, read.stages[-1])
    if message is None:
        assert to_come["models"] == []
        return
    assert preflight.main({"later": to_come}) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: stage 'later': ")
    assert message in error


def test_a_file_that_an_input_takes_the_place_of_is_not_looked_for(chain: Path) -> None:
    document = yaml.safe_load(chain.read_text())
    first = {"name": "first", "command": "score", "set": {"ckpt": "owner/name"}}
    document["stages"] = [first, {**SCORE, "name": "again", "inputs": {"responses": "first"}}]
    chain.write_text(yaml.safe_dump(document))
    assert "responses" not in load_chain(chain).stages[-1].own()


def test_a_finished_run_is_told_by_what_it_hands_over(chain: Path, home: Path) -> None:
    """Its journal grows where MLflow catches up."""
    base = home / "demo" / "base"
    run = Run.open(base)
    (base / "weights").write_text("one")
    run.finish({"best": str(base / "weights")}, {}, {})
    document = yaml.safe_load(chain.read_text())
    document["stages"] = [
        {"name": "out", "command": "export", "set": {"ckpt": str(base), "format": "gguf"}}
    ]
    chain.write_text(yaml.safe_dump(document))
    (stage,) = load_chain(chain).stages
    planned = _plan(stage, home / "demo", {}).path
    (base / "mlflow.json").write_text("{}")
    assert _plan(stage, home / "demo", {}).path == planned
    (base / "weights").write_text("two")
    assert _plan(stage, home / "demo", {}).path != planned


def test_a_stage_that_never_goes_on_has_a_run_of_its_own(chain: Path) -> None:
    """Its checkpoints lie beside no others', nor is one that is finished used again."""
    document = yaml.safe_load(chain.read_text())
    for name, options in (("auto", {}), ("anew", {"run.resume": "never"})):
        fit = {"name": name, "command": "fit", "config": f"{CONFIGS}/pretrain.yaml"}
        document["stages"].append({**fit, "set": options, "inputs": {"tokenizer": "big"}})
    chain.write_text(yaml.safe_dump(document))
    *_, auto, anew = load_chain(chain).stages
    assert [stage.starts_anew() for stage in (auto, anew)] == [False, True]
    (*_, told, _) = load_chain(chain, ["auto.run.resume=never"]).stages
    assert told.starts_anew()
    for stage, is_new in ((auto, False), (told, True), (anew, True)):
        first = _plan(replace(stage, inputs={}), chain.parent, {}).path
        first.mkdir()
        assert (_plan(replace(stage, inputs={}), chain.parent, {}).path != first) == is_new


def test_files_and_variables_in_options_decide_what_is_reused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = write("optimizer.yaml", "lr: 0.1\n")
    options = {"source": ["$TEXT"], "model.optimizer": str(optimizer)}
    identity = Stage("x", "fit", (), options, {}).identity
    monkeypatch.setenv("TEXT", "a.txt")
    first = identity()
    assert identity() == first
    monkeypatch.setenv("TEXT", "b.txt")
    second = identity()
    assert second != first
    optimizer.write_text("lr: 0.2\n")
    assert identity() != second


def test_rows_of_later_stages_are_read_before_the_first_runs(
    chain: Path, home: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their vocabulary is still to be made. In this process, too."""
    moods = write("moods.csv", "text,label\nso glad,good\nso sad,bad\nso so,\n")
    document = yaml.safe_load(chain.read_text())
    spam = {"name": "spam", "command": "fit", "config": f"{CONFIGS}/spam.yaml"}
    spam |= {"inputs": {"tokenizer": "big"}, "set": {"model.init_from": "texts"}}
    table = [spam["config"], f"{CONFIGS}/data/table.yaml"]
    own = {**spam["set"], "data.source": str(moods)}
    wrong = {**spam, "name": "moods", "config": table, "set": own}
    document["stages"] += [spam, wrong]
    chain.write_text(yaml.safe_dump(document))
    read = load_chain(chain)
    later = {stage.name: _to_come(read, stage) for stage in read.stages[2:]}
    assert preflight.main(later) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: stage 'moods': {moods}: row 3: it has no 'label'")
    assert not home.exists()


@pytest.mark.parametrize("text", ["big", "big.vocab_size", "small=3", "huge.vocab_size=3"])
def test_misspelt_overrides(text: str, chain: Path, home: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--set {text}")):
        run_chain(chain, [text])
    assert not home.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("7", 7), ("0.5", 0.5), ("true", True), ("null", None), ("a b", "a b")),
        *(("[a, b]", ["a", "b"]), ("{a: 1}", {"a": 1}), ("2024-01-02", datetime.date(2024, 1, 2))),
        *((text, text) for text in ("yes", "1_000", "12:30", "010", "", "Name a C #1 hit", "@you")),
        *((text, text) for text in ("Translate: Hello #1", "[draft] Hello", "{x", "'x'", "1e-3")),
    ],
)
def test_what_is_set_is_what_the_command_gets(text: str, value: Any, chain: Path) -> None:
    stage = load_chain(chain, [f"small.text_column={text}"]).stages[0]
    assert stage.overrides["text_column"] == value
    (word,) = (w for w in stage.arguments({}) if w.startswith("--text_column="))
    nested = isinstance(value, list | dict)
    assert word == f"--text_column={json.dumps(value) if nested else text}"


def test_every_character_of_a_list_is_what_the_command_gets(chain: Path, write: Write) -> None:
    write("😀 ß.txt", WORDS)
    stage = load_chain(chain, ["small.source=[a.txt, 😀 ß.txt]"]).stages[0]
    words = stage.arguments({})[len(stage.command.split()) :]
    assert parse(FUNCTIONS[stage.command], words, "")["source"] == ["a.txt", "😀 ß.txt"]


def test_a_key_that_is_left_empty(write: Write) -> None:
    source = {"source": "bundled:python-docs", "vocab_size": 270, "min_frequency": 2}
    stage = {"name": "a", "command": "tokenizer train", "config": None, "inputs": None}
    chain = {"experiment": "x", "stages": [{**stage, "set": source}]}
    assert load_chain(write("a.yaml", yaml.safe_dump(chain))).stages[0].configs == ()


def test_variables_and_references(
    chain: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    assert load_chain(chain).stages[1].overrides["source"] == "texts"
    write("elsewhere/b.txt", WORDS)
    monkeypatch.setenv("TEXTS", "elsewhere")
    assert load_chain(chain).stages[1].overrides["source"] == "elsewhere"
    assert load_chain(chain, ["big.source=[a.txt, texts]"]).stages[1].arguments({})[-2:] == [
        '--source=["a.txt", "texts"]',
        "--vocab_size=280",
    ]
    stages = [
        VOCAB,
        FIT,
        FIT | {"name": "tune", "inputs": {"init_from": "pretrain.last", "tokenizer": "pretrain"}},
    ]
    path = write("configs/run/tune.yaml", yaml.safe_dump({"experiment": "x", "stages": stages}))
    tune = load_chain(path).stages[2]
    assert {key: (ref.stage, ref.output) for key, ref in tune.inputs.items()} == {
        "init_from": ("pretrain", "last"),
        "tokenizer": ("pretrain", "best"),  # a checkpoint holds its tokenizer
    }


def test_memory_and_speed_are_not_part_of_the_identity(chain: Path, write: Write) -> None:
    def identity(**options: Any) -> Any:
        stage = {"name": "a", "command": "fit", "set": {f"data.{k}": v for k, v in options.items()}}
        path = write("one.yaml", yaml.safe_dump({"experiment": "x", "stages": [stage]}))
        return load_chain(path).stages[0].identity()

    assert identity(max_tokens=100, num_workers=2, batch_size=4) == identity(batch_size=4)
    assert identity(batch_size=8) != identity(batch_size=4)
    nested = write("c.yaml", "data: {class_path: X, init_args: {max_tokens: 3, batch_size: 4}}\n")
    stage = {"name": "a", "command": "fit", "config": nested.name}
    path = write("two.yaml", yaml.safe_dump({"experiment": "x", "stages": [stage]}))
    assert load_chain(path).stages[0].identity()["config"] == [
        {"data.class_path": "X", "data.batch_size": 4}
    ]


@pytest.fixture
def slow_chain(write: Write) -> Path:
    """A stage that is at work for seconds."""
    rows = (json.dumps({"text": f"line {i} of a long text"}) for i in range(150_000))
    write("long.jsonl", "\n".join(rows))
    stage: dict[str, Any] = {"name": "slow", "command": "tokenizer train"}
    stage["set"] = {"source": "long.jsonl", "vocab_size": 300, "min_frequency": 2}
    return write("waiting.yaml", yaml.safe_dump({"experiment": "demo", "stages": [stage]}))


@pytest.fixture
def started(slow_chain: Path, home: Path) -> Iterator[subprocess.Popen[str]]:
    """The slow chain in a process of its own, its stage at work.

    It hears Ctrl-C also where this process does not: a shell's background jobs ignore it.
    """
    command = [sys.executable, "-m", "pipeline", "run", "-c", str(slow_chain)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        deadline = time.monotonic() + 60
        while not list(home.glob("demo/slow-*/config.yaml")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has to tell it")
def test_a_stage_ends_with_a_chain_that_is_killed(
    started: subprocess.Popen[str], home: Path
) -> None:
    started.kill()
    started.wait()
    (stage,) = runs(home, "slow")
    deadline = time.monotonic() + 60
    while is_open(stage):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_outcome(stage) is None, "it was not left to go on by itself"


@pytest.mark.parametrize(
    ("number", "exit_code", "stage_status"),
    [(signal.SIGINT, 130, "KILLED"), (signal.SIGTERM, 143, "RUNNING")],
)
def test_signals_reach_the_stage(
    number: signal.Signals,
    exit_code: int,
    stage_status: str,
    started: subprocess.Popen[str],
    home: Path,
) -> None:
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == exit_code
    assert "stage slow was interrupted; to go on: python -m pipeline run" in errors.splitlines()[-1]
    (stage,), (parent,) = runs(home, "slow"), runs(home, "waiting")
    assert status(parent) == "KILLED"
    assert status(stage) == stage_status


def test_a_child_whose_parent_is_gone_already_ends() -> None:
    """It would not be told any more."""
    command = [sys.executable, "-m", "pipeline", "export", "--help"]
    for parent, code in ((os.getpid(), 0), (os.getppid(), -signal.SIGTERM)):
        own = {PARENT_VARIABLE: "/nowhere", "GPT_PIPELINE_PARENT_PID": str(parent)}
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True)
        assert done.returncode == code


def test_two_of_the_same_chain_do_not_mix(
    started: subprocess.Popen[str], slow_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runs.run_directory._LOCK_TIMEOUT_S", 0.2)
    assert main(["run", "-c", str(slow_chain)]) == 2
    assert started.poll() is None
    started.terminate()
    assert started.wait(60) == 143
