"""Training's passes as CUDA graphs: a GPU is asked once for what it does again and again.

A pass through a small model, or one with adapters, is thousands of operations of a few
microseconds each; to ask for one takes longer than to do it.

Shapes: B rows, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipeline.gpt import GPT
from pipeline.sharding import FullySharded

MULTIPLE = 64  # of tokens a row: few shapes, for each has a graph of its own
GRADIENT_BYTES = 3 * 2**30  # that all graphs together may hold; each has gradients of its own
MIN_SHAPES, MAX_SHAPES = 4, 16  # with a graph; others are computed operation by operation


def install(gpt: GPT, trainer: pl.Trainer, *, is_asked_for: bool) -> None:
    """Has a model's passes in training captured from now on, where that can be done.

    Raises:
        ValueError: where it is asked for and cannot be done.
    """
    device, n_processes = trainer.strategy.root_device.type, trainer.world_size
    is_sharded = isinstance(trainer.strategy, FullySharded)
    graphs = TrainingGraphs(gpt)
    obstacles = {
        f"training runs on {device} (trainer.accelerator)": device != "cuda",
        f"there are {n_processes} processes (trainer.devices)": n_processes > 1,
        "weights are shared out (trainer.strategy)": is_sharded,
        "model.gpt.causal is false": not gpt.config.causal,
        "model.gradient_checkpointing is true": gpt.gradient_checkpointing,
        "trainer.detect_anomaly is true": trainer._detect_anomaly,
        "graphs would hold too many gradients": graphs.max_shapes < MIN_SHAPES,
    }
    found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
    if found and is_asked_for:
        raise ValueError(f"model.cuda_graphs is true, but {found[0]}; set it to null.")
    if not found:
        # the accumulators that a graph holds are of its stream; they are waited for
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        gpt.forward = graphs  # type: ignore[method-assign]


def remove(gpt: GPT) -> None:
    """Gives graphs up: they hold for the weights where they are now, and take memory."""
    gpt.__dict__.pop("forward", None)


def is_installed(gpt: GPT) -> bool:
    """Whether a model's passes in training are captured."""
    return isinstance(gpt.forward, TrainingGraphs)


def n_captured(gpt: GPT) -> int:
    """Shapes that there are graphs for."""
    return len(gpt.forward.bodies) if isinstance(gpt.forward, TrainingGraphs) else 0


@contextmanager
def left_out(gpt: GPT) -> Iterator[None]:
    """Within it passes are what they consist of, for whoever counts that."""
    graphs = gpt.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if graphs is not None:
            gpt.forward = graphs  # type: ignore[method-assign]


class TrainingGraphs:
    """A model's `forward`; passes that train it are captured, others are as before.

    Rows are padded to few lengths, and padding is computed: that is cheaper than to ask. Shapes
    without a graph are computed with the same operations, so to the same bits: a run that goes on
    may have met others first.

    Args:
        gpt: causal, on a GPU, of one process.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt, self.bodies = gpt, {}  # type: ignore[var-annotated]
        named = gpt.named_parameters()  # without the head, which is no part of a pass
        self.trained = [p for n, p in named if p.requires_grad and not n.startswith("head.")]
        n_bytes = sum(p.nbytes for p in self.trained)
        self.max_shapes = min(MAX_SHAPES, GRADIENT_BYTES // max(1, n_bytes))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """As `GPT.forward`."""
        (n_rows, n_tokens), block_size = input_ids.shape, self.gpt.config.block_size
        is_trained = torch.is_grad_enabled() and self.gpt.training and not options
        if not is_trained or n_tokens > block_size:
            return type(self.gpt).forward(self.gpt, input_ids, attention_mask, **options)
        room = min(n_tokens + -n_tokens % MULTIPLE, block_size)
        padded = nn.functional.pad(input_ids, (0, room - n_tokens))
        self._hold_gradients()
        return self._body(n_rows, room)(padded)[:, :n_tokens]

    def _hold_gradients(self) -> None:
        """One that is there is added to; else it would be the graph's own, which it overwrites."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _body(self, *shape: int) -> Any:
        """For rows of this shape: a graph, or the same operations where there are too many."""
        if shape not in self.bodies and len(self.bodies) < self.max_shapes:
            self.bodies[shape] = self._captured(shape)
        return self.bodies.get(shape) or _Body(self.gpt, None)

    def _captured(self, shape: tuple[int, ...]) -> Any:
        device, random = self.gpt.cos.device, torch.cuda.get_rng_state()
        dtype, is_on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        pool = next(iter(self.bodies.values())).pool if self.bodies else None
        with torch.autocast("cuda", dtype, enabled=is_on, cache_enabled=False):
            body = _Body(self.gpt, pool or torch.cuda.graph_pool_handle())
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
            torch.cuda.make_graphed_callables(body, (ids,), allow_unused_input=True, pool=body.pool)
        torch.cuda.set_rng_state(random)  # the same dropout, whatever was captured
        return body


class _Body(nn.Module):
    """What a graph is captured of: one tensor to another."""

    def __init__(self, gpt: GPT, pool: Any) -> None:
        super().__init__()
        self.gpt, self.pool = gpt, pool

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return type(self.gpt).forward(self.gpt, input_ids)
