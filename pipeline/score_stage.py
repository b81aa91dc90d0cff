"""`score`: a model answers held-out instructions, before tuning and after; both are scored."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from datamodules.files import sha256
from datamodules.instruction import InstructionDataModule, Item
from datamodules.prompts import encode_prompt, reply_opening, surplus
from pipeline.checkpoint import path_digest
from pipeline.evaluation.judge import JudgeConfig
from pipeline.evaluation.report import before_and_after, score_histogram
from pipeline.evaluation.responses import Response, read_responses
from pipeline.evaluation.score import evaluate
from pipeline.evaluation.summary import Summary
from pipeline.generate import generate
from pipeline.hardware import Precision, inference_dtype
from pipeline.inference import load_language_model, prompt_style, settings_for
from pipeline.loss import next_token_losses
from pipeline.models import Loaded
from pipeline.run_directory import AlreadyFinished, Run
from pipeline.stage_run import digest, open_run
from pipeline.weights.fetch import locate
from pipeline.weights.reading import tokenizer_of

BOOTSTRAP_SEED = 0
FILES = ("responses.jsonl", "responses-before.jsonl", "scores.jsonl", "scores-before.jsonl")


@dataclass(frozen=True)
class Answering:
    """How responses are made.

    Attributes:
        split: of the data, that is answered: train, val or test.
        max_new_tokens: at most; less where the context is full.
        batch_size: prompts that are decoded together, of like length.
        precision: of the models.
    """

    split: str
    max_new_tokens: int
    batch_size: int
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        """Of the models' weights."""
        return inference_dtype(self.precision)


def score_stage(
    *,
    ckpt: str | None,
    before: str | None,
    responses: Path | None,
    data: dict[str, Any] | None,
    answering: Answering,
    judge: JudgeConfig | None,
) -> None:
    """Scores in a run directory; see `pipeline.commands.score`."""
    if judge is not None:
        judge.check()
    source = str(ckpt or responses)
    content = path_digest(locate(ckpt)) if ckpt else sha256(Path(source))
    options = {
        "source": source,
        "before": before,
        "data": data,
        "split": answering.split,
        "max_new_tokens": answering.max_new_tokens,
        "dtype": str(answering.dtype),
        "judge": judge and vars(judge),
    }
    try:
        with open_run("score", f"score-{digest([options, content])[:8]}", options) as run:
            if ckpt is None:
                after, earlier, lineage = read_responses(Path(source)), None, {"responses": source}
                sources = {source: content}
            else:
                after, earlier, lineage, sources = answer(ckpt, before, data, answering)
            lineage = {**lineage, "digest": content, "split": answering.split}
            summary = evaluate(
                after,
                before=earlier,
                judge=judge,
                directory=run.path,
                lineage=lineage,
                seed=BOOTSTRAP_SEED,
            )
            _record(run, summary, after, lineage, sources)
            print(f"report: {run.path / 'report.html'}", file=sys.stderr)
    except AlreadyFinished as finished:
        print(f"already finished: {finished.path}", file=sys.stderr)


def _record(
    run: Run,
    summary: Summary,
    after: list[Response],
    lineage: dict[str, str],
    sources: dict[str, str],
) -> None:
    """Metrics, files, figures and the outcome; what `evaluate` wrote lies in the run already."""
    metrics = summary.metrics()
    run.log_metrics(metrics, step=0)
    run.log_tags({f"lineage.{key}": value for key, value in lineage.items()})
    for name in (*FILES, "summary.json", "report.html"):
        if (run.path / name).exists():
            run.log_artifact(name)
    run.log_figure(score_histogram(summary), "figures/scores.png")
    if (run.path / FILES[1]).exists():
        run.log_figure(before_and_after(summary), "figures/before-and-after.png")
    run.log_table([vars(r) for r in after[:50]], "samples/responses.json")
    names = {"responses": FILES[0], "scores": FILES[2], "report": "report.html"}
    outputs = {key: str(run.path / name) for key, name in names.items()}
    run.finish(outputs=outputs, metrics=metrics, sources=sources, headline=headline(metrics))


