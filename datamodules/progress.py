"""How far long work on data is: a line now and then, wherever it is read."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

TELL_S = 20.0  # between two lines

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], what: str, tell: Callable[[str], object]
) -> Iterator[Item]:
    """The items; `tell` gets a line every 20 s: how many are what (`documents read`) so far."""
    due = time.monotonic() + TELL_S
    for number, item in enumerate(items, start=1):
        if time.monotonic() >= due:
            tell(f"{number:,} {what} so far")
            due = time.monotonic() + TELL_S
        yield item
