"""The one place where conversations become token ids, for training, scoring, chat and notebooks.

A conversation is a sequence of segments. Text between two special tokens is encoded as one piece,
as in tools that render a chat template first; only the assistant's text is encoded on its own, so
that no BPE merge crosses that border: the ids to generate from are an exact prefix of the ids that
were trained on. Only markers written here become special ids; whatever a user types is ordinary
text.

The alpaca wording is that of Taori et al. 2023 as shortened by Raschka, "Build a Large Language
Model (From Scratch)", chapter 7; phi3 follows the model card of Phi-3, chatml OpenAI's ChatML. The
style `template` is the chat template (Jinja source) that was published with the tokenizer.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal, NamedTuple

from datamodules.chat_template import Message, TemplateParts, split_by_template
from datamodules.tokenizer import Tokenizer

IGNORE = -100  # Hugging Face's label for "no loss here"
Supervise = Literal["response", "all"]


class Segment(NamedTuple):
    """A piece of a conversation."""

    text: str
    marker: bool = False  # becomes one special id if the tokenizer declares the text as one
    supervised: bool = False  # carries loss


@dataclass(frozen=True)
class PromptStyle:
    """How turns are written.

    Attributes:
        opening: role -> (marker, text) before the content of a turn; the marker may be empty.
        end: the marker after a turn; None is the tokenizer's end of text.
        ends: the roles whose turns end with it.
        between: text between two turns.
        preamble: text in place of a missing system message.
    """

    opening: dict[str, tuple[str, str]]
    end: str | None
    ends: tuple[str, ...]
    between: str = ""
    preamble: str = ""


ROLES = ("system", "user", "assistant")
STYLES = {
    "alpaca": PromptStyle(
        opening={
            "system": ("", ""),
            "user": ("", "\n\n### Instruction:\n"),
            "assistant": ("", "\n\n### Response:\n"),
        },
        end=None,
        ends=("assistant",),
        preamble="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "phi3": PromptStyle(
        opening={role: (f"<|{role}|>", "\n") for role in ROLES},
        end="<|end|>",
        ends=ROLES,
        between="\n",
    ),
    "chatml": PromptStyle(
        opening={role: ("<|im_start|>", f"{role}\n") for role in ROLES},
        end="<|im_end|>",
        ends=ROLES,
        between="\n",
    ),
}


TEMPLATE = "template"  # the style that was published with the tokenizer


def check_style(name: str, tokenizer: Tokenizer | None = None) -> None:
    """ValueError for an unknown style, and for `template` if the tokenizer has no chat template."""
    if name not in (*STYLES, TEMPLATE):
        raise ValueError(
            f"data.prompt_style is {name!r}; choose one of {', '.join((*STYLES, TEMPLATE))}."
        )
    if name == TEMPLATE and tokenizer is not None and not tokenizer.vocabulary.chat_template:
        raise ValueError(
            f"data.prompt_style is template, but the tokenizer {tokenizer.name} has no chat "
            f"template; choose one of {', '.join(STYLES)}."
        )


def alpaca_messages(instruction: str, input: str = "") -> list[Message]:
    """Alpaca fields as a user's message; the input gets a heading of its own in every style."""
    content = f"{instruction}\n\n### Input:\n{input}" if input else instruction
    return [Message(role="user", content=content)]


def check_messages(messages: Sequence[Message]) -> None:
    """ValueError unless there are messages, all of known roles, with any system message first."""
    if not messages:
        raise ValueError("a conversation is empty; give it at least one user message.")
    for position, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {position} has role {message['role']!r}; use one of {', '.join(ROLES)}."
            )
        if message["role"] == "system" and position:
            raise ValueError(f"message {position} is a system message; only the first one may be.")


