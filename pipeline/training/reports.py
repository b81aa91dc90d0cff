"""What a Lightning stage reports at its end: figures, baselines, rows of the chain's table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.baselines import MAX_TRAIN_BYTES, compression_baselines
from datamodules.pretraining import PretrainingDataModule
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.console import warn
from pipeline.evaluation.responses import write_lines
from pipeline.runs.journal import metric_history
from pipeline.runs.run_directory import Run, lines_of, read_outcome
from pipeline.training.figures import loss_curves

Prediction = dict[str, Tensor]
PREDICTIONS = "predictions.jsonl"
NO_THIRD_SPLIT = (
    "pretraining has no third split: this is the held-out text, which chose the best checkpoint "
    "unless data.val_source names another here."
)


@dataclass(frozen=True)
class Report:
    """What a stage reports to the journal and to the chain's table."""

    metrics: dict[str, float]
    headline: list[dict[str, Any]] = field(default_factory=list)  # rows: metric, before, after
    lines: list[str] = field(default_factory=list)  # printed instead of the headline, if any


def report_fit(run: Run, data: StepDataModule, metrics: dict[str, float]) -> Report:
    """Loss curves, from the run's journal, and the validation metrics of the best checkpoint.

    For pretraining, also the scores of a compressor and a 5-gram model on the same text.
    """
    history = metric_history(run.path)
    tokens, known = history.get("train/tokens", {}), history.get("train/loss", {})
    losses = [(n, int(tokens[n]), loss) for n, loss in known.items() if n in tokens]
    if losses:
        val = list(history.get("val/loss", {}).items())
        unit = "text" if isinstance(data, TextClassificationDataModule) else "token"
        run.log_figure(loss_curves(losses, val, unit), "figures/loss.png")
    if not metrics:  # trained without validation
        return Report({})
    labels = data.label_names if isinstance(data, TextClassificationDataModule) else ()
    guess = math.log(len(labels) or data.tokenizer.n_vocab)
    if not metrics.get("val/loss", guess - 1) < guess:
        warn(
            f"the best val/loss, {metrics['val/loss']:.3f}, is no lower than that of guessing "
            f"blindly, {guess:.3f}; lower model.optimizer.lr, or train longer."
        )
    if not isinstance(data, PretrainingDataModule):
        key = "val/accuracy" if "val/accuracy" in metrics else "val/loss"
        return Report(metrics, [{"metric": key, "before": None, "after": metrics[key]}])
    baselines = compression_baselines(data.train_bytes(MAX_TRAIN_BYTES), data.heldout_bytes())
    beside = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    row = {
        "metric": f"bits per byte, held-out ({beside})",
        "before": None,
        "after": metrics["val/bits_per_byte"],
    }
    named = {f"baseline/{name}_bits_per_byte": value for name, value in baselines.items()}
    return Report({**metrics, **named}, [row])


def report_language_model(data: StepDataModule, metrics: dict[str, float]) -> Report:
    """The loss of a test; for pretraining with a note on the text that it is of."""
    row = {"metric": "test/loss", "before": None, "after": metrics["test/loss"]}
    is_val = isinstance(data, PretrainingDataModule)
    return Report(metrics, [row], [*lines_of([row]), NO_THIRD_SPLIT] if is_val else [])


def prediction_rows(data: Any, outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Lightning's predictions as one JSON object per sample, in order of sample id."""
    rows = []
    for prediction in (p for batch in outputs for p in batch):
        if "probabilities" not in prediction:
            rows.append(prediction)
            continue
        for i, row in zip(
            prediction["sample_ids"].tolist(), prediction["probabilities"], strict=True
        ):
            named = dict(zip(data.label_names, (round(p, 6) for p in row.tolist()), strict=True))
            predicted = data.label_names[int(row.argmax())]
            row = {"sample_id": i, "text": data.text(i), "predicted": predicted}
            rows.append({**row, "probabilities": named})
    return sorted(rows, key=lambda row: row["sample_id"])


def log_predictions(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes predictions into the run, one JSON line per sample."""
    write_lines(run.path / PREDICTIONS, rows)
    run.log_artifact(PREDICTIONS)


def hand_over(path: Path) -> None:
    """Prints what the next command takes from a run: its best checkpoint, or its predictions."""
    outcome = read_outcome(path)
    for name in ("best", "predictions"):
        if outcome and name in outcome["outputs"]:
            print(outcome["outputs"][name])
