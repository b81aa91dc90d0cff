"""`tokenizer train`: trains a vocabulary on text, and measures how well it compresses."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.cleaning import Duplicates, cleaned
from datamodules.documents import documents
from datamodules.files import digest, write_atomically
from datamodules.sources import source_digests
from datamodules.tokenizer import FILE_NAME, Tokenizer, train_tokenizer
from pipeline.console import warn
from pipeline.runs.run_directory import Run
from pipeline.runs.stage_run import run_once

MEASURED_BYTES = 4 << 20  # of text that compression is measured on


def train_stage(
    sources: Sequence[str],
    *,
    text_column: str,
    vocab_size: int,
    min_frequency: int,
    output: Path | None,
) -> None:
    """Trains a vocabulary in a run directory; see `pipeline.commands.tokenizer_train`."""
    config: dict[str, Any] = {
        "source": list(sources),
        "text_column": text_column,
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
    }
    digests = source_digests(sources)
    make = partial(_train, digests=digests, **config)
    stem, deciding = f"bpe-{vocab_size}", [config, digests]
    path = run_once("tokenizer", stem, deciding, config, make, "tokenizer")
    if output is not None:
        _hand_over(path, output)
    print(output or path)


def _hand_over(tokenizer: Path, output: Path) -> None:
    """Copies a tokenizer's file, whole or not at all, and never over another file.

    Raises:
        FileExistsError: the output exists and is another file.
    """
    content = tokenizer.read_bytes()
    if output.exists() and not (output.is_file() and output.read_bytes() == content):
        raise FileExistsError(
            f"output is {output}, which is there and is not this tokenizer; give another, or "
            f"remove it. The tokenizer is kept as {tokenizer}."
        )
    write_atomically(output, content)


def _train(
    run: Run,
    digests: Mapping[str, str],
    source: Sequence[str],
    text_column: str,
    vocab_size: int,
    min_frequency: int,
) -> None:
    counts: Counter[str] = Counter()
    texts = cleaned(documents(source, text_column), duplicates=Duplicates(None), counts=counts)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, min_frequency=min_frequency)
    if counts["read"] == counts["empty"]:
        raise ValueError(f"source {', '.join(source)} holds no text; give some.")
    if tokenizer.n_vocab < vocab_size:
        warn(
            f"{tokenizer.n_vocab:,} tokens, not {vocab_size:,}: no other pair occurs "
            f"{min_frequency} times (min_frequency); give more text."
        )
    path = run.path / FILE_NAME
    tokenizer.save(path)
    ratio = bytes_per_token(tokenizer, documents(source, text_column))
    metrics = {"n_vocab": float(tokenizer.n_vocab), "bytes_per_token": ratio}
    run.log_dataset("tokenizer", digest(digests), counts, ", ".join(source))
    run.log_tags({"tokenizer.digest": tokenizer.digest})
    run.log_metrics(metrics, step=0)
    run.log_artifact(FILE_NAME)
    run.finish(
        outputs={"tokenizer": str(path)},
        metrics=metrics,
        sources=digests,
        headline=[{"metric": "bytes per token", "before": 1.0, "after": ratio}],
    )


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token, over the first MEASURED_BYTES of text."""
    n_bytes = n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode())
        n_tokens += len(tokenizer.encode(text))
        if n_bytes >= MEASURED_BYTES:
            break
    return n_bytes / n_tokens
