"""Checks a chain's later stages before any of them runs: parses their options, reads their rows.

`run` starts it in a process of its own, since it needs Lightning, which is large and slow to load.
"""

import json
import os
import sys
from contextlib import suppress
from typing import Any, ClassVar, NoReturn

from datamodules.entries import make_item, read_entries
from datamodules.sources import resolve
from datamodules.tables import refused_together
from pipeline import safe
from pipeline.arguments import check_configs, guard_yaml, one_line
from pipeline.cli import PipelineCLI
from pipeline.cli import main as lightning_main
from pipeline.console import say
from pipeline.interrupts import end_with_parent
from pipeline.stages.chain_config import TO_COME
from pipeline.training.options import check_trainer
from pipeline.weights.fetch import locate

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130


class _Read(Exception):
    """Raised when a command's options and rows are in order, to leave it before it begins."""


class _ReadingCLI(PipelineCLI):
    known: ClassVar[set[str]] = set()  # so that data that stages share is read once

    def _set_seed(self) -> None:
        """Does nothing: nothing is random here, and Lightning would announce the seed."""

    def before_instantiate_classes(self) -> None:
        """Skips what earlier stages may make (tokenizer, weights); checks the trainer's options."""
        self.take_from_checkpoint()
        check_trainer(self.stage.trainer, str(self.subcommand))
        self.stage.trainer.logger = None

    def instantiate_trainer(self, **_: Any) -> NoReturn:
        """Reads the rows instead; data module and model are built by now."""
        self.check_parts(self.model, self.datamodule)
        if repr(self.stage.data) not in self.known:
            self.datamodule.read()
            self.known.add(repr(self.stage.data))
        raise _Read


def main(stages: dict[str, dict[str, list[str]]]) -> int:
    """Checks each stage, by name.

    Parses the `words` of one of Lightning's commands and reads its rows; looks for its `models`,
    which are fetched if need be, and reads the `entries` that it will answer.

    Returns:
        The exit code: 2 for a mistake, told in one line on stderr, 130 for an interrupt.
    """
    end_with_parent()
    guard_yaml()
    if safe.VARIABLE in os.environ:
        safe.refuse_strangers()
    for name, given in stages.items():
        try:
            for model in given["models"]:
                locate(model)
            for source in given["entries"]:
                _read_entries(source)
            if words := given["words"]:
                check_configs(words)
                with suppress(_Read):
                    lightning_main(words, _ReadingCLI)
        except (OSError, ValueError) as error:
            if TO_COME in str(error):  # a class looks for it when it is built
                continue
            say(f"error: stage {name!r}: {one_line(str(error))}")
            return EXIT_MISTAKE
        except KeyboardInterrupt:
            say("interrupted")
            return EXIT_INTERRUPTED
    return 0


def _read_entries(source: str) -> None:
    with refused_together() as row:
        for place, entry in (found for path in resolve(source) for found in read_entries(path)):
            with row(place):
                make_item(0, entry)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
