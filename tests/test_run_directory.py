import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

from pipeline.runs import provenance, run_directory
from pipeline.runs.journal import JOURNAL, metric_history, read_journal
from pipeline.runs.provenance import _git_facts, code_digest, environment, redact
from pipeline.runs.run_directory import AlreadyFinished, Run, handed_over, is_open, read_outcome
from pipeline.training.figures import confusion_figure

WRITER = """
import sys
from pathlib import Path
from pipeline.runs.run_directory import Run
run = Run.open(Path(sys.argv[1]))
step = 0
while True:
    run.log_metrics({"train/loss": 1 / (step + 1)}, step)
    step += 1
    if step == 200:
        print("writing", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spam" / "one"


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line, _ in read_journal(path) if line["kind"] == kind]


def kill_while_writing(path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()


def test_journal_holds_what_was_logged(path: Path) -> None:
    run = Run.open(path, parent=path.parent.parent / "chain" / "all", command="fit -c a.yaml")
    run.log_params({"model": {"n_layer": 2, "empty": {}}, "layers": [1, 2]})
    run.log_dataset("sms", "ab" * 32, {"train": 3, "leaked": 1}, "bundled:sms")
    run.event("skipped", step=3)
    run.finish({"best": "checkpoints/step-1"}, {"val/loss": 0.5}, {"a.txt": "cd" * 32})

    (created,) = (line for line in lines(path, "event") if line["name"] == "created")
    assert (created["parent"], created["command"]) == ("../../chain/all", "fit -c a.yaml")
    assert lines(path, "param")[0]["values"] == {
        "model.n_layer": "2",
        "model.empty": "{}",
        "layers": "[1, 2]",
    }
    assert lines(path, "dataset")[0]["counts"] == {"train": 3, "leaked": 1}
    assert [line["status"] for line in lines(path, "status")] == ["RUNNING", "FINISHED"]


def test_outcome_is_there_only_for_a_finished_run(path: Path) -> None:
    run = Run.open(path, command="fit")
    assert read_outcome(run.path) is None
    headline = [{"metric": "accuracy", "before": 0.5, "after": 0.9}]
    run.finish({"best": "b"}, {"f1": 0.5, "worst": math.inf}, {}, headline)
    outcome = read_outcome(path)
    assert outcome is not None
    assert outcome["metrics"] == {"f1": 0.5, "worst": math.inf}
    assert (outcome["command"], outcome["headline"]) == ("fit", headline)
    before = (path / JOURNAL).read_bytes()
    with pytest.raises(AlreadyFinished, match="is finished"):
        Run.open(path)
    assert (path / JOURNAL).read_bytes() == before
    assert not is_open(path)


def test_an_outcome_moves_with_the_folder_of_all_runs(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "mlruns", tmp_path / "elsewhere"
    path, made = root / "spam" / "one", root / "made" / "a.txt"
    run, outputs = Run.open(path), {"best": str(path / "best"), "copy": "/somewhere/else.json"}
    (path / "best").mkdir()
    made.parent.mkdir()
    made.write_text("a")
    run.finish(outputs, {}, {str(made): "1", "/data/b.txt": "2"})
    root.rename(elsewhere)
    moved = elsewhere / path.relative_to(root)
    outcome = read_outcome(moved)
    assert outcome is not None
    assert outcome["outputs"] == {"best": str(moved / "best"), "copy": outputs["copy"]}
    assert outcome["sources"] == {str(elsewhere / "made" / "a.txt"): "1", "/data/b.txt": "2"}
    assert handed_over(moved) == moved / "best"


def test_a_run_that_was_copied_alone_hands_over_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any name, at any depth; what another made is where it was."""
    path, made = tmp_path / "mlruns" / "spam" / "one", tmp_path / "mlruns" / "made" / "a.txt"
    run = Run.open(path)
    (path / "best").mkdir()
    made.parent.mkdir()
    made.write_text("a")
    run.finish({"best": str(path / "best")}, {}, {str(made): "1"})
    copied = tmp_path / "models" / "mine"
    shutil.copytree(path, copied)
    outcome = read_outcome(copied)
    assert outcome is not None
    assert (handed_over(copied), outcome["sources"]) == (copied / "best", {str(made): "1"})
    shutil.rmtree(copied / "best")
    assert handed_over(copied) == path / "best"
    monkeypatch.setattr(Path, "resolve", lambda _: Path("/mine"))  # as in a container
    assert handed_over(copied) == path / "best"


def test_a_headline_without_a_number_is_read_back(path: Path) -> None:
    headline = [{"metric": "f1", "before": None, "after": math.nan}]
    Run.open(path).finish({}, {}, {}, headline)
    outcome = read_outcome(path)
    assert outcome is not None
    assert outcome["headline"][0]["before"] is None
    assert math.isnan(outcome["headline"][0]["after"])


