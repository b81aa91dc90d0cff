"""What a classifier does for those who ask over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool

from pipeline.inference import label_probabilities
from pipeline.models import Loaded


@dataclass(frozen=True)
class Labeller:
    """A model that labels, one request after the other: each uses all cores."""

    loaded: Loaded
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def names(self) -> list[str]:
        """Of the labels."""
        return self.loaded.meta["label_names"]

    async def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        """Of every text and label, (N, K).

        Raises:
            ValueError: for a text without anything to label.
        """
        async with self._turn:
            return await run_in_threadpool(label_probabilities, self.loaded, texts)
