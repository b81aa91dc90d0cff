"""Conversations in a published chat template: untrusted Jinja source, run in a sandbox.

The template's own text is kept apart from the contents of messages, so that a special token typed
by a user stays ordinary text; in a single rendered string the two could not be told apart.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from datamodules.tokenizer import Tokenizer

_MAX_ROUNDS = 100_000  # budget of a rendering for loops, calls, repetitions and bits of products
# a template that writes one of these is refused
_UNKNOWN = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CHARACTERS_A_ROUND = 100  # or items, of what is concatenated
# per rendering, as several run at once
_rounds_left: ContextVar[int] = ContextVar("rounds_left", default=0)
_today: ContextVar[datetime.datetime | None] = ContextVar("today", default=None)


class Message(TypedDict):
    """One turn of a conversation, as OpenAI's chat API writes it."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class TemplateParts:
    """A rendered conversation of n messages, taken apart.

    Attributes:
        contents: the n contents as the template writes them (some strip white space or line ends).
        between: the n + 1 texts before, between and after them.
        opened: what replaces the last of these when the assistant's reply is opened.
    """

    contents: list[str]
    between: Sequence[str]
    opened: str


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, opening: bool) -> str:
    """The conversation as one text, as transformers' `apply_chat_template` gives it.

    With `opening` the assistant's next turn is opened. Templates that support thinking (Qwen3's)
    have it disabled: models are trained on, and asked for, answers alone.

    Raises:
        ValueError: the template refuses these messages, or is not a valid template.
    """
    vocabulary = tokenizer.vocabulary
    try:
        template = _compiled(vocabulary.chat_template or "")
        _rounds_left.set(_MAX_ROUNDS)
        return template.render(
            messages=list(messages),
            add_generation_prompt=opening,
            bos_token=vocabulary.bos_token or "",
            eos_token=vocabulary.eos,
            **{name: StrictUndefined(name=name) for name in _UNKNOWN},
            enable_thinking=False,
            tools=None,
            documents=None,
        )
    except Exception as error:  # untrusted code may raise anything
        raise ValueError(
            f"the chat template of {tokenizer.name} refuses the conversation: {error}"
        ) from error


def split_by_template(
    tokenizer: Tokenizer, messages: Sequence[Message], *, forgets_thoughts: bool = False
) -> TemplateParts:
    """Renders a conversation and takes it apart.

    Args:
        tokenizer: the one whose template is used.
        messages: the conversation.
        forgets_thoughts: whether the template may drop what a content has before `</think>`.

    Raises:
        ValueError: the template refuses these messages, or changes a content other than by
            stripping white space.
    """
    day = _today.get() or datetime.datetime.now()
    with on(day):
        between, opened = _outline(tokenizer, tuple(m["role"] for m in messages), day)
        whole = render(tokenizer, messages, opening=False)
    forms = [list(_forms(message["content"], forgets_thoughts)) for message in messages]
    contents = _contents(forms, between, whole)
    if contents is not None and opened is not None:
        return TemplateParts(contents, between, opened)
    problem = "what the messages say" if contents is None else "what stands before a reply"
    raise ValueError(
        f"the chat template of {tokenizer.name} rewrites {problem}, which cannot be learned from "
        "token by token; give another data.prompt_style."
    )


@functools.lru_cache(maxsize=64)
def _outline(
    tokenizer: Tokenizer, roles: tuple[str, ...], day: datetime.datetime
) -> tuple[tuple[str, ...], str | None]:
    """What a template writes around any contents, and what it writes last to open a reply.

    The latter is None if it also changes the text before. `day`: templates may write the date.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    marked = [Message(role=role, content=mark) for role, mark in zip(roles, marks, strict=True)]
    texts = (render(tokenizer, marked, opening=opening) for opening in (False, True))
    between, opened = (tuple(re.split("|".join(marks), text)) for text in texts)
    return between, opened[-1] if opened[:-1] == between[:-1] else None


def _forms(content: str, forgets_thoughts: bool) -> Iterator[str]:
    """The forms in which a template may write a content."""
    for text in (content, content.rpartition("</think>")[2])[: 1 + forgets_thoughts]:
        yield text
        for blanks in (None, "\n"):  # Qwen3's keeps an answer's indentation
            yield from (text.strip(blanks), text.lstrip(blanks), text.rstrip(blanks))


def _contents(
    forms: Sequence[Sequence[str]], between: Sequence[str], whole: str
) -> list[str] | None:
    """Contents as they stand in a rendered text, each in one of its forms; None if one does not."""
    if len(between) != len(forms) + 1 or not whole.startswith(between[0]):
        return None
    contents, place = [], len(between[0])
    for own, after in zip(forms, between[1:], strict=True):
        written = next((form for form in own if whole.startswith(form + after, place)), None)
        if written is None:
            return None
        contents.append(written)
        place += len(written) + len(after)
    return contents if place == len(whole) else None


@functools.cache
def _compiled(source: str) -> Template:
    return _Sandbox().from_string(source)


class _Generation(Extension):
    """`{% generation %}` adds nothing to its body: it marks the assistant's for transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """What transformers offers to templates, with a budget for loops, calls and growth.

    Not all is counted: a width (`center`, `%99d`), `replace`, `join`, `format`, nested lists or a
    recursive loop can still take much memory or time; only a process with limits would bound that.
    """

    intercepted_binops = frozenset(("+", "*", "**"))  # nor are these folded while compiling

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self.filters |= {"tojson": _to_json, "counted": self._counted, "grown": self._grown}

    def _parse(self, *args: Any) -> nodes.Template:
        tree = super()._parse(*args)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "counted")
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [_filtered(node, "grown") for node in concat.nodes]
        return tree

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _grown(self, part: Any) -> Any:
        self._spend(len(part) // _CHARACTERS_A_ROUND if isinstance(part, Sized) else 0)
        return part

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, which costs one round."""
        self._spend(1)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes a sum, product or power, which costs as much as it has items or bits."""
        match operator, left, right:
            case "+", Sized(), Sized():
                self._grown(left), self._grown(right)
            case "**", int(), int():
                self._spend(left.bit_length() * right)
            case "*", int(), int():
                self._spend(left.bit_length() + right.bit_length())
            case ("*", int(n), Sized() as items) | ("*", Sized() as items, int(n)):
                self._spend(len(items) * n)
        return super().call_binop(context, operator, left, right)

    def _spend(self, rounds: int) -> None:
        left = _rounds_left.get() - max(0, rounds)
        _rounds_left.set(left)
        if left < 0:
            raise TemplateError(
                f"it calls, loops or multiplies more than {_MAX_ROUNDS} times; where the messages "
                "are long, shorten them."
            )


def _filtered(node: nodes.Node, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


@contextmanager
def on(day: datetime.datetime) -> Iterator[None]:
    """Makes templates take `day` for today within the block."""
    token = _today.set(day)
    try:
        yield
    finally:
        _today.reset(token)


def _now(form: str) -> str:
    return (_today.get() or datetime.datetime.now()).strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as in transformers; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