def test_numbers_that_json_lacks_are_kept_in_standard_json(path: Path) -> None:
    run = Run.open(path)
    run.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300}, step=3)
    text = (path / JOURNAL).read_text("utf-8")
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    values = {key: float(value) for key, value in parsed[-1]["values"].items()}
    assert math.isnan(values.pop("a"))
    assert values == {"b": math.inf, "c": -math.inf, "d": 1e-300}


def test_a_killed_run_loses_no_whole_line_and_is_reattached(path: Path) -> None:
    kill_while_writing(path)
    with (path / JOURNAL).open("ab") as journal:
        journal.write(b'{"time": 1, "kind": "metr')  # the line that it was writing
    run = Run.open(path)
    assert run.reattached
    run.log_metrics({"train/loss": 0.0}, step=10**6)
    steps = [line["step"] for line in lines(path, "metric")]
    assert len(steps) > 200
    assert steps == [*range(len(steps) - 1), 10**6]
    assert [line["name"] for line in lines(path, "event")] == ["created", "resumed"]


def test_a_journal_cut_anywhere_is_reopened(path: Path) -> None:
    run = Run.open(path)
    run.log_tags({"language": "中文"})
    run.fail("stop")
    content = (path / JOURNAL).read_bytes()
    whole = [end for _, end in read_journal(path)]
    for size in range(0, len(content), 7):
        (path / JOURNAL).write_bytes(content[:size])
        again = Run.open(path)
        assert again.reattached == (size >= whole[0])
        again.fail("stop")
        kept = max((end for end in whole if end <= size), default=0)
        assert (path / JOURNAL).read_bytes()[:kept] == content[:kept]
        assert len(list(read_journal(path))) == sum(end <= size for end in whole) + 3


def test_a_damaged_line_is_reported_with_its_place(path: Path) -> None:
    Run.open(path).fail("stop")
    first = next(end for _, end in read_journal(path))
    content = bytearray((path / JOURNAL).read_bytes())
    content[first : first + 4] = b"\0\0\0\0"
    (path / JOURNAL).write_bytes(content)
    with pytest.raises(ValueError, match=rf"journal.jsonl is damaged at byte {first} "):
        list(read_journal(path))


def test_only_one_process_writes_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_LOCK_TIMEOUT_S", 0.1)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    try:
        assert is_open(path)
        with pytest.raises(ValueError, match="is open in another process; wait until it ends"):
            Run.open(path)
    finally:
        writer.kill()
        writer.wait()
    assert not is_open(path)
    Run.open(path).fail("stop")


def test_threads_share_a_run(path: Path) -> None:
    run = Run.open(path)

    def work(number: int) -> None:
        for step in range(300):
            run.log_metrics({f"thread{number}": step}, step)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = metric_history(run.path)
    for number in range(6):
        assert history[f"thread{number}"] == {s: float(s) for s in range(300)}


def test_history_takes_the_last_value_of_a_repeated_step(path: Path) -> None:
    run = Run.open(path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)):
        run.log_metrics({"loss": loss}, step)
    assert metric_history(run.path)["loss"] == {1: 3.0, 2: 2.5, 3: 1.0}
    run.log_metrics({"later": 1.0}, 7)
    run.log_metrics({"later": 2.0}, 5)  # gone on with from an earlier step than before
    assert [*metric_history(run.path)["later"]] == [5, 7]


def test_elapsed_time_leaves_out_the_time_between_attempts(path: Path) -> None:
    path.mkdir(parents=True)
    events = [(100, "created"), (160, "saved"), (5000, "resumed"), (5040, "saved")]
    (path / JOURNAL).write_text(
        "".join(json.dumps({"time": t, "kind": "event", "name": n}) + "\n" for t, n in events)
    )
    assert Run.open(path).elapsed_s == pytest.approx(100, abs=5)  # 60 + 40, and this test


