"""Whether a checkpoint may be resumed here: the same data, model, precision and processes.

And whether what is held out here was held out from it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pipeline.arguments import load_yaml
from pipeline.checkpoint import CHECKPOINTS, stem_of
from pipeline.runs.identity import decisive
from pipeline.runs.run_directory import CONFIG, OUTCOME

FIXED = "model.optimizer."  # what begins so is in the optimizer's saved state, and stays so
SPLIT = (  # arguments of data that decide what is held out
    *("split_seed", "train_fraction", "val_fraction", "shuffle_split", "near_duplicates"),
    *("text_column", "label_column"),
)
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


def check_alike(first: Mapping[str, str], other: Mapping[str, str], rank: int) -> None:
    """Refuses a process that would train something else than the first.

    Args:
        first: what all must share, in the first process, by key.
        other: the same in another.
        rank: of that one.

    Raises:
        ValueError: naming every difference.
    """
    if found := differences(first, other):
        raise ValueError(
            f"process {rank} is not like the first: {'; '.join(found.values())} there. Give all of "
            "them the same files, runs (GPT_PIPELINE_HOME) and settings."
        )


def check_base(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    """Refuses an adapter's checkpoint on another base; None where a run has no adapter.

    Raises:
        ValueError: naming both.
    """
    if (theirs or {}).get("digest") != (ours or {}).get("digest"):
        raise ValueError(
            f"the checkpoint belongs to the base {theirs and theirs['path']}, "
            f"model.init_from gives {ours and ours['path']}, which holds other weights."
        )


def check_tensors(what: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Refuses tensors of other names or shapes than the model's.

    Args:
        what: what holds theirs, for the message.
        theirs: tensors by name.
        ours: the model's.

    Raises:
        ValueError: naming missing and unexpected tensors, or one of another shape.
    """
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


def trained_on(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`data` and `dataset` of every training behind a checkpoint, the first one first.

    Args:
        meta: the checkpoint's meta.json.
    """
    own = [{key: meta[key] for key in ("data", "dataset")}] if meta.get("dataset") else []
    return [*meta.get("earlier", []), *own]


def check_held_out(
    meta: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    fingerprint: Mapping[str, Any],
    splits: Collection[str],
) -> None:
    """Refuses to evaluate a checkpoint on another split of data that it was trained on.

    Data that shares no file with what it was trained on last is all held out; that is said.

    Args:
        meta: the checkpoint's meta.json.
        config: configuration of the data here, with `init_args`.
        fingerprint: fingerprint of the data here.
        splits: those that are evaluated on.

    Raises:
        ValueError: naming what differs.
    """
    if found := split_otherwise(meta, config, fingerprint, splits):
        raise ValueError(
            f"what is held out here may have been trained on: {found}. Restore that, or "
            "give data.source with files that the checkpoint has not seen."
        )
    *_, last = trained_on(meta)
    dataset, ours = last["dataset"], _files_of(fingerprint, splits)
    if not _share_files(dataset["sources"], ours):
        print(
            f"warning: the checkpoint was trained on {', '.join(_learned(dataset))}, and is "
            f"evaluated on other data, {', '.join(ours)}; data.source says on which.",
            file=sys.stderr,
        )
    n_repeated = fingerprint.get("counts", {}).get("n_repeated")
    if n_repeated and _apart(dataset) != _apart(fingerprint):
        print(
            f"warning: {n_repeated} rows of data.source repeat what is held out here; the "
            "checkpoint may have learned them.",
            file=sys.stderr,
        )


def split_otherwise(
    meta: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    fingerprint: Mapping[str, Any],
    splits: Collection[str],
) -> str:
    """How data here is split otherwise than where a checkpoint, or one before it, trained on it.

    Takes what `check_held_out` takes; the text is empty where nothing is.
    """
    found: list[str] = []
    for earlier in trained_on(meta):
        dataset = earlier["dataset"]
        if not _share_files(_learned(dataset), _files_of(fingerprint, splits)):
            continue
        was, now = ((given or {}).get("init_args", {}) for given in (earlier["data"], config))
        both = [key for key in SPLIT if key in was and key in now]
        texts = differences({k: str(was[k]) for k in both}, {k: str(now[k]) for k in both})
        found += [f"data.{text}" for text in texts.values()]
        theirs, ours = dataset["sources"], fingerprint["sources"]
        if list(theirs.values()) != list(ours.values()):  # in this order the split counts its rows
            found += [f"{name} is not what it was" for name in changed_files(theirs, ours)]
        elif _apart(dataset) != _apart(fingerprint):
            found.append("data.val_source and data.test_source named other files")
    return "; ".join(dict.fromkeys(found))


def _learned(dataset: Mapping[str, Any]) -> dict[str, str]:
    """Files, by digest, that training has a share of, or all."""
    apart = {path for files in dataset.get("apart", {}).values() for path in files}
    return {path: digest for path, digest in dataset["sources"].items() if path not in apart}


def _files_of(dataset: Mapping[str, Any], splits: Collection[str]) -> dict[str, str]:
    apart, shared = dataset.get("apart", {}), _learned(dataset)
    files = [apart.get(split, shared) for split in splits]
    return {path: digest for of_split in files for path, digest in of_split.items()}


def _apart(dataset: Mapping[str, Any]) -> dict[str, list[str]]:
    return {split: list(files.values()) for split, files in dataset.get("apart", {}).items()}


def _share_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    return bool(theirs.keys() & ours.keys() or set(theirs.values()) & set(ours.values()))


def interrupted_like(run: Path) -> str:
    """The last run of the same name that was interrupted, and how it differs; else empty."""
    others = [
        other
        for other in run.parent.glob("*")
        if other != run
        and stem_of(other) == stem_of(run)
        and any(other.glob(f"{CHECKPOINTS}/step-*"))
        and (other / CONFIG).is_file()
        and not (other / OUTCOME).exists()
    ]
    if not others:
        return ""
    other = max(others, key=lambda path: (path / CONFIG).stat().st_mtime)
    theirs, ours = _options(other), _options(run)
    if not theirs:
        return f"there is an interrupted run {other}, but its {CONFIG} is damaged"
    found = "; ".join(differences(theirs, ours).values())
    return f"the interrupted run {other} is another: {found}"


def _options(run: Path) -> dict[str, str]:
    """What decides the result of a run, by dotted key; nothing where the file is damaged."""
    try:
        config = load_yaml((run / CONFIG).read_text("utf-8"))
    except (ValueError, yaml.YAMLError):
        return {}
    found = decisive(config) if isinstance(config, dict) else {}
    return {key: str(value) for key, value in found.items()}


def changed_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Names of the files that were changed, removed or added."""
    names = sorted(theirs.keys() | ours.keys())
    return [name for name in names if theirs.get(name) != ours.get(name)]


def _shown(value: str | None) -> str:
    if value is None:
        return "not there"
    return value[: 12 if len(value) == _DIGEST_LENGTH else _SHOWN]
