"""What a command says beside its result, on stderr."""

import sys

# of control characters: what strangers wrote moves no cursor here
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}


def say(text: str) -> None:
    """Tells whoever looks on."""
    print(text.translate(CONTROL_PICTURES), file=sys.stderr)


def warn(text: object) -> None:
    """Tells of what may not be meant, or is missing; the command goes on."""
    say(f"warning: {text}")
