"""`run`: the stages of a chain, one subprocess and one child run each, below one parent run.

A stage's run directory is named by a digest of what decides its result: command, schema number,
config and the content of its inputs. If it is finished, it is reused as long as its data are the
same; if not, it is resumed. The parent run is found again in the same way.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.files import at, digest, expanded
from pipeline.commands import FUNCTIONS
from pipeline.console import say, warn
from pipeline.directories import path_digest
from pipeline.interrupts import PARENT_VARIABLE, Child
from pipeline.runs.journal import JOURNAL
from pipeline.runs.provenance import code_digest
from pipeline.runs.reuse import Attempt, Outcome, find_run, what_changed
from pipeline.runs.run_directory import Run, handed_over, read_outcome
from pipeline.runs.stage_run import RUN_VARIABLE, mlruns_root, open_run
from pipeline.stages.chain_config import (
    TO_COME,
    Chain,
    Stage,
    is_below,
    load_chain,
    made_before,
)


@dataclass(frozen=True)
class StageRun:
    """A stage and its run directory.

    Attributes:
        inputs: path of each input.
        outcome: None if the stage has to run.
        why: why an earlier outcome, if any, is not reused.
        is_reused: whether the outcome is that of an earlier run.
    """

    stage: Stage
    path: Path
    inputs: Mapping[str, str]
    outcome: Outcome | None
    why: str = ""
    is_reused: bool = True

    @property
    def result(self) -> Outcome:
        """The outcome of a run that has one."""
        assert self.outcome is not None
        return self.outcome


class StageFailed(Exception):
    """A stage that ended without an outcome."""

    def __init__(self, stage: Stage, exit_code: int, ending: str) -> None:
        super().__init__(f"stage {stage.name} {ending}")
        self.exit_code = exit_code


class StageInterrupted(StageFailed, KeyboardInterrupt):
    """A stage that ended because the chain got a signal."""


def run_chain(path: Path, overrides: Sequence[str] = (), resume: str = "auto") -> int:
    """Runs the stages of a chain that are not done yet, and prints the results.

    Options are those of `pipeline.commands.run`.

    Returns:
        The exit code: 0, that of the stage that failed, 2 if options or rows of a later stage have
        a mistake, or 128 + the signal that interrupted the chain.

    Raises:
        ValueError: the chain has a mistake, or another process runs it.
        OSError: a file of it cannot be read.
    """
    chain = load_chain(path, overrides)
    folder = mlruns_root() / chain.experiment
    base = folder / f"{path.stem}-{digest(_resolved(chain))[:8]}"
    anew = resume == "never"
    done = {} if anew else _finished(chain, folder)
    runs = _outputs(done)
    parent_path, outcome, _ = find_run(
        base,
        lambda made: "" if made["outputs"] == runs else "its stages have other runs",
        anew=anew,
    )
    if resume == "must" and outcome is None and not (parent_path / JOURNAL).exists():
        raise ValueError(
            f"resume is must, but no run of {path} was interrupted; give auto to start one."
        )
    if outcome is not None:
        say("every stage is done already")
    else:
        _check_outputs(chain.stages[len(done) :], folder)
        if exit_code := _preflight(chain, len(done)):
            return exit_code
        try:
            config = {"experiment": chain.experiment, "stages": _resolved(chain)}
            opened = open_run(Attempt(parent_path, None), config, whole_root=True)
            with opened as parent, Child() as child:
                done = _run_stages(chain, folder, parent, child, anew)
        except StageFailed as failure:
            again = ["run", "-c", str(path), *(word for o in overrides for word in ("--set", o))]
            hint = "correct that and go on" if failure.exit_code == 2 else "to go on"
            say(f"{failure}; {hint}: python -m pipeline {shlex.join(again)}")
            return failure.exit_code
    _warn_of_code(done.values())
    summarise(done.values())
    return 0


def _check_outputs(stages: Sequence[Stage], folder: Path) -> None:
    """Refuses label tables that exist and are not this chain's, before anything runs."""
    for stage in (stage for stage in stages if stage.command == "classify"):
        from pipeline.stages.classify_stage import check_new

        if (output := stage.options().get("output")) is not None:
            with at(f"stage {stage.name!r}"):
                check_new(expanded(str(output)), folder)


