"""`import`: weights of others as a checkpoint of ours."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import torch

from datamodules.files import file_digests
from pipeline.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    check_output,
    model_writers,
    path_digest,
    step_name,
    write_checkpoint,
)
from pipeline.models import foreign_meta
from pipeline.run_directory import Run
from pipeline.stage_run import digest, run_once
from pipeline.weights.fetch import locate
from pipeline.weights.lineage import short_name
from pipeline.weights.reading import open_foreign, read_model


def import_stage(source: str, *, output: Path | None) -> None:
    """Imports in a run directory; see `pipeline.commands.import_`."""
    path = locate(source)
    if (path / MANIFEST).is_file():
        raise ValueError(f"{path} is a checkpoint of ours already; use it as it is.")
    if output is not None:
        check_output(output, MANIFEST)
    options = {"source": source, "output": output and str(output)}
    content = path_digest(path)
    stem = re.sub(r"[^\w-]+", "-", Path(source).name)
    name = f"{stem}-{digest([options, content])[:8]}"
    make = partial(_import, source=source, path=path, content=content, output=output)
    print(run_once("import", name, options, make, "best"))


def _import(run: Run, source: str, path: Path, content: str, output: Path | None) -> None:
    foreign = open_foreign(path)
    model = read_model(foreign, path, torch.float32)
    is_name = not Path(source).expanduser().exists()
    origin = {"name": source if is_name else short_name(path), "digest": content}
    meta = {
        **foreign_meta(foreign),
        "step": 0,
        "source": {**origin, "file": path.name, "license": foreign.license},
    }
    target = output or run.path / CHECKPOINTS / step_name(0)
    write_checkpoint(target, model_writers(model.tensors(), meta, foreign.tokenizer))
    skipped = f"; left out: {', '.join(foreign.skipped)}" if foreign.skipped else ""
    print(
        f"{len(foreign.entries)} tensors became {model.n_parameters():,} parameters in float32, "
        f"each tensor used once{skipped}",
        file=sys.stderr,
    )
    run.log_tags({"source": meta["source"]})
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    run.finish(
        outputs={"best": str(target)},
        metrics={"n_parameters": model.n_parameters()},
        sources=file_digests(files),
    )
