"""Processes that were started from outside."""

import os


def n_started() -> int:
    """In how many processes torchrun or srun has started this command."""
    key = "WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_STEP_NUM_TASKS"
    return int(os.environ.get(key) or 1)
