"""Classification scores on 0-1 as statistics for the bootstrap, equal to those of torchmetrics.

Shapes: N items, C classes, R bootstrap replicates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Array, Statistic, mean_of

Labels = NDArray[np.int64]


def classification_statistics(
    labels: Labels, predictions: Labels, probabilities: Array, *, positive: int | None
) -> dict[str, Statistic]:
    """Accuracy, precision, recall, F1 and AUROC, each ready for `metrics.bootstrap`.

    Args:
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        probabilities: (N, C) scores of the classes; only their order matters.
        positive: the class that precision, recall, F1 and AUROC are about; None averages over the
            classes that occur (macro).
    """
    n_classes = probabilities.shape[1]
    classes = range(n_classes) if positive is None else (positive,)

    def rates(weights: Array) -> Array:
        per_class = np.array([_rates(weights, labels == c, predictions == c) for c in classes])
        return _mean_of_known(per_class)

    def auroc(weights: Array) -> Array:
        per_class = [_auroc(weights, labels == c, probabilities[:, c]) for c in classes]
        return _mean_of_known(np.array(per_class))

    return {
        "accuracy": mean_of((labels == predictions).astype(np.float64)),
        "precision": lambda weights: rates(weights)[0],
        "recall": lambda weights: rates(weights)[1],
        "f1": lambda weights: rates(weights)[2],
        "auroc": auroc,
    }


def _mean_of_known(per_class: Array) -> Array:
    """Mean over the first axis without NaN: the classes that occur; NaN where none does."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.nansum(per_class, axis=0) / np.isfinite(per_class).sum(axis=0)


def _rates(weights: Array, actual: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> Array:
    """(3, R) precision, recall and F1 of one class; 0 if undefined, NaN if it never occurs."""
    n_actual, n_predicted = weights @ actual, weights @ predicted
    n_hit = weights @ (actual & predicted)
    denominators = np.stack([n_predicted, n_actual, (n_actual + n_predicted) / 2])
    rates = n_hit / np.maximum(denominators, 1e-9)
    return np.where(n_actual + n_predicted > 0, rates, np.nan)


def _auroc(weights: Array, actual: NDArray[np.bool_], scores: Array) -> Array:
    """(R,) probability that a positive item outranks a negative one, ties counting half."""
    order = np.argsort(scores, kind="stable")
    ranked = weights[:, order]
    # NaN != 0: the first is one
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    positives = np.add.reduceat(ranked * actual[order], starts, axis=1)
    negatives = np.add.reduceat(ranked * ~actual[order], starts, axis=1)
    outranked = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(1) * negatives.sum(1)
    return np.where(pairs > 0, (positives * outranked).sum(1) / np.maximum(pairs, 1), np.nan)
