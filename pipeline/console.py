"""Messages of a command beside its result, on stderr."""

import sys

# of control characters: what strangers wrote moves no cursor here
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}


def say(text: str) -> None:
    """Prints a message."""
    print(text.translate(CONTROL_PICTURES), file=sys.stderr)


def warn(text: object) -> None:
    """Prints a warning: something may not be meant, or is missing; the command goes on."""
    say(f"warning: {text}")
