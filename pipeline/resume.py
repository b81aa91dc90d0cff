"""Whether a checkpoint may be resumed here: the same data, model, precision and processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.chain_config import decisive
from pipeline.checkpoint import CHECKPOINTS
from pipeline.run_directory import CONFIG, OUTCOME

FIXED = "model.optimizer."  # what begins so is in the optimizer's saved state, and stays so
_SHOWN = 40  # characters of a value; a digest is cut to fewer
_DIGEST_LENGTH = 64


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Key -> what the checkpoint has and what this run has, wherever they are not the same."""
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    return {
        key: f"{key} was {_shown(theirs.get(key))}, is {_shown(ours.get(key))}"
        for key in keys
        if theirs.get(key) != ours.get(key)
    }


def check_resumable(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, allowed: bool) -> str:
    """Refuses a checkpoint that another run made.

    Args:
        theirs: the checkpoint's meta: `identity`, and `dataset` with the digests of its files.
        ours: the same of this run.
        allowed: take it all the same, the optimizer's settings excepted.

    Returns:
        The differences that were allowed; empty where there are none.

    Raises:
        ValueError: naming every difference, and what can be done.
    """
    found = differences(theirs.get("identity", {}), ours["identity"])
    text = "; ".join(found.values())
    if files := changed_files(theirs["dataset"]["sources"], ours["dataset"]["sources"]):
        text += f" (changed: {', '.join(files)})" if "data.samples" in found else ""
    if any(key.startswith(FIXED) for key in found):
        raise ValueError(
            f"the checkpoint is of another run: {text}. An optimizer goes on as it began: restore "
            "what differs, or take the weights alone, with model.init_from."
        )
    if found and not allowed:
        raise ValueError(
            f"the checkpoint is of another run: {text}. Restore what differs, start anew with "
            "--run.resume never, or go on all the same with --run.allow_changes true."
        )
    return text


def interrupted_like(run: Path) -> str:
    """The last run of the same name that was interrupted, and how it differs; else empty.

    Args:
        run: a run directory; its name is that of the run, and a digest.
    """
    prefix = run.name.rpartition("-")[0]
    others = [
        folder.parents[1]
        for folder in run.parent.glob(f"{prefix}-*/{CHECKPOINTS}/step-*")
        if folder.parents[1] != run and not (folder.parents[1] / OUTCOME).exists()
    ]
    if not others:
        return ""
    other = max(others, key=lambda path: (path / CONFIG).stat().st_mtime)
    theirs, ours = (_decisive(yaml.safe_load((path / CONFIG).read_text())) for path in (other, run))
    found = "; ".join(differences(theirs, ours).values())
    return f"the interrupted run {other} is another: {found}"


def _decisive(config: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in decisive(config).items()}


def changed_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Names of the files that were changed, removed or added."""
    names = sorted(theirs.keys() | ours.keys())
    return [name for name in names if theirs.get(name) != ours.get(name)]


def _shown(value: str | None) -> str:
    if value is None:
        return "not there"
    return value[: 12 if len(value) == _DIGEST_LENGTH else _SHOWN]
