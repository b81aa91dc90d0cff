"""What a bag of words achieves: the number that a model has to beat to be worth its price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

INVERSE_REGULARISATION = (1.0, 10.0, 100.0)


def tfidf_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    val_texts: Sequence[str],
    val_labels: Sequence[int],
    test_texts: Sequence[str],
) -> NDArray[np.float64]:
    """Class probabilities of texts by logistic regression on TF-IDF of words and word pairs.

    The regularisation is the one of least log loss on the validation texts. Labels are class
    indices 0..n_classes-1, every one of them in training. Nothing is random.

    Returns:
        (n_test, n_classes) probabilities; column i is class i.
    """
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
    )
    train = vectorizer.fit_transform(train_texts)
    val, test = vectorizer.transform(val_texts), vectorizer.transform(test_texts)
    models = [
        LogisticRegression(C=strength, solver="newton-cg", max_iter=1000).fit(train, train_labels)
        for strength in INVERSE_REGULARISATION
    ]
    classes = models[0].classes_
    best = min(
        models, key=lambda model: log_loss(val_labels, model.predict_proba(val), labels=classes)
    )
    return np.asarray(best.predict_proba(test))
