"""Launchers that start several processes of one command."""

import os


def n_started() -> int:
    """Number of processes in which torchrun or srun started this command; 1 without them."""
    key = "WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_STEP_NUM_TASKS"
    return int(os.environ.get(key) or 1)
