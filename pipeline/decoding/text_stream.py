"""Text from tokens as they come, without half characters and without any of a stop text."""

import codecs
from collections.abc import Iterable, Sequence

from datamodules.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens after a prompt into text that never has to be taken back.

    A character whose bytes span tokens waits until it is whole; what may be the start of a stop
    text waits until it turns out not to be.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._before, self._stops = tokenizer, prompt, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False  # by a stop text, which is left out

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        read = self._decoder.decode(self._tokenizer.piece(token, self._before))
        self._before = [token]
        return self._release(read, is_last=False)

    def close(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._release(self._decoder.decode(b"", final=True), is_last=True)

    def _release(self, read: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + read
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        self.stopped = bool(found)
        if found:
            certain = min(found)[1]  # up to the stop that is complete first, wherever tokens end
        elif is_last:
            certain = len(text)
        else:
            certain = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


def text_of(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> str:
    """Text of ids that a model wrote after a prompt."""
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, ids), stream.close()])


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of a text that are the start of a stop text."""
    longest = min(len(stop) - 1, len(text))  # a stop may be much longer than what is held
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
