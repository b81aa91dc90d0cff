"""Killed, terminated or interrupted, then started again with the same command: nothing is lost."""

import os
import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.checkpoint import WEIGHTS, newest_valid
from pipeline.directories import CHECKPOINTS
from pipeline.interrupts import StopRequest
from pipeline.runs.journal import JOURNAL, read_journal
from pipeline.runs.run_directory import read_outcome
from pipeline.runs.tracking import sync_all, tracking_uri
from tests.faults.processes import Started, at
from tests.faults.test_exact_resume import assert_equal_checkpoints
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, said

MAX_STEPS = 60
BY_THE_CLOCK = ("perf/",)  # metrics that no two runs share


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that an uninterrupted run ends with."""
    return uninterrupted(words, tmp_path_factory.mktemp("whole"))


def uninterrupted(words: Sequence[str], folder: Path) -> Path:
    """The last checkpoint of a run below a folder of its own."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "GPT_PIPELINE_HOME": str(folder)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = Started(words, folder / "said.txt", environment)
    assert started.wait() == 0, started.said()
    return max(folder.glob("default/*/checkpoints/step-*"))


def journaled(home: Path) -> int:
    """The last step that is in the journal."""
    paths = list(home.glob(f"default/*/{JOURNAL}"))
    return max(metrics(paths[0].parent)) if paths and metrics(paths[0].parent) else 0


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics, of steps taken again the last ones, without what the clock decides."""
    found: dict[int, dict[str, float]] = {}
    for line, _ in read_journal(run):
        if line["kind"] == "metric":
            kept = {k: v for k, v in line["values"].items() if not k.startswith(BY_THE_CLOCK)}
            found.setdefault(line["step"], {}).update(kept)
    return {step: values for step, values in found.items() if values}


def stop_and_go_on(
    words: Sequence[str], home: Path, output: Path, stops: Sequence[tuple[int, int]]
) -> list[int]:
    """Starts the command again and again, and stops it when a step is in the journal; exit codes.

    One that is killed finds its newest checkpoint damaged too.

    Args:
        stops: step and signal.
    """
    codes = []
    for step, number in stops:
        started = Started(words, output)
        started.until(lambda step=step: journaled(home) >= step)  # type: ignore[misc]
        started.send(number)
        codes.append(started.wait())
        if number == signal.SIGKILL:
            damage_newest(home)
    started = Started(words, output)
    assert started.wait() == 0, started.said()
    return codes


def damage_newest(home: Path) -> None:
    """Flips a bit in the newest checkpoint's weights, where there are two."""
    *older, newest = [None, *sorted(home.glob("default/*/checkpoints/step-*"))]
    if newest is not None and older[1:]:
        content = bytearray((newest / WEIGHTS).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / WEIGHTS).write_bytes(content)


def assert_nothing_is_lost(home: Path, whole: Path) -> None:
    (last,) = home.glob(f"default/*/checkpoints/{whole.name}")
    assert_equal_checkpoints(last, whole)
    assert metrics(last.parents[1]) == metrics(whole.parents[1])
    ours, theirs = (read_outcome(path.parents[1]) for path in (last, whole))
    assert ours is not None
    assert theirs is not None
    assert ours["metrics"] == theirs["metrics"]


