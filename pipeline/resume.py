"""Whether a checkpoint may be resumed here: the same data, model, precision and processes."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pipeline.arguments import load_yaml
from pipeline.checkpoint import stem_of
from pipeline.directories import CHECKPOINTS
from pipeline.runs.identity import decisive
from pipeline.runs.run_directory import CONFIG, OUTCOME, is_open, read_outcome

FIXED = "model.optimizer."  # prefix of settings in the optimizer's saved state, never changed
LENGTHS = ("trainer.max_steps", "trainer.max_epochs")
FROM = "ckpt_path"  # option of fit: the checkpoint that a run goes on from
N_COMPARED = 50  # newest finished runs of a name, of which a sweep may have thousands
_SHOWN = 40  # characters of a value; a digest is cut to fewer
_DIGEST_LENGTH = 64


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Key -> a text with the checkpoint's and this run's value, for values that differ."""
    return {
        key: f"{key} was {_shown(theirs.get(key))}, is {_shown(ours.get(key))}"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    }


def check_resumable(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, allowed: bool) -> str:
    """Refuses a checkpoint of a different run, with a ValueError that names every difference.

    Args:
        theirs: the checkpoint's meta: `identity`, and `dataset` with the digests of its files.
        ours: the same of this run.
        allowed: accept differences, except in the optimizer's settings.

    Returns:
        The differences that were allowed; empty where there are none.
    """
    found = differences(theirs.get("identity", {}), ours["identity"])
    text = "; ".join(found.values())
    files = changed_files(theirs["dataset"]["sources"], ours["dataset"]["sources"])
    if files and "data.samples" in found:
        text += f" (changed: {', '.join(files)})"
    if any(key.startswith(FIXED) for key in found):
        raise ValueError(
            f"the checkpoint is of another run: {text}. An optimizer goes on as it began: restore "
            "what differs, or take the weights alone, with model.init_from."
        )
    if found and not allowed:
        raise ValueError(
            f"the checkpoint is of another run: {text}. Restore what differs, start anew with "
            "--run.resume never (in a chain, --set STAGE.run.resume=never), or go on all the same "
            "with --run.allow_changes true."
        )
    return text


def check_alike(first: Mapping[str, str], other: Mapping[str, str], rank: int) -> None:
    """ValueError if the process of a rank would train something different from the first."""
    if found := differences(first, other):
        raise ValueError(
            f"process {rank} is not like the first: {'; '.join(found.values())} there. Give all of "
            "them the same files, runs (GPT_PIPELINE_HOME) and settings."
        )


def check_base(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    """ValueError if an adapter's checkpoint has another base; None stands for no adapter."""
    if (theirs or {}).get("digest") != (ours or {}).get("digest"):
        raise ValueError(
            f"the checkpoint belongs to the base {theirs and theirs['path']}, "
            f"model.init_from gives {ours and ours['path']}, which holds other weights."
        )


def check_tensors(what: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """ValueError if the tensors of `what` differ from the model's in names or shapes."""
    if theirs.keys() != ours.keys():
        missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        raise ValueError(
            f"{what} does not fit the model: missing {missing[:3]}, unexpected {extra[:3]}; "
            "give one of a model like this."
        )
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{what} does not fit the model: {name} has shape {tuple(theirs[name].shape)}, "
                f"the model's is {tuple(tensor.shape)}; give one of a model like this."
            )


def earlier_like(run: Path) -> str:
    """Names a shorter or interrupted run of the same name and how it differs; empty without one.

    Empty, too, if the run is not open yet: other processes may ask before the first opens it.
    """
    return (shorter_than(run) or interrupted_like(run)) if (run / CONFIG).is_file() else ""


def interrupted_like(run: Path) -> str:
    """Names the last interrupted run of the same name and how it differs; empty without one."""
    others = [other for other in _newest_first(run) if not (other / OUTCOME).exists()]
    other = next((other for other in others if not is_open(other)), None)
    if other is None:
        return ""
    theirs, ours = _options(other), _options(run)
    if not theirs:
        return f"there is an interrupted run {other}, but its {CONFIG} cannot be read"
    if not (found := "; ".join(differences(theirs, ours).values())):
        return f"the interrupted run {other} had the same options, but other files or weights"
    return f"the interrupted run {other} is another: {found}"


def shorter_than(run: Path) -> str:
    """Names the last finished run that is this one, but shorter; empty without one."""
    ours = _options(run)
    for other in _newest_first(run)[:N_COMPARED]:
        theirs = _options(other)
        found = differences(theirs, ours)
        found.pop(FROM, None)
        longer = {key for key in LENGTHS if _length(theirs, key) < _length(ours, key)}
        if not found or found.keys() != longer:
            continue
        facts = f"the finished run {other} is another: {'; '.join(found.values())}"
        try:
            last = (read_outcome(other) or {"outputs": {}})["outputs"].get("last")
        except ValueError as error:
            return f"{facts}; but {error}"
        if last and Path(last).is_dir():
            return f"{facts}; --{FROM} {shlex.quote(last)} goes on from it"
    return ""


def _length(options: Mapping[str, str], key: str) -> float:
    """Steps or epochs that a run may take; infinite where they are not limited."""
    text = options.get(key, "")
    return float(text) if text.isdecimal() else math.inf


def _newest_first(run: Path) -> list[Path]:
    """Other runs of the same name that have a checkpoint and a configuration."""
    others = [
        other
        for other in run.parent.glob("*")
        if other != run
        and stem_of(other) == stem_of(run)
        and any(other.glob(f"{CHECKPOINTS}/step-*"))
        and (other / CONFIG).is_file()
    ]
    return sorted(others, key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)


def _options(run: Path) -> dict[str, str]:
    """The options that decide a run's result, by dotted key; empty if they cannot be read."""
    try:
        config = load_yaml((run / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # of another's run, too
        return {}
    found = decisive(config) if isinstance(config, dict) else {}
    return {key: str(value) for key, value in found.items()}


def changed_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Names of the files that were changed, removed or added."""
    return [name for name in sorted({**theirs, **ours}) if theirs.get(name) != ours.get(name)]


def _shown(value: str | None) -> str:
    if value is None:
        return "not there"
    return value[: 12 if len(value) == _DIGEST_LENGTH else _SHOWN]
