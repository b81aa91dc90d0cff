"""Report of a classifier's test: scores with intervals, compared with others on the same texts."""

import itertools
import pydoc
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from datamodules.baselines import tfidf_baseline
from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.arguments import construct
from pipeline.checkpoint import stem_of
from pipeline.console import say, warn
from pipeline.evaluation.classification import MEASURES, Labels, classification_statistics
from pipeline.evaluation.metrics import Array, bootstrap_all, widened
from pipeline.held_out import check_held_out
from pipeline.inference import label_probabilities, load_classifier
from pipeline.models import Loaded
from pipeline.resume import changed_files
from pipeline.runs.run_directory import Run
from pipeline.training.figures import confusion_figure
from pipeline.training.reports import Prediction, Report, log_predictions, prediction_rows

OWN = "test/{}"  # keys of the classifier's own metrics


class Rival(NamedTuple):
    """What a classifier is compared with; keys are format strings that take a measure's name."""

    words: str  # its name in reports
    own: str  # key of its metrics
    difference: str  # key of the classifier's metrics minus these


TFIDF = Rival("TF-IDF + logistic regression", "baseline/tfidf_{}", "test/{}_minus_tfidf")


def read_rival(source: str, data: StepDataModule) -> tuple[Rival, Loaded]:
    """Reads another classifier's checkpoint; called before a test, so that a mistake costs none.

    Raises:
        ValueError: it is no classifier, has other labels, or may have trained on held-out texts.
    """
    if not isinstance(data, TextClassificationDataModule):
        raise ValueError("--before compares classifiers, this is none; leave it out.")
    loaded, called = load_classifier(source), f"before ({source})"
    data.setup("test")
    names = loaded.meta["label_names"]
    if names != data.label_names:  # their order changes the split, too
        raise ValueError(
            f"{called} has the labels {names}, here they are {data.label_names}; a comparison "
            "needs the same, in the same order (data.label_names)."
        )
    facts, keys = data.fingerprint, data.keys("test")
    check_held_out(loaded.meta, data.config, facts, ["test"], keys, called=called)
    return Rival(stem_of(source), "before/{}", "test/{}_minus_before"), loaded


def report_classifier(
    run: Run,
    data: TextClassificationDataModule,
    metrics: dict[str, float],
    predictions: Sequence[Prediction],
    training: Mapping[str, Any] | None = None,
    other: tuple[Rival, Loaded] | None = None,
) -> Report:
    """Scores with 95 % intervals, compared on the same texts with TF-IDF and another classifier.

    Args:
        run: gets the confusion matrix and the predictions.
        data: data module whose test set was predicted.
        metrics: what the LightningModule has logged.
        predictions: micro-batches of a classifier's `predict_step`.
        training: `data` and `dataset` of the classifier's training, if known.
        other: what `read_rival` returned.
    """
    labels, ours = in_order(predictions)
    predicted = zip(prediction_rows(data, [predictions]), labels, strict=True)
    log_predictions(run, [{**row, "label": data.label_names[label]} for row, label in predicted])
    counts = np.zeros((len(data.label_names), len(data.label_names)), dtype=int)
    np.add.at(counts, (labels, ours.argmax(axis=1)), 1)
    run.log_figure(confusion_figure(counts.tolist(), data.label_names), "figures/confusion.png")
    say(f"comparing with {TFIDF.words} ...")
    rivals = {TFIDF: _tfidf(data, training)}
    if other is not None:
        rival, loaded = other
        found = label_probabilities(loaded, data.texts("test"), title="before")
        rivals[rival] = np.array(found)
    scores: dict[str, float] = {}
    rows, lines = [], []
    for rival, theirs in rivals.items():
        scores |= compare(labels, ours, theirs, data.keys("test"), rival)
        for name, words in _headline(data.label_names).items():
            row = {"before": scores[rival.own.format(name)], "after": scores[OWN.format(name)]}
            rows.append({"metric": f"test {words} (before: {rival.words})", **row})
            lines.append(beside(scores, name, words, rival))
    if len(data.label_names) > 2:
        for name, values in by_label(labels, ours.argmax(1), data.label_names).items():
            shown = [f"{key} {value:.3f}" for key, value in values.items() if key != "texts"]
            lines.append(f"  {name}: {', '.join(shown)}, of {values['texts']} texts")
            scores |= {f"test/{key}/{name}": float(value) for key, value in values.items()}
    return Report({**metrics, **scores}, rows, lines)


def _headline(label_names: Sequence[str]) -> dict[str, str]:
    """The measures in a chain's table, and their names there."""
    of = label_names[1] if len(label_names) == 2 else None
    return {"accuracy": "accuracy", "f1": f"f1 of {of}" if of else "f1, mean of the labels'"}


def _tfidf(data: TextClassificationDataModule, training: Mapping[str, Any] | None) -> Array:
    """(N, K) probabilities by TF-IDF, trained on what the classifier was trained on."""
    learned = _learned(data, training)
    train, val = ((learned.texts(split), learned.labels(split)) for split in ("train", "val"))
    return tfidf_baseline(*train, *val, data.texts("test"))


