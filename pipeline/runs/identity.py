"""What makes two runs the same: the options that decide a result."""

from typing import Any

NEUTRAL = {  # options that affect memory, speed, names or display, never the result
    "run.experiment",
    "run.name",
    "run.resume",
    "run.allow_changes",
    "data.max_tokens",
    "data.num_workers",
    "checkpoints.asynchronous",
    "judge.api_key_env",
    "judge.max_attempts",
    "judge.max_concurrency",
    "judge.max_wait_s",
    "judge.timeout_s",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
}


def decisive(options: Any, prefix: str = "") -> dict[str, Any]:
    """The options that decide the result, by dotted key, as the command line names them."""
    if not isinstance(options, dict) or not options:
        key = prefix.rstrip(".").replace(".init_args", "")
        return {} if key in NEUTRAL else {key: options}
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= decisive(value, f"{prefix}{key}.")
    return flat
