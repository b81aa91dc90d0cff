"""The supported part of OpenAI's protocol: requests, and the format of responses.

What is not supported is refused by name; nothing that a client asks for is silently ignored.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.serving.logprob_formats import TokenText, chat_form, text_form

MAX_STOPS, MAX_CHOICES, MAX_INPUTS, MAX_LIKELIEST = 4, 16, 256, 20
# keys that clients send by habit, with the values that, like null, ask for nothing
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "continuous_usage_stats": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_obfuscation": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "seed": (-1,),
    "service_tier": ("auto", "default"),
    "stop": ("", []),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
}
T = TypeVar("T")
OneOrMore = Annotated[list[T], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(min_length=1)]


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys; null is the same as absent."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, asked: Any) -> Any:
        """Drops keys with values that ask for nothing."""
        if not isinstance(asked, dict):
            return asked
        return {
            key: value
            for key, value in asked.items()
            if value is not None and value not in ASKS_NOTHING.get(key, ())
        }


def _prompts(value: Any) -> Any:
    """A list of prompts, even if there is only one."""
    are_ids = isinstance(value, list) and bool(value) and isinstance(value[0], int)
    return [value] if are_ids or isinstance(value, str) else value


class StreamOptions(Strict):
    """What else a stream contains."""

    include_usage: bool = False


class WritingRequest(Strict):
    """The keys that chat and text completions share."""

    model: str | None = None  # there is only one
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**62)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: OneOrMore[Annotated[str, Field(min_length=1)]] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    metadata: dict[str, str] | None = None


class TextPart(Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


Parts = Annotated[
    list[TextPart],
    BeforeValidator(lambda v: [{"type": "text", "text": v}] if isinstance(v, str) else v),
]


class ChatMessage(Strict):
    """A turn of a conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        AfterValidator(lambda v: "system" if v == "developer" else v),  # OpenAI's newer name
    ]
    content: Parts

    @property
    def text(self) -> str:
        """The content as one text, its parts joined by line breaks, as in vLLM and llama.cpp."""
        return "\n".join(part.text for part in self.content)


class ChatRequest(WritingRequest):
    """POST /v1/chat/completions."""

    echo: ClassVar[bool] = False  # a conversation is never repeated
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LIKELIEST)

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int, others: ValidationInfo) -> int:
        if value and not others.data.get("logprobs"):
            raise ValueError("it needs logprobs to be true")
        return value

    @property
    def n_likeliest(self) -> int | None:
        """How many likeliest tokens to report with each token; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(WritingRequest):
    """POST /v1/completions; a prompt is a text or its token ids."""

    prompt: Annotated[list[str | Ids], BeforeValidator(_prompts)] = Field(
        min_length=1, max_length=MAX_INPUTS
    )
    logprobs: Annotated[int | None, BeforeValidator(lambda v: None if v is False else v)] = Field(
        None, ge=0, le=MAX_LIKELIEST, strict=True
    )
    echo: bool = False

    @property
    def n_likeliest(self) -> int | None:
        """How many likeliest tokens to report with each token; None for no log-probabilities."""
        return self.logprobs


Asked = ChatRequest | CompletionRequest


class ClassifyRequest(Strict):
    """POST /classify, in vLLM's form."""

    model: str | None = None
    input: OneOrMore[str] = Field(min_length=1, max_length=MAX_INPUTS)


class Delta(NamedTuple):
    """A piece of one of the requested texts, or all of it."""

    number: int
    text: str
    ended: str | None  # why it ended; None while it goes on
    n_tokens: int  # that were generated for it
    n_cached: int  # prompt tokens that were computed for another text; counted once per prompt
    # if log-probabilities are requested: all generated tokens, including a stop token or those of
    # a stop text; with `echo`, the prompt's come before them
    tokens: list[TokenText]


class Answer:
    """The format of an answer, whole or as events of a stream: a message to a chat, else a text."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self.is_chat, self.began = is_chat, time.monotonic()
        self.n_prompt = self.n_completion = self.n_cached = 0  # tokens
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()  # choices whose role has been sent

    def count(self, delta: Delta) -> None:
        """Adds a delta's tokens to `usage`."""
        self.n_completion += delta.n_tokens
        self.n_cached += delta.n_cached

    def whole(self, choices: Iterable[Delta]) -> dict[str, Any]:
        """The complete answer."""
        return self._form("chat.completion", "message", choices) | {"usage": self.usage()}

    def event(self, *choices: Delta) -> dict[str, Any]:
        """An event of the stream, with deltas of some choices."""
        return self._form("chat.completion.chunk", "delta", choices)

    def usage(self) -> dict[str, Any]:
        """Counts of prompt and completion tokens."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_completion,
            "total_tokens": self.n_prompt + self.n_completion,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }

    def _form(self, kind: str, key: str, choices: Iterable[Delta]) -> dict[str, Any]:
        kind = kind if self.is_chat else "text_completion"
        said = [self._choice(key, choice) for choice in choices]
        return {**self._head, "object": kind, "choices": said}

    def _choice(self, key: str, choice: Delta) -> dict[str, Any]:
        form = chat_form if self.is_chat else text_form
        said: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            role = {} if choice.number in self._begun else {"role": "assistant"}
            said = {key: {**role, "content": choice.text}}
            self._begun.add(choice.number)
        logprobs = form(choice.tokens) if choice.tokens else None
        place = {"index": choice.number, "finish_reason": choice.ended}
        return {**place, **said, "logprobs": logprobs}


def label_form(
    model: str, names: Sequence[str], labelled: Sequence[tuple[Sequence[float], bool]]
) -> dict[str, Any]:
    """The answer to `ClassifyRequest`: probabilities (K,) of texts, with the likeliest label.

    `truncated` says whether a text was too long for the classifier to see all of it.
    """
    data = [
        {
            "index": i,
            "label": names[row.index(max(row))],
            "probs": row,
            "num_classes": len(row),
            "truncated": is_cut,
        }
        for i, (row, is_cut) in enumerate(labelled)
    ]
    head = {"id": f"classify-{uuid.uuid4().hex}", "created": int(time.time())}
    return {**head, "object": "list", "model": model, "data": data}