def _preflight(chain: Chain, n_done: int) -> int:
    """Checks options, models and rows of later stages in a subprocess; returns its exit code."""
    given = {stage.name: _to_come(chain, stage) for stage in chain.stages[n_done:]}
    if not any(any(parts.values()) for parts in [*given.values()][1:]):
        return 0  # the next stage checks its own
    say("reading the options and rows of later stages ...")
    with Child() as child:
        command = [sys.executable, "-m", "pipeline.stages.preflight", json.dumps(given)]
        return child.run(command, os.environ)


def _to_come(chain: Chain, stage: Stage) -> dict[str, list[str]]:
    """What can be checked of a stage before earlier ones have run; see `preflight.main`."""
    made = made_before(chain.stages, stage)
    models = [name for name in stage.models() if not is_below(expanded(name), made)]
    words = _words_to_come(chain, stage) if stage.command not in FUNCTIONS else []
    return {"words": words, "models": models, "entries": stage.entries()}


def _words_to_come(chain: Chain, stage: Stage) -> list[str]:
    """A stage's command line; without a config, it gets the options of its checkpoint's fit."""
    name, *words = stage.arguments(dict.fromkeys(stage.inputs, TO_COME))
    if not stage.configs and (source := stage.inputs.get("ckpt")):
        (fit,) = (made for made in chain.stages if made.name == source.stage)
        if fit.command == "fit":
            words = [*fit.arguments(dict.fromkeys(fit.inputs, TO_COME))[1:], *words]
    return [name, *words]


def _resolved(chain: Chain) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            **stage.identity(),
            "inputs": {key: f"{ref.stage}.{ref.output}" for key, ref in stage.inputs.items()},
        }
        for stage in chain.stages
    ]


def _outputs(done: Mapping[str, StageRun]) -> dict[str, str]:
    return {name: str(run.path) for name, run in done.items()}


def _finished(chain: Chain, folder: Path) -> dict[str, StageRun]:
    """Stages that are done, up to the first that is not."""
    done: dict[str, StageRun] = {}
    for stage in chain.stages:
        run = _plan(stage, folder, done)
        if run.outcome is None:
            break
        done[stage.name] = run
    return done


def _plan(stage: Stage, folder: Path, done: Mapping[str, StageRun], anew: bool = False) -> StageRun:
    """Where a stage runs, or has run, given those before it."""
    inputs = {k: done[ref.stage].result["outputs"][ref.output] for k, ref in stage.inputs.items()}
    identity = stage.identity()
    identity["inputs"] = {key: path_digest(Path(path)) for key, path in inputs.items()}
    if given := stage.paths():
        identity["given"] = {key: path_digest(handed_over(path)) for key, path in given.items()}
    base = folder / f"{stage.name}-{digest(identity)[:8]}"
    found = find_run(base, partial(_what_changed, stage), anew=anew or stage.starts_anew())
    return StageRun(stage, found.path, inputs, found.outcome, found.why)


def _what_changed(stage: Stage, outcome: Outcome) -> str:
    given = stage.options().get("output")  # a copy, or all that the command makes
    written = None if given is None else expanded(given)
    if written is not None and not written.exists():
        return f"{written} is gone"
    if (found := what_changed(outcome, options=stage.options())) or not written:
        return found
    copied = outcome["outputs"].get("tokenizer")
    is_as_it_was = not copied or path_digest(written) == path_digest(Path(copied))
    return "" if is_as_it_was else f"{written} is not what it wrote"


