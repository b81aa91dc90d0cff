"""From sources to token files: documents streamed, cleaned, split and tokenised once, then cached.

The cache is keyed by content: digests of the sources and of the tokenizer, and the options. Nothing
here holds more than one document in memory, and nothing imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from datamodules.cleaning import Duplicates, cleaned
from datamodules.documents import documents
from datamodules.files import MALFORMED, cache_dir, digest, remembered_sha256
from datamodules.sources import source_digests
from datamodules.tokenizer import Tokenizer

SPLITS = ("train", "val")
Ranges = dict[str, list[tuple[int, int]]]  # split -> (first token, one past the last) of each
Part = tuple[Iterable[str], float]  # documents, and the share of them to hold out
SEPARATOR = b"\0"  # what <|endoftext|> counts as where text is measured in bytes

_SCHEMA = 4  # increase it when the same sources and options give other tokens
_MIN_HELD_OUT_DOCUMENTS = 10  # with fewer, the end of each is held out instead of whole ones

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Two token files, `train.bin` and `val.bin`, and the facts about them.

    Attributes:
        key: digest of everything that decides the tokens.
        facts: `split` (document, tail or apart), `dtype`, `documents` (counts of the cleaning and
            of each split), and `tokens`, `bytes` and `sha256` of each split. Bytes are those of
            UTF-8; `<|endoftext|>` between two documents is one token and counts as one byte.
    """

    key: str
    folder: Path
    facts: dict[str, Any]

    def tokens(self, split: str) -> NDArray[np.unsignedinteger]:
        """(n_tokens,) memory-mapped ids."""
        return np.memmap(self.path(split), self.facts["dtype"], mode="r")

    def path(self, split: str) -> Path:
        """File of a split's ids, little-endian."""
        return self.folder / f"{split}.bin"

    def text(self, split: str, tokenizer: Tokenizer, limit: int = sys.maxsize) -> bytes:
        """The last `limit` bytes of a split's UTF-8 text, with a zero byte between documents."""
        tokens = self.tokens(split)[-limit:]  # no token is shorter than a byte
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        parts = np.split(tokens, ends)
        ids = [part[i > 0 :] for i, part in enumerate(parts)]  # all but the first start with eos
        text = SEPARATOR.join(tokenizer.decode_bytes(part.tolist()) for part in ids)
        return text[-limit:]


