"""A stopped run resumes exactly where it was, whatever it trains and however it was stopped."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from pipeline import checkpoint as files
from tests.faults.processes import Infinite
from tests.faults.test_checkpoint_faults import Keep
from tests.journey import Journey
from tests.training import (
    LORA,
    Losses,
    classifier,
    fit,
    instruction_data,
    language_model,
    pretraining_data,
    spam_data,
)

EVERY = 3  # steps between checkpoints; an epoch has another number of steps
OPTIONS: dict[str, tuple[Any, ...]] = {
    "trained": ("pretraining", "classifier", "lora"),
    "precision": ("32-true", "bf16-mixed"),
    "length": ("max_steps", "max_epochs"),
    "validation": (False, True),
    "num_workers": (0, 1),
}
Case = dict[str, Any]
GRID = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(case.items(), 2))


def covering(cases: Sequence[Case]) -> Iterator[Case]:
    """Few cases in which every value of an option meets every value of every other."""
    missing = set().union(*map(pairs, cases))
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield best


def named(case: Case) -> str:
    return "-".join(f"{key}={case[key]}" for key in ("validation", "num_workers")) + "-".join(
        ["", *(case[key] for key in ("trained", "precision", "length"))]
    )


class KeepAll(pl.Callback):
    """Copies every checkpoint away before it is pruned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        for path in (Path(trainer.default_root_dir) / files.CHECKPOINTS).glob("step-*"):
            if not (self.folder / path.name).exists():
                try:
                    shutil.copytree(path, self.folder / path.name)
                except (FileNotFoundError, shutil.Error):  # pruned meanwhile, from another thread
                    shutil.rmtree(self.folder / path.name, ignore_errors=True)


def make(case: Case, journey: Journey) -> tuple[Any, Any]:
    """Module and data; all with dropout."""
    workers = {"num_workers": case["num_workers"]}
    if case["trained"] == "pretraining":
        data: Any = pretraining_data(
            journey.tokenizer, journey.folder / "prose", batch_size=32, **workers
        )
        return language_model(), data
    if case["trained"] == "classifier":
        return classifier(), spam_data(
            journey.tokenizer, batch_size=16, train_fraction=0.1, **workers
        )
    base = str(journey.best("pretrain"))
    data = instruction_data(journey.tokenizer, batch_size=4, train_fraction=0.08, **workers)
    return language_model(gpt=None, init_from=base, lora=LORA), data


def train(
    case: Case,
    journey: Journey,
    folder: Path,
    *,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[pl.Trainer, Losses, Path]:
    """The largest loss counts as the best: it comes early, and a resume has to remember it."""
    module, data = make(case, journey)
    length = {"max_steps": 11} if case["length"] == "max_steps" else {"max_epochs": 3}
    validation = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer, losses = fit(
        module,
        data,
        folder,
        every_n_steps=EVERY,
        precision=case["precision"],
        callbacks=[Keep(mode="max"), *callbacks],
        **length,
        **(validation if case["validation"] else {"limit_val_batches": 0}),
        **options,
    )
    return trainer, losses, folder / "checkpoints" / files.step_name(trainer.global_step)


def equal_after_stops(case: Case, journey: Journey, folder: Path, n_stops: int | None) -> int:
    """Stops at one checkpoint, goes on to the next, stops there, and so on; how often it did."""
    copies = folder / "copies"
    _, whole, last = train(case, journey, folder / "whole", callbacks=[KeepAll(copies)])
    path = min(copies.iterdir())
    for stop in itertools.count(1):
        step = int(path.name.removeprefix("step-"))
        copies, again = folder / f"copies-{stop}", folder / f"again-{stop}"
        callbacks = [KeepAll(copies)]
        for kept in files.steps_in(folder / "whole" / "checkpoints"):  # the best so far among them
            if kept.name <= path.name:
                shutil.copytree(kept, again / "checkpoints" / kept.name)
        _, tail, end = train(case, journey, again, ckpt_path=path, callbacks=callbacks)
        assert tail.sample_ids == whole.sample_ids[step:], f"{path.name}: other samples"
        assert tail.losses == whole.losses[step:], f"{path.name}: other losses"
        assert end.name == last.name
        assert_equal_checkpoints(end, last)
        later = [copy for copy in copies.glob("step-*") if copy.name > path.name]
        if stop == n_stops or not later:
            break
        path = min(later)
    return stop


def assert_equal_checkpoints(ours: Path, theirs: Path) -> None:
    """Weights, optimizer, schedule, position, random state, best: bit by bit."""
    for name in {files.WEIGHTS, files.ADAPTER_WEIGHTS} & {path.name for path in theirs.iterdir()}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert_equal(files.read_training(ours), files.read_training(theirs), "training")


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            if not str(key).startswith("epoch_loop.val_loop"):  # counts runs of its own
                assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("case", covering(GRID), ids=named)
def test_resumed_equals_uninterrupted(case: Case, tiny: Journey, tmp_path: Path) -> None:
    assert equal_after_stops(case, tiny, tmp_path, n_stops=1) == 1


def test_steps_that_were_skipped_stay_counted(tiny: Journey, tmp_path: Path) -> None:
    case, copies = GRID[0], tmp_path / "copies"
    callbacks = [KeepAll(copies), Infinite(2)]
    _, _, last = train(case, tiny, tmp_path / "whole", callbacks=callbacks)
    _, _, end = train(case, tiny, tmp_path / "again", ckpt_path=min(copies.iterdir()))
    assert files.read_training(last)["skipped"]["in_all"] == 1
    assert_equal_checkpoints(end, last)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=named)
def test_resumed_from_any_checkpoint_equals_uninterrupted(
    case: Case, tiny: Journey, tmp_path: Path
) -> None:
    assert equal_after_stops(case, tiny, tmp_path, n_stops=None) >= 2


def test_the_cases_cover_all_pairs() -> None:
    cases = list(covering(GRID))
    assert set().union(*map(pairs, cases)) == set().union(*map(pairs, GRID))
    assert len(cases) < len(GRID) / 4
