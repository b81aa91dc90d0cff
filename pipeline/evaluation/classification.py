"""Classification metrics on 0-1 as statistics for the bootstrap, equal to those of torchmetrics.

Shapes: N items, C classes, R bootstrap replicates.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pipeline.evaluation.metrics import Array, Statistic, mean_of

Labels = NDArray[np.int64]
MEASURES = ("accuracy", "precision", "recall", "f1", "auroc")


def classification_statistics(
    labels: Labels, predictions: Labels, probabilities: Array, *, positive: int | None
) -> Statistic:
    """Statistic for `metrics.bootstrap_all`: the (5, R) values of `MEASURES` for (R, N) weights.

    Args:
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        probabilities: (N, C) scores of the classes; only their order matters.
        positive: the class that precision, recall, F1 and AUROC are computed for; None averages
            them over the classes that occur (macro).
    """
    n_classes = probabilities.shape[1]
    classes = list(range(n_classes)) if positive is None else [positive]

    correct = np.where(labels == predictions, labels, -1)
    counted = [_one_hot(chosen, n_classes)[classes] for chosen in (labels, predictions, correct)]
    accuracy = mean_of((labels == predictions).astype(np.float64))

    def values(weights: Array) -> Array:
        rates = _mean_of_known(_rates(*(chosen @ weights.T for chosen in counted)))
        auroc = [_auroc(weights, labels == c, probabilities[:, c]) for c in classes]
        return np.stack([accuracy(weights), *rates, _mean_of_known(np.array(auroc))])

    return values


def _mean_of_known(per_class: Array) -> Array:
    """Mean over classes, the first axis, ignoring NaN (absent classes); NaN if all are absent."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.nansum(per_class, axis=0) / np.isfinite(per_class).sum(axis=0)


def _one_hot(chosen: Labels, n_classes: int) -> csr_array:
    """One-hot (C, N), so that one product counts all classes; all zeros for an item of class -1."""
    items = np.flatnonzero(chosen >= 0)
    places = (chosen[items], items)
    return csr_array((np.ones(len(items)), places), shape=(n_classes, len(chosen)))


def _rates(n_actual: Array, n_predicted: Array, n_hit: Array) -> Array:
    """Precision, recall, F1 (C, 3, R) of (C, R) counts; 0 if undefined, NaN for absent classes."""
    n_both = n_actual + n_predicted
    denominators = np.stack([n_predicted, n_actual, n_both / 2], axis=1)
    rates = n_hit[:, None] / np.maximum(denominators, 1e-9)
    return np.where(n_both[:, None] > 0, rates, np.nan)


def _auroc(weights: Array, actual: NDArray[np.bool_], scores: Array) -> Array:
    """Probability (R,) that a positive item outranks a negative one; ties count half."""
    order = np.argsort(scores, kind="stable")
    positive = order[actual[order]]
    drawn = weights[:, positive]
    outranked = sum(  # negatives with lower scores, then with lower or equal ones; halved below
        _before(weights[:, order], np.searchsorted(scores[order], scores[positive], side))
        - _before(drawn, np.searchsorted(scores[positive], scores[positive], side))
        for side in ("left", "right")
    )
    n_positive = drawn.sum(1)
    pairs = n_positive * (weights.sum(1) - n_positive)
    wins = (drawn * outranked).sum(1) / 2
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def _before(weights: Array, ends: NDArray[np.int64]) -> Array:
    """Sums (R, M) of the weights (R, N) before each of M ends."""
    sums = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums[:, ends]
