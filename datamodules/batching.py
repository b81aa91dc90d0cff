"""From samples to optimizer steps: a batch of the loader is one optimizer step, in micro-batches.

First the members of a step are chosen, a pure function of (seed, epoch); then they are sorted by
length and cut to a token budget. `batch_size` therefore decides the learning and `max_tokens` only
the memory.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.prompts import IGNORE
from datamodules.tokenizer import Tokenizer


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


class SampleList(Dataset[Sample]):
    """Samples that fit in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int) -> Sample:
        return self.samples[key]


def digest_of(sample_sets: Iterable[SampleList]) -> str:
    """SHA-256 of all samples in their order: equal digests train equally."""
    digest = hashlib.sha256()
    for samples in sample_sets:
        digest.update(f"{len(samples)} samples".encode())
        for sample in samples.samples:
            labels = sample["labels"].tolist() if "labels" in sample else sample["label"]
            content = (sample["sample_id"], sample["input_ids"].tolist(), labels)
            digest.update(repr(content).encode())
    return digest.hexdigest()


class StepSampler:
    """Yields the sample keys of each optimizer step of one epoch after the other.

    It owns its epoch counter, and starts once at `start`; its length is always that of a full
    epoch. Members of a step are dealt to the ranks in turn, so that every sample is seen exactly
    once an epoch.

    Args:
        order: epoch -> (N,) int64 keys, of the same length for every epoch.
        batch_size: samples a step, over all ranks.
        epoch: the first epoch to yield.
        start: steps of that first epoch to leave out (they were taken before a resume).
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
        self.next_epoch, self.start = epoch, start
        self.rank, self.world_size = rank, world_size
        self.n_steps = -(-len(order(epoch)) // batch_size)

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        steps = self.order(epoch).split(self.batch_size)
        for members in steps[start:]:
            yield members[self.rank :: self.world_size].tolist()


def shuffled(n_samples: int, seed: int) -> Callable[[int], Tensor]:
    """Order of `n_samples` keys as a pure function of (seed, epoch)."""
    return lambda epoch: torch.randperm(n_samples, generator=epoch_generator(seed, epoch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator that decides everything random about the data of one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


@dataclass(frozen=True)
class Collate:
    """Sorts the samples of a step by length and cuts them into micro-batches.

    None has more than `max_tokens` tokens, padding included; a sample longer than that goes alone.
    """

    max_tokens: int
    pad_id: int

    def __call__(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """The micro-batches of one step, longest rows first; none where a rank has no samples."""
        longest_first = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
        lengths = [len(sample["input_ids"]) for sample in longest_first]
        return [pad(longest_first[rows], self.pad_id) for rows in cut(lengths, self.max_tokens)]


def cut(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Which rows of a step go through the model together.

    Args:
        lengths: tokens of the rows, the longest first.
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
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    columns = torch.arange(int(lengths.max()))
    micro_batch = MicroBatch(
        sample_ids=torch.tensor([sample["sample_id"] for sample in samples]),
        input_ids=_stack([sample["input_ids"] for sample in samples], pad_id),
    )
    if "labels" in samples[0]:
        micro_batch["labels"] = _stack([sample["labels"] for sample in samples], IGNORE)
    if "label" in samples[0]:
        micro_batch["label"] = torch.tensor([sample["label"] for sample in samples])
    if bool((lengths < len(columns)).any()):
        micro_batch["attention_mask"] = columns < lengths[:, None]  # (B, T)
    return micro_batch


def _stack(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


class StepDataModule(pl.LightningDataModule):
    """Base of the data modules: a batch is an optimizer step, and its position survives a resume.

    A subclass makes `tokenizer`, `train_set`, `val_set`, `test_set` and `fingerprint`.

    Args:
        batch_size: samples an optimizer step, over all ranks.
        max_tokens: padded tokens a micro-batch; memory, not learning.
        seed: random seed of the order of training samples.
        num_workers: processes that prepare batches.
    """

    context_key = "max_length"  # the argument that bounds the length of a row, in tokens
    tokenizer: Tokenizer
    train_set: Dataset[Sample]
    val_set: Dataset[Sample]
    test_set: Dataset[Sample]
    fingerprint: dict[str, Any]  # primitives: digest, counts, and what decides the samples
    config: dict[str, Any] | None = None  # the YAML that it was made from, where there was one

    def __init__(self, *, batch_size: int, max_tokens: int, seed: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; give at least 1.")
        if max_tokens < 1:
            raise ValueError(f"data.max_tokens is {max_tokens}; give at least 1.")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.num_workers = seed, num_workers
        self._at = {"epoch": 0, "position": 0}  # in the order of training

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Prepares the data sets; called by Lightning on every process, possibly more than once."""

    @property
    def context(self) -> tuple[str, int]:
        """The argument that bounds the length of a row, and its value in tokens."""
        return self.context_key, getattr(self, self.context_key)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint must know of the data to be used without it; primitives."""
        return {}

    def train_order(self) -> Callable[[int], Tensor]:
        """Epoch -> keys of `train_set`."""
        return shuffled(len(self.train_set), self.seed)  # type: ignore[arg-type]

    def train_lengths(self, keys: Tensor) -> Tensor:
        """Tokens of the rows of `train_set` with these keys (N,), int64."""
        return torch.tensor([len(self.train_set[key]["input_ids"]) for key in keys.tolist()])

    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return -(-len(self.train_order()(0)) // self.batch_size)

    def advance(self, n_steps: int) -> None:
        """Moves the position past an optimizer step, into the next epoch behind its last one.

        Lightning's own counters are no help: after a resume at an epoch's end they lag behind.

        Args:
            n_steps: optimizer steps that this run takes an epoch.
        """
        self._at["position"] += 1
        if self._at["position"] >= n_steps:
            self._at = {"epoch": self._at["epoch"] + 1, "position": 0}

    def state_dict(self) -> dict[str, int]:
        """Position after the last finished optimizer step."""
        return dict(self._at)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at a saved position; called by Lightning before the loaders are made."""
        self._at = dict(state_dict)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a saved position in the data to hold, by key; primitives."""
        key, n_tokens = self.context
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            key: n_tokens,
            "tokenizer": self.tokenizer.digest,
            "samples": self.fingerprint["digest"],
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training; the first epoch may start in its middle."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = StepSampler(
            self.train_order(),
            batch_size=self.batch_size,
            epoch=self._at["epoch"],
            start=min(self._at["position"], self.steps_per_epoch() - 1),  # other data may be less
            rank=rank,
            world_size=world_size,
        )
        return self._loader(self.train_set, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation, in order."""
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test, in order."""
        return self._in_order(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test set again: predictions for it, in order."""
        return self._in_order(self.test_set)

    def _in_order(self, dataset: Dataset[Sample]) -> DataLoader[Any]:
        return self._loader(dataset, batch_size=self.batch_size)

    def _loader(self, dataset: Dataset[Sample], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            collate_fn=Collate(self.max_tokens, self.tokenizer.eos_id),
            num_workers=self.num_workers,
            worker_init_fn=let_server_end,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise every iter() draws from the global generator
            **options,
        )


def let_server_end(worker_id: int) -> None:
    """Closes a worker's end of the pipe by which a fork server knows that its run is there.

    Otherwise, after a run was killed, the server lives as long as its workers, and these, which
    look whether the server is there, as long as it. It is Python's way to start them since 3.14.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


@rank_zero_only
def report(message: str) -> None:
    """Tells who listens to the logger `datamodules`, as the command line does; once over ranks."""
    logging.getLogger(__name__).info(message)


def load_tokenizer(source: str | None) -> Tokenizer:
    """The tokenizer of a data module; the command line fills null in from `model.init_from`.

    Raises:
        ValueError: for null.
    """
    if source is None:
        raise ValueError("data.tokenizer is null; give a name (gpt2), a file or a checkpoint.")
    return Tokenizer.load(source)
