"""Library errors that have a remedy, explained in one line."""

import re

import torch
from torch.distributed import DistBackendError, DistNetworkError

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory")
_OF_GLOO = "gloo/transport"  # its errors have no class of their own
_EARLY_STOPPING = re.compile("Early stopping conditioned on metric .* not available")
_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")


def explain(
    error: BaseException, *, max_tokens: int, needed_gib: float, free_gib: float
) -> str | None:
    """What happened and what to do, for known errors of libraries; None for any other.

    `max_tokens` is the limit of a micro-batch, `needed_gib` comes from `memory.estimate_gib`.
    """
    if is_out_of_memory(error):
        graphs = "model.cuda_graphs to false or " if torch.cuda.is_available() else ""
        return (
            f"out of memory ({_first_line(error)}). Training needs about {needed_gib:.1f} GiB "
            f"beside the weights, {free_gib:.1f} GiB are free: lower data.max_tokens (it is "
            f"{max_tokens}, and changes no result, but for what dropout draws), set {graphs}"
            "model.gradient_checkpointing to true, train adapters (model.lora), or take a smaller "
            "model."
        )
    if _WORKER.search(str(error)):
        return (
            f"a data worker was killed ({_first_line(error)}), often for too little memory: lower "
            "data.num_workers, then repeat the command to resume from the last checkpoint."
        )
    if _EARLY_STOPPING.search(str(error)):
        return f"{_first_line(error)} Correct EarlyStopping.monitor."
    if isinstance(error, DistNetworkError):
        return (
            f"the processes did not meet ({_first_line(error)}): MASTER_ADDR has to be the first "
            "one's machine, and MASTER_PORT free there."
        )
    if isinstance(error, DistBackendError) or _OF_GLOO in str(error):
        return (
            "another process of this run has ended; its output, or the system's log, says why. "
            "Repeat the command to resume from the last checkpoint."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU, and for a CUDA graph, torch has no error class for it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(name in str(error) for name in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
