"""Cleaning of documents: repairs encodings, drops boilerplate and duplicates, and counts both."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from datamodules.progress import with_progress

_log = logging.getLogger(__name__)

_START = re.compile(
    r"^\*{3} ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.{0,300}?\*{3}",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_END = re.compile(
    r"^(?:\*{3} ?)?END OF (?:TH(?:E|IS) )?PROJECT GUTENBERG", re.IGNORECASE | re.MULTILINE
)

_SHINGLE_BYTES = 8  # one uint64
_MAX_SHINGLES = 1024  # the smallest hashes stand for a long document (bottom-k sketch, Broder 1997)
_PERMUTATIONS = 64
_MAX_COMPARED = 128  # candidates per text; pages made from one template all match each other
_MAX_INDEXED = 0.98  # highest similarity that an index of so few permutations supports
_ALL = np.uint32(2**32 - 1)
Sketch = NDArray[np.uint32]  # sorted hashes


def cleaned(
    documents: Iterable[str], *, duplicates: Duplicates, counts: Counter[str]
) -> Iterator[str]:
    """Documents that are worth learning from, in order.

    Args:
        documents: consumed once, streamed.
        duplicates: the texts seen so far; documents that repeat one are dropped.
        counts: updated as documents pass: documents `read`; dropped as `empty`,
            `exact_duplicates` or `near_duplicates`; kept after repair (`mojibake_repaired`); and
            e-books in kept documents (`gutenberg_stripped`), of which one may hold many.
    """
    counts.update(read=0, empty=0, exact_duplicates=0, near_duplicates=0)
    counts.update(mojibake_repaired=0, gutenberg_stripped=0)
    for document in with_progress(documents, "documents read", _log.info):
        counts["read"] += 1
        text = document.replace("\r\n", "\n").replace("\r", "\n")
        repaired = repair_mojibake(text)
        stripped, n_books = strip_gutenberg(repaired)
        if not stripped.strip():
            counts["empty"] += 1
        elif kind := duplicates.kind(stripped):
            counts[kind] += 1
        else:
            counts["mojibake_repaired"] += repaired != text
            counts["gutenberg_stripped"] += n_books
            yield stripped


def repair_mojibake(text: str) -> str:
    """Undoes UTF-8 that was read as another encoding ("â€œ"), line by line, and changes no more."""
    if text.isascii():
        return text
    import ftfy

    lines = re.split(r"(?<=\n)", text)  # not at other line ends, which may be mojibake
    return "".join(line if line.isascii() else ftfy.fix_encoding(line) for line in lines)


def strip_gutenberg(text: str) -> tuple[str, int]:
    """Strips the boilerplate of Project Gutenberg's e-books; also counts those that start here.

    What precedes the first start marker is a header, unless a book ends there: then the text is a
    later part of a long file, and begins within that book.
    """
    before, *books = _START.split(text)
    if not books:
        return text, 0
    rest, *ended = _END.split(before, maxsplit=1)
    bodies = [rest if ended else "", *(_END.split(book, maxsplit=1)[0] for book in books)]
    kept = [body.strip() for body in bodies]
    return "\n\n".join(filter(None, kept)) + "\n", len(books)


class Duplicates:
    """Remembers texts, and tells whether a new one repeats one of them.

    The index of near-duplicates takes about 4 kB of memory per text, that of exact ones 0.1 kB.

    Args:
        threshold: estimated Jaccard similarity (of 8-byte shingles, ignoring case and white space)
            in (0, 1] from which texts are near-duplicates; None: only exact ones are found.
    """

    def __init__(self, threshold: float | None) -> None:
        self._exact: set[bytes] = set()
        self._near = None if threshold is None else _NearDuplicates(threshold)

    def kind(self, text: str) -> str | None:
        """`exact_duplicates`, `near_duplicates`, or None for a text that is new."""
        text = unicodedata.normalize("NFC", text.strip())  # some systems write é as two characters
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self._exact:
            return "exact_duplicates"
        self._exact.add(digest)
        if self._near is not None and self._near.seen(text):
            return "near_duplicates"
        return None


class _NearDuplicates:
    """Finds candidates by MinHash and locality-sensitive hashing (Broder 1997), and compares them.

    Of more than _MAX_COMPARED candidates only those with the most similar signatures are compared.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # 2 seconds: it imports SciPy

        self._threshold = threshold
        self._index = MinHashLSH(
            threshold=min(threshold, _MAX_INDEXED),
            num_perm=_PERMUTATIONS,
            weights=(0.1, 0.9),  # false candidates only cost a comparison, missed ones are lost
        )
        self._empty = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int)
        self._sketches: list[Sketch] = []
        self._signatures: list[Sketch] = []

    def seen(self, text: str) -> bool:
        sketch, signature = _shingles(text), self._empty.copy()
        signature.update_batch(sketch.tolist())
        hashes = signature.hashvalues.astype(np.uint32)
        for key in self._likeliest(self._index.query(signature), hashes):
            if _similarity(self._sketches[key], sketch) >= self._threshold:
                return True
        self._index.insert(len(self._sketches), signature, check_duplication=False)
        self._sketches.append(sketch)
        self._signatures.append(hashes)
        return False

    def _likeliest(self, candidates: list[int], hashes: Sketch) -> list[int]:
        if len(candidates) <= _MAX_COMPARED:
            return candidates
        theirs = np.stack([self._signatures[key] for key in candidates])
        ranked = (theirs == hashes).sum(axis=1).argpartition(-_MAX_COMPARED)
        return [candidates[i] for i in ranked[-_MAX_COMPARED:]]


def _similarity(a: Sketch, b: Sketch) -> float:
    """Jaccard similarity, estimated from the range of hashes that both sketches cover."""
    end = min((sketch[-1] for sketch in (a, b) if len(sketch) == _MAX_SHINGLES), default=_ALL)
    a, b = a[a <= end], b[b <= end]
    n_both = len(np.intersect1d(a, b, assume_unique=True))
    return n_both / (len(a) + len(b) - n_both)


def _shingles(text: str) -> Sketch:
    """Hashes of the text's 8-byte windows, which suit any script and need no tokenizer."""
    data = " ".join(text.casefold().split()).encode().ljust(_SHINGLE_BYTES, b"\0")
    windows = np.lib.stride_tricks.sliding_window_view(
        np.frombuffer(data, np.uint8), _SHINGLE_BYTES
    )
    words = np.ascontiguousarray(windows).view(np.uint64).ravel()
    hashes = (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)  # Fibonacci hashing
    enough = 16 * _MAX_SHINGLES  # repetitions included; sorting all of a long text takes seconds
    smallest = _distinct(np.partition(hashes, enough)[:enough] if len(hashes) > enough else hashes)
    if len(smallest) < _MAX_SHINGLES and len(hashes) > enough:  # many repetitions
        smallest = _distinct(hashes)
    return smallest[:_MAX_SHINGLES].astype(np.uint32)


def _distinct(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same as np.unique, which hashes before it sorts: five times slower on a document."""
    ordered = np.sort(hashes)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]
