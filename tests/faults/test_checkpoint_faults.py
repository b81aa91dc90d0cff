"""Checkpoints that are damaged or cannot be written: refused by name; the others remain."""

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from pipeline import checkpoint as files
from pipeline.checkpoint import newest_valid, verify_checkpoint
from pipeline.directories import CheckpointError
from pipeline.models import load
from pipeline.training.checkpoint_callback import Checkpoints, DirectoryCheckpointIO
from pipeline.weights.reading import EXPORT
from tests.journey import Journey, said
from tests.training import classifier, fit, spam_data

VALIDATED: dict[str, Any] = {
    "max_steps": 10,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_every_file_is_verified_whatever_reads_it(
    stage: str, damage: Callable[[Path], None], tiny: Journey, tmp_path: Path
) -> None:
    """Of a full checkpoint and of an adapter's; as a model, as training state, from the shell."""
    whole = tiny.best(stage)
    names = sorted(path.name for path in whole.iterdir())
    assert {files.META, files.TRAINING, files.MANIFEST} <= set(names)
    for name in names:
        path = tmp_path / name / whole.name
        shutil.copytree(whole, path)
        damage(path / name)
        for read in (load, DirectoryCheckpointIO().load_checkpoint):
            with pytest.raises(CheckpointError, match=name):
                read(path)
        code, _, err = said("generate", f"--ckpt={path}", "--prompt=hi")
        assert (code, err.count("error:")) == (2, 1)
        assert name in err


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("checkpoints/step-*"))


class Keep(pl.Callback):
    """Puts other policies in the place of the usual one."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        (checkpoints,) = (c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore
        for name, value in self.options.items():
            setattr(checkpoints, name, value)


def test_the_last_and_the_best_are_kept(tiny: Journey, tmp_path: Path) -> None:
    """The loss falls, so that the largest ones are not among the last."""
    keep = Keep(keep_last=2, keep_best=2, mode="max")
    data = spam_data(tiny.tokenizer)
    trainer, _ = fit(classifier(), data, tmp_path, callbacks=[keep], **VALIDATED)
    (checkpoints,) = (c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore
    assert len(checkpoints.best) == 2
    assert not {8, 10} & set(checkpoints.best), "the last are the best: nothing is shown"
    assert set(steps(tmp_path)) == {8, 10} | set(checkpoints.best)


class SpoilFirst(pl.Callback):
    """Makes a number of nothing of the first validation; the weights are what they were."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step == 2:
            self.weight = module.model.classifier.weight.detach().clone()
            module.model.classifier.weight.fill_(math.nan)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step == 2:
            module.model.classifier.weight.copy_(self.weight)


def test_no_number_is_worse_than_any(tiny: Journey, tmp_path: Path) -> None:
    data, callbacks = spam_data(tiny.tokenizer), [SpoilFirst(), Keep(keep_best=5)]
    trainer, _ = fit(classifier(), data, tmp_path, callbacks=callbacks, **VALIDATED)
    (checkpoints,) = (c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore
    *better, (worst, entry) = checkpoints.best.items()
    assert worst == 2
    assert math.isnan(entry["value"])
    values = [entry["value"] for _, entry in better]
    assert values == sorted(values)
    assert math.isfinite(values[0])


def test_the_only_valid_one_is_never_removed(
    tiny: Journey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a disk that loses what was just written, once a step has been reached."""
    write = files.write_checkpoint

    def losing(path: Path, writers: files.Writers) -> None:
        write(path, writers)
        if path.name == files.step_name(6):
            flip_a_bit(path / files.WEIGHTS)

    monkeypatch.setattr(files, "write_checkpoint", losing)
    options = {"max_steps": 6, "limit_val_batches": 0}
    fit(classifier(), spam_data(tiny.tokenizer), tmp_path, every_n_steps=3, **options)
    assert steps(tmp_path) == [3, 6]
    assert "step-00000006/model.safetensors is missing or damaged" in capsys.readouterr().err
    valid = newest_valid(tmp_path / files.CHECKPOINTS)
    assert valid is not None
    assert valid.name == "step-00000003"


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_costs_the_last_steps_alone(
    asynchronous: str,
    words: list[str],
    home: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(small_disk))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}.db")
    words = [*words, "--data.num_workers=0", "--checkpoints.keep_last=20"]
    words += [f"--checkpoints.asynchronous={asynchronous}"]
    code, _, err = said(*words)
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "could not be written" in line
    assert "then repeat the command" in line
    whole = sorted(small_disk.glob("default/*/checkpoints/step-*"))
    assert whole, err
    for path in whole:
        verify_checkpoint(path)
    assert not list(small_disk.glob("default/*/checkpoints/.*")), "half of one is left"

    size = "remount,size=100m"
    subprocess.run(["mount", "-o", size, str(small_disk)], check=True)
    code, _, err = said(*words)
    assert code == 0, err
    assert f"resuming from {whole[-1]}" in err


@pytest.mark.parametrize("command", ["huggingface", "gguf", "import", "merge"])
def test_a_full_disk_is_named_by_whatever_writes_a_model(
    command: str, tiny: Journey, home: Path, small_disk: Path
) -> None:
    """Its file is begun and not ended; what safetensors and GGUF say of that names no path."""
    ckpt = f"--ckpt={tiny.best('instruct' if command == 'merge' else 'pretrain')}"
    words = ["export", ckpt, f"--format={command}"]
    if command == "merge":
        words = ["merge", ckpt]
    elif command == "import":
        source = small_disk.parent / "published"
        assert said("export", ckpt, "--format=huggingface", f"--output={source}")[0] == 0
        (source / EXPORT).unlink()
        words = ["import", f"--source={source}"]
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 64 * 2**10))
    words.append(f"--output={small_disk / 'model'}")
    code, _, err = said(*words)
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: {small_disk / 'model'} could not be written (")
    assert "Make room, then repeat the command." in line
    assert list(small_disk.iterdir()) == [filler], "half of it is left"
    filler.unlink()
    assert said(*words)[0] == 0


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a machine that stops leaves a whole checkpoint, or none of that name."""
    done: list[tuple[str, Any]] = []
    fsync, rename, write_text = os.fsync, Path.rename, Path.write_text

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("flush", os.fstat(descriptor).st_ino))

    def recording_rename(self: Path, target: Path) -> Path:
        done.append(("rename", target))
        return rename(self, target)

    def recording_write(self: Path, *args: Any, **options: Any) -> int:
        done.append(("write", self.name))
        return write_text(self, *args, **options)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    monkeypatch.setattr(Path, "write_text", recording_write)
    path = tmp_path / "step-00000001"
    files.write_checkpoint(path, {name: lambda file: file.write_text("x") for name in ("z", "b")})
    inside = {("flush", file.stat().st_ino) for file in (*path.iterdir(), path)}
    assert done[:3] == [("write", "z"), ("write", "b"), ("write", files.MANIFEST)]
    assert len(inside) == 4
    assert set(done[3:7]) == inside
    assert done[7:] == [("rename", path), ("flush", tmp_path.stat().st_ino)]


def test_a_file_system_that_refuses_is_named(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")
            file.flush()

    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("/dev/full is Linux's")
    path = tmp_path / "step-00000001"
    with pytest.raises(OSError, match=r"step-00000001 could not be written \(.*No space left"):
        files.write_checkpoint(path, {"weights": full})
    assert list(tmp_path.iterdir()) == []