def prepare(
    sources: Sequence[str],
    *,
    text_column: str,
    tokenizer: Tokenizer,
    near_duplicates: float | None,
    val_fraction: float,
    val_sources: Sequence[str] = (),
) -> Corpus:
    """The corpus of these sources and options, from the cache or newly made and cached.

    The documents of `val_sources` are held out, and repeats of them are left out of training;
    without `val_sources` a share of the sources is held out. Processes that ask for the same corpus
    at the same time wait for the one that makes it.

    Raises:
        FileNotFoundError, ValueError: as `documents` does, and if there is no text.
    """
    form: dict[str, Any] = {
        "schema": _SCHEMA,
        "sources": _content_digests(sources),
        "text_column": text_column,
        "tokenizer": tokenizer.digest,
        "near_duplicates": near_duplicates,
    }
    if val_sources:
        form["val_sources"] = _content_digests(val_sources)
    else:
        form["val_fraction"] = val_fraction
    key = hashlib.sha256(json.dumps(form).encode()).hexdigest()
    folder = cache_dir() / "corpora" / key[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            counts, duplicates = Counter[str](), Duplicates(near_duplicates)
            apart, texts = (
                cleaned(documents(names, text_column), duplicates=duplicates, counts=counts)
                for names in (val_sources, sources)
            )
            parts = [(apart, 1.0), (texts, 0.0)] if val_sources else [(texts, val_fraction)]
            _make(folder, parts, counts, tokenizer)
        return Corpus(key, folder, json.loads((folder / "corpus.json").read_text()))


def _content_digests(sources: Sequence[str]) -> list[list[str]]:
    """Suffixes and digests in the order of reading; the location of a file does not matter."""
    return [
        [Path(name).suffix.lower(), digest]
        for source in sources
        for name, digest in source_digests([source]).items()
    ]


def _is_whole(folder: Path) -> bool:
    if not (folder / "corpus.json").is_file():
        return False
    if damaged := _damaged(folder):
        _log.warning("%s is damaged in the cache; the corpus is tokenised again", damaged)
    return not damaged


def _damaged(folder: Path) -> Path | None:
    path = folder / "corpus.json"
    try:
        facts = json.loads(path.read_text())
        if facts.pop("checksum") != digest(facts):
            return path
    except MALFORMED:
        return path
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file() or remembered_sha256(path) != facts["sha256"][split]:
            return path
    return None


def _make(folder: Path, parts: Sequence[Part], counts: Counter[str], tokenizer: Tokenizer) -> None:
    temporary = folder.with_suffix(".tmp")  # we hold the lock: a killed process left it
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    dtype = "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"
    whole = temporary / "whole.bin"
    ends, held_out = _tokenise(whole, parts, tokenizer, dtype)
    if not ends or not ends[-1]:
        raise ValueError(
            f"data.source holds no text: {counts['read']} documents, all empty; give some text."
        )
    tokens = np.memmap(whole, dtype, mode="r")
    facts: dict[str, Any] = {"dtype": dtype, "split": "document" if len(parts) == 1 else "apart"}
    ranges = _documents(ends, held_out)
    if len(parts) == 1 and len(ranges["val"]) < _MIN_HELD_OUT_DOCUMENTS:
        ((_, val_fraction),) = parts
        facts["split"], ranges = "tail", _tails(tokens, ends, tokenizer, val_fraction)
    facts["documents"] = {"kept": len(ends), **counts}
    for split in SPLITS:
        written = _write(temporary / f"{split}.bin", tokens, ranges[split], tokenizer)
        for fact, value in written.items():
            facts.setdefault(fact, {})[split] = value
    facts["checksum"] = digest(facts)
    (temporary / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    whole.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _tokenise(
    path: Path, parts: Iterable[Part], tokenizer: Tokenizer, dtype: str
) -> tuple[array[int], bytearray]:
    """Writes the tokens of all documents; returns where each ends, and whether it is held out.

    That depends on the document's digest alone: other seeds, or more text, hold out the same.
    """
    ends, held_out = array("q"), bytearray()
    with path.open("wb") as file:
        for texts, val_fraction in parts:
            for text in texts:
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                held_out.append(int.from_bytes(digest, "big") < val_fraction * 2**64)
                ids = np.array(tokenizer.encode(text), dtype)
                file.write(ids.data)
                ends.append((ends[-1] if ends else 0) + len(ids))
    return ends, held_out


def _documents(ends: Sequence[int], held_out: Sequence[int]) -> Ranges:
    ranges: Ranges = {split: [] for split in SPLITS}
    for start, end, val in zip([0, *ends], ends, held_out, strict=False):
        ranges[SPLITS[val]].append((start, end))
    return ranges


def _tails(
    tokens: NDArray[np.unsignedinteger],
    ends: Sequence[int],
    tokenizer: Tokenizer,
    val_fraction: float,
) -> Ranges:
    """Holds out each document's end, from the first line (else word) that starts after the cut."""
    ranges: Ranges = {split: [] for split in SPLITS}
    for start, end in zip([0, *ends], ends, strict=False):
        cut = start + round((1 - val_fraction) * (end - start))
        near = tokens[cut : cut + min((end - cut) // 2, 10_000)].tolist()
        pieces = [tokenizer.decode_bytes([token], near) for token in near]
        lines = [i + 1 for i, piece in enumerate(pieces) if piece.endswith(b"\n")]
        words = [i for i, piece in enumerate(pieces) if piece.startswith(b" ")]
        cut += (lines + words + [0])[0]
        ranges["train"] += [(start, cut)] if start < cut else []
        ranges["val"] += [(cut, end)] if cut < end else []
    return ranges


def _write(
    path: Path,
    tokens: NDArray[np.unsignedinteger],
    ranges: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
) -> dict[str, int | str]:
    """Writes ranges of tokens, separated by `<|endoftext|>`, and returns their facts."""
    lengths = np.array(tokenizer.lengths())
    separator = np.array([tokenizer.eos_id], tokens.dtype)
    n_tokens = n_bytes = max(0, len(ranges) - 1)  # the separators
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for i, (start, end) in enumerate(ranges):
            document = np.concatenate([separator[: i > 0], tokens[start:end]])
            file.write(document.data)
            digest.update(document.data)
            n_tokens += end - start
            first, others = tokens[start:end][:1], tokens[start:end][1:]
            n_bytes += len(tokenizer.decode_bytes(first.tolist())) + int(lengths[others].sum())
        file.flush()
        os.fsync(file.fileno())
    facts = {"documents": len(ranges), "tokens": n_tokens, "bytes": n_bytes}
    return {**facts, "sha256": digest.hexdigest()}
