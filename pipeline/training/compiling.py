"""torch.compile where it pays: in the blocks, whose many small kernels it fuses into few."""

import torch

from pipeline.gpt import GPT

RECOMPILE_LIMIT = 32  # training and validation, with padding and without, compile each shape


def compile_blocks(gpt: GPT) -> None:
    """Compiles a model's blocks when they first run: once for all, since they are alike.

    Only `forward` is compiled, not what wraps it, such as FSDP2's hooks.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in gpt.blocks:
        block.forward = torch.compile(block.forward)
