"""What a Lightning stage says when it ends: figures, baselines, the rows of the chain's table."""

import itertools
import math
import pydoc
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.baselines import MAX_TRAIN_BYTES, compression_baselines, tfidf_baseline
from datamodules.pretraining import PretrainingDataModule
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.arguments import construct
from pipeline.console import say, warn
from pipeline.evaluation.classification import Labels, classification_statistics
from pipeline.evaluation.metrics import Array, bootstrap_all, widened
from pipeline.evaluation.responses import write_lines
from pipeline.resume import changed_files
from pipeline.runs.journal import metric_history
from pipeline.runs.run_directory import Run, lines_of
from pipeline.training.figures import confusion_figure, loss_curves

Prediction = dict[str, Tensor]
PREDICTIONS = "predictions.jsonl"
NO_THIRD_SPLIT = (
    "pretraining has no third split: this is the held-out text, which chose the best checkpoint "
    "unless data.val_source names another here."
)


@dataclass(frozen=True)
class Report:
    """What a stage hands to the journal and to the chain's table.

    Attributes:
        metrics: the stage's result.
        headline: rows {"metric", "before", "after"} of the chain's table.
        lines: what is said of it, where that is more.
    """

    metrics: dict[str, float]
    headline: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def report_fit(run: Run, data: StepDataModule, metrics: dict[str, float]) -> Report:
    """Loss curves; for pretraining, what a compressor and a 5-gram model reach on the same text.

    Args:
        run: the run, whose journal holds the losses.
        data: the data that was trained on.
        metrics: validation metrics of the best checkpoint.
    """
    history = metric_history(run.path)
    tokens = history.get("train/tokens", {})
    losses = [
        (step, int(tokens[step]), loss)
        for step, loss in history.get("train/loss", {}).items()
        if step in tokens
    ]
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


def report_test(
    run: Run,
    data: StepDataModule,
    metrics: dict[str, float],
    predictions: Sequence[Prediction],
    training: Mapping[str, Any] | None = None,
) -> Report:
    """A classifier's scores with 95 % intervals, beside those of a bag of words on the same texts.

    Args:
        run: gets the confusion matrix and the predictions.
        data: the data module whose test set was predicted.
        metrics: what the module logged itself.
        predictions: micro-batches of a classifier's `predict_step`; empty for a language model.
        training: `data` and `dataset` of what the classifier learned, where it is known.
    """
    if not isinstance(data, TextClassificationDataModule):
        row = {"metric": "test/loss", "before": None, "after": metrics["test/loss"]}
        is_val = isinstance(data, PretrainingDataModule)
        return Report(metrics, [row], [*lines_of([row]), NO_THIRD_SPLIT] if is_val else [])
    labels, ours = in_order(predictions)
    predicted = zip(prediction_rows(data, [predictions]), labels, strict=True)
    log_predictions(run, [{**row, "label": data.label_names[label]} for row, label in predicted])
    counts = np.zeros((len(data.label_names), len(data.label_names)), dtype=int)
    np.add.at(counts, (labels, ours.argmax(axis=1)), 1)
    run.log_figure(confusion_figure(counts.tolist(), data.label_names), "figures/confusion.png")
    say("comparing with TF-IDF + logistic regression ...")
    learned = _learned(data, training)
    theirs = tfidf_baseline(
        learned.texts("train"),
        learned.labels("train"),
        learned.texts("val"),
        learned.labels("val"),
        data.texts("test"),
    )
    scores = compare(labels, ours, theirs, data.keys("test"))
    is_binary = len(data.label_names) == 2
    f1 = f"f1 of {data.label_names[1]}" if is_binary else "f1, mean of the labels'"
    called = {"accuracy": "accuracy", "f1": f1}
    rows = [
        {
            "metric": f"test {words} (before: TF-IDF + logistic regression)",
            "before": scores[f"baseline/tfidf_{name}"],
            "after": scores[f"test/{name}"],
        }
        for name, words in called.items()
    ]
    lines = [beside_tfidf(scores, name, words) for name, words in called.items()]
    if not is_binary:
        for name, values in by_label(labels, ours.argmax(1), data.label_names).items():
            shown = [f"{key} {value:.3f}" for key, value in values.items() if key != "texts"]
            lines.append(f"  {name}: {', '.join(shown)}, of {values['texts']} texts")
            scores |= {f"test/{key}/{name}": float(value) for key, value in values.items()}
    return Report({**metrics, **scores}, rows, lines)


def _learned(
    data: TextClassificationDataModule, training: Mapping[str, Any] | None
) -> TextClassificationDataModule:
    """The data whose training set a classifier learned: those here, or its own of other files."""
    if training is None or training["dataset"].get("digest") == data.fingerprint["digest"]:
        return data
    kind, given = type(data), training["data"] or {}
    try:
        if pydoc.locate(str(given.get("class_path"))) is not kind:
            raise ValueError("it does not say how they were read.")
        learned = construct(kind, given["init_args"], "data")
        learned.read()
        if changed := changed_files(
            training["dataset"]["sources"], learned.files.facts()["sources"]
        ):
            raise ValueError(f"{', '.join(changed)}: not what was learned.")
    except (OSError, ValueError, AttributeError, TypeError) as error:  # of another's class
        warn(f"TF-IDF learns the texts of data.source, not those that the checkpoint did: {error}")
        return data
    return learned


