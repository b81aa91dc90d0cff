"""OpenAI's protocol, as far as it is kept: what may be asked, and the form of the answers.

What is not kept is refused by name; nothing that a client asks for is left out silently.
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

from pipeline.serving.telling import Told, chat_form, text_form

MAX_STOPS, MAX_CHOICES, MAX_INPUTS, MAX_LIKELIEST = 4, 16, 256, 20
# what clients send by habit, with the values that ask for nothing, as null does
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
    """What has no keys but those that are kept; null is as good as not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, asked: Any) -> Any:
        """Without what asks for nothing."""
        if not isinstance(asked, dict):
            return asked
        return {
            key: value
            for key, value in asked.items()
            if value is not None and value not in ASKS_NOTHING.get(key, ())
        }


def _prompts(value: Any) -> Any:
    """A list of prompts, of one too."""
    are_ids = isinstance(value, list) and bool(value) and isinstance(value[0], int)
    return [value] if are_ids or isinstance(value, str) else value


class StreamOptions(Strict):
    """What else is sent while a text is made."""

    include_usage: bool = False


class WritingRequest(Strict):
    """What both forms of completion have."""

    model: str | None = None  # there is but one
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
    """A piece of a message; there is no other kind than text."""

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
        """What it says; parts are lines, as vLLM and llama.cpp have them."""
        return "\n".join(part.text for part in self.content)


class ChatRequest(WritingRequest):
    """POST /v1/chat/completions."""

    echo: ClassVar[bool] = False  # a chat is never said again
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
        """Tokens to be told beside each one; None where nothing is told."""
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
        """Tokens to be told beside each one; None where nothing is told."""
        return self.logprobs


Asked = ChatRequest | CompletionRequest


class ClassifyRequest(Strict):
    """POST /classify, in vLLM's form."""

    model: str | None = None
    input: OneOrMore[str] = Field(min_length=1, max_length=MAX_INPUTS)


class Delta(NamedTuple):
    """What came of one of the texts asked for, or all of it."""

    number: int
    text: str
    ended: str | None  # why there will be no more of it; None while it goes on
    n_tokens: int  # that were written for it
    n_cached: int  # of its prompt, that were computed for another text; once for all choices
    # where they are to be told: those written, the one that ended the text and those of a stop
    # text too; with `echo` the prompt's before them
    tokens: list[Told]


class Answer:
    """An answer's form, whole or in events while it is made: to a chat a message, else a text."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self.is_chat, self.began = is_chat, time.monotonic()
        self.n_prompt = self.n_completion = self.n_cached = 0  # tokens
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()  # choices of which an event has said whose they are

    def count(self, delta: Delta) -> None:
        """Adds to what `usage` says."""
        self.n_completion += delta.n_tokens
        self.n_cached += delta.n_cached

    def whole(self, choices: Iterable[Delta]) -> dict[str, Any]:
        """The answer, when all of it is there."""
        return self._form("chat.completion", "message", choices) | {"usage": self.usage()}

    def event(self, *choices: Delta) -> dict[str, Any]:
        """What came of some choices."""
        return self._form("chat.completion.chunk", "delta", choices)

    def usage(self) -> dict[str, Any]:
        """Tokens read and written."""
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

    Beside them, whether the end of a text was too far for the classifier to look at.
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
