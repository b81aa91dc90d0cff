"""Base of all data modules: loaders whose position survives a resume.

Shapes: N rows.
"""

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from multiprocessing import forkserver
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batching import Sample, StepSampler, collate, shuffled
from datamodules.tokenizer import Tokenizer


class StepDataModule(pl.LightningDataModule):
    """Base of the data modules: a batch is an optimizer step, and its position survives a resume.

    A subclass sets `train_set`, `val_set`, `test_set` and `fingerprint`.

    Args:
        tokenizer: a name (gpt2), a file from `tokenizer train`, or a checkpoint; null: that of
            model.init_from.
        batch_size: samples per optimizer step, over all ranks.
        max_tokens: padded tokens per micro-batch; sets memory, not learning (except by dropout).
        seed: random seed of the order of training samples, or of where blocks begin.
        num_workers: processes that prepare batches; with 0 the training process does.
    """

    context_key = "max_length"  # the argument that bounds the length of a row, in tokens
    train_set: Sequence[Sample]
    val_set: Sequence[Sample]
    test_set: Sequence[Sample]
    fingerprint: dict[str, Any]  # primitives: digest, counts, and what decides the samples
    config: dict[str, Any] | None = None  # the YAML that it was made from, if any

    def __init__(
        self,
        *,
        tokenizer: str | None,
        batch_size: int,
        max_tokens: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"data.{key} is {value}; give at least 1.")
        check_seed("seed", seed)
        self._tokenizer = tokenizer
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.num_workers = seed, num_workers
        self._at = {"epoch": 0, "position": 0}  # in the training order

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use: a chain reads rows before its tokenizer is trained.

        Raises:
            ValueError: for null; the command line fills it in from `model.init_from`.
        """
        if self._tokenizer is None:
            raise ValueError("data.tokenizer is null; give a name (gpt2), a file or a checkpoint.")
        return Tokenizer.load(self._tokenizer)

    def check(self, stage: str) -> None:
        """Refuses a missing or unfit tokenizer before any data is read."""
        _ = self.tokenizer

    def read(self) -> None:
        """Reads and splits rows, which needs no tokenizer; refuses those that cannot be used."""

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Prepares the data sets; called by Lightning on every process, possibly more than once."""

    @property
    def context(self) -> tuple[str, int]:
        """The argument that bounds the length of a row, and its value in tokens."""
        return self.context_key, getattr(self, self.context_key)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs of the data module to be used without it; primitives."""
        return {}

    def keys(self, split: str) -> list[str]:
        """One key per row of the train, val or test split, equal for rows that say the same."""
        return []

    def train_order(self) -> Callable[[int], Tensor]:
        """Epoch -> keys of `train_set`, in order."""
        return shuffled(len(self.train_set), self.seed)

    def train_lengths(self, keys: Tensor) -> Tensor:
        """Tokens of the rows of `train_set` with these keys (N,), int64."""
        return torch.tensor([len(self.train_set[key]["input_ids"]) for key in keys.tolist()])

    def advance(self, n_steps: int) -> None:
        """Moves the position past an optimizer step; an epoch has `n_steps`.

        Lightning's own counters do not serve: after a resume at an epoch's end they lag behind.
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
        """What must not change if a saved position in the data is to hold, by key; primitives."""
        key, n_tokens = self.context
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            key: n_tokens,
            "tokenizer": self.tokenizer.digest,
            "samples": self.fingerprint["digest"],
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches; after a resume the first epoch may start in its middle."""
        at = {"epoch": self._at["epoch"], "start": self._at["position"]}
        return self._dealt(self.train_set, self.train_order(), **at)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in order, dealt to the ranks as in training."""
        in_order = torch.arange(len(self.val_set))
        return self._dealt(self.val_set, lambda epoch: in_order)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in order, all of them on every rank."""
        return self._loader(self.test_set, batch_size=self.batch_size)

    predict_dataloader = test_dataloader  # predictions are of the test set

    def _dealt(
        self, dataset: Sequence[Sample], order: Callable[[int], Tensor], **at: int
    ) -> DataLoader[Any]:
        if trainer := self.trainer:
            at |= {"rank": trainer.global_rank, "world_size": trainer.world_size}
        sampler = StepSampler(order, batch_size=self.batch_size, **at)
        return self._loader(dataset, batch_sampler=sampler)

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            collate_fn=partial(collate, max_tokens=self.max_tokens, pad_id=self.tokenizer.eos_id),
            num_workers=self.num_workers,
            worker_init_fn=let_server_end,
            persistent_workers=self.num_workers > 0,
            # pinned by the training thread; workers need another one, which would spoil CUDA graphs
            pin_memory=torch.cuda.is_available() and self.num_workers == 0,
            generator=torch.Generator(),  # otherwise every iter() draws from the global generator
            **options,
        )


def check_seed(key: str, seed: int) -> None:
    """ValueError for a seed that one of the generators does not accept."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"data.{key} is {seed}; give a whole number from 0 to 2^32 - 1.")


def let_server_end(worker_id: int) -> None:
    """Closes a worker's end of the pipe by which a fork server knows that its run is alive.

    Otherwise, after a run is killed, the server lives as long as its workers, and these, which
    watch the server, as long as it does. Fork servers are Python's default since 3.14.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


@rank_zero_only
def report(message: str) -> None:
    """Logs to the logger `datamodules`, which the command line shows; on the first rank alone."""
    logging.getLogger(__name__).info(message)


def described(counts: Mapping[str, Any]) -> str:
    """Counts in one line: labels (`train/spam`) and nested counts in brackets, no `n_...` ones."""
    words = []
    for name, count in counts.items():
        if isinstance(count, Mapping):
            words.append(f"{name} ({described(count)})")
        elif "/" not in name and not name.startswith("n_"):
            of_it = {k.partition("/")[2]: n for k, n in counts.items() if k.startswith(f"{name}/")}
            parts = ", ".join(f"{part} {n:,}" for part, n in of_it.items())
            words.append(f"{name} {count:,}" + (f" ({parts})" if parts else ""))
    return ", ".join(words)
