"""Reads instruction data in its common formats, and makes each entry an item."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from datamodules.files import at, decode
from datamodules.prompts import Message, alpaca_messages, check_messages
from datamodules.tables import ROWS, parse_json, read_rows, text_in

_SHAREGPT = {"human": "user", "gpt": "assistant"}  # roles of ShareGPT -> ours
# fields of other formats that are not read, but would change what is learned
_UNREAD = (
    *("system", "system_prompt", "system_message", "history", "context", "documents"),
    *("tools", "functions", "conversations"),
)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields of a message


class Item(TypedDict):
    """One entry of the data; `messages` is the prompt, `reference` the response to it."""

    id: int  # position in the data, from 0
    instruction: str
    input: str
    reference: str
    messages: list[Message]
    n_given: int  # leading answers that carry no loss, as they are in TRL's prompt


def read_entries(path: Path) -> list[tuple[str, Any]]:
    """The entries of a file, each with its place for error messages.

    Raises:
        ValueError: naming the file, if it has no entries, or is not what its suffix says.
    """
    if path.suffix.lower() in ROWS:
        entries: list[tuple[str, Any]] = list(read_rows(path))
    else:
        entries = [(f"{path}: entry {i}", entry) for i, entry in enumerate(_json_list(path))]
    if not entries:
        raise ValueError(f"{path} holds no entries; fill it, or leave it out.")
    return entries


def _json_list(path: Path) -> list[Any]:
    text = decode(path.read_bytes(), path)
    remedy = "correct the JSON, or name the file .jsonl where it has an object a line."
    entries = parse_json(text, path, remedy) if text.strip() else []
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} holds a JSON {type(entries).__name__}, not a list; put the entries into [...]."
        )
    return entries


def make_item(index: int, entry: Any) -> Item:
    """Makes an item of an entry in one of the formats that `InstructionDataModule` takes.

    Raises:
        ValueError: it has no prompt or response, or a field that would be ignored.
    """
    entry, n_given = _as_here(_object(entry))
    is_chat = entry.get("messages") is not None
    _refuse_unread(entry, ("instruction", "input", "output", *_UNREAD) if is_chat else _UNREAD)
    if is_chat:
        messages = _chat(entry["messages"])
        instruction, given = _transcript(messages[:-1]), ""
    else:
        instruction, output = (_text(entry, field) for field in ("instruction", "output"))
        given = "" if entry.get("input") is None else _text(entry, "input")
        reply = Message(role="assistant", content=output)
        messages = [*alpaca_messages(instruction, given), reply]
    for message in messages:
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(
                f"it has an empty {message['role']} text, there is nothing to learn from it; "
                "complete the entry, or drop it."
            )
    *prompt, reply = messages
    return Item(
        id=index,
        instruction=instruction,
        input=given,
        reference=reply["content"],
        messages=prompt,
        n_given=n_given,
    )


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object; correct it.")
    return value


def _as_here(entry: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Converts TRL's and ShareGPT's formats to ours; also counts the answers in TRL's prompt."""
    given = {key for key, value in entry.items() if value is not None}
    if {"instruction", "messages"} & given:
        return entry, 0
    others = dict(entry)
    if {"prompt", "completion"} <= given:
        prompt, completion = others.pop("prompt"), others.pop("completion")
        _refuse_unread(others, ("output",))
        if isinstance(prompt, list) and isinstance(completion, list):
            said = [turn for turn in prompt if isinstance(turn, dict)]
            n_given = sum(turn.get("role") == "assistant" for turn in said)
            return {**others, "messages": prompt + completion}, n_given
        return {**others, "instruction": prompt, "output": completion}, 0
    if not isinstance(entry.get("conversations"), list):
        return entry, 0
    messages = []
    for i, turn in enumerate(others.pop("conversations")):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"conversations[{i}] has no 'from' and 'value'; correct it.")
        role = _SHAREGPT.get(str(turn["from"]), turn["from"])
        messages.append({**turn, "role": role, "content": turn["value"]})
    return {**others, "messages": messages}, 0


def _transcript(prompt: list[Message]) -> str:
    """The question that an answer is judged by: the prompt's messages, with roles if several."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _refuse_unread(entry: Mapping[str, Any], fields: Iterable[str]) -> None:
    """ValueError for fields that are not read but would change what is learned, unless empty."""
    for field in fields:
        if entry.get(field):
            raise ValueError(
                f"it has {field!r}, which is not read beside the others; write the whole "
                "conversation as 'messages' of roles and contents, or take it out."
            )


def _chat(messages: Any) -> list[Message]:
    """The messages, checked: the last one must be an assistant's answer to a user."""
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is a {type(messages).__name__}, not a list.")
    chat = []
    for i, value in enumerate(messages):
        with at(f"message {i}"):
            chat.append(_message(_object(value)))
    check_messages(chat)
    if [message["role"] for message in chat[-2:]] != ["user", "assistant"]:
        raise ValueError(
            "its messages do not end with a user's and the assistant's answer to it; "
            "complete the entry, or drop it."
        )
    return chat


def _message(value: dict[str, Any]) -> Message:
    _refuse_unread(value, ("tool_calls", "function_call", *_THOUGHTS))
    is_reply = value.get("role") == "assistant"  # other turns carry no loss anyway
    for field, usual in (("weight", 1), ("train", True), ("trainable", True), ("loss", True)):
        if is_reply and value.get(field) not in (None, usual):
            raise ValueError(
                f"it has {field} {value[field]}, but every answer is learned; take the entry out, "
                f"or the {field}."
            )
    return Message(role=_text(value, "role"), content=_text(value, "content"))


def _text(entry: dict[str, Any], field: str) -> str:
    return text_in(entry, field, "complete, correct or drop the entry.")
