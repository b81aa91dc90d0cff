"""`classify` of a table: in a chain it keeps a run, which records what was made from what."""

import os
from functools import partial
from pathlib import Path

from datamodules.files import file_digests, sha256
from pipeline.inference import classify_table
from pipeline.runs.reuse import Attempt
from pipeline.runs.run_directory import OUTCOME, read_outcome
from pipeline.runs.stage_run import RUN_VARIABLE, open_run

LABELS = "labels"  # the output of such a run


def classify_stage(
    ckpt: str,
    *,
    file: Path,
    column: str,
    output: Path,
    threshold: float | None,
    batch_size: int,
) -> None:
    """Labels a table; see `pipeline.commands.classify`."""
    label = partial(classify_table, ckpt, file, column, output, threshold, batch_size)
    if RUN_VARIABLE not in os.environ:
        check_new(output)
        label()
        return
    options = {
        "ckpt": ckpt,
        "file": str(file),
        "column": column,
        "output": str(output),
        "threshold": threshold,
    }
    with open_run(Attempt(Path(os.environ[RUN_VARIABLE]), None), options) as run:
        check_new(output, run.path.parent)
        label()
        run.finish(
            outputs={LABELS: str(output.resolve())},
            digests={LABELS: sha256(output)},
            metrics={},
            sources=file_digests([file]),
        )


def check_new(output: Path, folder: Path | None = None) -> None:
    """Refuses an output that exists, unless a run in `folder` wrote it as it is."""
    if not output.exists() or (folder is not None and _was_made(output, folder)):
        return
    raise ValueError(f"output {output} exists; give a new file, or remove it.")


def _was_made(output: Path, folder: Path) -> bool:
    found = [read_outcome(path.parent) for path in folder.glob(f"*/{OUTCOME}")]
    made = [o for o in found if o and o["outputs"].get(LABELS) == str(output.resolve())]
    return any(outcome["digests"][LABELS] == sha256(output) for outcome in made)
