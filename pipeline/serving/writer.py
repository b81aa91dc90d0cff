"""Turns HTTP requests into prompts for the engine, and streams the texts that it generates."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from datamodules.prompts import Message, encode_prompt, encode_start
from datamodules.tokenizer import Tokenizer
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.text_stream import TextStream
from pipeline.inference import prompt_style, settings_for
from pipeline.models import Loaded
from pipeline.serving.engine import Engine, EngineError, Piece, Request
from pipeline.serving.logprob_formats import TokenTexts
from pipeline.serving.protocol import Asked, ChatRequest, CompletionRequest, Delta


@dataclass(frozen=True)
class Writer:
    """A language model; requests without a length or temperature take those of `defaults`."""

    loaded: Loaded
    engine: Engine
    defaults: Sampling

    def prompts(self, asked: Asked) -> list[list[int]]:
        """Token ids of the prompts.

        ValueError if the model cannot take such a conversation, or ids are not in its vocabulary.
        """
        tokenizer = self.loaded.tokenizer
        if isinstance(asked, CompletionRequest):
            return [self._ids(prompt) for prompt in asked.prompt]
        if "prompt_style" not in self.loaded.meta:
            raise ValueError("this model was not tuned to converse; ask /v1/completions.")
        said = [Message(role=m.role, content=m.text) for m in asked.messages]
        return [encode_prompt(tokenizer, prompt_style(self.loaded), said)]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if isinstance(prompt, str):
            return encode_start(tokenizer, None, prompt)
        with contextlib.suppress(KeyError):
            tokenizer.decode_bytes(prompt)  # KeyError if an id has no token
            if max(prompt) < tokenizer.n_vocab:
                return prompt
        raise ValueError(f"the prompt has ids that are not among the {tokenizer.n_vocab} tokens.")

    def settings(self, asked: Asked) -> Sampling:
        """Sampling settings of a request; only length and temperature default to the server's."""
        newer = asked.max_completion_tokens if isinstance(asked, ChatRequest) else None
        temperature = self.defaults.temperature if asked.temperature is None else asked.temperature
        return settings_for(
            self.loaded,
            max_new_tokens=newer or asked.max_tokens or self.defaults.max_new_tokens,
            temperature=temperature,
            top_k=asked.top_k or 0,
            top_p=asked.top_p or 1.0,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
            n_likeliest=asked.n_likeliest,
            echo=asked.echo and asked.n_likeliest is not None,
        )

    async def write(
        self, prompts: Sequence[list[int]], settings: Sampling, asked: Asked
    ) -> AsyncGenerator[Delta, None]:
        """Yields deltas of `n` texts per prompt as they are generated; choice i uses seed + i.

        ValueError for a prompt that does not fit, or more texts than may wait at all; EngineError
        if the engine refuses a text or fails.
        """
        events: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, piece: Piece) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, (index, piece))

        each = [prompt for prompt in prompts for _ in range(asked.n)]
        limit = self.engine.limits.max_waiting
        if len(each) > limit:  # retrying would not help
            raise ValueError(
                f"{len(each)} texts are asked for (prompts times n), but at most {limit} may wait; "
                "ask for fewer at a time."
            )
        texts = [ChoiceText(self.loaded.tokenizer, prompt, asked) for prompt in each]
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(each):
                own = replace(settings, seed=settings.seed + i)
                requests.append(self.engine.submit(prompt, own, partial(deliver, i)))
            going = set(range(len(each)))
            while going:
                index, piece = await events.get()
                if index not in going:  # sent before a stop text ended it
                    continue
                delta = texts[index].read(index, piece)
                if index % asked.n:
                    delta = delta._replace(n_cached=0)
                if delta.ended:
                    going.remove(index)
                    self.engine.cancel(requests[index])
                yield delta
        finally:
            for request in requests:
                self.engine.cancel(request)


class ChoiceText:
    """Turns what the engine delivers for a text into deltas for the client."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], asked: Asked) -> None:
        self._stream = TextStream(tokenizer, prompt, asked.stop)
        self._tokens = TokenTexts(tokenizer, () if asked.echo else prompt)
        self._echo = ""
        if asked.echo:
            n_bos = len(tokenizer.bos_ids) if [*prompt[:1]] == tokenizer.bos_ids else 0
            self._echo = tokenizer.decode(prompt[n_bos:])

    def read(self, number: int, piece: Piece) -> Delta:
        """The delta of a piece; EngineError if the engine failed."""
        if isinstance(piece.ended, EngineError):
            raise piece.ended
        stream, text, self._echo = self._stream, self._echo, ""
        text += "" if piece.token is None else stream.push(piece.token)
        if piece.ended:
            text += stream.close()
        ended = "stop" if stream.stopped else piece.ended
        tokens = list(map(self._tokens.add, piece.logprobs))
        return Delta(number, text, ended, int(piece.token is not None), piece.n_cached, tokens)
