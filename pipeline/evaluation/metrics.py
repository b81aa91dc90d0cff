"""Text metrics on 0-100 and bootstrap intervals over items.

A corpus-level value (BLEU, chrF, perplexity, a mean) is a function of sums over items, so one
resampling serves them all: a bootstrap replicate is a row of weights, how often each item is drawn.

Shapes: N items, K counts per item, R bootstrap replicates.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import regex
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # (R, N) weights of the items -> (R,) values

SEED = 0  # of all intervals
RESAMPLES = 2_000  # so that 50 replicates lie beyond either end of a 95 % interval
MAX_WEIGHTS = 4_000_000  # R x N held at once: 32 MB
CHAR_ORDER, WORD_ORDER = 6, 4  # of chrF (Popović 2015) and BLEU (Papineni 2002)

# Scripts that put no spaces between words: every character counts as a word.
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}--\p{M}]"
_WORD = regex.compile(
    rf"(?:{_SPACELESS}|\p{{So}})\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{_SPACELESS}]+", regex.V1
)
_BLEU_SPLIT = regex.compile(rf"{_SPACELESS}\p{{M}}*|[\u3000-\u303f\uff00-\uffef]", regex.V1)


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic, n_items: int, *, seed: int = SEED, keys: Sequence[str] | None = None
) -> Estimate:
    """Percentile bootstrap over items (Efron & Tibshirani 1993, chapter 13), expanded for few.

    Replicates on which the statistic is undefined (NaN) are left out. If all items agree, the
    interval has zero width, as it only reflects the spread of these items (see `widened`).

    ValueError if there are no items.

    Args:
        statistic: maps rows of weights to values; the estimate itself is the value for weights 1.
        n_items: N.
        seed: random seed of the replicates.
        keys: one per item; items with the same key say the same and are drawn together, as they
            would otherwise count as independent observations.
    """
    return bootstrap_all(lambda w: statistic(w)[None], n_items, seed=seed, keys=keys)[0]


def bootstrap_all(
    statistics: Statistic, n_items: int, *, seed: int = SEED, keys: Sequence[str] | None = None
) -> list[Estimate]:
    """`bootstrap` of S statistics at once, whose values are (S, R), on the same replicates."""
    if n_items == 0:
        raise ValueError("an interval needs at least one item, and there is none.")
    generator, numbers = np.random.default_rng(seed), dict[str, int]()
    units = [numbers.setdefault(key, len(numbers)) for key in keys or map(str, range(n_items))]
    n_units, values = len(numbers), list[Array]()
    while (n_left := RESAMPLES - sum(len(rows) for rows in values)) > 0:
        n_rows = min(n_left, max(1, MAX_WEIGHTS // n_items))
        drawn = generator.integers(n_units, size=(n_rows, n_units))
        drawn += n_units * np.arange(n_rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        values.append(statistics(times[:, units].astype(np.float64)).T)
    estimates = statistics(np.ones((1, n_items)))[:, 0]
    return [
        Estimate(float(value), *_interval(replicates, n_units))
        for value, replicates in zip(estimates, np.concatenate(values).T, strict=True)
    ]


def _interval(replicates: Array, n_units: int) -> tuple[float, float]:
    """Percentiles at the ends, those of a few units farther out (Hesterberg 2015, section 4.3).

    Resampled, N units spread by sqrt((N - 1) / N) of what they do, and it takes Student's t rather
    than the normal distribution to say so: of 10, plain percentiles cover the truth in 90 %.
    """
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return math.nan, math.nan
    n_free = max(n_units - 1, 1)
    tail = ndtr(stdtrit(n_free, 0.025) * math.sqrt(1 + 1 / n_free))
    with np.errstate(invalid="ignore"):  # between infinite ones
        low, high = np.percentile(defined, (100 * tail, 100 - 100 * tail))
    return float(low), float(high)


def widened(estimate: Estimate, *n_items: int, scale: float, lowest: float = 0.0) -> Estimate:
    """The estimate, but with an interval of zero width widened for what the sample may lack.

    If N items all have the same score, up to 1 - 0.025^(1 / N) of the population may still have
    another one, the lowest or the highest, at 95 % (Clopper & Pearson 1934).

    Args:
        estimate: of a mean over items.
        n_items: N; for a mean of several means, the N of each.
        scale: the highest possible score, or difference of two scores.
        lowest: the lowest possible one.
    """
    value = estimate.value
    if not math.isclose(estimate.low, estimate.high, abs_tol=1e-9 * scale):
        return estimate
    unseen = sum(1 - 0.025 ** (1 / n) for n in n_items) / len(n_items)
    low, high = value - unseen * (value - lowest), value + unseen * (scale - value)
    return replace(estimate, low=low, high=high)


def of_sums(counts: Array, value: Callable[[Array], Array]) -> Statistic:
    """Corpus-level statistic: `value`, mapping (..., K) to (...), of weighted sums of `counts`."""
    return lambda weights: value(weights @ counts)


def mean_of(scores: Sequence[float] | Array) -> Statistic:
    """Statistic: the mean of (N,) scores."""
    return of_sums(np.column_stack([scores, np.ones(len(scores))]), mean)


def mean(sums: Array) -> Array:
    """Total / number, from (..., 2) sums of both."""
    return sums[..., 0] / sums[..., 1]


def difference(before: Statistic, after: Statistic) -> Statistic:
    """Paired difference after - before over the same items: both see the same replicates."""

    def values(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):  # of two infinite perplexities it is NaN
            return after(weights) - before(weights)

    return values


def exact_match(response: str, reference: str) -> float:
    """100 if the texts are equal, up to whitespace and Unicode normalisation (NFC), else 0."""
    return 100.0 * (" ".join(_nfc(response).split()) == " ".join(_nfc(reference).split()))


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004) on 0-100, on words of any script.

    torchmetrics' default normaliser drops everything but a-z and 0-9; on such text the two agree
    (tests/test_metrics.py), but its table has a cell per pair of words: two texts of 4,000 words
    take 40 s. For a reference without words ("?") it is the same as `exact_match`.
    """
    wanted, given = words(_nfc(reference)), words(_nfc(response))
    if not wanted:
        return exact_match(response, reference)
    return 200.0 * _longest_common(given, wanted) / (len(given) + len(wanted))


