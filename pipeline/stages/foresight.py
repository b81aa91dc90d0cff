"""A chain's later stages before the first of them runs: options are parsed, rows are read.

Run by `run` in a process of its own, since Lightning, which parses them, is large and slow to load.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from functools import cache

from jsonargparse.util import import_object

from pipeline import safe
from pipeline.arguments import check_configs, construct, guard_yaml
from pipeline.cli import PipelineCLI
from pipeline.cli import main as lightning_main
from pipeline.interrupts import end_with_parent

EXIT_MISTAKE = 2


class _Read(Exception):
    """A command's options and rows are in order: no error, but the way out before it begins."""


class _ReadingCLI(PipelineCLI):
    def before_instantiate_classes(self) -> None:
        """Builds the data alone; its tokenizer may be one that an earlier stage makes."""
        data = self.stage.data
        _read(data.class_path, json.dumps(data.init_args.as_dict(), sort_keys=True))
        raise _Read


@cache
def _read(class_path: str, arguments: str) -> None:
    """Reads what several stages share once."""
    construct(import_object(class_path), json.loads(arguments), "data").read()


def main(stages: dict[str, list[str]]) -> int:
    """Parses what each stage's command will, and reads its rows.

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
            with suppress(_Read):
                lightning_main(words, _ReadingCLI)
        except (OSError, ValueError) as error:
            print(f"error: stage {name!r}: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
