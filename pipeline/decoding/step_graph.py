"""A decoding step captured as a CUDA graph: one replay instead of hundreds of launches.

A step of a small model is hundreds of kernels of a few microseconds each; launching one takes
longer than running it.

Shapes: R places for rows, B of them with rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.decoding.kv_cache import KVCache

WARM_UP = 2  # steps before the capture: libraries load, and a store may soon grow

# from tokens (R, T), positions (R,) of the first of them, and a cache, to logits (R, T, V); never
# waits for the device
Step = Callable[[Tensor, Tensor, KVCache], Tensor]


class StepGraph:
    """Decoding steps of T tokens on the store of a cache.

    All of its places are computed, so that rows may leave and others join; the contents of places
    without a row do not matter.
    """

    def __init__(self, step: Step, cache: KVCache, n_tokens: int) -> None:
        self.step, self.cache = step, cache.whole()
        n_places, device = self.cache.n_rows, cache.store.device
        self.input_ids = torch.zeros((n_places, n_tokens), dtype=torch.int64, device=device)
        self.starts = torch.zeros(n_places, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_steps = 0

    def __call__(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Logits (B, T, V) after each of B rows' tokens, from positions (B,) on."""
        n_rows = len(tokens)
        self.input_ids[:n_rows] = torch.tensor(tokens)
        self.starts[:n_rows] = torch.tensor(starts)
        if self.graph is None and self.n_steps == WARM_UP:
            self._capture()
        self.n_steps += 1
        if self.graph is None:
            return self._run()[:n_rows]
        self.graph.replay()
        return self.logits[:n_rows].clone()  # overwritten by the next step

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._run()
        self.graph = graph  # only once it is complete

    def _run(self) -> Tensor:
        return self.step(self.input_ids, self.starts, self.cache)
