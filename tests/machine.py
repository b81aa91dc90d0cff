"""What tests need of the machine that they run on."""

from __future__ import annotations

import pytest
import torch

from pipeline.hardware import multiplies_f16_weights

needs_f16_products = pytest.mark.skipif(
    not multiplies_f16_weights(torch.device("cpu")),
    reason="no products of float32 with weights in float16",
)
