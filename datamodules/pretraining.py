"""Next-token prediction on plain text: an epoch is the corpus, cut into disjoint blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batching import Sample, epoch_generator
from datamodules.corpus import Corpus, prepare
from datamodules.sources import source_digests
from datamodules.step_data_module import StepDataModule, report


@dataclass(frozen=True)
class Blocks(Sequence[Sample]):
    """Blocks of a token file, one every `stride` tokens; the last ones may be shorter.

    A block is read from the file on access: this process keeps nothing of it in memory.

    Raises:
        OSError, ValueError: on access, if the file is gone or was truncated.
    """

    corpus: Corpus
    split: str
    block_size: int
    stride: int

    def __len__(self) -> int:
        n_tokens = self.corpus.facts["tokens"][self.split]
        return -(-(n_tokens - 1) // self.stride)  # a block of one token has nothing to predict

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start, path = index * self.stride, self.corpus.path(self.split)
        dtype = np.dtype(self.corpus.facts["dtype"])
        n_tokens = min(self.block_size, self.corpus.facts["tokens"][self.split] - start)
        block = np.fromfile(path, dtype, n_tokens, offset=start * dtype.itemsize)
        if len(block) < n_tokens:
            raise ValueError(f"{path} was cut while in use; repeat the command to make it anew.")
        input_ids = torch.from_numpy(block.astype(np.int64))  # (T,)
        return Sample(sample_id=index, input_ids=input_ids, labels=input_ids)


class PretrainingDataModule(StepDataModule):
    """Plain text, of which some documents are held out, or the end of each if they are few.

    Documents are cleaned, deduplicated and joined by `<|endoftext|>`. Which ones are held out does
    not depend on the seed. There is no third split: the test set is the validation set.

    Args:
        source: one or more files, folders or globs, of plain text or tables (.jsonl, .parquet,
            .csv, .tsv), or bundled:python-docs; see `datamodules.sources.resolve`.
        text_column: field of JSONL, or column of Parquet, CSV or TSV, that holds the text.
        block_size: tokens per sample.
        val_fraction: share of the text that is held out, above 0 and below 1.
        val_source: texts to hold out instead, given like source; repeats of them are not learned.
        near_duplicates: Jaccard similarity from which a document is dropped; null: only exact ones.
        **options: those of `StepDataModule`.
    """

    context_key = "block_size"
    corpus: Corpus

    def __init__(
        self,
        *,
        source: str | list[str],
        text_column: str,
        block_size: int,
        val_fraction: float,
        near_duplicates: float | None,
        val_source: str | list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if block_size < 2:
            raise ValueError(f"data.block_size is {block_size}; give at least 2.")
        if self.max_tokens < block_size:
            raise ValueError(
                f"data.max_tokens is {self.max_tokens}, but one block has {block_size} tokens; "
                "raise data.max_tokens or lower data.block_size."
            )
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; give one between 0 and 1.")
        if near_duplicates is not None and not 0 < near_duplicates <= 1:
            raise ValueError(
                f"data.near_duplicates is {near_duplicates}; give a similarity between 0 and 1, "
                "or null to keep near-duplicates."
            )
        self.sources = [source] if isinstance(source, str) else source
        if not self.sources:
            raise ValueError("data.source is an empty list; give at least one source.")
        self.val_sources = [val_source] if isinstance(val_source, str) else val_source or []
        self.text_column, self.block_size = text_column, block_size
        self.val_fraction, self.near_duplicates = val_fraction, near_duplicates

    def setup(self, stage: str) -> None:
        """Tokenises the corpus, or finds it in the cache; see `prepare` for what it raises.

        Raises:
            ValueError: for a corpus too short for the block size.
        """
        if hasattr(self, "fingerprint"):
            return
        corpus = prepare(
            self.sources,
            text_column=self.text_column,
            tokenizer=self.tokenizer,
            near_duplicates=self.near_duplicates,
            val_fraction=self.val_fraction,
            val_sources=self.val_sources,
        )
        self._check_length(corpus.facts["tokens"])
        if corpus.facts["split"] == "tail" and (kept := corpus.facts["documents"]["kept"]) > 1:
            report(
                f"{kept} documents are too few to hold out whole ones by data.val_fraction: the "
                f"last {self.val_fraction:.0%} of each is held out."
            )
        self.train_set = Blocks(corpus, "train", self.block_size, stride=1)  # key: first token
        self.val_set = Blocks(corpus, "val", self.block_size, stride=self.block_size - 1)
        self.test_set = self.val_set
        self.fingerprint = {
            "digest": corpus.key,
            "tokenizer": self.tokenizer.digest,
            "block_size": self.block_size,
            "split": corpus.facts["split"],
            "counts": {fact: corpus.facts[fact] for fact in ("documents", "tokens", "bytes")},
            "sources": source_digests([*self.sources, *self.val_sources]),
        }
        if self.val_sources:  # there is no third split
            apart = source_digests(self.val_sources)
            self.fingerprint["apart"] = {"val": apart, "test": apart}
        self.corpus = corpus

    def _check_length(self, n_tokens: dict[str, int]) -> None:
        needed = 2 * self.block_size - 1  # one whole block at any offset
        if n_tokens["train"] < needed:
            raise ValueError(
                f"the training text has {n_tokens['train']} tokens, but data.block_size "
                f"{self.block_size} needs {needed}; lower data.block_size or give more text."
            )
        if n_tokens["val"] < 2:
            raise ValueError(
                f"the held-out text has {n_tokens['val']} tokens; "
                "raise data.val_fraction or give more text."
            )

    def train_order(self) -> Callable[[int], Tensor]:
        """Epoch -> first tokens of disjoint blocks, shuffled; each epoch cuts at a new offset."""
        n_tokens = self.corpus.facts["tokens"]["train"]
        block_size, seed = self.block_size, self.seed
        n_blocks = (n_tokens - (block_size - 1)) // block_size  # the same for every offset

        def order(epoch: int) -> Tensor:
            generator = epoch_generator(seed, epoch)
            offset = torch.randint(block_size, (), generator=generator)
            return offset + block_size * torch.randperm(n_blocks, generator=generator)

        return order

    def train_lengths(self, keys: Tensor) -> Tensor:
        """Tokens of blocks: all are whole, and reading a large corpus to count them takes long."""
        return torch.full_like(keys, self.block_size)

    @property
    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes per held-out token: bits per byte are nats per token / ln 2 / this."""
        facts = self.corpus.facts
        return float(facts["bytes"]["val"] / facts["tokens"]["val"])

    def train_bytes(self, limit: int) -> bytes:
        """The training text's last `limit` bytes of UTF-8, with a zero byte between documents."""
        return self.corpus.text("train", self.tokenizer, limit)

    def heldout_bytes(self) -> bytes:
        """The held-out text in UTF-8, with a zero byte between documents."""
        return self.corpus.text("val", self.tokenizer)
