"""The report of an evaluation: a self-contained HTML file."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.console import CONTROL_PICTURES
from pipeline.evaluation.metrics import RESAMPLES
from pipeline.evaluation.responses import Response
from pipeline.evaluation.summary import LOWER_IS_BETTER, MIN_QUESTIONS, Score, Summary

TITLES = {
    "judge": "LLM judge",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "exact_match": "Exact match",
    "corpus_chrf": "chrF, corpus",
    "corpus_bleu": "BLEU, corpus",
    "perplexity": "Perplexity of the reference",
}
N_EXAMPLES = 5  # best and worst items
MAX_UNSCORED = 50  # shown with their raw text; scores.jsonl has all
MAX_CHARACTERS = 2_000  # of one text; the JSONL files have the rest

INK = "#010203"  # placeholder for the page's own text colour
BEFORE, AFTER = "#a0795a", "#3d7fd9"  # distinguishable even without colour vision


def render_report(summary: Summary, *, lineage: Mapping[str, str]) -> str:
    """The report as HTML.

    Texts from models are treated as data: escaped and clipped, on a page that forbids scripts.

    `lineage` says what the numbers come from: checkpoint and digest, data, settings.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    best, worst = _best_and_worst(summary)
    plots = [score_histogram(summary)]
    if summary.before:
        plots.append(before_and_after(summary))
    unscored = [
        (side, score)
        for side, scored in (("before", summary.before), ("after", summary.after))
        for column in (scored.scores.values() if scored else ())
        for score in column
        if score.score is None
    ]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        lineage=lineage,
        plots=[_svg(plot) for plot in plots],
        best=best,
        worst=worst,
        unscored=unscored[:MAX_UNSCORED],
        n_unscored=len(unscored),
        titles=TITLES,
        lower_is_better=LOWER_IS_BETTER,
        n_resamples=RESAMPLES,
        min_questions=MIN_QUESTIONS,
    )


def score_histogram(summary: Summary) -> Figure:
    """Histogram of the items' headline scores over 0-100, in steps of ten."""
    figure, axes = _axes()
    sides = [scored for scored in (summary.before, summary.after) if scored]
    columns = [scored.column(summary.headline) for scored in sides]
    axes.hist(
        [column[~np.isnan(column)] for column in columns],
        bins=np.arange(0, 101, 10).tolist(),
        label=["before", "after"][-len(sides) :],
        color=[BEFORE, AFTER][-len(sides) :],
    )
    axes.set(xlabel=TITLES[summary.headline], ylabel="items", xlim=(0, 100))
    axes.set_xticks(range(0, 101, 20))
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there are no half items
    if summary.before:
        axes.legend(frameon=False, labelcolor=INK)
    return figure


def before_and_after(summary: Summary) -> Figure:
    """Scatter plot of the headline scores before and after; above the diagonal, items improved."""
    assert summary.before is not None, "there is nothing to compare with"
    figure, axes = _axes()
    before = summary.before.column(summary.headline)
    after = summary.after.column(summary.headline)
    pairs = np.column_stack([before, after])[~np.isnan(before + after)]
    places, n_items = np.unique(pairs.round(), axis=0, return_counts=True)
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":")
    area = np.maximum(12, 900 * n_items / max(len(pairs), 1))
    axes.scatter(places[:, 0], places[:, 1], s=area, color=AFTER, alpha=0.6, linewidths=0)
    change = pairs[:, 1] - pairs[:, 0]
    counts = f"{(change > 0).sum()} better, {(change < 0).sum()} worse, {(change == 0).sum()} equal"
    axes.set(xlabel=f"{TITLES[summary.headline]}, before", ylabel="after", title=counts)
    axes.set(xlim=(-6, 106), ylim=(-6, 106), aspect="equal")
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    axes.title.set_fontsize("medium")
    return figure, axes


def _svg(figure: Figure) -> Markup:
    """Inline SVG in the page's own text colour; nothing in it comes from a model."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def _best_and_worst(summary: Summary) -> tuple[list[Any], list[Any]]:
    """The best and the worst items by headline score; chrF breaks ties."""
    column = summary.after.column(summary.headline)
    ranked = np.lexsort((summary.after.column("chrf"), column))  # NaN last
    ranked = ranked[: int((~np.isnan(column)).sum())]
    n_shown = min(N_EXAMPLES, (len(ranked) + 1) // 2)
    worst, best = ranked[:n_shown], ranked[n_shown:][::-1][:n_shown]
    return [_example(summary, i) for i in best], [_example(summary, i) for i in worst]


def _example(summary: Summary, index: int) -> dict[str, Response | Score | None]:
    """One item as the report shows it."""
    before, after, scorer = summary.before, summary.after, summary.headline
    return {
        "response": after.responses[index],
        "score": after.scores[scorer][index],
        "response_before": before.responses[index] if before else None,
        "score_before": before.scores[scorer][index] if before else None,
    }


def _shown(text: str) -> str:
    """A text as the report shows it: control characters visible, a long one clipped."""
    n_more = len(text) - MAX_CHARACTERS
    clipped = f"{text[:MAX_CHARACTERS]} … ({n_more} more characters)" if n_more > 0 else text
    return clipped.translate(CONTROL_PICTURES)
