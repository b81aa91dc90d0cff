"""Text metrics against hand-computed values and reference implementations; interval coverage."""

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import binomtest

from pipeline.evaluation import classification, metrics
from pipeline.evaluation.classification import MEASURES, classification_statistics
from pipeline.evaluation.metrics import (
    Estimate,
    Statistic,
    bootstrap,
    bootstrap_all,
    difference,
    mean_of,
    widened,
)
from pipeline.training import classifier_report
from pipeline.training.lit_classifier import MeanAUROC

TEXTS = st.text(alphabet=st.sampled_from("ab cé我爱北京.,\n1"), max_size=30)


def corpus_bleu(responses: list[str], references: list[str]) -> float:
    return float(metrics.bleu(metrics.bleu_counts(responses, references).sum(0)))


def corpus_chrf(responses: list[str], references: list[str]) -> float:
    return float(metrics.chrf(metrics.chrf_counts(responses, references).sum(0)))


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("\nShe will walk. ", "She will walk.", 100.0),
        ("caf\u0065\u0301", "café", 100.0),  # the same text, composed and decomposed
        ("she will walk.", "She will walk.", 0.0),
        ("", "She will walk.", 0.0),
    ],
)
def test_exact_match(response: str, reference: str, expected: float) -> None:
    assert metrics.exact_match(response, reference) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5 GB_x!", ["it", "s", "3", "5", "gb", "x"]),
        ("Straße NAÏVE", ["strasse", "naïve"]),
        ("我爱abc。", ["我", "爱", "abc"]),
        ("カナ かな", ["カ", "ナ", "か", "な"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs stay with their words
        ("ก็ได้", ["ก็", "ไ", "ด้"]),
        ("🎉❤️ ok", ["🎉", "❤️", "ok"]),
        ("", []),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]) -> None:
    assert metrics.words(text) == expected


@pytest.mark.parametrize(
    ("response", "reference", "longest_common", "n_response", "n_reference"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 4, 6, 6),
        ("我爱北京", "我很爱北京天安门", 4, 4, 8),
        ("Москва столица", "столица Москва", 1, 2, 2),
        ("yes", "no", 0, 1, 1),
    ],
)
def test_rouge_l_by_hand(
    response: str, reference: str, longest_common: int, n_response: int, n_reference: int
) -> None:
    f1 = 100 * 2 * longest_common / (n_response + n_reference)
    assert metrics.rouge_l(response, reference) == pytest.approx(f1)
    assert metrics.rouge_l("", reference) == 0.0


def test_rouge_l_without_words_is_exact_match() -> None:
    assert [metrics.rouge_l(given, "?") for given in ("?", " ? ", "!", "a question mark")] == [
        100.0,
        100.0,
        0.0,
        0.0,
    ]


def test_rouge_l_is_the_standard_one_on_ascii() -> None:
    from torchmetrics.functional.text.rouge import rouge_score

    generator = random.Random(0)
    vocabulary = ["The", "cat", "sat,", "on", "3.5", "a-b", "mat.", "don't", "_x_"]
    for _ in range(50):
        response, reference = (" ".join(generator.choices(vocabulary, k=8)) for _ in range(2))
        standard = rouge_score([response], [[reference]], rouge_keys="rougeL")["rougeL_fmeasure"]
        ours = metrics.rouge_l(response, reference)
        assert ours == pytest.approx(100 * float(standard), abs=1e-5)  # float32 in torchmetrics


def test_rouge_l_of_long_answers() -> None:
    """A table of a cell for each pair of words would take longer than a test may."""
    generator = random.Random(0)
    response, reference = (" ".join(generator.choices("abcdefgh", k=20_000)) for _ in range(2))
    assert 45 < metrics.rouge_l(response, reference) < 60


