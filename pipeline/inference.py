"""Inference for the terminal, `serve` and `score`: continuations, conversations, labels."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from datamodules.batching import Sample, pad
from datamodules.prompts import Message, encode_prompt, encode_start, encode_text, stop_ids
from datamodules.tables import check_writable, read_table, some, write_table
from pipeline.classifier import GPTClassifier
from pipeline.console import say, warn
from pipeline.decoding.generate import Batch, generate
from pipeline.decoding.packed import pack
from pipeline.decoding.passes import check_finite
from pipeline.decoding.prefix_cache import PrefixCache
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.text_stream import TextStream
from pipeline.hardware import default_device, inference_precision
from pipeline.models import Loaded, load
from pipeline.precision import Precision


def print_continuation(
    source: str,
    prompt: str,
    *,
    precision: Precision,
    is_message: bool,
    system: str = "",
    **sampling: Any,
) -> None:
    """Writes the continuation of a prompt to stdout as it is generated; see `commands.generate`."""
    loaded = load_language_model(source, precision)
    if is_message:
        said = [*_system_messages(system), Message(role="user", content=prompt)]
        ids = encode_prompt(loaded.tokenizer, prompt_style(loaded), said)
    else:
        ids = encode_start(loaded.tokenizer, None, prompt)
    for piece in pieces(loaded, ids, settings_for(loaded, **sampling)):
        print(piece, end="", flush=True)
    print()


def converse(source: str, *, precision: Precision, system: str, **sampling: Any) -> None:
    """Holds a conversation on stdin and stdout; see `commands.chat`."""
    loaded = load_language_model(source, precision)
    settings = settings_for(loaded, **sampling)
    opening = _system_messages(system)
    _check_system(loaded, opening)
    turns: list[Message] = []
    prefixes = PrefixCache(max_texts=1)  # only what is new in a turn is computed
    while said := _line("you: "):
        turns.append(Message(role="user", content=said))
        ids = _recent(loaded, opening, turns, settings.max_new_tokens)
        if ids is None:
            continue
        answer = ""
        try:
            for piece in pieces(loaded, ids, settings, prefixes):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" (interrupted)", end="", flush=True, file=sys.stderr)
        print()
        if answer:
            turns.append(Message(role="assistant", content=answer))
        else:
            turns.pop()


def _system_messages(system: str) -> list[Message]:
    return [Message(role="system", content=system)] if system else []


def _check_system(loaded: Loaded, opening: list[Message]) -> None:
    shortest = [*opening, Message(role="user", content="?")]
    ids = encode_prompt(loaded.tokenizer, prompt_style(loaded), shortest)
    if len(ids) >= loaded.gpt.config.block_size:
        raise ValueError(
            f"system leaves no room: with a question of one character it has {len(ids)} tokens, "
            f"the context {loaded.gpt.config.block_size}; shorten it."
        )


def _line(prompt: str) -> str:
    if sys.stdin.isatty():
        print(prompt, end="", flush=True, file=sys.stderr)
    return sys.stdin.readline().strip()


def _recent(
    loaded: Loaded, opening: list[Message], turns: list[Message], n_new: int
) -> list[int] | None:
    """Ids of a conversation with room for an answer; drops its oldest turns where they do not fit.

    None if the last message alone is too long. Either is reported on stderr.
    """
    context, style, n_turns = loaded.gpt.config.block_size, prompt_style(loaded), len(turns)

    def encoded(messages: list[Message]) -> list[int]:
        return encode_prompt(loaded.tokenizer, style, [*opening, *messages])

    if (n_alone := len(encoded(turns[-1:]))) >= context:
        say(f"(too long: {n_alone} tokens of {context - 1}; shorten it)")
        del turns[-1]
        return None
    if len(encoded(turns)) + min(n_new, context // 4) > context:
        while len(turns) > 1 and len(encoded(turns)) > context // 2:  # rarely, as all is read anew
            del turns[:2]  # a question and its answer
    if n_gone := n_turns - len(turns):
        say(f"(the context is full: {n_gone} earlier messages are forgotten)")
    return encoded(turns)


def load_for_use(source: str | Path, precision: Precision) -> Loaded:
    """Loads a checkpoint, onto the GPU if there is one; packs a language model for decoding.

    A classifier is in float32, so that all commands give a text the same probabilities.
    """
    precision = inference_precision(precision)
    loaded = load(source, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    loaded.model.to(default_device())
    if not isinstance(loaded.model, GPTClassifier):
        pack(loaded.model, in_f16=precision == "f16-weights")
    return loaded


def load_language_model(source: str | Path, precision: Precision) -> Loaded:
    """A checkpoint that continues text, ready for use; ValueError for a classifier."""
    loaded = load_for_use(source, precision)
    if isinstance(loaded.model, GPTClassifier):
        raise ValueError(f"{source} is a classifier and writes no text; use the command classify.")
    return loaded


def prompt_style(loaded: Loaded) -> str:
    """The prompt style that the checkpoint was tuned with; ValueError for one that was not."""
    if "prompt_style" not in loaded.meta:
        raise ValueError(
            f"{loaded.path} was not tuned to follow instructions; give a checkpoint of "
            "configs/instruct.yaml (generate without --chat takes this one too, and score with "
            "--data.prompt_style)."
        )
    return loaded.meta["prompt_style"]


def settings_for(loaded: Loaded, **sampling: Any) -> Sampling:
    """Sampling settings with the checkpoint's stop tokens."""
    stops = stop_ids(loaded.tokenizer, loaded.meta.get("prompt_style"))
    return Sampling(stop_ids=frozenset(stops), **sampling)


