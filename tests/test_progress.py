"""Progress output of a training run, in a terminal and in a file."""

import logging
import re
import shlex
import warnings
from pathlib import Path

import pytest
from torch.utils import _pytree

from pipeline.training.progress import quiet_libraries
from tests.journey import CONFIGS, PLAIN, TINY, Journey, outcome_of, said

WIDTH = 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# train ━━━━━━━━━━━ 8/8 loss 6.124 val 6.105 13,654 tok/s 0:00:10 00:00 left
LINE = re.compile(
    r"train +━+ 8/8 loss \d+\.\d{3} val \d+\.\d{3} [\d,]+ tok/s \d:\d\d:\d\d \d\d:\d\d left"
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "my runs"))
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    return tmp_path / "my runs" / "default"


def pretrain(journey: Journey, *words: str) -> tuple[str, str]:
    code, out, err = said(
        "fit",
        f"--config={CONFIGS}/pretrain.yaml",
        *TINY,
        f"--data.tokenizer={journey.tokenizer}",
        "--data.near_duplicates=null",
        f"--data.source=[{journey.folder / 'prose'}]",
        *words,
    )
    assert code == 0, err
    return out, err


def test_in_a_file_it_is_lines(
    tiny: Journey, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.progress.LOG_INTERVAL_S", 0.0)
    out, err = pretrain(tiny)
    lines = [line for line in err.splitlines() if line.startswith("train")]
    assert len(lines) == 9  # one a step, and the last state
    assert LINE.fullmatch(lines[-1].rstrip()), lines[-1]
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in err
    assert "Epoch" not in err
    best = outcome_of(own_home)["outputs"]["best"]
    assert out == f"{best}\n", "stdout is what the next command takes"

    again, err = pretrain(tiny)
    assert "already finished" in err
    assert again == out
    longer = re.search(r"a longer run goes on from it with (--ckpt_path .+)$", err, re.MULTILINE)
    assert longer, err
    option, last = shlex.split(longer[1])  # as a shell takes it
    _, err = pretrain(tiny, "--trainer.max_steps=10", f"{option}={last}")
    assert f"resuming from {last}" in err
    assert re.search(r"^train +━+ 10/10 ", err, re.MULTILINE), err


def test_the_report_of_a_profiler_is_shown(tiny: Journey) -> None:
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = shown.append  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.profilers")
    logger.addHandler(handler)
    try:
        pretrain(tiny, "--trainer.profiler=simple")
    finally:
        logger.removeHandler(handler)
    assert any("Profiler Report" in record.getMessage() for record in shown)


def test_metrics_that_are_of_all_ranks_raise_no_advice_to_gather_them(
    tiny: Journey, recwarn: pytest.WarningsRecorder
) -> None:
    pretrain(tiny, "--trainer.strategy=ddp")
    assert not [w for w in recwarn if "sync_dist" in str(w.message)]


def test_in_a_terminal_it_moves(tiny: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.progress.SCREEN_INTERVAL_S", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    _, err = pretrain(tiny)
    states = [state.rstrip() for state in re.split(r"[\r\n]+", CONTROL.sub("", err))]
    bars = [state for state in states if state.startswith(("train", "val"))]
    assert any(re.match(r"val +━+ [01]/1 ", bar) for bar in bars), "no validation is shown"
    assert LINE.fullmatch(bars[-1]), "the bar of the run is not the last"
    assert max(map(len, bars)) <= WIDTH


def test_it_can_be_turned_off(tiny: Journey) -> None:
    _, err = pretrain(tiny, *PLAIN)
    assert "train" not in re.sub(r"pretrain", "", err)


def test_evaluations_end_with_their_bar(tiny: Journey) -> None:
    code, _, err = said("test", f"--config={CONFIGS}/spam.yaml", f"--ckpt_path={tiny.best('spam')}")
    assert code == 0
    assert re.search(r"^test +━+ (\d+)/\1 ", err, re.MULTILINE), err


def test_a_test_is_beside_its_baseline(tiny: Journey, own_home: Path) -> None:
    words = [f"--config={CONFIGS}/spam.yaml", f"--ckpt_path={tiny.best('spam')}"]
    _, out, err = said("test", *words)
    score = r"[+-]?\d\.\d{3}"
    interval = rf"{score} \[{score}, {score}\]"
    line = (
        rf"^test accuracy: {interval}; TF-IDF \+ logistic regression {interval}; "
        rf"difference {interval}$"
    )
    assert re.search(line, out, re.MULTILINE), err
    metrics = outcome_of(own_home)["metrics"]
    low, high = metrics["test/accuracy_low"], metrics["test/accuracy_high"]
    assert f"test accuracy: {metrics['test/accuracy']:.3f} [{low:.3f}, {high:.3f}]; TF-IDF" in out
    assert f"regression {metrics['baseline/tfidf_accuracy']:.3f} [" in out
    assert f"difference {metrics['test/accuracy_minus_tfidf']:+.3f} [" in out


def test_what_is_stopped_says_how_far_it_came(
    tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.training.lit_step.LitStep.on_train_batch_end", stop)
    words = [f"--data.tokenizer={tiny.tokenizer}", "--data.near_duplicates=null"]
    words += [f"--data.source=[{tiny.folder / 'prose'}]"]
    code, _, err = said("fit", f"--config={CONFIGS}/pretrain.yaml", *TINY, *words)
    assert code == 130
    lines = [line for line in err.splitlines() if line.startswith("train")]
    assert re.match(r"train +━* +1/8 ", lines[-1]), err


def test_lightnings_way_of_asking_torch_is_not_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        _pytree.LeafSpec()
    assert caught == []
