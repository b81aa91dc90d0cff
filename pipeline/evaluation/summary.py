"""Summary of items' scores: a row per measure, with 95 % intervals and paired differences."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.splits import canonical_key
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Array, Estimate, Statistic
from pipeline.evaluation.responses import Response

Keys = NDArray[np.object_]  # one per item, equal for items that ask the same

SCALE = 100.0  # scores are between 0 and this
LOWER_IS_BETTER = ("perplexity",)
MIN_QUESTIONS = 6  # even if fewer all agree, a sign test gives p > 0.05 (2 / 2^5)


@dataclass(frozen=True)
class Score:
    """An item's score by one scorer, 0-100; None if it is unscored, with the why in `rationale`."""

    id: int | str
    scorer: str
    score: float | None
    rationale: str = ""
    raw: str = ""

    def as_row(self) -> dict[str, Any]:
        """The score's object in `scores.jsonl`."""
        return asdict(self) | {"status": "unscored" if self.score is None else "scored"}


@dataclass(frozen=True)
class Scored:
    """Responses of one model and every scorer's scores, in the order of the responses."""

    responses: Sequence[Response]
    scores: Mapping[str, Sequence[Score]]

    def column(self, scorer: str) -> Array:
        """(N,) scores of one scorer, NaN where there is none."""
        return np.array([score.score for score in self.scores.get(scorer, ())], dtype=float)

    @property
    def n_empty(self) -> int:
        """Number of empty responses."""
        return sum(response.is_empty for response in self.responses)


@dataclass(frozen=True)
class Cell:
    """One measure of one model; there is no estimate if no item was scored."""

    estimate: Estimate | None
    n_scored: int
    n_unscored: int


@dataclass(frozen=True)
class Row:
    """One measure; `difference` is after - before over the items that are scored in both.

    Attributes:
        n_paired: number of those items.
        n_questions: number of different questions that they ask.
        is_equal: whether the counts of each are the same before and after.
    """

    measure: str
    before: Cell | None
    after: Cell
    difference: Estimate | None
    n_paired: int
    n_questions: int
    is_equal: bool

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `unclear` if the interval of the difference contains 0 or NaN.

        Also `unclear` for fewer questions than `MIN_QUESTIONS`; `equal` if no item differs.
        """
        difference = self.difference
        if difference is None or self.n_questions < MIN_QUESTIONS:
            return "unclear"
        if not (difference.low > 0 or difference.high < 0):
            return "equal" if self.is_equal and difference.value == 0 else "unclear"
        is_better = (difference.value < 0) == (self.measure in LOWER_IS_BETTER)
        return "better" if is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        """The row's object in `summary.json`, with null for values that are not finite."""
        row = asdict(self) | {"verdict": self.verdict if self.before else None}
        return json.loads(json.dumps(row), parse_constant=lambda _: None)


@dataclass(frozen=True)
class Summary:
    """All rows of an evaluation, and what they were computed from."""

    rows: Sequence[Row]
    before: Scored | None
    after: Scored

    @property
    def headline(self) -> str:
        """The scorer that ranks the items: the judge if it scored any, else chrF."""
        return "chrf" if np.isnan(self.after.column("judge")).all() else "judge"

    def as_dict(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {
            "n_items": len(self.after.responses),
            "n_empty_before": self.before.n_empty if self.before else None,
            "n_empty_after": self.after.n_empty,
            "headline": self.headline,
            "measures": {row.measure: row.as_dict() for row in self.rows},
        }

    def metrics(self) -> dict[str, float]:
        """Finite values for a tracker: `after/chrf`, `after/chrf_low`, `difference/chrf`, ..."""
        values: dict[str, float] = {}
        for row in self.rows:
            cells = {"before": row.before, "after": row.after}
            estimates = {side: cell.estimate for side, cell in cells.items() if cell}
            for side, estimate in (estimates | {"difference": row.difference}).items():
                if estimate:
                    name = f"{side}/{row.measure}"
                    values |= {name: estimate.value}
                    values |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            for side, cell in cells.items():
                if cell and cell.n_unscored:
                    values[f"{side}/{row.measure}_unscored"] = cell.n_unscored
        values["after/empty"] = self.after.n_empty
        if self.before:
            values["before/empty"] = self.before.n_empty
        return {name: value for name, value in values.items() if math.isfinite(value)}


def summarize(after: Scored, *, before: Scored | None) -> Summary:
    """Every measure with its interval; with `before`, also the paired differences.

    Both have the same items, in the same order.
    """
    tables = _tables(after)
    others = _tables(before) if before else {}
    asked = [f"{response.instruction}\n{response.input}" for response in after.responses]
    keys = np.array([canonical_key(text, mask_digits=False) for text in asked], dtype=object)
    rows = [_row(measure, others.get(measure), tables[measure], keys) for measure in tables]
    return Summary(rows, before, after)


def _tables(scored: Scored) -> dict[str, Array]:
    """Counts (N, K) by measure, NaN in the rows of items without a value."""
    tables: dict[str, Array] = {}
    for scorer in scored.scores:
        values = scored.column(scorer)
        tables[scorer] = np.column_stack([values, np.ones(len(values))])
    texts = [response.response for response in scored.responses]
    references = [response.reference for response in scored.responses]
    tables["corpus_chrf"] = metrics.chrf_counts(texts, references)
    tables["corpus_bleu"] = metrics.bleu_counts(texts, references)
    nats = np.array([[r.reference_nats, r.reference_tokens] for r in scored.responses], dtype=float)
    if not np.isnan(nats).all():
        tables["perplexity"] = nats
    return tables


_OF_CORPUS: Mapping[str, Callable[[Array], Array]] = {  # the others are means over items
    "corpus_chrf": metrics.chrf,
    "corpus_bleu": metrics.bleu,
    "perplexity": metrics.perplexity,
}


def _statistic(measure: str, table: Array) -> Statistic:
    return metrics.of_sums(table, _OF_CORPUS.get(measure, metrics.mean))


def _estimate(measure: str, of: Statistic, keys: list[str], lowest: float = 0.0) -> Estimate:
    """The estimate of a measure; where all items agree, a mean's interval is `metrics.widened`."""
    estimate = metrics.bootstrap(of, len(keys), keys=keys)
    if measure in _OF_CORPUS:
        return estimate
    return metrics.widened(estimate, len(set(keys)), scale=SCALE, lowest=lowest)


def _row(measure: str, before: Array | None, after: Array, keys: Keys) -> Row:
    """One measure from its (N, K) counts; both tables hold the same items in the same order."""
    cell = _cell(measure, after, keys)
    if before is None:
        return Row(measure, None, cell, None, n_paired=0, n_questions=0, is_equal=False)
    is_paired = _is_known(before) & _is_known(after)
    paired, difference = keys[is_paired].tolist(), None
    tables = before[is_paired], after[is_paired]
    if paired:
        change = metrics.difference(*(_statistic(measure, table) for table in tables))
        difference = _estimate(measure, change, paired, lowest=-SCALE)
    of_before, is_equal = _cell(measure, before, keys), np.array_equal(*tables)
    return Row(measure, of_before, cell, difference, len(paired), len(set(paired)), is_equal)


def _cell(measure: str, table: Array, keys: Keys) -> Cell:
    is_known = _is_known(table)
    known, statistic = keys[is_known].tolist(), _statistic(measure, table[is_known])
    estimate = _estimate(measure, statistic, known) if known else None
    return Cell(estimate, len(known), len(table) - len(known))


def _is_known(table: Array) -> NDArray[np.bool_]:
    return np.isnan(table).sum(axis=1) == 0