def by_label(labels: Labels, predicted: Labels, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of each label, NaN where there is none, and how many texts it has.

    Args:
        labels: (N,) true classes.
        predicted: (N,) classes.
        names: (K,) of the classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), zero_division=np.nan
    )
    return {  # where nothing is right the counts come as floats
        name: {"precision": precision, "recall": recall, "f1": f1, "texts": int(n)}
        for name, precision, recall, f1, n in zip(names, *found, strict=True)
    }


def beside_tfidf(scores: Mapping[str, float], name: str, words: str) -> str:
    """A score, called `words`, the baseline's, and the paired difference, with 95 % intervals."""

    def shown(key: str, form: str = ".3f") -> str:
        low, high = scores[f"{key}_low"], scores[f"{key}_high"]
        return f"{scores[key]:{form}} [{low:{form}}, {high:{form}}]"

    return (
        f"test {words}: {shown(f'test/{name}')}; TF-IDF + logistic regression "
        f"{shown(f'baseline/tfidf_{name}')}; difference "
        f"{shown(f'test/{name}_minus_tfidf', '+.3f')}"
    )


def compare(
    labels: Labels, ours: Array, theirs: Array, keys: Sequence[str] | None = None
) -> dict[str, float]:
    """Scores of two classifiers on the same items, and the paired difference, with 95 % intervals.

    Where no resample differs an interval is `widened`: that of accuracy by all items, of precision
    by those that were given a label, others by those that have it: of two labels the rarer one, of
    more each, whose mean they are.

    Args:
        labels: (N,) true classes.
        ours: (N, K) probabilities.
        theirs: (N, K) probabilities of the baseline.
        keys: (N,) equal for texts that say the same thing, which are no observations of their own.
    """
    positive = 1 if ours.shape[1] == 2 else None
    mine = classification_statistics(labels, ours.argmax(1), ours, positive=positive)
    base = classification_statistics(labels, theirs.argmax(1), theirs, positive=positive)
    difference = "test/{}_minus_tfidf"
    models = {"test/{}": ours, "baseline/tfidf_{}": theirs}
    units, present = keys or range(len(labels)), set(labels.tolist())

    def both_and_difference(weights: Array) -> Array:
        values = [(mine[name](weights), base[name](weights)) for name in mine]
        return np.concatenate([(own, other, own - other) for own, other in values])

    def n_behind(name: str, form: str) -> list[int]:
        if name == "accuracy":
            return [len(set(units))]
        given = [model.argmax(1) for of, model in models.items() if form in (of, difference)]
        behind = given if name == "precision" else [labels]
        counts = min((_n_of_each(classes, units, present) for classes in behind), key=min)
        return counts if positive is None else [min(counts)]

    estimates = bootstrap_all(both_and_difference, len(labels), keys=keys)
    scores: dict[str, float] = {}
    for (name, form), estimate in zip(
        itertools.product(mine, (*models, difference)), estimates, strict=True
    ):
        lowest = -1.0 if form == difference else 0.0
        estimate = widened(estimate, *n_behind(name, form), scale=1.0, lowest=lowest)
        key = form.format(name)
        scores[key] = estimate.value
        scores[f"{key}_low"], scores[f"{key}_high"] = estimate.low, estimate.high
    return scores


def _n_of_each(classes: Labels, keys: Iterable[Any], among: Iterable[int]) -> list[int]:
    """How many different items have each class; at least 1."""
    counts = Counter(c for c, _ in set(zip(classes.tolist(), keys, strict=True)))
    return [max(1, counts[c]) for c in among]


def prediction_rows(data: Any, outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Lightning's predictions as one JSON object a sample, in the order of the samples' ids."""
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


def in_order(predictions: Sequence[Prediction]) -> tuple[Labels, Array]:
    """Labels (N,) and probabilities (N, K) by sample id; micro-batches are sorted by length.

    Raises:
        ValueError: where the model overflowed, and a text has no label.
    """
    ids, labels, probabilities = (
        torch.cat([prediction[key] for prediction in predictions]).cpu().numpy()
        for key in ("sample_ids", "label", "probabilities")
    )
    if len(odd := ids[np.isnan(probabilities).any(axis=1)]):
        raise ValueError(
            f"{len(odd)} of {len(ids)} texts, such as sample {odd.min()}, have NaN for "
            "probabilities: the model overflows on them; give trainer.precision 32-true."
        )
    order = ids.argsort()
    return labels[order], probabilities[order].astype(np.float64)


def log_predictions(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keeps them in the run, one JSON line a sample."""
    write_lines(run.path / PREDICTIONS, rows)
    run.log_artifact(PREDICTIONS)
