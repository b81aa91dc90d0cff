"""The options of a chain's later stages, parsed before the first of them runs.

Run by `run` in a process of its own, since Lightning, which parses them, is large and slow to load.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from pipeline import safe
from pipeline.arguments import check_configs, guard_yaml
from pipeline.cli import PipelineCLI
from pipeline.cli import main as lightning_main
from pipeline.interrupts import end_with_parent

EXIT_MISTAKE = 2


class _Parsed(Exception):
    """A command's options are in order: no error, but the way out before anything is built."""


class _ParsingCLI(PipelineCLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        raise _Parsed


def main(stages: dict[str, list[str]]) -> int:
    """Parses what each stage's command will.

    Args:
        stages: by name, a command of Lightning's and its options.

    Returns:
        The exit code: 2 for a mistake, said in one line on stderr.
    """
    end_with_parent()
    guard_yaml()
    if safe.VARIABLE in os.environ:
        safe.refuse_strangers()
    for name, words in stages.items():
        try:
            check_configs(words)
            with suppress(_Parsed):
                lightning_main(words, _ParsingCLI)
        except ValueError as error:
            print(f"error: stage {name!r}: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