def encode_prompt(tokenizer: Tokenizer, style: str, messages: Sequence[Message]) -> list[int]:
    """Ids for the model to continue: the conversation, and the opening of the assistant's turn.

    Raises:
        ValueError: the last message isn't the user's, or `check_messages` refuses the conversation.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise ValueError(f"a prompt ends with a message of role {role!r}; end it with a user's.")
    return _encode(tokenizer, _segments(tokenizer, style, messages, is_prompt=True))[0]


def encode_text(
    tokenizer: Tokenizer, text: str, suffix: str, max_length: int
) -> tuple[list[int], bool]:
    """Ids of a text to classify, always ending in the suffix, and whether the text was cut.

    Raises:
        ValueError: for a text that has no ids, or a suffix that leaves it no room.
    """
    ids = tokenizer.bos_ids + tokenizer.encode(text)
    end = tokenizer.encode(suffix, ids)
    room = max_length - len(end)
    if room < 1:
        raise ValueError(
            f"data.suffix has {len(end)} tokens, data.max_length is {max_length}; raise it."
        )
    if len(ids) == len(tokenizer.bos_ids):
        raise ValueError(f"{text!r} has no token in the vocabulary; drop it.")
    return ids[:room] + end, len(ids) > room


def reply_opening(tokenizer: Tokenizer, style: str) -> list[int]:
    """Ids between the user's turn and the assistant's first word."""
    return _encode(tokenizer, _reply_opening(tokenizer, style))[0]


def encode_conversation(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], *, supervise: Supervise
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and its labels, unshifted, both of length T.

    With "response" every assistant turn is supervised, its content and the id that ends it; with
    "all" every id is. The content of an assistant turn follows exactly the ids of `encode_prompt`
    for the messages before it; with a template (see `check_replies`) only the last one does, as
    Qwen3's writes an empty thought before that alone.

    Raises:
        ValueError: `check_messages` refuses the conversation.
    """
    check_messages(messages)
    ids, labels = _encode(tokenizer, _segments(tokenizer, style, messages))
    return ids, labels if supervise == "response" else list(ids)


def surplus(n_prompt: int, room: int, n_opening: int) -> slice:
    """The middle of a prompt of `n_prompt` ids, to be deleted so that `room` of them remain.

    Half of what remains is the start, which says what is asked; at least the last `n_opening` ids
    (see `reply_opening`) stay at the end.
    """
    n_end = max(n_opening, room - room // 2)
    return slice(room - n_end, n_prompt - n_end)


def encode_start(tokenizer: Tokenizer, style: str | None, text: str) -> list[int]:
    """Ids for a model to continue: a user's message in a style, or, without one, a plain text."""
    if style is None:
        return tokenizer.bos_ids + tokenizer.encode(text)
    return encode_prompt(tokenizer, style, [Message(role="user", content=text)])


def stop_ids(tokenizer: Tokenizer, style: str | None) -> list[int]:
    """Ids that end a response: the style's own end, if declared, and all that end a text.

    Only the latter without a style, or with a template that fails on an example (and so would
    refuse every prompt).
    """
    ends = {tokenizer.vocabulary.eos, *tokenizer.vocabulary.more_ends}
    if style is not None:
        check_style(style, tokenizer)
        if style == TEMPLATE:
            with contextlib.suppress(ValueError):
                ends |= _ends_by_template(tokenizer)
        else:
            ends.add(reply_end(tokenizer, STYLES[style]))
    return sorted(tokenizer.special_ids[name] for name in ends)


def reply_end(tokenizer: Tokenizer, style: PromptStyle) -> str:
    """The one special token that ends a response: `end`, or EOS where that isn't declared."""
    is_declared = style.end in tokenizer.special_ids
    return style.end if style.end and is_declared else tokenizer.vocabulary.eos


def _segments(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], *, is_prompt: bool = False
) -> Iterator[Segment]:
    """Segments of a whole conversation.

    A prompt also opens a reply, and in it a template may drop the thoughts of earlier replies.
    """
    check_style(style, tokenizer)
    if style == TEMPLATE:
        return _by_template(tokenizer, messages, is_prompt)
    said = _in_style(tokenizer, STYLES[style], messages)
    return chain(said, _reply_opening(tokenizer, style)) if is_prompt else said


def _in_style(
    tokenizer: Tokenizer, style: PromptStyle, messages: Sequence[Message]
) -> Iterator[Segment]:
    if tokenizer.vocabulary.bos:
        yield Segment(tokenizer.vocabulary.bos, marker=True)
    if style.preamble and messages[0]["role"] != "system":
        yield Segment(style.preamble)
    for position, message in enumerate(messages):
        role, content = message["role"], message["content"]
        is_reply = role == "assistant"
        yield from _opening(style, role, first=position == 0)
        yield Segment(content, supervised=is_reply)
        if role in style.ends:
            end = reply_end(tokenizer, style) if is_reply else style.end or ""
            yield Segment(end, marker=True, supervised=is_reply)