def test_chrf_by_hand() -> None:
    # "abc" in "abcd": orders 1 to 3 have precision 1 and recalls 3/4, 2/3, 1/2; it has no order 4
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3
    expected = 100 * 5 * recall / (4 + recall)
    assert corpus_chrf(["abc"], ["abcd"]) == pytest.approx(expected, abs=1e-9)
    assert corpus_chrf(["42"], ["42"]) == pytest.approx(100.0)  # torchmetrics 1.9: 33.3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_chrf_equals_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    responses, references = map(list, zip(*pairs, strict=True))
    standard = CHRF().corpus_score(responses, [references]).score
    assert corpus_chrf(responses, references) == pytest.approx(standard, abs=1e-9)
    items = metrics.chrf(metrics.chrf_counts(responses, references))
    for item, response, reference in zip(items, responses, references, strict=True):
        standard = CHRF().sentence_score(response, [reference]).score
        assert item == pytest.approx(standard, abs=1e-9)


@pytest.mark.parametrize(
    ("tokenizer", "responses", "references"),
    [
        (
            "13a",
            ["The cat sat on the mat, didn't it?", "It costs $3.50 in all."],
            ["The cat sat on a mat, didn't it?", "It costs $3.50 in total."],
        ),
        (
            "zh",
            ["我爱北京天安门。", "他很高兴，今天不上班"],
            ["我很爱北京天安门。", "她很高兴，今天不上班！"],
        ),
    ],
)
def test_bleu_equals_sacrebleu(tokenizer: str, responses: list[str], references: list[str]) -> None:
    standard = BLEU(tokenize=tokenizer, smooth_method="none")
    expected = standard.corpus_score(responses, [references]).score
    assert 0 < expected < 100
    # float32 counts inside torchmetrics are exact; the rest is float64
    assert corpus_bleu(responses, references) == pytest.approx(expected, abs=1e-6)


def test_bleu_by_hand_and_at_its_edges() -> None:
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; same length
    value = corpus_bleu(["a b c d x f"], ["a b c d e f"])
    assert value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)
    shorter = corpus_bleu(["a b c d"], ["a b c d e"])
    assert shorter == pytest.approx(100 * math.exp(1 - 5 / 4), abs=1e-6)  # brevity alone
    longer = corpus_bleu(["a b c d e"], ["a b c d"])  # no bonus for length
    assert longer == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-6)
    assert corpus_bleu(["これはペンです"], ["これはペンです"]) == pytest.approx(100.0)
    assert corpus_bleu([""], ["a b c d"]) == corpus_bleu(["a b"], ["a b"]) == 0.0


def test_perplexity_is_of_the_corpus() -> None:
    sums = np.array([[2.0, 1.0], [4.0, 5.0]]).sum(0)
    assert metrics.perplexity(sums) == pytest.approx(math.exp(6 / 6))


def test_bootstrap_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).uniform(0, 100, 60)
    first = bootstrap(mean_of(scores), 60, seed=1)
    assert first == bootstrap(mean_of(scores), 60, seed=1)
    assert first != bootstrap(mean_of(scores), 60, seed=2)
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(scores.mean())
    monkeypatch.setattr(metrics, "MAX_WEIGHTS", 100)  # memory must not decide the result
    piecemeal = bootstrap(mean_of(scores), 60, seed=1)
    assert piecemeal.low == pytest.approx(first.low, rel=1e-12)  # sums in another order
    assert piecemeal.high == pytest.approx(first.high, rel=1e-12)


def test_bootstrap_edges() -> None:
    certain = bootstrap(mean_of([70.0] * 5), 5, seed=0)
    assert (certain.value, certain.low, certain.high) == pytest.approx((70.0, 70.0, 70.0))
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap(mean_of([]), 0, seed=0)


@pytest.mark.parametrize("n_items", [1, 6, 300])
def test_items_that_all_agree_do_not_make_a_certainty(n_items: int) -> None:
    for n_right in (0, n_items):
        exact = binomtest(n_right, n_items).proportion_ci(0.95, method="exact")
        seen = bootstrap(mean_of([100.0 * (n_right > 0)] * n_items), n_items)
        assert seen.low == seen.high == seen.value
        wider = widened(seen, n_items, scale=100.0)
        assert wider.value == seen.value
        assert (wider.low, wider.high) == pytest.approx((100 * exact.low, 100 * exact.high))
    alike = widened(bootstrap(mean_of([70.0] * n_items), n_items), n_items, scale=100.0)
    others = binomtest(0, n_items).proportion_ci(0.95, method="exact").high  # at 0, or at 100
    assert (alike.low, alike.high) == pytest.approx((70 - 70 * others, 70 + 30 * others))
    for other in (Estimate(99.0, 97.0, 100.0), Estimate(1.0, 0.0, 2.0)):
        assert widened(other, n_items, scale=100.0) == other