def test_stopped_by_every_signal(words: list[str], home: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "said.txt"
    stops = [(10, signal.SIGKILL), (25, signal.SIGTERM), (40, signal.SIGINT)]
    assert stop_and_go_on(words, home, output, stops) == [-9, 143, 130]
    text = output.read_text()
    assert text.count("model.safetensors is missing or damaged") == text.count("Set aside as") == 1
    stopped = [int(n) for n in re.findall(r"stopped after step (\d+); repeat the command to", text)]
    resumed = [int(n) for n in re.findall(r"resuming from .*/step-(\d+)\n", text)]
    assert resumed[1:] == stopped, "the step of each signal was saved"
    assert 25 <= stopped[0] < 40 <= stopped[1] < MAX_STEPS
    assert_nothing_is_lost(home, whole)
    assert_in_mlflow_once(home, whole)


def test_killed_in_a_save_and_before_the_outcome(
    words: list[str], home: Path, whole: Path, tmp_path: Path
) -> None:
    words = [*words, *at("HangInSave", 8), *at("HangInReport", MAX_STEPS)]
    for mark, left in (("hangs", ".step-00000008-*.draft"), ("reports", whole.name)):
        started = Started(words, tmp_path / "said.txt")
        started.until(lambda mark=mark: bool(list(home.glob(f"default/*/{mark}"))))  # type: ignore[misc]
        assert list(home.glob(f"default/*/checkpoints/{left}"))
        started.send(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
    assert not list(home.glob("default/*/outcome.json"))
    started = Started(words, tmp_path / "said.txt")
    assert started.wait() == 0, started.said()
    assert re.findall(r"resuming from .*/(step-\d+)\n", started.said()) == [
        "step-00000004",
        whole.name,
    ]
    assert not list(home.glob("default/*/checkpoints/.*")), "half of one is left"
    assert_nothing_is_lost(home, whole)


def test_an_adapter_goes_on_after_a_kill(tiny: Journey, home: Path, tmp_path: Path) -> None:
    words = ["fit", f"--config={CONFIGS}/instruct.yaml", *SHORT, *PLAIN]
    words += [f"--model.init_from={tiny.best('pretrain')}", "--model.lora.dropout=0.1"]
    words += ["--data.batch_size=4", "--data.max_tokens=512", "--trainer.max_steps=8"]
    words += ["--checkpoints.every_n_steps=2"]
    whole = uninterrupted(words, tmp_path / "whole")
    assert stop_and_go_on(words, home, tmp_path / "said.txt", [(5, signal.SIGKILL)]) == [-9]
    assert_nothing_is_lost(home, whole)


@pytest.mark.parametrize(
    ("workers", "n_left"),
    [("fork", 1), pytest.param("forkserver", 2, marks=pytest.mark.slow)],  # its server imports all
)
def test_a_killed_run_leaves_no_process(
    workers: str, n_left: int, words: list[str], home: Path, tmp_path: Path
) -> None:
    """Its data worker, and the server that starts it, as servers do since Python 3.14."""
    started = Started([*words, *at("Hang", 6)], tmp_path / "said.txt", workers=workers)
    started.until(lambda: bool(list(home.glob("default/*/hangs"))))
    left = psutil.Process(started.process.pid).children(recursive=True)
    assert len(left) >= n_left
    started.send(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times(words: list[str], home: Path, whole: Path, tmp_path: Path) -> None:
    """At moments that chance decides, the saves of checkpoints among them."""
    output, chance = tmp_path / "said.txt", random.Random(0)
    n_kills = 0
    while n_kills < 20:
        before = journaled(home)
        started = Started([*words, "--checkpoints.every_n_steps=1"], output)
        wanted = min(MAX_STEPS - 5, before + chance.randint(0, 4))
        started.until(lambda wanted=wanted: journaled(home) >= wanted)  # type: ignore[misc]
        started.process.join(chance.uniform(0, 0.3))
        started.send(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL, started.said()
        n_kills += 1
    started = Started([*words, "--checkpoints.every_n_steps=1"], output)
    assert started.wait() == 0, started.said()
    assert_nothing_is_lost(home, whole)


def assert_in_mlflow_once(home: Path, whole: Path) -> None:
    """One run, ended well, its breaks visible; every step of every metric once."""
    client = MlflowClient(tracking_uri(home))
    sync_all(home)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    assert run.data.tags["resumed"] == "3"
    assert "130" in run.data.tags["last_failure"]
    for name in ("train/loss", "val/loss", "train/tokens"):
        points = client.get_metric_history(run.info.run_id, name)
        expected = {s: v[name] for s, v in metrics(whole.parents[1]).items() if name in v}
        assert [(p.step, p.value) for p in points] == sorted(expected.items()), name


def test_a_second_interrupt_stops_at_once(words: list[str], home: Path, tmp_path: Path) -> None:
    """In the middle of a step that does not end; the last checkpoint is what it goes on from."""
    started = Started([*words, *at("Hang", 6)], tmp_path / "said.txt")
    started.until(lambda: bool(list(home.glob("default/*/hangs"))))
    started.send(signal.SIGINT)
    started.until(lambda: "Ctrl-C again stops at once" in started.said())
    assert started.process.is_alive()
    started.send(signal.SIGINT)
    assert started.wait() == 130
    assert started.said().splitlines()[-1] == "interrupted"
    (folder,) = home.glob(f"default/*/{CHECKPOINTS}")
    path = newest_valid(folder)
    assert path is not None
    assert path.name == "step-00000004"


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        stop = StopRequest()
        stop.listen()
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_other_data_and_options(
    words: list[str], home: Path, tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted run says when its files, or the options, are not what they were."""
    prose = tmp_path / "prose"
    prose.mkdir()
    for path in sorted((tiny.folder / "prose").iterdir())[:30]:
        (prose / path.name).write_text(path.read_text())
    words = [*words, f"--data.source=[{prose}]", "--data.num_workers=0"]
    started = Started(words, tmp_path / "said.txt")
    started.until(lambda: journaled(home) >= 10)
    started.send(signal.SIGTERM)
    assert started.wait() == 143

    code, _, err = said(*words, "--data.batch_size=4", "--run.resume=must")
    assert code == 2
    assert "run.resume is must" in err
    assert "data.batch_size was 8, is 4" in err
    changed = prose / "00.txt"
    before = changed.read_text()
    changed.write_text(before + "One more line.\n")
    code, _, err = said(*words)
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "data.samples was" in line
    assert f"changed: {changed}" in line
    code, _, err = said(*words, "--run.allow_changes=true")
    assert code == 0, err
    (path,) = home.glob("default/*/outcome.json")
    events: list[dict[str, Any]] = [line for line, _ in read_journal(path.parent)]
    (event,) = (e for e in events if e.get("name") == "changes_allowed")
    assert "data.samples was" in event["changes"]
