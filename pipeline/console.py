"""What a command says beside its result, on stderr."""

import sys


def say(text: str) -> None:
    """Tells whoever looks on."""
    print(text, file=sys.stderr)


def warn(text: object) -> None:
    """Tells of what may not be meant, or is missing; the command goes on."""
    say(f"warning: {text}")
