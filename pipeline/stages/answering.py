"""A model's answers to held-out instructions, and how well it predicts the references."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules import chat_template
from datamodules.files import digest
from datamodules.instruction import LEARNED_ON, InstructionDataModule
from datamodules.prompts import IGNORE, check_style, encode_prompt, reply_opening, surplus
from pipeline.arguments import construct
from pipeline.console import warn
from pipeline.decoding.generate import generate_each
from pipeline.decoding.text_stream import text_of
from pipeline.directories import path_digest
from pipeline.evaluation.jsonl_cache import JsonlCache
from pipeline.evaluation.responses import Response
from pipeline.held_out import check_held_out
from pipeline.inference import load_language_model, prompt_style, settings_for
from pipeline.loss import next_token_losses
from pipeline.models import Loaded, find_base
from pipeline.precision import Precision
from pipeline.weights.reading import tokenizer_of

_ANSWERED_WHOLE = {  # arguments of splits and batches, for a file that is answered whole
    **{"source": None, "train_fraction": 0.8, "val_fraction": 0.1, "shuffle_split": False},
    **{"split_seed": 0, "batch_size": 1, "max_tokens": 1, "seed": 0, "num_workers": 0},
}


@dataclass(frozen=True)
class Answering:
    """How responses are generated; see `pipeline.commands.score`. `precision` is not auto."""

    split: str
    max_new_tokens: int
    batch_size: int
    precision: Precision


def answer(
    ckpt: str,
    before: str | None,
    data: dict[str, Any] | None,
    answering: Answering,
    kept: JsonlCache,
) -> tuple[list[Response], list[Response] | None, dict[str, str], dict[str, str]]:
    """Responses of the tuned model, and of the one before, if any; lineage; digests of the data."""
    changes = (data or {}).get("init_args", data or {})
    tuned = in_style(load_language_model(ckpt, answering.precision), changes.get("prompt_style"))
    held_out = held_out_of(tuned, changes)
    origin = before or parent_of(tuned)
    untuned = load_language_model(origin, answering.precision) if origin else None
    if untuned is not None and not untuned.tokenizer.is_like(tuned.tokenizer):
        raise ValueError(f"before ({origin}) has another tokenizer than ckpt ({ckpt}).")
    models = [loaded for loaded in (tuned, untuned) if loaded is not None]
    context = min(loaded.gpt.config.block_size for loaded in models)
    held_out.max_length = min(held_out.max_length, context)
    held_out.setup("test")
    own, facts = {"init_args": vars(held_out)}, held_out.fingerprint
    keys = held_out.keys(answering.split)
    check_held_out(tuned.meta, own, facts, [answering.split], keys)
    if before and untuned is not None:  # a parent's training is in the tuned model's meta
        called = f"before ({before})"
        check_held_out(untuned.meta, own, facts, [answering.split], keys, called=called)
    prompts = prompts_of(held_out, answering, context)
    after, *earlier = (
        respond(loaded, tuned, held_out, prompts, answering, kept) for loaded in models
    )
    lineage = {
        "checkpoint": ckpt,
        "data": held_out.fingerprint["digest"],
        "split": answering.split,
        "max_new_tokens": str(answering.max_new_tokens),
        "precision": answering.precision,
    }
    if origin and untuned:
        lineage |= {"before": origin, "before_digest": path_digest(untuned.path)}
    return after, earlier[0] if earlier else None, lineage, held_out.fingerprint["sources"]


def parent_of(tuned: Loaded) -> str | None:
    """Path of what a checkpoint was tuned from; None if it was trained from scratch.

    Raises:
        ValueError: it is gone, or something else is in its place.
    """
    parent, base = tuned.meta.get("parent"), tuned.meta.get("base")
    if parent is None:
        return None
    path = Path(parent["path"])
    if base is not None and not path.exists():  # the whole project may have moved
        path = find_base(tuned.path, base)
    if not path.exists() or path_digest(path) != parent["digest"]:
        raise ValueError(
            f"what {tuned.path} was tuned from is no longer at {path}; put it back there, or say "
            "with --before what to compare with."
        )
    return str(path)


def in_style(loaded: Loaded, style: str | None) -> Loaded:
    """A model with the prompt style that is given, if one is.

    Raises:
        ValueError: the style is unknown, or another than the model was tuned with here.
    """
    own = loaded.meta.get("prompt_style")
    if style is None or style == own:
        return loaded
    if own is not None and loaded.meta.get("dataset"):
        raise ValueError(
            f"{loaded.path} was tuned with data.prompt_style {own!r}, here it is {style!r}; give "
            "that of the training."
        )
    check_style(style, loaded.tokenizer)
    return replace(loaded, meta={**loaded.meta, "prompt_style": style})


def held_out_of(tuned: Loaded, changes: dict[str, Any]) -> InstructionDataModule:
    """The data module that a model was tuned on, some arguments changed, loss on responses.

    Raises:
        ValueError: the checkpoint names no data and arguments are missing, or the data module does
            not take an argument.
    """
    own = (tuned.meta.get("data") or {}).get("init_args", {})
    own = own if "prompt_style" in own else {}  # which only instruction data have
    if not own and not changes:
        raise ValueError(
            f"{tuned.path} does not say what it was tuned on; give --data.test_source, a file all "
            "of which is to be answered."
        )
    if not own and changes.get("test_source"):
        own = {**_ANSWERED_WHOLE, "max_length": tuned.gpt.config.block_size}
    settled = {
        "tokenizer": tokenizer_of(tuned.path),
        "supervise": "response",
        "prompt_style": prompt_style(tuned),
    }
    return construct(InstructionDataModule, {**own, **changes, **settled}, "data")


@torch.inference_mode()
def respond(
    loaded: Loaded,
    tuned: Loaded,
    data: InstructionDataModule,
    prompts: Sequence[list[int]],
    answering: Answering,
    kept: JsonlCache,
) -> list[Response]:
    """Greedy answers of a model, and how well it predicts the references.

    Prompt style and stop tokens are those of the `tuned` model, also for the untuned one. Answers
    are `kept` as they are generated, and reused when an interrupted run resumes.
    """
    items, max_new_tokens = data.items(answering.split), answering.max_new_tokens
    settings = settings_for(tuned, max_new_tokens=max_new_tokens)
    keys = [digest([str(loaded.path), ids]) for ids in prompts]
    by_length = sorted(range(len(items)), key=lambda i: len(prompts[i]))  # for little padding
    left = [i for i in by_length if "text" not in kept.rows.get(keys[i], {})]
    written = generate_each(
        loaded.gpt, [prompts[i] for i in left], settings, max_rows=answering.batch_size
    )
    title, console = f"answering with {loaded.path.name}", Console(stderr=True)
    for i, ids in track(written, title, total=len(left), console=console):
        kept.append(keys[left[i]], text=text_of(loaded.tokenizer, ids).strip())
    nats = reference_nats(loaded, data, answering.split)
    return [
        Response(
            id=item["id"],
            instruction=item["instruction"],
            input=item["input"],
            reference=item["reference"],
            response=kept.rows[keys[i]]["text"],
            settings={"max_new_tokens": max_new_tokens, "temperature": 0.0},
            reference_nats=nats[i][0],
            reference_tokens=nats[i][1],
        )
        for i, item in enumerate(items)
    ]


def prompts_of(data: InstructionDataModule, answering: Answering, context: int) -> list[list[int]]:
    """Ids of every item's prompt, its middle cut if `context` (tokens) leaves no room to answer.

    Raises:
        ValueError: answers may take all of the context, or nearly.
    """
    opening = len(reply_opening(data.tokenizer, data.prompt_style))
    room = context - answering.max_new_tokens
    if room <= 2 * opening:
        raise ValueError(
            f"max_new_tokens is {answering.max_new_tokens}, which leaves {room} of the model's "
            f"{context} tokens to the prompts; lower it."
        )
    items = data.items(answering.split)
    with chat_template.on(LEARNED_ON):  # as the references were encoded
        prompts = [encode_prompt(data.tokenizer, data.prompt_style, i["messages"]) for i in items]
    too_long = [ids for ids in prompts if len(ids) > room]
    for ids in too_long:
        del ids[surplus(len(ids), room, opening)]
    if too_long:
        warn(
            f"{len(too_long)} of {len(prompts)} prompts are longer than {room} tokens; "
            "their middle is left out. A lower max_new_tokens leaves them more room."
        )
    return prompts


def reference_nats(
    loaded: Loaded, data: InstructionDataModule, split: str
) -> list[tuple[float, int]]:
    """Loss of every reference in nats, summed over its tokens, and the number of tokens.

    Earlier answers in a conversation belong to the prompt.
    """
    loaded.model.eval()
    sums = []
    title, console = f"references, {loaded.path.name}", Console(stderr=True)
    for sample in track(getattr(data, f"{split}_set"), title, console=console):
        input_ids = sample["input_ids"][None].to(loaded.device)
        labels = of_last_response(sample["labels"])[None].to(loaded.device)
        losses = next_token_losses(loaded.gpt(input_ids), loaded.gpt.head.weight, labels)
        sums.append((float(losses.sum()), len(losses)))
    return sums


def of_last_response(labels: Tensor) -> Tensor:
    """Labels (T,) of the last supervised piece alone: earlier answers' are ignored."""
    supervised = (labels != IGNORE).nonzero().flatten()
    piece = supervised - torch.arange(len(supervised))  # the same within a piece
    start = int(supervised[piece == piece[-1]][0])
    return torch.cat((torch.full_like(labels[:start], IGNORE), labels[start:]))
