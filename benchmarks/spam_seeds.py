"""Spam accuracy over seeds: new splits and training runs, the chain's hyperparameters.

    python -m benchmarks.spam_seeds 5

Runs the spam stages of configs/run/smollm2.yaml once per seed (finished ones are reused), saves all
their metrics as JSON, and prints every seed, the mean, and its 95 % confidence interval by
Student's t.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from scipy import stats

from benchmarks.harness import results_folder
from pipeline.runs.stage_run import mlruns_root

ROOT = Path(__file__).parents[1]
CHAIN = ROOT / "configs" / "run" / "smollm2.yaml"
MEASURES = ("test/accuracy", "baseline/tfidf_accuracy", "test/accuracy_minus_tfidf")


def experiment(seed: int) -> str:
    """The experiment of a seed's runs; a finished chain writes nothing to tell them apart by."""
    return f"smollm2-seed-{seed}"


def spam_chain(folder: Path, seed: int) -> Path:
    """The chain without its instruction stages, in the seed's experiment."""
    chain = yaml.safe_load(CHAIN.read_text())
    stages = [stage for stage in chain["stages"] if stage["name"].startswith("spam")]
    for stage in stages:
        stage["config"] = str(ROOT / "configs" / Path(stage["config"]).name)
    path = folder / "smollm2-spam.yaml"
    path.write_text(yaml.safe_dump({"experiment": experiment(seed), "stages": stages}))
    return path


def overrides(chain: Path, seed: int) -> Iterator[str]:
    """Options that redraw the split, the order and the adapters' initial values."""
    for stage in yaml.safe_load(chain.read_text())["stages"]:
        for key in ("data.split_seed", "data.seed", "seed_everything"):
            yield f"--set={stage['name']}.{key}={seed}"


def scores(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Metrics of each test stage, by name."""
    chain = spam_chain(folder, seed)
    words = ["run", "-c", str(chain), *overrides(chain, seed)]
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)
    outcomes = (mlruns_root() / experiment(seed)).glob("smollm2-spam-*/outcome.json")
    newest = json.loads(max(outcomes, key=lambda path: path.stat().st_mtime).read_text())
    runs = {name: Path(path) for name, path in newest["outputs"].items() if "test" in name}
    return {n: json.loads((p / "outcome.json").read_text())["metrics"] for n, p in runs.items()}


def main(n_seeds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        by_seed = {seed: scores(Path(folder), seed) for seed in range(1, n_seeds + 1)}
    path = results_folder() / "spam-seeds.json"
    path.write_text(json.dumps(by_seed, indent=1) + "\n")
    for stage in by_seed[1]:
        for measure in MEASURES:
            values = [100 * by_seed[seed][stage][measure] for seed in by_seed]
            mean = sum(values) / len(values)
            half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
            each = " ".join(f"{value:.2f}" for value in values)
            interval = f"[{mean - half:.2f}, {mean + half:.2f}]"
            print(f"{stage:14} {measure:28} {mean:6.2f} {interval}  {each}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
