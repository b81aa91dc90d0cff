"""What a model was made from, back to the published weights it started from."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint import META, read_meta
from pipeline.directories import CHECKPOINTS, path_digest
from pipeline.models import Loaded
from pipeline.runs.journal import JOURNAL, metric_history
from pipeline.runs.run_directory import read_outcome
from pipeline.weights.reading import is_foreign, open_foreign

Facts = dict[str, Any]


def lineage(loaded: Loaded) -> list[Facts]:
    """The model and its ancestors, newest first, as primitives without paths of this machine.

    Each has a `name` and a `digest`; checkpoints also `kind`, `data` and `metrics`, and published
    weights their `license`, if known.
    """
    path = loaded.path
    steps: list[Facts] = [{"name": loaded.name or short_name(path), "digest": path_digest(path)}]
    while (path / META).is_file():
        meta = read_meta(path)
        steps[-1] |= _facts(path, meta)
        if source := meta.get("source"):
            return [*steps, *_published(source, meta.get("lineage", ()))]
        parent = meta.get("adapter") or meta.get("parent")
        if parent is None:
            return steps
        steps.append({"name": short_name(Path(parent["path"])), "digest": parent["digest"]})
        places = (p for p in _places(path, parent["path"], meta) if p.exists())
        found = next((p for p in places if path_digest(p) == parent["digest"]), None)
        if found is None:
            return steps  # the parent is gone or has changed
        path = found
    if is_foreign(path):
        foreign = open_foreign(path)
        steps[-1:] = _published({**steps[-1], "license": foreign.license}, foreign.lineage)
    return steps


def _published(step: Facts, earlier: Iterable[Facts]) -> list[Facts]:
    """Published weights and, of an export of ours, what it was made from; the license is last's."""
    steps = [dict(step), *map(dict, earlier)]
    steps[-1]["license"] = step["license"] or steps[-1].get("license")
    return steps


def _places(path: Path, parent: str, meta: dict[str, Any]) -> Iterator[Path]:
    """Where a checkpoint's parent may be: at its old path, or moved with it or with all runs."""
    yield Path(parent)
    if base := meta.get("base"):
        yield path.parent / base["relative"]
    yield from (root / Path(*Path(parent).parts[-4:]) for root in path.resolve().parents[3:4])


def short_name(path: Path) -> str:
    """`<experiment>/<run>/checkpoints/<step>` of a checkpoint, the last part of another path."""
    return "/".join(path.parts[-4:]) if path.parent.name == CHECKPOINTS else path.name


def _facts(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    dataset = meta.get("dataset") or {}
    source = (meta.get("data") or {}).get("init_args", {}).get("source") or []
    paths = [source] if isinstance(source, str) else source
    return {
        "kind": meta["kind"],
        "step": meta.get("step"),
        "lora": meta["lora"],
        "data": dataset
        and {
            "source": ", ".join(Path(path).name for path in paths),  # without their folders
            "digest": dataset["digest"],
            "counts": dataset["counts"],
        },
        "metrics": _metrics(path, meta),
    }


def _metrics(path: Path, meta: dict[str, Any]) -> dict[str, float]:
    """The run's metrics if a checkpoint is its best one, else validation metrics of its step."""
    if path.parent.name != CHECKPOINTS:
        return {}
    run = path.parents[1]
    outcome = read_outcome(run)
    if outcome and Path(outcome["outputs"].get("best", "")).name == path.name:
        return outcome["metrics"]
    history = metric_history(run) if (run / JOURNAL).exists() else {}  # copied without its run
    step = meta.get("step")
    return {name: at[step] for name, at in history.items() if name[:4] == "val/" and step in at}
