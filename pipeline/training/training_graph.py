"""Training passes captured as CUDA graphs: one replay instead of thousands of kernel launches.

A pass through a small model, or one with adapters, is thousands of kernels of a few microseconds
each; launching one takes longer than running it.

Shapes: B rows, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pipeline.gpt import GPT
from pipeline.training.sharding import FullySharded

MULTIPLE = 64  # of tokens per row: few shapes, as each has graphs of its own
MAX_SHAPES = 32  # captured at most
MAX_GRADIENT_BYTES = 3 * 2**30  # a pass has its own besides those that it adds to


def install(gpt: GPT, trainer: pl.Trainer, *, is_asked_for: bool) -> None:
    """Turns on the capturing of a model's training passes, if that is possible.

    Raises:
        ValueError: it is asked for and not possible.
    """
    device, n_processes = trainer.strategy.root_device.type, trainer.world_size
    is_sharded = isinstance(trainer.strategy, FullySharded)
    graphs = TrainingGraphs(gpt)
    n_bytes = sum(p.nbytes for p in graphs.trained.values())
    obstacles = {
        f"training runs on {device} (trainer.accelerator)": device != "cuda",
        f"there are {n_processes} processes (trainer.devices)": n_processes > 1,
        "weights are shared out (trainer.strategy)": is_sharded,
        "model.gpt.causal is false": not gpt.config.causal,
        "no weight of the transformer is trained (model.trainable)": not graphs.trained,
        "model.gradient_checkpointing is true": gpt.gradient_checkpointing,
        "trainer.detect_anomaly is true": trainer._detect_anomaly,
        "gradients take more than 3 GiB, and are there twice": n_bytes > MAX_GRADIENT_BYTES,
    }
    found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
    if found and is_asked_for:
        raise ValueError(f"model.cuda_graphs is true, but {found[0]}; set it to null.")
    if not found:
        gpt.forward = graphs  # type: ignore[method-assign]


def remove(gpt: GPT) -> None:
    """Drops the graphs, which are bound to the weights' present addresses and take memory."""
    if isinstance(graphs := gpt.__dict__.pop("forward", None), TrainingGraphs):
        graphs.captured.clear()  # breaks a reference cycle


def is_installed(gpt: GPT) -> bool:
    """Whether a model's training passes are captured."""
    return isinstance(gpt.forward, TrainingGraphs)


@contextmanager
def left_out(gpt: GPT) -> Iterator[None]:
    """Context without graphs: passes run operation by operation, so that these can be observed."""
    graphs = gpt.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if graphs is not None:
            gpt.forward = graphs  # type: ignore[method-assign]


class TrainingGraphs:
    """A model's `forward` that captures training passes and leaves others as they are.

    Rows are padded to few lengths, and padding is computed: that is cheaper than testing for it. A
    shape is captured the second time that it occurs. Before that, and beyond MAX_SHAPES, the same
    operations are launched one by one and round alike: a resumed run may meet other shapes first.

    The weights must keep their addresses and their `requires_grad`.

    Args:
        gpt: a causal model on a GPU, in a single process.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt = gpt
        self.pool: Any = None  # memory pool of all graphs
        self.met: set[tuple[int, int]] = set()  # shapes that libraries and compilers have seen
        self.captured: dict[tuple[int, int], CapturedPass] = {}
        named = gpt.named_parameters()
        # without the head, which is no part of a pass
        self.trained = {n: p for n, p in named if p.requires_grad and not n.startswith("head.")}
        self.anchor = torch.zeros((), requires_grad=True)  # gives a pass's result a grad_fn
        self.latest: object = None  # token of the latest forward pass

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Does what `GPT.forward` does; the next pass overwrites what it returns."""
        n_tokens, block_size = input_ids.shape[1], self.gpt.config.block_size
        is_trained = torch.is_grad_enabled() and self.gpt.training and not options
        if not is_trained or n_tokens > block_size:
            return type(self.gpt).forward(self.gpt, input_ids, attention_mask, **options)
        room = min(n_tokens + -n_tokens % MULTIPLE, block_size)
        padded = nn.functional.pad(input_ids, (0, room - n_tokens))
        states: Tensor = _Run.apply(self.anchor, padded, self)
        return states[:, :n_tokens]

    @property
    def n_prepared(self) -> int:
        """Slow passes so far: the first of each shape, and its capture."""
        return len(self.met) + len(self.captured)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Gradients of `trained`, at fixed addresses; passes add to them."""
        return [torch.zeros_like(parameter) for parameter in self.trained.values()]

    def hold_gradients(self) -> None:
        """Makes these the weights' gradients, with the values of the present ones, or zero."""
        for parameter, held in zip(self.trained.values(), self.gradients, strict=True):
            if parameter.grad is not held:
                held.zero_() if parameter.grad is None else held.copy_(parameter.grad)
                parameter.grad = held

    def pass_of(self, shape: tuple[int, int]) -> Pass:
        """The pass for token ids of a shape (B, T), captured or not."""
        if shape in self.captured:
            return self.captured[shape]
        if len(self.captured) == MAX_SHAPES:
            return Pass(self)
        if shape not in self.met:
            self.met.add(shape)
            return Pass(self)
        self.captured[shape] = self._capture(shape)
        return self.captured[shape]

    def _capture(self, shape: tuple[int, int]) -> CapturedPass:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return CapturedPass(self, shape)