def _run_stages(
    chain: Chain, folder: Path, parent: Run, child: Child, anew: bool
) -> dict[str, StageRun]:
    parent.log_tags({"chain": str(chain.path)})
    parent.log_params({"stages": {stage.name: stage.command for stage in chain.stages}})
    done: dict[str, StageRun] = {}
    metrics: dict[str, float] = {}
    for number, stage in enumerate(chain.stages, start=1):
        title = f"[{number}/{len(chain.stages)}] {stage.name}"
        run = _plan(stage, folder, done, anew)
        if run.outcome is None:
            run = _execute(run, title, parent, child)
        else:
            say(f"{title}: done before, in {run.path}")
            parent.event("stage", state="reused", stage=stage.name, run=run.path.name)
        done[stage.name] = run
        news = {f"{stage.name}/{key}": value for key, value in run.result["metrics"].items()}
        metrics |= news
        parent.log_metrics(news, step=0)
    parent.finish(outputs=_outputs(done), metrics=metrics, sources={})
    return done


def _execute(run: StageRun, title: str, parent: Run, child: Child) -> StageRun:
    """Starts a stage's command and waits for its outcome.

    Raises:
        StageFailed: it has none, or a signal was received.
    """
    words = run.stage.arguments(run.inputs)
    if run.why:
        say(f"{title}: anew, {run.why}")
    say(f"{title}: python -m pipeline {shlex.join(words)}")
    facts = {"stage": run.stage.name, "run": run.path.name}
    parent.event("stage", state="started", **facts)
    started = time.monotonic()
    variables = {RUN_VARIABLE: str(run.path), PARENT_VARIABLE: str(parent.path)}
    exit_code = child.run([sys.executable, "-m", "pipeline", *words], {**os.environ, **variables})
    elapsed_s = round(time.monotonic() - started, 3)
    outcome = _outcome(run, parent, elapsed_s) if exit_code == 0 else None
    state = "failed" if outcome is None else "finished"
    parent.event("stage", state=state, exit_code=exit_code, elapsed_s=elapsed_s, **facts)
    if child.signal is not None:
        raise StageInterrupted(run.stage, 128 + child.signal, "was interrupted")
    if outcome is None:
        ending = f"failed with exit code {exit_code}"
        if exit_code > 128:
            ending = f"was killed by signal {exit_code - 128} (9: often too little memory)"
        raise StageFailed(run.stage, exit_code or 1, ending)
    return replace(run, outcome=outcome, is_reused=False)


def _outcome(run: StageRun, parent: Run, elapsed_s: float) -> Outcome | None:
    """The outcome of a stage; commands that keep no run get an empty one."""
    if not (run.path / JOURNAL).exists():
        kept = Run.open(run.path, parent=parent.path, command=run.stage.command)
        kept.finish({}, {}, {}, elapsed_s=elapsed_s)
    return read_outcome(run.path)


def _warn_of_code(runs: Iterable[StageRun]) -> None:
    now = code_digest()
    older = [r.stage.name for r in runs if r.is_reused and r.result.get("code") != now]
    if older:
        warn(
            f"the code has changed since {', '.join(older)} ran; the results are reused. "
            "Remove a stage's run directory to run it again."
        )


def summarise(runs: Iterable[StageRun]) -> None:
    """Prints the table of a finished chain, where its reports are, and what to do next."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "metric")
    for title in ("before", "after", "time"):
        table.add_column(title, justify="right")
    last_lines = []
    for run in runs:
        name, took = run.stage.name, _duration(run.result["elapsed_s"])
        took += " (earlier)" if run.is_reused else ""
        for row in run.result["headline"] or [{"metric": "", "before": None, "after": None}]:
            measure = escape(row["metric"])  # it may contain labels
            table.add_row(name, measure, _short(row["before"]), _short(row["after"]), took)
            name = took = ""
        if "report" in run.result["outputs"]:
            last_lines.append(f"report: {run.result['outputs']['report']}")
    Console().print(table)
    print(*last_lines, "next: python -m pipeline ui", sep="\n")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
