"""`python -m benchmarks --workloads [P1,P3]`: measures, saves JSON, prints a table, plots."""

from jsonargparse import auto_cli

from benchmarks.harness import measure, results_folder, save
from benchmarks.report import plot, read, table
from benchmarks.workloads import WORKLOADS


def bench(workloads: list[str] | None = None, rounds: int = 3) -> None:
    """Measures workloads; ours and the peers take turns.

    Args:
        workloads: keys, such as [P1,P3]; all of them by default.
        rounds: how often each contestant runs.
    """
    for key in workloads or WORKLOADS:
        workload = WORKLOADS[key]()
        save(workload, measure(workload, rounds))
    folder = results_folder()
    results = read(folder)
    (folder / "table.md").write_text(table(results) + "\n")
    plot(results, folder / "throughput.png")
    print(table(results))
    print(f"\nJSON, table and plot: {folder}")


if __name__ == "__main__":
    auto_cli(bench)
