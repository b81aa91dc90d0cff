"""`--safe`: an untrusted config may name the classes of a stage, and nothing else is imported.

jsonargparse enforces it: it checks a name before it imports the module, and then also where the
object found there was defined (`pipeline.cli.os.system` is `posix.system`).
"""

import re
import sys
from pathlib import Path

VARIABLE = "GPT_PIPELINE_SAFE"  # inherited by all subprocesses, such as stages and further ranks
_LIGHTNING = ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
ALLOWED = [
    "pipeline",
    "datamodules",
    *(f"lightning.pytorch.{part}" for part in _LIGHTNING),
    "lightning.fabric.plugins",
    "torch.nn",
    "torch.optim",
]
CALLERS = [  # callbacks that call whatever they are given
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.lambda_function",
]
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_KEY = re.compile(r'[Kk]ey "([^"]+)"')


def refuse_strangers() -> None:
    """Makes options refuse every name that is not allowed, for the rest of the process."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(
        import_path_denylist=["*", *CALLERS],
        import_path_allowlist=ALLOWED,
        instantiate_subclass_spec_in_any=False,
    )


def refusal(message: str) -> str | None:
    """One line on what a parser refused to import; None if its message is about something else."""
    denied = _DENIED.search(message)
    if denied is None:
        return None
    name, key = denied[1], ".".join(_KEY.findall(message)) or "class_path"
    return (
        f"{_place(name)}: {key}: {name} is not imported with --safe, which knows pipeline, "
        "datamodules and the parts of lightning and torch that run nothing they are given; without "
        "--safe the config is code that you trust."
    )


def _place(name: str) -> str:
    """The config file that contains a name, or else the command line."""
    for word in sys.argv[1:]:
        path = Path(word.rpartition("=")[2])
        if path.is_file() and name in path.read_text(encoding="utf-8", errors="replace"):
            return str(path)
    return "command line"