def headline(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the chain's table."""
    return [
        {
            "metric": measure,
            "before": metrics.get(f"before/{measure}"),
            "after": metrics[f"after/{measure}"],
        }
        for measure in ("judge", "chrf", "rouge_l", "exact_match", "perplexity")
        if f"after/{measure}" in metrics
    ]


def answer(
    ckpt: str, before: str | None, data: dict[str, Any] | None, answering: Answering
) -> tuple[list[Response], list[Response] | None, dict[str, str], dict[str, str]]:
    """Responses of the tuned model and of the one before; lineage; digests of the data."""
    tuned = load_language_model(ckpt, answering.dtype)
    held_out = data_of(tuned, data)
    held_out.setup("test")
    after = respond(tuned, tuned, held_out, answering)
    parent = tuned.meta["parent"]
    origin = before or (parent["path"] if parent else None)
    earlier = None
    if origin is not None:
        untuned = load_language_model(origin, answering.dtype)
        if untuned.tokenizer.digest != tuned.tokenizer.digest:
            raise ValueError(f"before ({origin}) has another tokenizer than ckpt ({ckpt}).")
        earlier = respond(untuned, tuned, held_out, answering)
    lineage = {
        "checkpoint": ckpt,
        "before": str(origin),
        "data": held_out.fingerprint["digest"],
        "max_new_tokens": str(answering.max_new_tokens),
        "dtype": str(answering.dtype),
    }
    return after, earlier, lineage, held_out.fingerprint["sources"]


def data_of(tuned: Loaded, data: dict[str, Any] | None) -> InstructionDataModule:
    """The data that a checkpoint was tuned on, its own or as given, with the loss on responses."""
    arguments = data or tuned.meta.get("data")
    if not arguments:
        raise ValueError(f"{tuned.path} does not say what it was tuned on; give --data.")
    arguments = arguments.get("init_args", arguments)
    known = {**arguments, "tokenizer": tokenizer_of(tuned.path), "supervise": "response"}
    known["prompt_style"] = prompt_style(tuned)
    return InstructionDataModule(**known)


@torch.inference_mode()
def respond(
    loaded: Loaded, tuned: Loaded, data: InstructionDataModule, answering: Answering
) -> list[Response]:
    """Greedy answers of a model, and how well it predicts the references.

    Args:
        loaded: the model that answers.
        tuned: the one whose prompt style and stop tokens are used, also for the untuned model.
        data: set up.
        answering: how.
    """
    items, max_new_tokens = data.items(answering.split), answering.max_new_tokens
    prompts = [prompt_ids(data, item, max_new_tokens) for item in items]
    settings = settings_for(tuned, max_new_tokens=max_new_tokens)
    by_length = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    starts = range(0, len(items), answering.batch_size)
    answers: dict[int, str] = {}
    for start in track(starts, description=f"answering with {loaded.path.name}"):
        chosen = by_length[start : start + answering.batch_size]
        new = generate(loaded.gpt, [prompts[i] for i in chosen], settings)
        for i, ids in zip(chosen, new, strict=True):
            answers[i] = loaded.tokenizer.decode(ids).strip()
    nats = reference_nats(loaded, data, answering.split)
    return [
        Response(
            id=item["id"],
            instruction=item["instruction"],
            input=item["input"],
            reference=item["reference"],
            response=answers[i],
            settings={"max_new_tokens": max_new_tokens, "temperature": 0.0},
            reference_nats=nats[i][0],
            reference_tokens=nats[i][1],
        )
        for i, item in enumerate(items)
    ]


def prompt_ids(data: InstructionDataModule, item: Item, max_new_tokens: int) -> list[int]:
    """An item's prompt, its middle taken out where it would leave the answer no room."""
    ids = encode_prompt(data.tokenizer, data.prompt_style, item["messages"])
    opening = len(reply_opening(data.tokenizer, data.prompt_style))
    room = max(opening + 1, data.max_length - max_new_tokens)
    if len(ids) > room:
        del ids[surplus(len(ids), room, opening)]
    return ids


def reference_nats(
    loaded: Loaded, data: InstructionDataModule, split: str
) -> list[tuple[float, int]]:
    """Loss of every reference in nats, summed over its tokens, and how many those are."""
    samples = getattr(data, f"{split}_set")
    loaded.model.eval()
    sums = []
    for sample in (samples[i] for i in range(len(samples))):
        hidden = loaded.gpt(sample["input_ids"][None])
        losses = next_token_losses(hidden, loaded.gpt.head.weight, sample["labels"][None])
        sums.append((float(losses.sum()), len(losses)))
    return sums
