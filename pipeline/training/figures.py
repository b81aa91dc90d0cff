"""Figures of training and classification; each function returns a Figure and shows nothing."""

from collections.abc import Sequence

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import EngFormatter

FIRST, SECOND = "#3b6ea8", "#d2691e"
MAX_COUNTED = 50  # labels with their counts written out: for 200 that took minutes and 10 GB


def loss_curves(
    train: Sequence[tuple[int, int, float]], val: Sequence[tuple[int, float]], unit: str = "token"
) -> Figure:
    """Training and validation loss over optimizer steps, and over tokens on a second axis.

    `train` has (step, tokens seen, loss) of every step, `val` (step, loss) of every validation; a
    loss is in nats per `unit`.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, tokens, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color=FIRST, linewidth=0.8, label="training")
    if val:
        axes.plot(
            *zip(*val, strict=True), color=SECOND, marker="o", markersize=3.5, label="validation"
        )
    axes.set(xlabel="optimizer steps", ylabel=f"loss (nats a {unit})")
    per_step = tokens[-1] / steps[-1]
    over_tokens = axes.secondary_xaxis(
        "top", functions=(lambda step: step * per_step, lambda n: n / per_step)
    )
    over_tokens.set_xlabel("tokens seen")
    over_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def confusion_figure(counts: Sequence[Sequence[int]], label_names: Sequence[str]) -> Figure:
    """Confusion matrix with its counts; rows are the truth.

    With more than MAX_COUNTED labels, only colours show the counts, and only some are named. A name
    that no installed font can write is shown as `label N`, the Nth of them.
    """
    every = -(-len(label_names) // MAX_COUNTED)
    fonts, beyond = _fonts_for("".join(label_names))
    named = [  # a dollar sign would be a formula's
        f"label {i}" if beyond & set(name) else name.replace("$", r"\$")
        for i, name in enumerate(label_names, start=1)
    ][::every]
    width = max(4.2, 0.55 * len(named) + 0.1 * max(map(len, named)))
    figure = Figure(figsize=(width, width - 0.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="Blues")
    highest = max(max(row) for row in counts)
    if every > 1:
        figure.colorbar(image, shrink=0.6)
    for i, row in enumerate(counts if every == 1 else ()):
        for j, count in enumerate(row):
            color = "white" if count > highest / 2 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=color)
    places = range(0, len(label_names), every)
    axes.set_xticks(places, labels=named, fontfamily=fonts)
    if sum(map(len, named)) > 24:  # they would overlap
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_yticks(places, labels=named, fontfamily=fonts)
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def _fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Fonts for a text, matplotlib's own first, and the characters that none of them has."""
    own = rcParams["font.sans-serif"][0]
    fonts, missing = [own], {c for c in text if not c.isspace()} - _characters(findfont(own))
    for font in fontManager.ttflist:
        if not missing:
            break
        if not font.name.startswith("Last Resort") and (found := missing & _characters(font.fname)):
            fonts.append(font.name)
            missing -= found
    return fonts, missing


def _characters(font: str) -> set[str]:
    return set(map(chr, get_font(font).get_charmap()))
