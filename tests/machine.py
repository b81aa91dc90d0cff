"""What tests need to know about the machine they run on."""

import pytest
import torch

from pipeline.hardware import default_device, multiplies_bf16, multiplies_f16_weights

CPU = torch.device("cpu")
needs_f16_products = pytest.mark.skipif(
    not multiplies_f16_weights(CPU),
    reason="no products of float32 with weights in float16",
)
takes_f16_weights = pytest.mark.skipif(
    not multiplies_f16_weights(default_device()), reason="models run elsewhere by default"
)
needs_bf16_of_one_kernel = pytest.mark.skipif(
    multiplies_bf16(CPU), reason="kernels of the hardware may round five rows otherwise than one"
)
