import platform
import shutil
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import file_digests
from datamodules.sources import PYTHON_DOCS, source_digests
from pipeline.directories import path_digest
from pipeline.runs.reuse import find_run, what_changed
from pipeline.runs.run_directory import Run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "spam" / "one"


def made(sources: dict[str, str] | None = None, **outputs: str) -> dict[str, Any]:
    return {"complete": True, "outputs": outputs, "digests": {}, "sources": sources or {}}


def new_run(base: Path) -> Path:
    return find_run(base, lambda outcome: "", anew=True).path


def attempt(base: Path, *, finished: bool) -> Path:
    run = Run.open(new_run(base))
    if finished:
        run.finish({}, {}, {})
    else:
        run.fail("stop")
    return run.path


def found(base: Path, *, stale: tuple[Path, ...] = ()) -> Path:
    def change(outcome: object) -> str:
        return "stale" if next(made) in stale else ""

    made = iter(sorted(p for p in base.parent.iterdir() if (p / "outcome.json").exists())[::-1])
    path, outcome, _ = find_run(base, change)
    assert (outcome is not None) == (path / "outcome.json").exists()
    return path


def test_the_first_is_new(base: Path) -> None:
    assert find_run(base, lambda outcome: "") == (base, None, "")


def test_of_finished_ones_the_last_is_used(base: Path) -> None:
    first, second = attempt(base, finished=True), attempt(base, finished=True)
    assert found(base) == second
    assert found(base, stale=(second,)) == first
    assert found(base, stale=(first, second)) == new_run(base) == base.with_name("one-3")


def test_an_interrupted_one_is_gone_on_with_unless_a_later_one_is_finished(base: Path) -> None:
    first = attempt(base, finished=True)
    interrupted = attempt(base, finished=False)
    assert found(base) == interrupted
    later = attempt(base, finished=True)
    assert found(base) == later
    assert found(base, stale=(later,)) == first


def test_one_that_has_nothing_to_go_on_from_is_left(base: Path) -> None:
    """Of data that have changed meanwhile its losses would be those of another training."""
    run = Run.open(base)
    run.fail("stop")
    run = Run.open(base)
    run.log_metrics({"fit/perplexity": 3.0}, step=0)
    run.fail("stop")
    assert found(base) == base  # of a chain, whose stages are what it goes on from
    run = Run.open(base)
    run.log_metrics({"train/loss": 3.0}, step=1)
    run.fail("stop")
    assert found(base) == base.with_name("one-2")
    (base / "checkpoints" / ".step-00000001-0a1b2c3d.draft").mkdir(parents=True)
    assert found(base) == base.with_name("one-2")  # killed in its first save
    (base / "checkpoints" / "step-00000001").mkdir()
    assert found(base) == base


def test_weights_by_a_relative_path_that_were_joined_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    outcome = made(file_digests([tmp_path / "hf" / "config.json"]))
    assert not what_changed(outcome, {"source": "hf"})
    (tmp_path / "hf" / "chat_template.jinja").write_text("")
    assert what_changed(outcome, {"source": "hf"})


def test_a_source_that_leads_elsewhere_now_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    options = {"data.init_args.source": ["$WHERE/x.txt"]}
    monkeypatch.setenv("WHERE", str(tmp_path / "a"))
    outcome = made(source_digests(["$WHERE/x.txt"]))
    assert not what_changed(outcome, options)
    monkeypatch.setenv("WHERE", str(tmp_path / "b"))
    assert what_changed(outcome, options)


@pytest.mark.parametrize("option", ["data.source", "data.val_source", "data.test_source", "source"])
def test_a_file_that_changed_or_joined_a_folder_is_a_change(option: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    outcome = made(source_digests([str(tmp_path)]))
    options = {"data.source": None, option: str(tmp_path)}
    assert not what_changed(outcome, options)
    (tmp_path / "a.json").write_text("[3]")
    assert what_changed(outcome, options)
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text("[2]")
    assert what_changed(outcome, options)


def test_a_finished_run_holds_while_what_it_made_is_as_it_was(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.mkdir()
    (best / "model.safetensors").write_text("weights")
    outcome = made(best=str(best))
    pinned = {**outcome, "digests": {"best": path_digest(best)}}
    assert not what_changed(outcome, {})
    assert not what_changed(pinned, {})
    assert what_changed({**outcome, "complete": False}, {})
    (best / "model.safetensors").write_text("others")
    assert not what_changed(outcome, {})
    assert what_changed(pinned, {})
    shutil.rmtree(best)
    assert what_changed(outcome, {})


def test_a_folder_whose_files_changed_names_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    before = path_digest(folder)
    (folder / "a.json").rename(folder / "b.json")
    assert path_digest(folder) != before


def test_what_can_be_had_again_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))
    docs = f"{PYTHON_DOCS}@{platform.python_version()}"
    for name, holds in {
        str(tmp_path / "cache" / "fetched.txt"): True,
        str(tmp_path / "own.txt"): False,
        docs: True,
        f"{docs}0": False,
    }.items():
        assert (not what_changed(made({name: "ab" * 32}), {})) == holds, name


def test_weights_are_recorded_by_other_paths_than_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("weights")
    outcome = made()
    assert not what_changed(
        outcome, {"model.source": str(tmp_path), "source": str(tmp_path / "gone")}
    )
    assert what_changed(outcome, {"data.source": str(tmp_path)})
