"""Progress of long work on data: a line now and then, whenever an item is read."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

TELL_S = 20.0  # between two lines

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], what: str, tell: Callable[[str], object]
) -> Iterator[Item]:
    """Yields the items; every 20 s `tell` gets a line such as `1,000 documents read so far`."""
    due = time.monotonic() + TELL_S
    for number, item in enumerate(items, start=1):
        if time.monotonic() >= due:
            tell(f"{number:,} {what} so far")
            due = time.monotonic() + TELL_S
        yield item
