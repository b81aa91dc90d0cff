"""`export`: a model in the format of other tools, with a model card and its lineage."""

import json
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from pipeline.checkpoint import stem_of
from pipeline.directories import Writers, check_output, path_digest, write_files, writing_directory
from pipeline.held_out import published
from pipeline.models import Loaded, load
from pipeline.runs.run_directory import Run
from pipeline.runs.stage_run import run_once
from pipeline.weights.card import card
from pipeline.weights.fetch import locate
from pipeline.weights.gguf_out import GGUFType, gguf_writers
from pipeline.weights.huggingface_in import CARD
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.lineage import lineage
from pipeline.weights.peft_out import peft_writers
from pipeline.weights.reading import EXPORT

Form = Literal["huggingface", "peft", "gguf"]
DTYPES = {"huggingface": ("float32", "bfloat16"), "peft": ("float32",), "gguf": get_args(GGUFType)}


def export_stage(ckpt: str, *, form: Form, dtype: str | None, output: Path | None) -> None:
    """Exports in a run directory; see `pipeline.commands.export`."""
    kind = dtype or DTYPES[form][0]
    if kind not in DTYPES[form]:
        raise ValueError(f"dtype is {dtype}; for {form} give {' or '.join(DTYPES[form])}.")
    path = locate(ckpt)
    if output is not None:
        output = check_output(output, is_own=(output / EXPORT).is_file())
    options = {"ckpt": ckpt, "format": form, "dtype": kind, "output": output and str(output)}
    stem, deciding = f"{stem_of(ckpt)}-{form}", [options, path_digest(path)]
    make = partial(_export, ckpt=ckpt, form=form, kind=kind, output=output)
    print(run_once("export", stem, deciding, options, make, "exported"))


def _export(run: Run, ckpt: str, form: Form, kind: str, output: Path | None) -> None:
    loaded = load(ckpt)
    steps = lineage(loaded)
    target = output or run.path / "exported"
    name = output.name if output else loaded.title
    text = card(loaded, steps, name=name, form=form)
    writers = {
        **_writers(loaded, form, kind, name, steps[-1].get("license")),
        CARD: lambda path: path.write_text(text, encoding="utf-8"),
    }
    with writing_directory(target) as draft:
        files = write_files(draft, writers)
        facts = {"format": form, "dtype": kind, "files": files, "lineage": steps}
        facts["trained_on"] = published(loaded.meta)
        (draft / EXPORT).write_text(json.dumps(facts, indent=1))
    run.log_tags({"lineage": steps[0]})
    digests = {"exported": path_digest(target)}
    run.finish(outputs={"exported": str(target)}, metrics={}, sources={}, digests=digests)


def _writers(loaded: Loaded, form: Form, kind: str, name: str, license: str | None) -> Writers:
    if form == "peft":
        return peft_writers(loaded)
    if form == "huggingface":
        return huggingface_writers(loaded, getattr(torch, kind))
    return gguf_writers(loaded, kind, name=name, license=license)  # type: ignore[arg-type]
