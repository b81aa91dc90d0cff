"""torch.compile where it pays: blocks, of whose many small kernels it makes few."""

import torch

from pipeline.gpt import GPT

RECOMPILE_LIMIT = 32  # of training and validation, rows with padding and without, each shape anew


def compile_blocks(gpt: GPT) -> None:
    """Compiles a model's blocks when they first run: one for all, since they are alike.

    What is around `forward`, as FSDP2's hooks, stays as it is.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in gpt.blocks:
        block.forward = torch.compile(block.forward)
