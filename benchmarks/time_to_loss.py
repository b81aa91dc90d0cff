"""P8: how long `fit` and a plain loop take to reach a given validation loss.

    python -m benchmarks.time_to_loss

Both start from the same random weights of a GPT-2 model (10.7 million parameters in its blocks) and
train on the prose that ships with Python. The plain loop takes 32 rows per step in float32, with
AdamW at a constant learning rate; `fit` has its own precision, optimizer, schedule and batch size.
The target is the lowest loss that the plain loop reaches. Validation time counts for neither; the
checkpoints that `fit` saves after each validation do count. Saves both curves as JSON and a plot.
"""

import json
import sys
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks import prepare
from benchmarks.harness import Contestant, record_of, results_folder

CONTEXT, PLAIN_ROWS = 256, 32
OURS_EVERY, PLAIN_EVERY = 4, 10  # steps between validations; `fit` saves a checkpoint at each


def plain(weights: str, n_steps: int, every: int) -> Contestant:
    """The plain loop."""
    steps = prepare.pretraining_steps(CONTEXT, PLAIN_ROWS, n_steps)
    words = [weights, str(steps), str(prepare.validation_rows(CONTEXT)), str(every)]
    module = "benchmarks.contestants.plain_to_loss"
    return Contestant("plain loop", "float32", [sys.executable, "-m", module, "{record}", *words])


def ours(weights: str, n_steps: int, n_rows: int, lr: float, every: int) -> Contestant:
    """`fit`, with its own recipe."""
    options = {
        "model.gpt": "null",
        "model.init_from": weights,
        "model.optimizer.name": "muon",
        "model.optimizer.lr": lr,
        "model.optimizer.warmup_steps": n_steps // 5,
        "model.optimizer.betas": "[0.7, 0.95]",  # of few steps the first are soon to be forgotten
        "data.block_size": CONTEXT,
        "data.batch_size": n_rows,
        "trainer.max_steps": n_steps,
        "trainer.val_check_interval": every,
        "trainer.callbacks": json.dumps(
            [{"class_path": "benchmarks.clock.StepClock", "init_args": {"path": "{record}"}}]
        ),
    }
    words = [sys.executable, "-m", "pipeline", "fit", "-c", "configs/pretrain.yaml"]
    words += [f"--{key}={value}" for key, value in options.items()]
    return Contestant("ours, through fit", "float32", words, is_ours=True)


def seconds_to(target: float, validations: list[dict[str, float]]) -> float:
    """Seconds until a validation loss is first at or below the target.

    Raises:
        RuntimeError: if none is.
    """
    for validation in validations:
        if validation["loss"] <= target:
            return validation["seconds"]
    lowest = min(validation["loss"] for validation in validations)
    raise RuntimeError(f"a loss of {target:.3f} was not reached; the lowest is {lowest:.3f}")


def plot(curves: dict[str, list[dict[str, float]]], target: float) -> Figure:
    """Validation loss against seconds of training."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot([v["seconds"] for v in curve], [v["loss"] for v in curve], marker=".", label=name)
    axis.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("validation loss (nats a token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    plain_steps: int = 40, n_steps: int = 24, n_rows: int = 8, lr: float = 0.005, rounds: int = 1
) -> None:
    """Measures, prints and saves the times.

    Args:
        plain_steps: steps of the plain loop.
        n_steps: steps of `fit`.
        n_rows: rows per step of `fit`.
        lr: peak learning rate of `fit`.
        rounds: how often both run, in turn.
    """
    config = prepare.gpt2_config(
        n_layer=6, n_head=6, n_embd=384, block_size=CONTEXT, vocab_size=4096
    )
    weights = str(prepare.gpt2(config, "P1"))
    results: list[dict[str, Any]] = []
    for _ in range(rounds):
        curves = {
            contestant.name: record_of(contestant)["validations"]
            for contestant in (
                ours(weights, n_steps, n_rows, lr, OURS_EVERY),
                plain(weights, plain_steps, PLAIN_EVERY),
            )
        }
        mine, theirs = curves.values()
        target = min(validation["loss"] for validation in theirs)
        plain_s, ours_s = seconds_to(target, theirs), seconds_to(target, mine)
        results.append({"target": target, "plain_s": plain_s, "ours_s": ours_s, "curves": curves})
        print(
            f"validation loss {target:.3f}: plain loop {plain_s:.0f} s, ours {ours_s:.0f} s: "
            f"{plain_s / ours_s:.1f} times sooner"
        )
    path = results_folder() / "time-to-loss.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results[-1]["curves"], results[-1]["target"]).savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    auto_cli(main)
