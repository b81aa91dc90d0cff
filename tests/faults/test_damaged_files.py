"""Damage to a run's small files: one clear error line, or detected and recreated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules import files
from pipeline.directories import CHECKPOINTS
from pipeline.resume import interrupted_like, shorter_than
from pipeline.runs.run_directory import CONFIG, OUTCOME, Run, read_outcome
from tests.faults.test_checkpoint_faults import empty
from tests.journey import said

Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    """One that leaves no UTF-8."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def lose_a_key(path: Path) -> None:
    path.write_text(path.read_text().replace('"outputs"', '"0utputs"'))


damages = pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])


def test_an_outcome(home: Path) -> None:
    text = home.parent / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    words = ["tokenizer", "train", f"--source={text}", "--vocab_size=300", "--min_frequency=2"]
    assert said(*words)[0] == 0
    (path,) = home.glob(f"*/*/{OUTCOME}")
    content, before = path.read_bytes(), read_outcome(path.parent)
    assert before is not None
    for damage in (truncate, empty, flip_a_bit, lose_a_key):
        path.write_bytes(content)
        damage(path)
        code, _, err = said(*words)
        (line,) = (line for line in err.splitlines() if line.startswith("error:"))
        assert code == 2
        assert f"{path} is damaged; remove it" in line
    path.unlink()
    assert said(*words)[0] == 0
    again = read_outcome(path.parent)
    assert again is not None
    assert (again["outputs"], again["metrics"]) == (before["outputs"], before["metrics"])


@damages
def test_the_config_of_an_interrupted_run(damage: Damage, tmp_path: Path) -> None:
    names = ("pretrain-00000000", "pretrain-00000001-2")  # the second one was started anew
    paths = [tmp_path / "demo" / name for name in names]
    for i, path in enumerate(paths):
        run = Run.open(path)
        run.config({"data": {"seed": i}})
        run.fail("killed")
    (paths[0] / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    assert interrupted_like(paths[1]).endswith(f"{names[0]} is another: data.seed was 0, is 1")
    damage(paths[0] / CONFIG)
    text = interrupted_like(paths[1])
    assert str(paths[0]) in text
    assert f"its {CONFIG} cannot be read" in text or damage is truncate, "which may be YAML"
    (paths[0] / CONFIG).unlink()
    assert interrupted_like(paths[1]) == ""


def test_a_run_that_is_at_work_is_not_interrupted(tmp_path: Path) -> None:
    at_work, new = (Run.open(tmp_path / "demo" / f"pretrain-{i:08x}") for i in range(2))
    for run in (at_work, new):
        run.config({"data": {"seed": 1}})
    (at_work.path / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    assert interrupted_like(new.path) == ""
    at_work.fail("killed")
    text = f"the interrupted run {at_work.path} had the same options, but other files or weights"
    assert interrupted_like(new.path) == text


@damages
def test_the_outcome_of_a_shorter_run(damage: Damage, tmp_path: Path) -> None:
    old, new, other = (Run.open(tmp_path / "demo" / f"pretrain-{i:08x}") for i in range(3))
    for i, run in enumerate((old, new, other)):
        options = {"trainer": {"max_steps": 10 * (i + 1)}, "data": {"seed": i // 2}}
        run.config(options | {"ckpt_path": "x" if run is new else None})
    last = old.path / CHECKPOINTS / "step-00000010"
    last.mkdir(parents=True)
    assert shorter_than(new.path) == "", "it has not finished"
    kept = tmp_path / "a b"
    old.finish(outputs={"last": str(kept)}, metrics={}, sources={})
    assert shorter_than(new.path) == "", "its checkpoint is gone"
    kept.mkdir()
    facts = f"the finished run {old.path} is another: trainer.max_steps was 10, is 20; "
    assert shorter_than(new.path) == f"{facts}--ckpt_path '{kept}' goes on from it"
    assert shorter_than(other.path) == "", "another seed"
    damage(old.path / OUTCOME)
    assert shorter_than(new.path).startswith(f"{facts}but {old.path / OUTCOME} is damaged")


def test_a_shorter_run_does_not_go_on_from_a_longer_one(tmp_path: Path) -> None:
    for i, steps in enumerate((10, 20)):
        run = Run.open(tmp_path / "demo" / f"pretrain-{i:08x}")
        run.config({"trainer": {"max_steps": steps}})
        (run.path / CHECKPOINTS / "step-00000010").mkdir(parents=True)
        run.finish(outputs={"last": str(run.path)}, metrics={}, sources={})
    long, short = run.path, tmp_path / "demo" / "pretrain-00000000"
    assert "max_steps was 10, is 20" in shorter_than(long)
    assert shorter_than(short) == ""


@damages
def test_the_config_of_a_run_that_goes_on(damage: Damage, tmp_path: Path) -> None:
    config = {"data": {"seed": 1}}
    run = Run.open(tmp_path / "demo" / "one")
    run.config(config)
    run.fail("killed")
    whole = (run.path / CONFIG).read_text()
    damage(run.path / CONFIG)
    again = Run.open(run.path)
    again.config(config)
    again.fail("killed")
    assert (run.path / CONFIG).read_text() == whole


@damages
def test_a_remembered_digest(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_REMEMBERED_BYTES", 0)
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "big.txt"
    path.write_text("what is read once")
    digest = files.file_digests([path])
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    damage(note)
    assert files.file_digests([path]) == digest
    assert note.read_text() == digest[str(path)]