def test_items_that_say_the_same_are_one_observation() -> None:
    """Forty items, each three times: as wide as of forty, not as of 120."""
    scores = np.random.default_rng(0).normal(50, 20, size=40)
    thrice, keys = np.repeat(scores, 3), [f"item {i}" for i in range(40) for _ in range(3)]
    once = bootstrap(mean_of(scores), 40, seed=0)
    assert bootstrap(mean_of(scores), 40, seed=0, keys=keys[::3]) == once
    grouped = bootstrap(mean_of(thrice), 120, seed=0, keys=keys)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    blind = bootstrap(mean_of(thrice), 120, seed=0)
    assert blind.high - blind.low < 0.7 * (grouped.high - grouped.low)


@pytest.mark.parametrize("n_items", [6, 10, 40])
def test_intervals_cover_the_truth(n_items: int) -> None:
    """Even of few items, where plain percentiles are too narrow: they cover 349 for 6."""
    generator = np.random.default_rng(0)
    n_covered = 0
    for trial in range(400):
        sample = generator.normal(50, 20, size=n_items)
        interval = bootstrap(mean_of(sample), n_items, seed=trial)
        n_covered += interval.low <= 50 <= interval.high
    assert 366 <= n_covered <= 394  # nominally 380; 3.2 sigma either way


def test_paired_differences_see_through_the_spread_of_items() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 80, 100)
    after = before + generator.normal(5, 2, 100)
    pair = bootstrap(difference(mean_of(before), mean_of(after)), 100, seed=0)
    alone = bootstrap(mean_of(before), 100, seed=0)
    assert pair.value == pytest.approx((after - before).mean())
    assert 4 < pair.low < pair.high < 6
    assert pair.high - pair.low < (alone.high - alone.low) / 5


def estimates(statistics: Statistic, n_items: int) -> dict[str, Estimate]:
    return dict(zip(MEASURES, bootstrap_all(statistics, n_items), strict=True))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_classification_equals_torchmetrics(n_classes: int) -> None:
    import torch
    from torchmetrics.functional import classification as reference

    generator = np.random.default_rng(n_classes)
    labels = generator.integers(n_classes, size=200)
    logits = generator.normal(size=(200, n_classes)) + 1.2 * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = probabilities.round(2)  # ties
    predictions = probabilities.argmax(1)
    positive = 1 if n_classes == 2 else None
    statistics = classification_statistics(labels, predictions, probabilities, positive=positive)
    ours = estimates(statistics, 200)
    names = {"precision": "precision", "recall": "recall", "f1": "f1_score", "auroc": "auroc"}
    scores, truth = torch.tensor(probabilities), torch.tensor(labels)
    for name, theirs in names.items():
        if n_classes == 2:
            given_ = scores[:, 1] if name == "auroc" else torch.tensor(predictions)
            expected = getattr(reference, f"binary_{theirs}")(given_, truth)
        else:
            given_ = scores if name == "auroc" else torch.tensor(predictions)
            expected = getattr(reference, f"multiclass_{theirs}")(
                given_, truth, num_classes=n_classes, average="macro"
            )
        estimate = ours[name]
        assert estimate.value == pytest.approx(float(expected), abs=1e-6)  # float32
        assert estimate.low < estimate.value < estimate.high
    assert ours["accuracy"].value == (labels == predictions).mean()


def test_means_are_of_the_classes_that_occur() -> None:
    labels, probabilities = np.array([0, 1, 0, 1]), np.eye(3)[[0, 1, 0, 1]]
    ours = classification_statistics(labels, labels, probabilities, positive=None)
    assert {estimate.value for estimate in estimates(ours, 4).values()} == {1.0}
    alike = classification_statistics(0 * labels, 0 * labels, probabilities, positive=None)
    assert np.isnan(estimates(alike, 4)["auroc"].value)