def pieces(
    loaded: Loaded, ids: Sequence[int], settings: Sampling, prefixes: PrefixCache | None = None
) -> Iterator[str]:
    """Yields text as it is generated, never half a character; `prefixes` as in `Batch`."""
    text = TextStream(loaded.tokenizer, ids)
    yield from map(text.push, _new_tokens(loaded, ids, settings, prefixes))
    yield text.close()


def _new_tokens(
    loaded: Loaded, ids: Sequence[int], settings: Sampling, prefixes: PrefixCache | None
) -> Iterator[int]:
    if settings.num_beams > 1:
        yield from generate(loaded.gpt, [ids], settings)[0]
        return
    batch = Batch(loaded.gpt, prefixes)
    (row,) = batch.join([ids], [settings])
    while row.token is not None:
        yield row.token
        if row.ended:
            return
        batch.step()


def print_label(source: str, text: str, threshold: float | None) -> None:
    """Writes label and probabilities of a text to stdout, as JSON."""
    loaded = load_classifier(source, threshold)
    probabilities = label_probabilities(loaded, [text])[0]
    names = loaded.meta["label_names"]
    row = {
        "label": names[decide(probabilities, threshold)],
        "probabilities": dict(zip(names, (round(p, 6) for p in probabilities), strict=True)),
    }
    print(json.dumps(row, ensure_ascii=False))


def classify_table(
    source: str, file: Path, column: str, output: Path, threshold: float | None, batch_size: int
) -> None:
    """Copies a table, adding a label and a probability per class for the texts of a column.

    ValueError for a missing column, a cell without text, or a format that cannot be written.
    """
    check_writable(output)
    frame = read_table(file)
    if column not in frame:
        raise ValueError(f"{file} has no column {column!r}; set --column to one of {list(frame)}.")
    texts = frame[column].tolist()
    is_text = [isinstance(cell, str) and bool(cell.strip()) for cell in texts]
    if odd := [i for i, ok in enumerate(is_text, start=1) if not ok]:
        raise ValueError(
            f"{file}: {column!r} has no text in {len(odd)} rows ({some(odd)}); complete them, or "
            "drop them."
        )
    loaded = load_classifier(source, threshold)
    names = loaded.meta["label_names"]
    made = ["predicted", *(f"probability_{name}" for name in names)]
    if taken := [name for name in made if name in frame]:
        raise ValueError(f"{file} has columns {taken}, which would be written over; rename them.")
    check_writable(output, {**frame, "predicted": names})
    probabilities = label_probabilities(loaded, texts, batch_size, title="labelling")
    frame["predicted"] = [names[decide(p, threshold)] for p in probabilities]
    for i, name in enumerate(made[1:]):
        frame[name] = [round(p[i], 6) for p in probabilities]
    write_table(frame, output, like=file)
    say(f"{len(texts)} texts labelled: {output}")


def load_classifier(source: str, threshold: float | None = None) -> Loaded:
    """A checkpoint that labels texts, ready for use.

    ValueError for a language model, and for a threshold where there are not two labels.
    """
    loaded = load_for_use(source, "32-true")
    if not isinstance(loaded.model, GPTClassifier):
        raise ValueError(f"{source} is not a classifier; tune one with configs/spam.yaml.")
    n_labels = len(loaded.meta["label_names"])
    if threshold is not None and n_labels != 2:
        raise ValueError(
            f"threshold is for two labels; this checkpoint has {n_labels}; leave it out, "
            "and decide by the probabilities, which are given with the label."
        )
    return loaded


def label_probabilities(
    loaded: Loaded, texts: Sequence[str], batch_size: int = 32, *, title: str = ""
) -> list[list[float]]:
    """Probabilities (N, K) of texts; see `label_texts`."""
    return [row for row, _ in label_texts(loaded, texts, batch_size, title=title)]


@torch.inference_mode()
def label_texts(
    loaded: Loaded, texts: Sequence[str], batch_size: int = 32, *, title: str = ""
) -> list[tuple[list[float], bool]]:
    """Probabilities (K,) of each text, and whether it was cut to the maximum length of training.

    `title` names a progress bar on stderr. ValueError for an empty text, and for damaged weights.
    """
    assert isinstance(loaded.model, GPTClassifier)
    if "" in texts:
        raise ValueError(f"text {texts.index('')} is empty; there is nothing to label.")
    suffix, max_length = loaded.meta["suffix"], loaded.meta["max_length"]
    encoded = [encode_text(loaded.tokenizer, text, suffix, max_length) for text in texts]
    if n_cut := sum(is_cut for _, is_cut in encoded):
        warn(
            f"{n_cut} of {len(texts)} texts have more than the {max_length} tokens that "
            "the classifier looks at; their end counts for nothing."
        )
    by_length = sorted(enumerate(ids for ids, _ in encoded), key=lambda item: len(item[1]))
    samples: list[Sample] = [{"sample_id": i, "input_ids": torch.tensor(t)} for i, t in by_length]
    rows: dict[int, list[float]] = {}
    starts, console = range(0, len(samples), batch_size), Console(stderr=True)
    for start in track(starts, title, console=console, disable=not title):
        batch = pad(samples[start : start + batch_size], loaded.tokenizer.eos_id)
        mask = batch.get("attention_mask")
        logits = loaded.model(
            batch["input_ids"].to(loaded.device), None if mask is None else mask.to(loaded.device)
        )
        check_finite(logits)
        probabilities = logits.float().softmax(-1).tolist()
        rows |= zip(batch["sample_ids"].tolist(), probabilities, strict=True)
    return [(rows[i], is_cut) for i, (_, is_cut) in enumerate(encoded)]


def decide(probabilities: Sequence[float], threshold: float | None) -> int:
    """The likeliest class; with a threshold, the second of two if its probability reaches that."""
    if threshold is None:
        return max(range(len(probabilities)), key=probabilities.__getitem__)
    return int(probabilities[1] >= threshold)