def _by_template(
    tokenizer: Tokenizer, messages: Sequence[Message], is_prompt: bool
) -> Iterator[Segment]:
    """Segments of a template: contents as ordinary text, all around them with its markers."""
    parts = split_by_template(tokenizer, messages, forgets_thoughts=is_prompt)
    lead = _reply_lead(tokenizer)
    was_reply = False
    for message, content, before in zip(messages, parts.contents, parts.between, strict=False):
        is_reply = message["role"] == "assistant"
        own = lead if is_reply and before.endswith(lead) else ""
        yield from _marked(tokenizer, before.removesuffix(own), supervised=was_reply)
        yield Segment(own + content, supervised=is_reply)
        was_reply = is_reply
    last = parts.opened if is_prompt else parts.between[-1]
    yield from _marked(tokenizer, last, supervised=was_reply)


@functools.lru_cache(maxsize=8)
def _reply_lead(tokenizer: Tokenizer) -> str:
    """White space before a reply that the prompt lacks: Llama 2 writes `[/INST]`, then ` 7 `."""
    opened = _example(tokenizer, "?").opened
    answered = _example(tokenizer, "?", "!").between[1]
    lead = answered.removeprefix(opened)
    return lead if answered.startswith(opened) and lead.isspace() else ""


@functools.lru_cache(maxsize=256)
def _marked(tokenizer: Tokenizer, text: str, *, supervised: bool = False) -> tuple[Segment, ...]:
    """A template's text, split at markers; after a reply, it is supervised up to the first one."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
    supervised = supervised and len(pieces) > 1
    segments = []
    for piece in pieces:
        is_marker = piece in tokenizer.special_ids
        segments.append(Segment(piece, marker=is_marker, supervised=supervised))
        supervised = supervised and not is_marker
    return tuple(segments)


def _ends_by_template(tokenizer: Tokenizer) -> set[str]:
    """The special token that a template ends a reply with, if any."""
    after = _marked(tokenizer, _example(tokenizer, "?", "!").between[2], supervised=True)
    return {segment.text for segment in after if segment.marker and segment.supervised}


def check_replies(tokenizer: Tokenizer) -> None:
    """ValueError if a chat template opens replies differently than it writes them, or ends none.

    Those of models that always think first do so: prompts would differ from what was trained on.
    """
    asked, said = _example(tokenizer, "?"), _example(tokenizer, "?", "!")
    opened, answered = asked.opened, said.between[1]
    if not answered.startswith(opened) or answered.removeprefix(opened).strip():
        raise ValueError(
            f"the chat template of {tokenizer.name} opens a reply with {opened!r}, but writes one "
            f"after {answered!r}; what is learned would not follow what is asked. Give another "
            "data.prompt_style."
        )
    if not _ends_by_template(tokenizer):
        raise ValueError(
            f"the chat template of {tokenizer.name} ends a reply with no special token, so that "
            "none would be learned and answers never end; give another data.prompt_style."
        )


def _example(tokenizer: Tokenizer, *said: str) -> TemplateParts:
    """A conversation of alternating user and assistant turns, as the template writes it.

    If the template demands a system message, it gets one, which is left out of the result.
    """
    roles = itertools.cycle(("user", "assistant"))
    turns = [Message(role=role, content=text) for role, text in zip(roles, said, strict=False)]
    try:
        return split_by_template(tokenizer, turns)
    except ValueError:
        with_system = [Message(role="system", content="."), *turns]
        with contextlib.suppress(ValueError):
            parts = split_by_template(tokenizer, with_system)
            return TemplateParts(parts.contents[1:], parts.between[1:], parts.opened)
        raise


def _reply_opening(tokenizer: Tokenizer, style: str) -> Iterable[Segment]:
    check_style(style, tokenizer)
    if style == TEMPLATE:
        asked = _example(tokenizer, "?")
        return _marked(tokenizer, asked.opened.removeprefix(asked.between[1]))
    return _opening(STYLES[style], "assistant", first=False)


def _opening(style: PromptStyle, role: str, *, first: bool) -> Iterator[Segment]:
    marker, text = style.opening[role]
    yield Segment("" if first else style.between)
    yield Segment(marker, marker=True)
    yield Segment(text)


def _encode(tokenizer: Tokenizer, segments: Iterable[Segment]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []

    def kind(segment: Segment) -> tuple[int | None, bool]:
        special = tokenizer.special_ids.get(segment.text) if segment.marker else None
        return special, segment.supervised

    for (special, supervised), pieces in groupby(segments, kind):
        together = list(pieces)
        text = "".join(segment.text for segment in together)
        piece = tokenizer.encode(text, ids) if special is None else [special] * len(together)
        ids += piece
        labels += piece if supervised else [IGNORE] * len(piece)
    return ids, labels
