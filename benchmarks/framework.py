"""P6: what `fit` takes beside the module's own steps: data, hooks, logging, saves.

    python -m benchmarks.framework

Two runs of the same loop differ by more than the framework costs, so both are told apart within
one: the module's step, forward pass to optimizer, is what a bare loop has too.
"""

import json
import statistics

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.harness import record_of, results_folder
from benchmarks.workloads import small_steps


def main(rounds: int = 3) -> None:
    """Measures, keeps, prints.

    Args:
        rounds: runs of `fit`.
    """
    workload = small_steps()
    ours = next(contestant for contestant in workload.contestants if contestant.is_ours)
    table = Table("a step, ms", "the module's, ms", "beside it, ms: mean", "median", "share")
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
        }
        results.append(found)
        shares = f"{found['beside_s'] / found['module_s']:.1%}"
        table.add_row(*(f"{1000 * seconds:.2f}" for seconds in found.values()), shares)
    Console().print(table)
    path = results_folder() / "framework.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main)
