"""P6: the overhead of `fit` over a bare loop: hooks, logging, saves and the like.

    python -m benchmarks.framework

Two runs of the same loop differ by more than the framework costs. So the time outside the module's
step (forward pass to optimizer) is measured within a single run of `fit`; a bare loop over the same
data module, run in turn with it, shows how much of that is waiting for data.
"""

import json
import statistics

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.harness import record_of, results_folder
from benchmarks.workloads import small_steps


def main(rounds: int = 3) -> None:
    """Measures, prints and saves the overhead.

    Args:
        rounds: how often `fit` and the loop each run.
    """
    workload = small_steps()
    ours, bare, *_ = workload.contestants  # of the first precision
    table = Table("a step, ms", "the module's", "beside it", "median", "its data, bare", "cost")
    results = []
    for _ in range(rounds):
        record = record_of(ours)
        whole = [step["seconds"] for step in record["steps"]][workload.n_warmup :]
        module = record["module_s"][workload.n_warmup :]
        beside = [a - b for a, b in zip(whole, module, strict=True)]
        found = {
            "step_s": statistics.mean(whole),
            "module_s": statistics.mean(module),
            "beside_s": statistics.mean(beside),
            "median_beside_s": statistics.median(beside),
            "data_s": statistics.mean(record_of(bare)["data_s"][workload.n_warmup :]),
        }
        results.append(found)
        loop_s = found["module_s"] + found["data_s"]
        cost = f"{found['step_s'] / loop_s - 1:.1%}"
        table.add_row(*(f"{1000 * seconds:.2f}" for seconds in found.values()), cost)
    Console().print(table)
    path = results_folder() / "framework.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main)