def _learned(
    data: TextClassificationDataModule, training: Mapping[str, Any] | None
) -> TextClassificationDataModule:
    """The data that a classifier was trained on: `data`, or other files that it names."""
    if training is None or training["dataset"].get("digest") == data.fingerprint["digest"]:
        return data
    kind, given = type(data), training["data"] or {}
    try:
        if pydoc.locate(str(given.get("class_path"))) is not kind:
            raise ValueError("it does not say how they were read.")
        learned = construct(kind, given["init_args"], "data")
        learned.read()
        known = training["dataset"]["sources"]
        if changed := changed_files(known, learned.file_facts()["sources"]):
            raise ValueError(f"{', '.join(changed)}: not what was learned.")
    except (OSError, ValueError, AttributeError, TypeError) as error:  # by a user's class, too
        warn(f"TF-IDF learns the texts of data.source, not those that the checkpoint did: {error}")
        return data
    return learned


def by_label(labels: Labels, predicted: Labels, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of each label, NaN where undefined, and its number of texts.

    `labels` (N,) are the true classes, `predicted` (N,) the model's, `names` (K,) all of them.
    """
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), zero_division=np.nan
    )
    return {  # the counts are floats where no prediction is right
        name: {"precision": precision, "recall": recall, "f1": f1, "texts": int(n)}
        for name, precision, recall, f1, n in zip(names, *found, strict=True)
    }


def beside(scores: Mapping[str, float], name: str, words: str, rival: Rival) -> str:
    """A line: a score, called `words`, a rival's, the paired difference, with 95 % intervals."""

    def shown(of: str, form: str = ".3f") -> str:
        key = of.format(name)
        low, high = scores[f"{key}_low"], scores[f"{key}_high"]
        return f"{scores[key]:{form}} [{low:{form}}, {high:{form}}]"

    return (
        f"test {words}: {shown(OWN)}; {rival.words} {shown(rival.own)}; difference "
        f"{shown(rival.difference, '+.3f')}"
    )


def compare(
    labels: Labels,
    ours: Array,
    theirs: Array,
    keys: Sequence[str] | None = None,
    rival: Rival = TFIDF,
) -> dict[str, float]:
    """Scores of two classifiers on the same items, and the paired difference, with 95 % intervals.

    If all resamples agree, an interval is `widened` by the number of items behind it: for accuracy
    all, for precision those predicted to have a label, for other measures those that have it. With
    two labels the rarer one counts, with more each of them, as the measure is their mean.

    Args:
        labels: (N,) true classes.
        ours: (N, K) probabilities.
        theirs: (N, K) probabilities of the rival.
        keys: (N,) equal for texts that say the same thing, which count as one observation.
        rival: names the keys of the scores.
    """
    positive = 1 if ours.shape[1] == 2 else None
    mine = classification_statistics(labels, ours.argmax(1), ours, positive=positive)
    base = classification_statistics(labels, theirs.argmax(1), theirs, positive=positive)
    models = {OWN: ours, rival.own: theirs}
    units, present = keys or range(len(labels)), set(labels.tolist())

    def both_and_difference(weights: Array) -> Array:
        own, other = mine(weights), base(weights)
        return np.stack([own, other, own - other], axis=1).reshape(-1, len(weights))

    def n_behind(name: str, form: str) -> list[int]:
        if name == "accuracy":
            return [len(set(units))]
        given = [model.argmax(1) for of, model in models.items() if form in (of, rival.difference)]
        behind = given if name == "precision" else [labels]
        counts = min((_n_of_each(classes, units, present) for classes in behind), key=min)
        return counts if positive is None else [min(counts)]

    estimates = bootstrap_all(both_and_difference, len(labels), keys=keys)
    scores: dict[str, float] = {}
    for (name, form), estimate in zip(
        itertools.product(MEASURES, (*models, rival.difference)), estimates, strict=True
    ):
        lowest = -1.0 if form == rival.difference else 0.0
        estimate = widened(estimate, *n_behind(name, form), scale=1.0, lowest=lowest)
        key = form.format(name)
        scores[key] = estimate.value
        scores[f"{key}_low"], scores[f"{key}_high"] = estimate.low, estimate.high
    return scores


def _n_of_each(classes: Labels, keys: Iterable[Any], among: Iterable[int]) -> list[int]:
    """Number of distinct items in each class, at least 1."""
    counts = Counter(c for c, _ in set(zip(classes.tolist(), keys, strict=True)))
    return [max(1, counts[c]) for c in among]


def in_order(predictions: Sequence[Prediction]) -> tuple[Labels, Array]:
    """Labels (N,) and probabilities (N, K) in order of sample id; batches are sorted by length.

    Raises:
        ValueError: some probabilities are NaN, because the model overflowed.
    """
    ids, labels, probabilities = (
        torch.cat([prediction[key] for prediction in predictions]).cpu().numpy()
        for key in ("sample_ids", "label", "probabilities")
    )
    if len(odd := ids[np.isnan(probabilities).any(axis=1)]):
        raise ValueError(
            f"{len(odd)} of {len(ids)} texts, such as sample {odd.min()}, have NaN for "
            "probabilities: the model overflows on them; give precision 32-true."
        )
    order = ids.argsort()
    return labels[order], probabilities[order].astype(np.float64)