class Pass:
    """A forward and a backward pass, operation by operation.

    Its weights are fresh leaves that share the model's memory: autograd's AccumulateGrad waits for
    the stream that first used a leaf, and such a wait cannot be captured.
    """

    def __init__(self, graphs: TrainingGraphs) -> None:
        self.graphs, self.gradients = graphs, graphs.gradients  # not made in a capture
        self.weights: dict[str, Tensor] = {
            name: nn.Parameter(p.detach()) for name, p in graphs.trained.items()
        }

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        gpt, device = self.graphs.gpt, input_ids.device.type
        dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with (
            left_out(gpt),
            torch.enable_grad(),
            torch.autocast(device, dtype, enabled=is_on, cache_enabled=False),
        ):
            self.states: Tensor = functional_call(gpt, self.weights, (input_ids,))
        return self.states.detach()

    def backward(self, upstream: Tensor) -> None:
        """Adds to the gradients; `upstream` (B, T, C) is the gradient of `forward`'s result."""
        weights = list(self.weights.values())
        found = torch.autograd.grad(self.states, weights, upstream, materialize_grads=True)
        del self.states
        torch._foreach_add_(self.gradients, found)


class CapturedPass(Pass):
    """The same for one shape, as two graphs on tensors of their own.

    All share one memory pool: what a pass keeps for its backward pass, and what it returned, is
    gone when another pass begins.
    """

    def __init__(self, graphs: TrainingGraphs, shape: tuple[int, int]) -> None:
        super().__init__(graphs)
        self.input_ids = torch.zeros(shape, dtype=torch.int64, device=graphs.gpt.head.weight.device)
        self.ahead, self.back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.ahead, pool=graphs.pool):
            self.returned = super().forward(self.input_ids)
        self.upstream = torch.zeros_like(self.returned)
        with torch.cuda.graph(self.back, pool=graphs.pool):
            super().backward(self.upstream)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Copies the ids in and replays the graph."""
        self.input_ids.copy_(input_ids)
        self.ahead.replay()
        return self.returned.detach()

    def backward(self, upstream: Tensor) -> None:
        """Copies the gradient in and replays the graph."""
        self.upstream.copy_(upstream)
        self.back.replay()


class _Run(torch.autograd.Function):
    """A pass as a single autograd operation, which does not see the weights."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, input_ids: Tensor, graphs: TrainingGraphs) -> Tensor:
        n_rows, n_tokens = input_ids.shape
        ctx.graphs, ctx.one = graphs, graphs.pass_of((n_rows, n_tokens))
        ctx.token = graphs.latest = object()
        return ctx.one.forward(input_ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None]:
        if ctx.graphs.latest is not ctx.token:
            raise RuntimeError("backward ran twice, or after another forward pass.")
        ctx.graphs.latest = None
        ctx.graphs.hold_gradients()
        ctx.one.backward(upstream)
        return None, None, None
