"""The command line: `python -m pipeline COMMAND`, also installed as `gpt-pipeline COMMAND`."""

import difflib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline import safe
from pipeline.commands import FUNCTIONS
from pipeline.console import say
from pipeline.interrupts import PARENT_VARIABLE, end_with_parent
from pipeline.launchers import n_started

LIGHTNING = {
    "fit": "Train a model: pretraining, classification or instruction tuning.",
    "validate": "Evaluate a checkpoint on the validation set.",
    "test": "Evaluate a checkpoint on the test set.",
    "predict": "Write a checkpoint's predictions for the test set.",
    "check": "Say what fit would do, cost and leave out, before it starts.",
}
COMMANDS = {
    **LIGHTNING,
    **{name: (function.__doc__ or "").splitlines()[0] for name, function in FUNCTIONS.items()},
}
GLOBAL_OPTIONS = {
    "--safe": "refuses a config that names classes from elsewhere: use it on untrusted configs.",
    "--debug": "shows the traceback of an error.",
}
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
LOOK_S, N_LOOKS = 0.1, 8
BUSY_PERCENT = 25  # of all cores, used by other processes when a command starts


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: the words after `python -m pipeline`; by default those of the process.

    Returns:
        The exit code: 2 for a user's mistake, in one line on stderr; `--debug` adds the traceback.
        With `--safe`, what configs name is not imported unless it is known: see `pipeline.safe`.
    """
    words = list(sys.argv[1:] if args is None else args)
    sys.argv[1:] = words  # what a run records as its command, and what launchers start again
    if PARENT_VARIABLE in os.environ:
        end_with_parent()
    sys.stdin = sys.stdin or io.StringIO()  # None where it is closed
    debug = "--debug" in words
    if "--safe" in words:
        os.environ[safe.VARIABLE] = "1"
    if safe.VARIABLE in os.environ:
        safe.refuse_strangers()
    try:
        with _listening_to_data():
            return _dispatch([word for word in words if word not in GLOBAL_OPTIONS]) or 0
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        say(f"error: {_one_line(error)}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED


@contextmanager
def _listening_to_data() -> Iterator[None]:
    """Shows what data modules log, such as how many samples were cut, on stderr."""
    logger, handler = logging.getLogger("datamodules"), logging.StreamHandler(sys.stderr)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _dispatch(words: list[str]) -> int | None:
    name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS), None)
    if name is None:
        return _explain(words)
    from pipeline.arguments import check_configs, guard_yaml, parse

    guard_yaml()
    rest = words[len(name.split()) :]
    check_configs(rest)
    if name != "run" and not {"-h", "--help"} & set(rest):  # a chain's stages choose for themselves
        choose_waiting()
    if name in FUNCTIONS:
        if (n_processes := n_started()) > 1:
            raise ValueError(
                f"{name} needs one process, not {n_processes}; leave out what starts more."
            )
        try:
            options = parse(FUNCTIONS[name], rest, f"{_prog()} {name}")
        except SystemExit as after_help:
            return int(after_help.code or 0)
        return FUNCTIONS[name](**options)
    if name == "check":
        from pipeline.check import main as check_main

        check_main(rest)
    else:
        from pipeline.cli import main as lightning_main

        lightning_main([name, *rest])
    return None


def choose_waiting() -> None:
    """Chooses how OpenMP's threads wait for one another; must run before torch is loaded.

    On an idle machine a short spin makes small steps 1.5 times as fast as sleeping does; where
    another process wants a core, sleeping is 3 times as fast as any spin. Only a machine that is
    busy at every look counts as busy: a process that was there just before may still be ending.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return
    import psutil

    if any(psutil.cpu_percent(interval=LOOK_S) < BUSY_PERCENT for _ in range(N_LOOKS)):
        os.environ["GOMP_SPINCOUNT"] = "10000"
    else:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _explain(words: list[str]) -> int:
    """Help, or what is wrong with the command."""
    first = " ".join(word for word in words[:2] if not word.startswith("-"))
    below = {name: line for name, line in COMMANDS.items() if name.startswith(f"{first} ".lstrip())}
    if first and not below:
        near = difflib.get_close_matches(first.split()[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}."
        raise ValueError(f"unknown command {first.split()[0]!r}{hint}")
    asked = any(word in ("-h", "--help") for word in words)
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"usage: {_prog()} COMMAND [options]",
        "",
        *(f"  {name:<{width}}{line}" for name, line in (below or COMMANDS).items()),
        "",
        "COMMAND --help lists its options; any of them can be set in a YAML file given with -c.",
        *(f"{name} {does}" for name, does in GLOBAL_OPTIONS.items()),
    ]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else EXIT_USER_ERROR


def _one_line(error: Exception) -> str:
    """An error's message on one line; for one of the operating system's, file and reason."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason != "surrogates not allowed":
        text = f"stdout takes {error.encoding} alone; set PYTHONIOENCODING=utf-8."
    elif isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 40) : error.end + 20]
        text = f"{near!r} holds bytes that are no UTF-8; rename the file, or write it otherwise."
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    return " ".join(text.split())


def _prog() -> str:
    return "gpt-pipeline" if Path(sys.argv[0]).name == "gpt-pipeline" else "python -m pipeline"


if __name__ == "__main__":
    sys.exit(main())
