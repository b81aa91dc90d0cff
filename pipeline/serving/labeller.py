"""What a classifier does for those who ask over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.inference import label_probabilities
from pipeline.models import Loaded
from pipeline.serving.worker import Worker


@dataclass(frozen=True)
class Labeller:
    """A model that labels, one request after the other: each uses all cores."""

    loaded: Loaded
    worker: Worker

    @property
    def names(self) -> list[str]:
        """Names of the labels."""
        return self.loaded.meta["label_names"]

    async def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        """Probabilities of every text and label, (N, K).

        Raises:
            ValueError: for a text without anything to label.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.worker, label_probabilities, self.loaded, texts)
