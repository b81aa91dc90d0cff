"""The harness measures what it says: warm-up left out, equal work refused where it is not equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Contestant, Result, Workload, check_equal_work, measure
from benchmarks.report import plot, table

STEPS = """
import sys
from benchmarks.record import Record
record = Record(sys.argv[1])
for tokens, loss in ((999, 9.0), ({tokens}, 2.0), ({tokens}, {loss})):
    record.step(tokens, loss)
record.save()
"""


def contestant(
    name: str, *, tokens: int = 100, loss: float = 1.0, ours: bool = False
) -> Contestant:
    program = STEPS.format(tokens=tokens, loss=loss)
    return Contestant(name, "float32", [sys.executable, "-c", program, "{record}"], is_ours=ours)


def workload(*contestants: Contestant) -> Workload:
    return Workload("P0", "nothing", contestants, 1, flops_per_token=1e6, loss_tolerance=0.02)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    work = workload(contestant("ours", ours=True), contestant("theirs", loss=1.01))
    return measure(work, n_rounds=2)


def test_warm_up_is_left_out_and_reported(results: list[Result]) -> None:
    for result in results:
        assert result.tokens == [200, 200]
        assert [len(v) for v in (result.rates, result.warmup_seconds, result.rss)] == [2, 2, 2]
        rates = [200 / seconds for seconds in result.seconds]
        assert result.rates == pytest.approx(rates)
        assert all(share > 0 for share in result.shares)
        assert all(5e6 < rss < 1e9 for rss in result.rss)  # bytes of a Python process


def test_other_work_is_refused(results: list[Result]) -> None:
    ours, theirs = results
    less = Result(**{**vars(theirs), "tokens": [199, 200]})
    with pytest.raises(RuntimeError, match="theirs worked on"):
        check_equal_work(workload(), [ours, less])
    other = Result(**{**vars(theirs), "outputs": ["0", "0"]})
    with pytest.raises(RuntimeError, match="same output"):
        check_equal_work(workload(), [ours, other])
    worse = Result(**{**vars(theirs), "losses": [1.0, 1.5]})
    with pytest.raises(RuntimeError, match="theirs ends at a loss"):
        check_equal_work(workload(), [ours, worse])


def test_a_contestant_that_fails_says_why() -> None:
    broken = Contestant("ours", "float32", [sys.executable, "-c", "1 / 0"], is_ours=True)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure(workload(broken), n_rounds=1)


def test_table_and_plot(tmp_path: Path) -> None:
    rows = [
        Result("ours", "bf16", True, rates=[300.0, 310.0, 320.0], rss=[2 * 10**9], shares=[0.5]),
        Result("theirs", "float32", False, rates=[100.0, 103.0, 104.0], rss=[10**9]),
    ]
    kept = {"key": "P0", "title": "nothing", "unit": "tokens/s"}
    kept["results"] = json.loads(json.dumps([vars(row) for row in rows]))
    text = table([kept])
    assert "310 (300 to 320) tokens/s" in text
    assert "| 3.0x |" in text
    assert "| 50% | 2.00 GB |" in text
    plot([kept], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
