"""How far long work on data is: a line now and then, wherever it is read."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

TELL_S = 20.0  # between two lines

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], what: str, tell: Callable[[str], object]
) -> Iterator[Item]:
    """The items; every 20 s it is told how many of them have been taken.

    Args:
        items: consumed once, streamed.
        what: they are, and what is done with them: `documents read`.
        tell: gets the line.
    """
    due = time.monotonic() + TELL_S
    for number, item in enumerate(items, start=1):
        if time.monotonic() >= due:
            tell(f"{number:,} {what} so far")
            due = time.monotonic() + TELL_S
        yield item
