"""Results as a table and as a plot."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADER = "| | workload | who | precision | {} | of ours | share of ceiling | peak memory |"


def read(folder: Path) -> list[dict[str, Any]]:
    """All results saved in a folder, ordered by key."""
    paths = sorted(folder.glob("P*.json"), key=lambda path: (_place(path), path.stem))
    return [json.loads(path.read_text()) for path in paths]


def _place(path: Path) -> int:
    """The 10 in `P10-x.json`."""
    found = re.match(r"P(\d+)", path.stem)
    assert found, path
    return int(found[1])


def table(workloads: Sequence[dict[str, Any]]) -> str:
    """Markdown: median (min to max) of every contestant, and how many times faster ours is."""
    lines = [HEADER.format("rate, median (min to max)"), "|---|---|---|---|---|---|---|---|"]
    for workload in workloads:
        ours = {r["precision"]: r for r in workload["results"] if r["is_ours"]}
        for row, result in enumerate(workload["results"]):
            name = (workload["key"], workload["title"]) if row == 0 else ("", "")
            rates = result["rates"]
            spread = f"{_number(statistics.median(rates))} ({_number(min(rates))} to "
            spread += f"{_number(max(rates))}) {workload['unit']}"
            share = statistics.median(result["shares"]) if result["shares"] else None
            cells = [
                *name,
                result["name"],
                result["precision"],
                spread,
                "" if result["is_ours"] else _ratios(ours, result),
                f"{share:.0%}" if share else "",
                f"{max(result['rss']) / 1e9:.2f} GB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(ours: dict[str, dict[str, Any]], peer: dict[str, Any]) -> str:
    """Our rate over a peer's: our best, and ours in the peer's own precision."""
    rate = statistics.median(peer["rates"])
    by_precision = {p: statistics.median(r["rates"]) / rate for p, r in ours.items()}
    best = max(by_precision.values())
    own = by_precision.get(peer["precision"])
    return f"{best:.1f}x" + (f", {own:.1f}x in its precision" if own and own != best else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(workloads: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: each contestant's rate as a multiple of the best peer's."""
    bars_of = [len(workload["results"]) for workload in workloads]
    figure, axes = plt.subplots(
        len(workloads),
        1,
        figsize=(8, 1.1 + 0.23 * sum(bars_of) + 0.25 * len(workloads)),
        height_ratios=bars_of,
        layout="constrained",
    )
    for axis, workload in zip([axes] if len(workloads) == 1 else axes, workloads, strict=True):
        results = sorted(workload["results"], key=lambda r: statistics.median(r["rates"]))
        rates = [statistics.median(r["rates"]) for r in results]
        best_peer = max(rate for rate, r in zip(rates, results, strict=True) if not r["is_ours"])
        colours = ["tab:blue" if r["is_ours"] else "lightgrey" for r in results]
        names = [f"{r['name']}, {r['precision']}" for r in results]
        bars = axis.barh(names, [rate / best_peer for rate in rates], color=colours)
        axis.bar_label(bars, [f"{rate / best_peer:.1f}x" for rate in rates], padding=3, fontsize=8)
        axis.set_title(f"{workload['key']}: {workload['title']}", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    figure.supxlabel("throughput, as a multiple of the best peer's", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
