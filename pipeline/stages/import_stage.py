"""`import`: turns published weights into a checkpoint."""

from functools import partial
from pathlib import Path

from datamodules.files import expanded, file_digests
from pipeline.checkpoint import (
    WEIGHTS,
    json_writer,
    model_writers,
    read_meta,
    step_name,
    write_checkpoint,
)
from pipeline.console import say
from pipeline.directories import CHECKPOINTS, MANIFEST, check_output, path_digest
from pipeline.gpt import GPT
from pipeline.models import foreign_meta
from pipeline.runs.run_directory import Run
from pipeline.runs.stage_run import run_once
from pipeline.weights.fetch import locate
from pipeline.weights.foreign import mapping
from pipeline.weights.lineage import short_name
from pipeline.weights.reading import open_foreign, weights_writer

MAPPING = "mapping.json"  # what became of every tensor, in the run


def import_stage(source: str, *, output: Path | None) -> None:
    """Imports in a run directory; see `pipeline.commands.import_`."""
    path = locate(source)
    if (path / MANIFEST).is_file():
        raise ValueError(f"{path} is a checkpoint of ours already; use it as it is.")
    if output is not None:
        is_own = (output / MANIFEST).is_file() and "source" in read_meta(output)
        output = check_output(output, is_own=is_own)
    options = {"source": source, "output": output and str(output)}
    content = path_digest(path)
    make = partial(_import, source=source, path=path, content=content, output=output)
    print(run_once("import", Path(source).name, [options, content], options, make, "best"))


def _import(run: Run, source: str, path: Path, content: str, output: Path | None) -> None:
    foreign = open_foreign(path)
    origin = {"name": short_name(path) if expanded(source).exists() else source, "digest": content}
    meta = {
        **foreign_meta(foreign),
        "step": 0,
        "source": {**origin, "file": path.name, "license": foreign.license},
        "lineage": list(foreign.lineage),
    }
    target = output or run.path / CHECKPOINTS / step_name(0)
    write_checkpoint(
        target,
        {**model_writers({}, meta, foreign.tokenizer), WEIGHTS: weights_writer(foreign, path)},
    )
    json_writer(mapping(foreign))(run.path / MAPPING)
    n_parameters = GPT.skeleton(foreign.config).n_parameters()
    skipped = f"; left out: {', '.join(foreign.skipped)}" if foreign.skipped else ""
    say(
        f"{len(foreign.entries)} tensors became {n_parameters:,} parameters in float32, "
        f"each tensor used once{skipped}"
    )
    metrics = {"n_parameters": float(n_parameters)}
    run.log_tags({"source": meta["source"]})
    run.log_metrics(metrics, step=0)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    run.finish(
        outputs={"best": str(target)},
        digests={"best": path_digest(target)},
        metrics=metrics,
        sources=file_digests(files),
    )