def test_auroc_under_weights_equals_sklearn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=50)
    scores = (generator.normal(size=50) + labels).round(1)
    weights = generator.integers(3, size=(1, 50)).astype(float)
    columns = np.column_stack([1 - scores, scores])
    *_, ours = classification_statistics(labels, labels, columns, positive=1)(weights)[:, 0]
    expected = roc_auc_score(labels, scores, sample_weight=weights[0])
    assert ours == pytest.approx(expected, abs=1e-12)


def test_both_classifiers_are_scored_once_on_the_same_replicates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drawn anew for each of 15 intervals, a test set of 50 labels took an hour."""
    calls = Counter[str]()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(classification, "_auroc", counted("auroc", classification._auroc))
    monkeypatch.setattr(np.random, "default_rng", counted("draw", np.random.default_rng))
    labels, columns = np.arange(60) % 3, np.linspace(0, 1, 180).reshape(60, 3)
    scores = classifier_report.compare(labels, columns, columns[::-1])
    assert len(scores) == 45
    assert calls == {"draw": 1, "auroc": 2 * 2 * 3}  # models, replicates and estimate, labels


def test_a_classifier_without_an_error_may_still_err() -> None:
    """Twenty ham and six spam texts, two of which say the same: 25 observations, five of spam."""
    labels = np.array([0] * 20 + [1] * 6)
    perfect, keys = np.eye(2)[labels], [*map(str, range(25)), "24"]
    scores = classifier_report.compare(labels, perfect, perfect, keys)
    bounds = {n: binomtest(n, n).proportion_ci(0.95, method="exact").low for n in (5, 25)}
    for model in ("test/", "baseline/tfidf_"):
        assert scores[f"{model}accuracy_low"] == pytest.approx(bounds[25])
        for name in ("precision", "recall", "f1", "auroc"):
            assert scores[f"{model}{name}_low"] == pytest.approx(bounds[5]), name
            assert scores[f"{model}{name}_high"] == 1.0
    for name, n in (("accuracy", 25), ("precision", 5), ("recall", 5), ("auroc", 5)):
        key = f"test/{name}_minus_tfidf"
        assert scores[key] == 0.0
        assert scores[f"{key}_high"] == pytest.approx(1 - bounds[n]), (
            "what was never seen may differ"
        )
        assert scores[f"{key}_low"] == pytest.approx(bounds[n] - 1)
    many = np.array([0] * 100 + [1] * 100 + [2] * 2)
    scores = classifier_report.compare(many, np.eye(3)[many], np.eye(3)[many])
    each = [binomtest(n, n).proportion_ci(0.95, method="exact").low for n in (100, 100, 2)]
    assert scores["test/f1_low"] == pytest.approx(np.mean(each)), "a mean over labels"
    once = perfect[::-1].copy()  # the one text that it calls spam is none
    once[:, 1], once[0, 1] = 0.0, 1.0
    for theirs, n_called in ((once, 1), (np.eye(2)[labels * 0], 0)):
        assert theirs.argmax(1).sum() == n_called
        scores = classifier_report.compare(labels, perfect, theirs, keys)
        assert scores["baseline/tfidf_precision_high"] == pytest.approx(0.975)
        missed = binomtest(0, 5).proportion_ci(0.95, method="exact").high
        assert scores["baseline/tfidf_recall_high"] == pytest.approx(missed)


def test_a_rank_without_a_text_has_rows_to_gather() -> None:
    auroc = MeanAUROC(3, average="none")
    auroc.fill_up(torch.device("cpu"))
    assert (auroc.preds[0].shape, auroc.target[0].dtype) == ((0, 3), torch.int64)
    seen = MeanAUROC(3, average="none")
    seen.update(torch.eye(3), torch.arange(3))
    seen.fill_up(torch.device("cpu"))
    assert len(seen.preds) == 1


def test_what_a_resample_leaves_undefined() -> None:
    """One positive item: where it is not drawn there is no AUROC, and no NaN in the interval."""
    labels = np.array([1] + [0] * 9)
    probabilities = np.column_stack([np.linspace(0.1, 0.9, 10), np.linspace(0.9, 0.1, 10)])
    never = np.zeros(10, dtype=np.int64)
    ours = estimates(classification_statistics(labels, never, probabilities, positive=1), 10)
    assert ours["auroc"].low == 1.0
    assert ours["precision"].value == 0.0
