"""Names of the arithmetic of a model that only answers; without torch, as `--help` shows them."""

from typing import Literal

# f16-weights: float32 throughout, on weights that are held in float16
Precision = Literal["auto", "32-true", "bf16-true", "f16-weights"]
