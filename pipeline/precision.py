"""Names of inference precisions; imports no torch, as `--help` shows them."""

from typing import Literal

# f16-weights: float32 arithmetic on weights that are held in float16
Precision = Literal["auto", "32-true", "bf16-true", "f16-weights"]