def test_a_clock_that_is_set_back_takes_no_time_off(path: Path) -> None:
    path.mkdir(parents=True)
    events = [(5000, "created"), (5060, "saved"), (100, "saved"), (140, "saved")]
    (path / JOURNAL).write_text(
        "".join(json.dumps({"time": t, "kind": "event", "name": n}) + "\n" for t, n in events)
    )
    assert Run.open(path).elapsed_s == pytest.approx(100, abs=5)  # 60 + 40, and this test


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (RuntimeError("no"), "FAILED"),
        ("diverged", "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_how_a_run_can_fail(path: Path, reason: BaseException | str, status: str) -> None:
    run = Run.open(path)
    run.fail(reason)
    run.fail("again")  # it has ended
    assert [line["status"] for line in lines(path, "status")] == ["RUNNING", status]
    assert read_outcome(run.path) is None


def test_secrets_are_written_nowhere(path: Path) -> None:
    run = Run.open(path, command="score --judge.api_key sk-1 --hf_token='sk-1 b' --x 2")
    run.log_params({"judge": {"api_key": "sk-1", "url": "https://me:sk-1@host/v1"}})
    run.log_tags({"HF_TOKEN": "sk-1"})
    run.log_dataset("sms", "ab" * 32, {}, "https://me:sk-1@host/sms.tsv")
    run.config({"judge": [{"password": "sk-1", "model": "m"}]})
    run.fail("GET https://me:sk-1@host/v1 failed")
    written = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"sk-1" not in written
    assert b"--x 2" in written
    assert b"https://***@host/v1" in written


def test_what_is_no_secret_is_kept() -> None:
    kept = {
        "max_tokens": 5,
        "tokenizer": "gpt2",
        "perf/tokens_per_s": 1.0,
        "eos_token": "<|endoftext|>",
        "api_key": None,
        "url": "http://localhost:8000/v1?a=b@c",
    }
    assert redact(kept) == kept


def test_a_config_that_changed_is_kept_beside(path: Path) -> None:
    run = Run.open(path)
    for lr in (1, 1, 2, 3):
        run.config({"lr": lr, "name": "中文"})
    names = ("config-1.yaml", "config-2.yaml", "config.yaml")
    assert [yaml.safe_load((path / name).read_text())["lr"] for name in names] == [1, 2, 3]
    assert "中文" in (path / "config.yaml").read_text("utf-8")
    assert {line["path"] for line in lines(path, "artifact")} == set(names)


def test_files_of_a_run(path: Path) -> None:
    run, figure = Run.open(path), Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "figures/loss.png")
    assert (path / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    run.log_table([{"a": 1}, {"b": math.nan, "a": 2}], "samples/x.json")
    table = json.loads((path / "samples" / "x.json").read_text())
    assert table == {"columns": ["a", "b"], "data": [[1, None], [2, "nan"]]}
    run.log_text("text", "samples/x.txt")
    recorded = {line["path"]: line["table"] for line in lines(path, "artifact")}
    assert recorded == {"figures/loss.png": False, "samples/x.json": True, "samples/x.txt": False}
    assert not list(path.rglob("*.tmp"))


def test_a_figure_is_not_cut_where_its_labels_end(path: Path) -> None:
    labels = [
        "Complaint about a late or missing delivery",
        "Question about an invoice or a payment",
    ]
    run = Run.open(path)
    run.log_figure(confusion_figure([[5, 1], [2, 7]], labels), "x.png")
    image = imread(path / "x.png")
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 1).all(), "white"


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "score", "--judge.api_key", "sk-1"])
    facts = environment()
    assert facts["command"] == "python -m pipeline score --judge.api_key ***"
    assert {"python", "platform", "version.torch", "version.mlflow"} <= facts.keys()
    assert all(facts[f"hardware.{key}"] for key in ("cpu", "cores", "memory_gib"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not any(key.startswith("git.") for key in environment())


def test_git_facts_tell_a_changed_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert _git_facts(tmp_path) == {}
    git("commit", "--allow-empty", "-m", "a")
    assert _git_facts(tmp_path) == {"git.commit": git("rev-parse", "HEAD"), "git.dirty": "False"}
    (tmp_path / "new.py").touch()
    assert _git_facts(tmp_path)["git.dirty"] == "True"


def test_an_editors_lock_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emacs makes a dangling link beside a file that it has not saved yet."""
    file = tmp_path / "pipeline" / "runs" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(file))
    before = code_digest.__wrapped__()
    (file.parent / ".#provenance.py").symlink_to("me@machine.1:2")
    assert code_digest.__wrapped__() == before
    file.write_text("2\n")
    assert code_digest.__wrapped__() != before


def test_imports_are_light() -> None:
    code = "import sys, pipeline.runs.tracking, pipeline.runs.run_directory; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"mlflow", "torch", "lightning", "matplotlib", "pandas"} & set(loaded.stdout.split())


def test_logging_is_cheap(path: Path) -> None:
    run = Run.open(path)
    start = time.perf_counter()
    for step in range(1000):
        run.log_metrics({"train/loss": 1.0, "train/lr": 0.1, "perf/tokens_per_s": 5.0}, step)
    per_call_s = (time.perf_counter() - start) / 1000
    assert per_call_s < 2e-3  # seen: 2e-5; a busy machine may take a hundred times as long
    assert os.path.getsize(path / JOURNAL) < 200_000  # noqa: PTH202
