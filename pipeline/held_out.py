"""Checks that evaluation data was held out from a checkpoint's training, and has the same form."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import digest
from datamodules.splits import n_among
from pipeline.console import warn
from pipeline.resume import changed_files, differences

Facts = Mapping[str, Any]  # a meta.json, a configuration, a fingerprint
SPLIT = (  # arguments of data that decide what is held out
    *("split_seed", "train_fraction", "val_fraction", "shuffle_split", "near_duplicates"),
    *("text_column", "label_column"),
)


def trained_on(meta: Facts) -> list[dict[str, Any]]:
    """`data` and `dataset` of every training behind a checkpoint's meta, in their order."""
    own = [{key: meta[key] for key in ("data", "dataset")}] if meta.get("dataset") else []
    return [*meta.get("earlier", []), *own]


def published(meta: Facts) -> list[dict[str, Any]]:
    """`trained_on` for an export: file names without the folders of this machine."""
    shown = []
    for training in trained_on(meta):
        dataset, options = training["dataset"], (training["data"] or {}).get("init_args", {})
        names = _names(dataset["sources"])
        files = {"all": dataset["sources"], **dataset.get("apart", {})}
        named = {s: {names[path]: sha256 for path, sha256 in of.items()} for s, of in files.items()}
        facts = {"sources": named.pop("all"), "split": dataset.get("split"), "apart": named}
        data = {"init_args": {key: options[key] for key in SPLIT if key in options}}
        shown.append({"data": data, "dataset": facts})
    return shown


def _names(paths: Iterable[str]) -> dict[str, str]:
    """A unique name for each path."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = Path(path).name
        if name in taken:  # in another folder, which is not disclosed
            name = f"{digest(path)[:16]}/{name}"
        taken.add(name)
        names[path] = name
    return names


def check_held_out(
    meta: Facts,
    config: Facts | None,
    fingerprint: Facts,
    splits: Collection[str],
    keys: Sequence[str] = (),
    *,
    called: str = "the checkpoint",
) -> None:
    """Refuses to evaluate a checkpoint on another split of data that it was trained on.

    Warns if the data shares no file with that of the last training, and if parts of it were, or may
    have been, trained on.

    Args:
        meta: the checkpoint's meta.json.
        config: configuration of the evaluation data, with `init_args`.
        fingerprint: that of the evaluation data.
        splits: those that are evaluated on.
        keys: of the rows that are evaluated on; see `StepDataModule.keys`.
        called: what a message calls the checkpoint.

    Raises:
        ValueError: naming what differs.
    """
    if found := split_otherwise(meta, config, fingerprint, splits):
        raise ValueError(
            f"what is held out here may have been trained on: {found}. Restore that, or "
            f"give data.source with files that {called} has not seen."
        )
    if not (trainings := trained_on(meta)):  # published weights, which do not say
        return
    dataset = trainings[-1]["dataset"]
    _warn_of_other_data(dataset, fingerprint, splits, called)
    _warn_of_learned([training["dataset"] for training in trainings], fingerprint, keys, called)
    _warn_of_repeats(dataset, fingerprint, called)


def _warn_of_other_data(
    dataset: Facts, fingerprint: Facts, splits: Collection[str], called: str
) -> None:
    ours = _files_of(fingerprint, splits)
    if _share_files(dataset["sources"], ours):
        return
    apart = fingerprint.get("apart", {})
    named = [  # plain text has no third split: test is val
        f"data.{'val' if apart[split] == apart.get('val') else split}_source"
        for split in splits
        if split in apart
    ]
    key = " or ".join(named) or "data.source"
    unknown = "" if dataset.get("learned") else "; which texts it learned is not known"
    warn(
        f"{called} was trained on {', '.join(_learned(dataset))}, and is evaluated on other data, "
        f"{', '.join(ours)}; {key} says on which{unknown}."
    )


def _warn_of_learned(
    datasets: Iterable[Facts], fingerprint: Facts, keys: Sequence[str], called: str
) -> None:
    units = fingerprint.get("split", "")
    for earlier in datasets:
        learned = earlier.get("learned")
        if learned and earlier["split"] == units and (n_known := n_among(keys, learned)):
            of = f"{n_known} of {len(keys)} {units.partition(' ')[0]}"
            warn(
                f"{of} that are evaluated on are what {called} was trained on; no score of "
                "them is held out."
            )


def _warn_of_repeats(dataset: Facts, fingerprint: Facts, called: str) -> None:
    n_repeated = fingerprint.get("counts", {}).get("n_repeated")
    is_same_source = _share_files(_learned(dataset), _learned(fingerprint))
    if n_repeated and is_same_source and _apart(dataset) != _apart(fingerprint):
        warn(
            f"{n_repeated} rows of data.source repeat what is held out here; {called} may have "
            "learned them."
        )


def warn_of_split(source: str, meta: Facts, config: Facts | None, fingerprint: Facts) -> None:
    """Warns if weights from a source are trained further on another split than before."""
    if found := split_otherwise(meta, config, fingerprint, ("val", "test")):
        warn(
            f"what is held out here may have been trained on before, in {source}: "
            f"{found}. test and score will refuse it; restore that, or give data.source with other "
            "files."
        )


def check_form(source: str, meta: Facts, ours: Facts) -> None:
    """ValueError if weights from a source would get data in another form than in training."""
    for key, value in ours.items():
        if key in meta and meta[key] != value:
            raise ValueError(
                f"{source} was trained with data.{key} {meta[key]!r}, here it is {value!r}; give "
                "that of the training."
            )


def split_otherwise(
    meta: Facts, config: Facts | None, fingerprint: Facts, splits: Collection[str]
) -> str:
    """How the split of data differs from that in the trainings behind a checkpoint.

    Takes what `check_held_out` takes; the text is empty where nothing differs.
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
        units, own_units = dataset.get("split"), fingerprint.get("split")
        if units != own_units:
            found.append(f"it was split by {units}, is split by {own_units}")
        theirs, ours = dataset["sources"], fingerprint["sources"]
        if list(theirs.values()) != list(ours.values()):  # the split depends on their order
            found += [f"{name} is not what it was" for name in changed_files(theirs, ours)]
        if _apart(dataset) != _apart(fingerprint):
            found.append("data.val_source and data.test_source named other files")
    return "; ".join(dict.fromkeys(found))


def _learned(dataset: Facts) -> dict[str, str]:
    """Files and digests that training has all or a share of."""
    apart = {path for files in dataset.get("apart", {}).values() for path in files}
    return {path: digest for path, digest in dataset["sources"].items() if path not in apart}


def _files_of(dataset: Facts, splits: Collection[str]) -> dict[str, str]:
    apart, shared = dataset.get("apart", {}), _learned(dataset)
    files = [apart.get(split, shared) for split in splits]
    return {path: digest for of_split in files for path, digest in of_split.items()}


def _apart(dataset: Facts) -> dict[str, list[str]]:
    return {split: list(files.values()) for split, files in dataset.get("apart", {}).items()}


def _share_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    return bool(theirs.keys() & ours.keys() or set(theirs.values()) & set(ours.values()))
