"""Figures of training and classification; a function returns a Figure and shows nothing."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

FIRST, SECOND = "#3b6ea8", "#d2691e"


def loss_curves(
    train: Sequence[tuple[int, int, float]], val: Sequence[tuple[int, float]]
) -> Figure:
    """Training and validation loss over optimizer steps, and over tokens on a second axis.

    Args:
        train: (step, tokens seen, loss in nats) of every step.
        val: (step, loss in nats) of every validation.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, tokens, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color=FIRST, linewidth=0.8, label="training")
    if val:
        axes.plot(
            *zip(*val, strict=True), color=SECOND, marker="o", markersize=3.5, label="validation"
        )
    axes.set(xlabel="optimizer steps", ylabel="loss (nats a token)")
    per_step = tokens[-1] / steps[-1]
    over_tokens = axes.secondary_xaxis(
        "top", functions=(lambda step: step * per_step, lambda n: n / per_step)
    )
    over_tokens.set_xlabel("tokens seen")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def confusion_figure(counts: Sequence[Sequence[int]], label_names: Sequence[str]) -> Figure:
    """Confusion matrix with its counts; rows are the truth."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    highest = max(max(row) for row in counts)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            color = "white" if count > highest / 2 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=color)
    places = range(len(label_names))
    axes.set_xticks(places, labels=label_names)
    axes.set_yticks(places, labels=label_names)
    axes.set(xlabel="predicted", ylabel="true")
    return figure