def _longest_common(given: list[str], wanted: list[str]) -> int:
    """Length, in words, of the longest common subsequence; a row of its table is one integer.

    A bit of it is 0 where the length grows (Hyyrö 2004, "Bit-parallel LCS-length computation").
    """
    places: dict[str, int] = {}
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    everywhere = row = (1 << len(wanted)) - 1
    for word in given:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & everywhere
    return len(wanted) - row.bit_count()


def words(text: str) -> list[str]:
    """Case-folded words of any script, and symbols such as emoji; punctuation is left out."""
    return _WORD.findall(text.casefold())


def chrf_counts(responses: Sequence[str], references: Sequence[str]) -> Array:
    """Counts (N, 18) of character n-grams in response, reference and both, each of orders 1 to 6.

    By sacrebleu rather than torchmetrics 1.9, whose chrF gives an exact "42" only 33 (it divides by
    orders for which a text is too short) and ignores the reference of an item without any match.
    """
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    counts = np.zeros((len(responses), 3, CHAR_ORDER))
    for row, response, reference in zip(counts, responses, references, strict=True):
        given = extract_all_char_ngrams(_nfc(response), CHAR_ORDER)
        wanted = extract_all_char_ngrams(_nfc(reference), CHAR_ORDER)
        for order, (have, want) in enumerate(zip(given, wanted, strict=True)):
            # as in sacrebleu, n-grams longer than the reference do not count against the response
            row[:, order] = have.total() if want else 0, want.total(), (have & want).total()
    return counts.reshape(len(responses), 3 * CHAR_ORDER)


def chrf(counts: Array) -> Array:
    """chrF2 on 0-100, as in sacrebleu, from (..., 18) counts of an item or summed over a corpus."""
    given, wanted, matched = np.moveaxis(counts.reshape(*counts.shape[:-1], 3, CHAR_ORDER), -2, 0)
    present = (given > 0) & (wanted > 0)
    n_orders = np.maximum(present.sum(-1), 1)
    precision = _ratio(matched, np.where(present, given, 0)).sum(-1) / n_orders
    recall = _ratio(matched, np.where(present, wanted, 0)).sum(-1) / n_orders
    return 100.0 * _ratio(5 * precision * recall, 4 * precision + recall)  # F-beta, beta 2


def bleu_counts(responses: Sequence[str], references: Sequence[str]) -> Array:
    """Counts (N, 10) by torchmetrics: matching and all word n-grams, orders 1 to 4, both lengths.

    Tokenised by sacreBLEU's 13a; scripts without spaces are first split into characters, as its zh
    does for Chinese.
    """
    from torchmetrics.text import SacreBLEUScore

    metric = SacreBLEUScore(n_gram=WORD_ORDER, tokenize="13a")
    rows = []
    for response, reference in zip(responses, references, strict=True):
        metric.update([_spaced(response)], [[_spaced(reference)]])
        lengths = [float(metric.preds_len), float(metric.target_len)]
        rows.append([*metric.numerator.tolist(), *metric.denominator.tolist(), *lengths])
        metric.reset()
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * WORD_ORDER + 2)


def bleu(counts: Array) -> Array:
    """Unsmoothed corpus BLEU on 0-100 from (..., 10) sums; 0 where an order has no match."""
    matched, given = counts[..., :WORD_ORDER], counts[..., WORD_ORDER : 2 * WORD_ORDER]
    n_given, n_wanted = counts[..., -2], counts[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 and x / 0 end up as BLEU 0
        brevity = np.minimum(0.0, 1.0 - n_wanted / n_given)
        value = np.exp(brevity + np.log(_ratio(matched, given)).mean(-1))
    return 100.0 * np.nan_to_num(value)


def perplexity(sums: Array) -> Array:
    """exp(nats / tokens) from (..., 2) sums."""
    with np.errstate(over="ignore"):  # an untrained model may well reach inf
        return np.exp(sums[..., 0] / sums[..., 1])


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _spaced(text: str) -> str:
    return _BLEU_SPLIT.sub(r" \g<0> ", _nfc(text))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
