"""Where a command keeps its run: where the chain says, else in a folder named by its options."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.files import digest
from pipeline.console import say
from pipeline.interrupts import PARENT_VARIABLE
from pipeline.runs.identity import decisive
from pipeline.runs.provenance import environment
from pipeline.runs.reuse import Attempt, find_run, what_changed
from pipeline.runs.run_directory import AlreadyFinished, Run, read_outcome
from pipeline.runs.tracking import INTERRUPTED_PATIENCE_S, PATIENCE_S, Replica

RUN_VARIABLE = "GPT_PIPELINE_RUN"
HOME_VARIABLE = "GPT_PIPELINE_HOME"


def mlruns_root() -> Path:
    """Folder of all runs and of the tracking store: GPT_PIPELINE_HOME, else `mlruns` here."""
    return Path(os.environ.get(HOME_VARIABLE) or "mlruns").expanduser().resolve()


def run_once(
    experiment: str,
    stem: str,
    deciding: Any,
    config: Mapping[str, Any],
    make: Callable[[Run], None],
    output: str,
) -> Path:
    """Makes an output in a run of its own, unless a finished run still has it; returns its path.

    Args:
        experiment: folder below `mlruns_root()`.
        stem: name of the run, to which a digest is added.
        deciding: what the digest is taken of: equal options and inputs are the same run.
        config: resolved options, primitives.
        make: makes the output, and finishes the run.
        output: key of the output among those of the run.
    """
    stem = re.sub(r"[^\w-]+", "-", stem)
    base = mlruns_root() / experiment / f"{stem}-{digest(deciding)[:8]}"
    attempt = find_run(base, partial(what_changed, options=decisive(config)))
    try:
        with open_run(attempt, config) as run:
            make(run)
        path = run.path
    except AlreadyFinished as finished:
        path = finished.path
        say(f"already finished: {path}")
    outcome = read_outcome(path)
    assert outcome is not None, f"{path} was not finished"
    return Path(outcome["outputs"][output])


@contextmanager
def open_run(
    attempt: Attempt, config: Mapping[str, Any], *, whole_root: bool = False
) -> Iterator[Run]:
    """Opens a command's run and records config and environment; the run fails if the block does.

    MLflow is kept up to date meanwhile, by a chain for the `whole_root`. A stage leaves that to its
    chain, which also gives its directory and says why it runs anew. Raises what `Run.open` does.
    """
    given, parent = os.environ.get(RUN_VARIABLE), os.environ.get(PARENT_VARIABLE)
    if attempt.why and not given:
        say(f"anew: {attempt.why}")
    path, command = Path(given) if given else attempt.path, shlex.join(sys.argv[1:])
    run = Run.open(path, parent=Path(parent) if parent else None, command=command)
    replica = None if parent else Replica(run.path, whole_root=whole_root)
    patience_s = PATIENCE_S
    try:
        run.config(config)
        if not whole_root:  # of a chain, the stages' runs have them
            run.log_params(config)
        run.log_tags(environment())
        yield run
    except BaseException as error:
        run.fail(error)
        if isinstance(error, KeyboardInterrupt | SystemExit):  # the latter from training
            patience_s = INTERRUPTED_PATIENCE_S
        raise
    finally:
        if replica is not None:
            replica.close(patience_s)
