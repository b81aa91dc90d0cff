"""From samples to optimizer steps: a batch of the loader is one optimizer step, in micro-batches.

The samples of a step are a pure function of (seed, epoch); they are then sorted by length and cut
into micro-batches by a token budget. So `batch_size` decides the learning, and `max_tokens` only
the memory.

Shapes: B rows, T tokens.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.prompts import IGNORE


class Sample(TypedDict, total=False):
    """One row before padding; `labels` for language modelling, `label` for classification."""

    sample_id: int
    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, unshifted, IGNORE where no loss is taken
    label: int


class MicroBatch(TypedDict, total=False):
    """Rows that go through the model together; `attention_mask` only where there is padding."""

    sample_ids: Tensor  # (B,) int64
    input_ids: Tensor  # (B, T) int64, padded on the right
    labels: Tensor  # (B, T) int64, unshifted, IGNORE where no loss is taken
    attention_mask: Tensor  # (B, T) bool
    label: Tensor  # (B,) int64


class Samples(Sequence[Sample]):
    """Samples in memory, the tokens of all of them in one tensor per key.

    A worker that is not forked gets a file descriptor for every tensor, and a process may have only
    a thousand or so.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._ends = [0, *accumulate(len(sample["input_ids"]) for sample in samples)]
        rows: Sequence[Mapping[str, Any]] = samples
        columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
        self._tokens = {k: torch.cat(v) for k, v in columns.items() if isinstance(v[0], Tensor)}
        self._facts = {k: v for k, v in columns.items() if k not in self._tokens}

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        own = slice(self._ends[i], self._ends[i + 1])
        tokens = {key: of_all[own] for key, of_all in self._tokens.items()}
        return {**tokens, **{key: of_all[i] for key, of_all in self._facts.items()}}


def digest_of(sample_sets: Iterable[Sequence[Sample]]) -> str:
    """SHA-256 of all samples in order; equal digests mean equal training."""
    digest = hashlib.sha256()
    for samples in sample_sets:
        digest.update(f"{len(samples)} samples".encode())
        for sample in samples:
            labels = sample["labels"].tolist() if "labels" in sample else sample["label"]
            content = (sample["sample_id"], sample["input_ids"].tolist(), labels)
            digest.update(repr(content).encode())
    return digest.hexdigest()


class StepSampler:
    """Yields the sample keys of each optimizer step; every iteration is the next epoch.

    It keeps its own epoch counter, and only the first epoch begins at `start`; its length is always
    that of a full epoch. The samples of a step are dealt to the ranks in turn, so that each is seen
    exactly once per epoch.

    Args:
        order: epoch -> (N,) int64 keys, of the same length for every epoch.
        batch_size: samples per step, over all ranks.
        epoch: the first epoch to yield.
        start: steps of that first epoch to skip (they were taken before a resume); the last step
            is never skipped, as the data may have changed and have fewer.
    """

    def __init__(
        self,
        order: Callable[[int], Tensor],
        *,
        batch_size: int,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.n_steps = -(-len(order(epoch)) // batch_size)
        self.next_epoch, self.start = epoch, max(0, min(start, self.n_steps - 1))

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        steps = self.order(epoch).split(self.batch_size)[: self.n_steps]
        for members in steps[start:]:
            yield members[self.rank :: self.world_size].tolist()


def shuffled(n_samples: int, seed: int) -> Callable[[int], Tensor]:
    """Order of `n_samples` keys as a pure function of (seed, epoch)."""
    return lambda epoch: torch.randperm(n_samples, generator=epoch_generator(seed, epoch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator behind everything random in the data of one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def collate(samples: Sequence[Sample], max_tokens: int, pad_id: int) -> list[MicroBatch]:
    """The micro-batches of one step, longest rows first; none where a rank has no samples."""
    longest_first = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
    lengths = [len(sample["input_ids"]) for sample in longest_first]
    return [pad(longest_first[rows], pad_id) for rows in cut(lengths, max_tokens)]


def cut(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Slices of a step's rows that go through the model together.

    Args:
        lengths: tokens of each row, longest first.
        max_tokens: limit of a micro-batch, padding included; a longer row goes alone.
    """
    slices, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, max_tokens // lengths[start]))
        slices.append(slice(start, stop))
        start = stop
    return slices


def pad(samples: Sequence[Sample], pad_id: int) -> MicroBatch:
    """Stacks samples, padded on the right to the longest."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    stack = partial(pad_sequence, batch_first=True)
    micro_batch = MicroBatch(
        sample_ids=torch.tensor([sample["sample_id"] for sample in samples]),
        input_ids=stack([s["input_ids"] for s in samples], padding_value=pad_id),
    )
    if "labels" in samples[0]:
        micro_batch["labels"] = stack([s["labels"] for s in samples], padding_value=IGNORE)
    if "label" in samples[0]:
        micro_batch["label"] = torch.tensor([sample["label"] for sample in samples])
    if min(lengths) < max(lengths):
        columns = torch.arange(max(lengths))
        micro_batch["attention_mask"] = columns < torch.tensor(lengths)[:, None]  # (B, T)
    return micro_batch
