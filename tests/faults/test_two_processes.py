"""Two processes train as one does: token-exact means, every sample once, one of them logs."""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient

from datamodules.prompts import IGNORE
from pipeline.checkpoint import ADAPTER_WEIGHTS, WEIGHTS, read_tensors, verify_checkpoint
from pipeline.runs.journal import metric_history, read_journal
from pipeline.runs.tracking import sync_all
from tests.faults.processes import PROCESSES, TORCHRUN, Started, at, finish, go_on, pauses, start
from tests.faults.test_exact_resume import assert_equal_checkpoints
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, run
from tests.training import instruction_data, spam_data

SAME = 1e-6  # float32: the sums over two processes round otherwise
BESIDE = ["--checkpoints.asynchronous=true"]
IDS = ["--trainer.log_every_n_steps=1", "--trainer.callbacks+=tests.faults.processes.Ids"]
IDS += ["--trainer.callbacks+=LearningRateMonitor"]  # which asks each process for a logger
NewHome = Callable[[str], Path]  # by a name for it


class Rank(Started):
    """One of two processes, forked from one that has imported everything."""

    def __init__(self, words: list[str], output: Path, environment: dict[str, str]) -> None:
        self.output = output
        self.process: Any = PROCESSES.Process(target=_rank, args=(words, output, environment))
        self.process.start()


