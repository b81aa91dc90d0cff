"""The checkpoint of another run is never resumed by mistake: the differences are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.tokenizer import train_tokenizer
from pipeline.checkpoint import newest_valid, read_meta
from pipeline.training.lit_step import LitStep
from tests.journey import Journey
from tests.training import ADAMW, LORA, TINY, classifier, fit, spam_data

SHORT: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0}


@pytest.fixture(scope="module")
def saved(tiny: Journey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps of a classifier."""
    folder = tmp_path_factory.mktemp("saved")
    fit(classifier(), spam_data(tiny.tokenizer), folder, **SHORT)
    path = newest_valid(folder / "checkpoints")
    assert path is not None
    return path


def resume(saved: Path, module: LitStep, data: Any, folder: Path, **options: Any) -> list[float]:
    """The losses from there on."""
    options = {**SHORT, "max_steps": 3, **options}
    _, recorded = fit(module, data, folder, ckpt_path=saved, **options)
    return recorded.losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, r"data\.seed was 1, is 2"),
        ({"batch_size": 4}, r"data\.batch_size was 8, is 4"),
        (
            {"max_length": 32},
            r"data\.max_length was 64, is 32; data\.samples was",
        ),
        ({"split_seed": 2}, r"data\.samples was"),
    ],
)
def test_other_data(
    change: dict[str, Any], message: str, saved: Path, tiny: Journey, tmp_path: Path
) -> None:
    data = spam_data(tiny.tokenizer, **change)
    with pytest.raises(ValueError, match=message) as caught:
        resume(saved, classifier(), data, tmp_path)
    assert "--run.resume never" in str(caught.value)
    assert "--run.allow_changes true" in str(caught.value)


def test_another_tokenizer(saved: Path, tiny: Journey, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    train_tokenizer(["the spam and the ham"], vocab_size=280, min_frequency=1).save(other)
    with pytest.raises(ValueError, match=r"data\.tokenizer was \w{12}, is \w{12}"):
        resume(saved, classifier(), spam_data(other), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpt": replace(TINY, n_layer=1)}, r"model\.gpt\.n_layer was 2, is 1"),
        ({"gpt": replace(TINY, dropout=0.2)}, r"model\.gpt\.dropout was 0\.1, is 0\.2"),
        ({"trainable": "head"}, r"model\.n_trained was \d+, is \d+"),
    ],
)
def test_another_model(
    options: dict[str, Any], message: str, saved: Path, tiny: Journey, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        resume(saved, classifier(**options), spam_data(tiny.tokenizer), tmp_path)


def test_another_base(tiny: Journey, tmp_path: Path) -> None:
    bases = {"gpt": None, "lora": LORA, "trainable": "lora"}
    own, other = (str(tiny.best(stage)) for stage in ("pretrain", "instruct"))
    fit(classifier(init_from=own, **bases), spam_data(tiny.tokenizer), tmp_path, **SHORT)
    path = newest_valid(tmp_path / "checkpoints")
    assert path is not None
    again = classifier(init_from=other, **bases)  # the base, with its adapter merged
    with pytest.raises(ValueError, match="which holds other weights"):
        resume(path, again, spam_data(tiny.tokenizer), tmp_path / "again")


def test_another_optimizer_is_refused_even_if_changes_are_allowed(
    saved: Path, tiny: Journey, tmp_path: Path
) -> None:
    """Its settings come back with its state: a new rate would have no effect."""
    module = classifier(optimizer=replace(ADAMW, lr=0.5))
    module.allow_changes = True
    with pytest.raises(ValueError, match=r"model\.optimizer\.lr was 0\.001, is 0\.5.*init_from"):
        resume(saved, module, spam_data(tiny.tokenizer), tmp_path)


def test_another_precision(saved: Path, tiny: Journey, tmp_path: Path) -> None:
    data = spam_data(tiny.tokenizer)
    with pytest.raises(ValueError, match=r"trainer\.precision was 32-true, is bf16-mixed"):
        resume(saved, classifier(), data, tmp_path, precision="bf16-mixed")


def test_another_number_of_processes(
    saved: Path, tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = read_meta(saved)
    meta["identity"]["trainer.world_size"] = "2"
    monkeypatch.setattr("pipeline.checkpoint.read_meta", lambda path: meta)
    with pytest.raises(ValueError, match=r"trainer\.world_size was 2, is 1"):
        resume(saved, classifier(), spam_data(tiny.tokenizer), tmp_path)


def test_an_adapter_where_there_was_none(saved: Path, tiny: Journey, tmp_path: Path) -> None:
    base = str(tiny.best("pretrain"))
    module = classifier(gpt=None, init_from=base, lora=LORA, trainable="lora")
    with pytest.raises(ValueError, match="belongs to the base None"):
        resume(saved, module, spam_data(tiny.tokenizer), tmp_path)


def test_what_decides_memory_alone_may_change(tiny: Journey, tmp_path: Path) -> None:
    """And changes nothing; without dropout, whose draws fall otherwise in other micro-batches."""
    gpt = replace(TINY, dropout=0.0)
    fit(classifier(gpt=gpt), spam_data(tiny.tokenizer), tmp_path, **SHORT)
    path = newest_valid(tmp_path / "checkpoints")
    assert path is not None
    same, other = (
        resume(
            path, classifier(gpt=gpt), spam_data(tiny.tokenizer, max_tokens=n), tmp_path / f"{n}"
        )
        for n in (256, 128)
    )
    assert len(same) == 1
    assert other == pytest.approx(same, rel=1e-5)  # float32: the same sum, in parts


def test_changes_that_are_allowed_are_said(
    saved: Path, tiny: Journey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = classifier()
    module.allow_changes = True
    resume(saved, module, spam_data(tiny.tokenizer, batch_size=4), tmp_path)
    assert "data.batch_size was 8, is 4" in capsys.readouterr().err