def _rank(words: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    rank_zero_only.rank = int(environment["RANK"])  # what Lightning reads when it is imported
    raise SystemExit(run(*words))


class Two:
    """A command as torchrun's processes are started: each is told which of the two it is.

    Args:
        of_second: environment variables that the second has otherwise.
    """

    def __init__(self, words: list[str], home: Path, **of_second: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"GPT_PIPELINE_HOME": str(home), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "two"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.ranks = [
            Rank(words, home / "said.txt", {**os.environ, **shared, **own})
            for i in "01"
            for own in [{"RANK": i, "LOCAL_RANK": i, **(of_second if i == "1" else {})}]
        ]

    def is_running(self) -> bool:
        return all(rank.process.is_alive() for rank in self.ranks)

    def stop(self) -> None:
        """SIGTERM to the one that logs nothing."""
        self.ranks[1].send(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Their exit code, and what they wrote."""
        try:
            codes = {rank.wait() for rank in self.ranks}
        finally:
            for rank in self.ranks:
                rank.process.kill()
        text = self.ranks[0].said()
        assert len(codes) == 1, (codes, text)
        return codes.pop(), text


class Launched:
    """A command as a shell starts it: Lightning starts the second process."""

    def __init__(self, words: list[str], home: Path) -> None:
        self.process = start(words, home)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what both wrote."""
        return finish(self.process)


class Torchrun(Launched):
    """A command as torchrun starts it, by torchrun."""

    def __init__(self, words: list[str], home: Path) -> None:
        self.process = start(words, home, TORCHRUN)


@pytest.fixture(scope="module")
def new_home(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> NewHome:
    """Makes a folder of runs, with a tracking store in it: to make one takes seconds."""

    def make(name: str) -> Path:
        home = tmp_path_factory.mktemp(name)
        shutil.copy(empty_database, home / "mlflow.db")
        return home

    return make


@pytest.fixture(scope="module")
def words(tiny: Journey) -> list[str]:
    """Texts of very unequal length; the last step has one sample, so that a process has none."""
    data = spam_data(tiny.tokenizer, train_fraction=0.06, val_fraction=0.1)
    data.setup("fit")
    n_samples = len(data.train_set)
    batch_size = next(n for n in range(6, n_samples) if n_samples % n == 1)
    return [
        "fit",
        f"--config={CONFIGS}/spam.yaml",
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--model.optimizer.warmup_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.limit_val_batches=0",
        "--data.train_fraction=0.06",
        f"--data.batch_size={batch_size}",
        "--data.max_tokens=150",
        "--checkpoints.every_n_steps=5",
        *IDS,
        *at("Infinite", 7),
    ]


@pytest.fixture(scope="module")
def adapters(tiny: Journey) -> list[str]:
    """Adapters and a tied head, with validation and sample texts."""
    return [
        "fit",
        f"--config={CONFIGS}/instruct.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--trainer.accelerator=cpu",
        "--data.max_tokens=300",
        *IDS,
    ]


def of_one(words: list[str], home: Path) -> Path:
    """The folder in which one process has run a command."""
    started = Started(words, home / "said.txt", {**os.environ, "GPT_PIPELINE_HOME": str(home)})
    assert started.wait() == 0, started.said()
    return home


def of_two(words: list[str], overlay: str) -> list[str]:
    """The same, by two processes."""
    return [*words, f"--config={CONFIGS}/trainer/{overlay}.yaml", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def one(words: list[str], new_home: NewHome) -> Path:
    """What one process does."""
    return of_one(words, new_home("one"))


@pytest.fixture(scope="module")
def adapters_of_one(adapters: list[str], new_home: NewHome) -> Path:
    return of_one(adapters, new_home("adapters"))


@pytest.fixture
def classifying(tiny: Journey) -> list[str]:
    """Adapters and a head, with validation."""
    return [
        "fit",
        f"--config={CONFIGS}/spam.yaml",
        f"--config={CONFIGS}/model/lora_classifier.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=2",
        "--data.train_fraction=0.06",
        *IDS,
    ]


@pytest.fixture(scope="module")
def two(words: list[str], new_home: NewHome) -> Callable[[str], Path]:
    """What two processes do that nothing stops, by the overlay that they share the work by."""

    @cache
    def of(overlay: str) -> Path:
        home = new_home(overlay)
        code, errors = Two(of_two(words, overlay), home).end()
        assert code == 0, errors
        return home

    return of


def only_run(home: Path) -> Path:
    (run,) = home.glob("default/*")
    return run


def last_checkpoint(home: Path) -> Path:
    return max(only_run(home).glob("checkpoints/step-*"))


def losses(home: Path, name: str = "train/loss") -> dict[int, float]:
    """Of every step; or another metric."""
    return metric_history(only_run(home))[name]


def assert_same_losses(home: Path, other: Path) -> None:
    ours, theirs = losses(home), losses(other)
    assert list(ours) == list(theirs) == list(range(1, len(theirs) + 1))
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < SAME
    assert losses(home, "train/tokens") == losses(other, "train/tokens")


def assert_same_validation(home: Path, alone: Path, *measures: str) -> None:
    """Each of two validates a half."""
    for name in measures:
        ours, theirs = losses(home, f"val/{name}"), losses(alone, f"val/{name}")
        assert ours == pytest.approx(theirs, rel=SAME, abs=SAME), name


def assert_logged_once(home: Path) -> None:
    """Every metric of every step, in the one run that there is; in MLflow too."""
    lines = [line for line, _ in read_journal(only_run(home)) if line["kind"] == "metric"]
    points = Counter((line["step"], name) for line in lines for name in line["values"])
    assert set(points.values()) == {1}
    uri = f"sqlite:///{home / 'mlflow.db'}"
    sync_all(home, uri)
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments)
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(losses(home))


def names(home: Path) -> list[str]:
    """Of the events of a run."""
    return [line["name"] for line, _ in read_journal(only_run(home)) if line["kind"] == "event"]


def skipped(home: Path) -> list[int]:
    """Ids of the samples of the step that was skipped."""
    lines = (line for line, _ in read_journal(only_run(home)))
    (event,) = (line for line in lines if line.get("name") == "skipped_step")
    return sorted(event["sample_ids"])


def ids(home: Path, rank: int, key: str = "ids") -> dict[int, Any]:
    lines = map(json.loads, (only_run(home) / f"ids-{rank}.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines}


def assert_shared_out(home: Path, alone: Path) -> None:
    """Every sample of a step went to one of two."""
    shares = [ids(home, rank) for rank in (0, 1)]
    for step, members in ids(alone, 0).items():
        assert sorted(shares[0][step] + shares[1][step]) == sorted(members)


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # AdamW divides by the root of what may be near nothing: its rounding is the rate's size
        assert float((ours[name] - tensor).abs().max()) < 1e-4, name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_two_equal_one(overlay: str, two: Callable[[str], Path], one: Path) -> None:
    """A step with an infinite gradient is skipped by both, whichever of them has it."""
    home, whole = two(overlay), ids(one, 0)
    assert_same_losses(home, one)
    assert_logged_once(home)
    assert_shared_out(home, one)
    assert any(not ids(home, 1)[step] for step in whole), "every process had samples in every step"
    assert ids(home, 0, "seed")[1] != ids(home, 1, "seed")[1], "both would drop the same"
    assert skipped(home) == skipped(one) == sorted(whole[7]), "the samples of both processes"
    assert_close(*(read_tensors(last_checkpoint(of)) for of in (home, one)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("overlay", "begin", "options"),
    [
        pytest.param("ddp", Two, BESIDE, marks=pytest.mark.slow),
        pytest.param("ddp", Launched, [], marks=pytest.mark.slow),
        ("fsdp2", Two, BESIDE),
        pytest.param("fsdp2", Launched, [], marks=pytest.mark.slow),
    ],
    ids=["ddp-asynchronous", "ddp-launched", "fsdp2-asynchronous", "fsdp2-launched"],
)
def test_two_that_were_stopped_equal_two_that_were_not_to_the_last_bit(
    overlay: str,
    begin: type[Two] | type[Launched],
    options: list[str],
    two: Callable[[str], Path],
    words: list[str],
    new_home: NewHome,
) -> None:
    """SIGTERM to one of them in a step after the first checkpoint; the same command goes on."""
    home, words = new_home("stopped"), [*of_two(words, overlay), *options, *at("Pause", 6)]
    words += at("SlowSave", 6)
    running = begin(words, home)
    while not pauses(home, 6):
        assert running.is_running(), running.end()[1]
        time.sleep(0.05)
    running.stop()
    go_on(home, 6)
    if isinstance(running, Two):
        running.ranks[1].wait()
        assert last_checkpoint(home).name.endswith("6"), (
            "launchers end the first once one has ended"
        )
    code, errors = running.end()
    assert code == 143, errors
    assert not list(home.glob("default/*/outcome.json"))
    code, errors = begin(words, home).end()
    assert code == 0, errors
    assert "checkpoints/step-00000006\n" in errors, "it goes on after the step of the signal"
    assert names(home).count("created") == 1
    assert losses(home) == losses(two(overlay))
    ours, theirs = (last_checkpoint(of) for of in (home, two(overlay)))
    assert ours.name == theirs.name
    assert_equal_checkpoints(ours, theirs)


def assert_adapters_are_those_of_one(home: Path, alone: Path, tokenizer: Path) -> None:
    """Though in every step one of the two has more tokens to learn from than the other."""
    assert_same_losses(home, alone)
    assert_same_validation(home, alone, "loss", "perplexity")
    assert_logged_once(home)
    assert_shared_out(home, alone)
    data = instruction_data(tokenizer, train_fraction=0.8, val_fraction=0.1)
    data.setup("fit")
    n_targets = {
        sample["sample_id"]: int((sample["labels"][1:] != IGNORE).sum())
        for sample in data.train_set
    }
    counts = [
        [sum(n_targets[i] for i in members) for members in ids(home, rank).values()]
        for rank in (0, 1)
    ]
    assert all(a != b for a, b in zip(*counts, strict=True))
    verify_checkpoint(last_checkpoint(home))
    assert_close(*(read_tensors(last_checkpoint(of), ADAPTER_WEIGHTS) for of in (home, alone)))
    assert (only_run(home) / "samples/step-00000004.json").is_file()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("overlay", "begin", "options"),
    [
        ("ddp", Two, []),
        ("fsdp2", Two, ["--run.resume=never"]),
        pytest.param("fsdp2", Torchrun, ["--run.resume=never"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2-anew", "fsdp2-anew-torchrun"],
)
def test_two_learn_adapters_as_one_does(
    overlay: str,
    begin: type[Two] | type[Torchrun],
    options: list[str],
    adapters: list[str],
    adapters_of_one: Path,
    tiny: Journey,
    new_home: NewHome,
) -> None:
    """By fsdp2, what adapters leave as it is is shared out too, the tied head among it."""
    home = new_home("adapters-two")
    code, errors = begin([*of_two(adapters, overlay), *options], home).end()
    assert code == 0, errors
    assert names(home).count("created") == 1
    assert_adapters_are_those_of_one(home, adapters_of_one, tiny.tokenizer)


@pytest.mark.slow  # what is above has adapters, and a head
@pytest.mark.timeout(900)
def test_two_learn_a_head_beside_adapters(classifying: list[str], new_home: NewHome) -> None:
    """What is shared out is gathered by a validation, and not shared out again before the save."""
    home, alone = new_home("classifier-two"), of_one(classifying, new_home("classifier"))
    code, errors = Two(of_two(classifying, "fsdp2"), home).end()
    assert code == 0, errors
    assert "sync_dist" not in errors, "Lightning's advice is not for means that are of all data"
    assert_same_losses(home, alone)
    measures = ("loss", "accuracy", "auroc", "precision", "recall", "f1")
    assert_same_validation(home, alone, *measures)
    verify_checkpoint(last_checkpoint(home))
    for name in (ADAPTER_WEIGHTS, WEIGHTS):
        assert_close(*(read_tensors(last_checkpoint(of), name) for of in (home, alone)))


@pytest.mark.timeout(900)
def test_the_second_comes_before_the_first(classifying: list[str], new_home: NewHome) -> None:
    """It may look for a checkpoint before the first has opened the run; here the first never is."""
    home = new_home("early")
    environment = {**os.environ, "GPT_PIPELINE_HOME": str(home), "RANK": "1", "LOCAL_RANK": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = [*of_two(classifying, "ddp"), "--run.resume=must"]
    second = Rank(words, home / "said.txt", environment)
    assert second.wait() == 2
    said = second.said().splitlines()[-1]
    assert "run.resume is must, but" in said
    (path,) = re.findall(r"but (\S+)/checkpoints holds", said)
    interrupted = Path(f"{path[:-8]}00000000")
    (interrupted / "checkpoints" / "step-00000001").mkdir(parents=True)
    Path(path).mkdir(parents=True, exist_ok=True)
    for i, opened in enumerate((Path(path), interrupted)):  # and here the first has opened it
        (opened / "config.yaml").write_text(f"data: {{seed: {i}}}")
    second = Rank(words, home / "again.txt", environment)
    assert second.wait() == 2
    told = f"; the interrupted run {interrupted} is another: data.seed was 1, is 0;"
    assert told in second.said().splitlines()[-1]


@pytest.mark.timeout(900)
def test_one_of_two_is_killed(classifying: list[str], new_home: NewHome) -> None:
    home = new_home("killed")
    first, second = Two(of_two([*classifying, *at("Pause", 2)], "ddp"), home).ranks
    first.until(lambda: pauses(home, 2))
    second.send(signal.SIGKILL)
    go_on(home, 2)
    assert first.wait() == 2
    assert "error: another process of this run has ended" in first.said().splitlines()[-1]


@pytest.mark.timeout(900)
def test_two_that_do_not_see_the_same_are_refused(
    classifying: list[str], new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other files, as on another node, and another folder of runs when one is gone on with."""
    home, other = new_home("unlike"), str(tmp_path / "b")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        names = [folder + x + y for x in ascii_lowercase for y in ascii_lowercase[:8]]
        rows = [f"ham\tWe meet at {name}\nspam\tWin {name} now" for name in names]
        (tmp_path / folder / "sms.tsv").write_text("\n".join(rows))
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    classifying += ["--data.source=~/sms.tsv", "--checkpoints.every_n_steps=1"]
    words = of_two([*classifying, *at("Allocate", 3)], "ddp")
    code, errors = Two(words, home, HOME=other).end()
    assert code == 2, errors
    assert "process 1 is not like the first: data.samples was" in errors
    code, errors = Two(words, home).end()
    assert code == 2, errors
    assert "out of memory" in errors
    code, errors = Two(words, home, GPT_PIPELINE_HOME=other).end()
    assert code == 2, errors
    assert "process 1 is not like the first: ckpt_path was" in errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_of_a_run_that_is_finished(adapters: list[str], tmp_path: Path) -> None:
    adapters = of_two(adapters, "fsdp2")
    for words in (adapters, [*adapters, "--run.resume=never"]):
        code, errors = Torchrun(words, tmp_path).end()
        assert code == 0, errors
    first, second = sorted(tmp_path.glob("default/*"))
    assert second.name == f"{first.name}-2"
    code, errors = Torchrun(adapters, tmp_path).end()
    assert code == 0, errors
    assert errors.count("already finished") == 1
