"""Parses options against typed functions with jsonargparse; its errors become one line."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    get_loader,
    set_dumper,
    set_loader,
)

from pipeline.safe import refusal

T = TypeVar("T")

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value type:"
    r"|Problem with given class_path|.*(Namespace|NestedArg)\("
)

_UNKNOWN_KEY = re.compile("unrecognized arguments|is not accepted|does not accept option")
# for a parser that looks for some options before the others are parsed
EARLY: dict[str, Any] = {"add_help": False, "allow_abbrev": False, "exit_on_error": False}
_MAX_DEPTH = 100  # of nested values: YAML readers recurse, the one in C until it crashes
_PARSERS_LOADER = get_loader("yaml")


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 1e5, which jsonargparse takes for numbers when it reads them."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def dump_yaml(value: Any) -> str:
    """YAML of primitives that reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def guard_yaml() -> None:
    """Makes jsonargparse read YAML with `check_nesting` and write it with `dump_yaml`."""
    set_loader("yaml", _guarded, (yaml.YAMLError,))
    set_dumper("yaml", dump_yaml)


def _guarded(text: str) -> Any:
    check_nesting(text)
    return _PARSERS_LOADER(text)


def load_yaml(text: str) -> Any:
    """A YAML text as primitives.

    Raises:
        yaml.YAMLError: it is not valid YAML, or what `check_nesting` refuses.
    """
    check_nesting(text)
    return yaml.safe_load(text)


def check_nesting(text: str) -> None:
    """Raises yaml.YAMLError for values nested too deeply or in themselves, and for a key given
    twice, of which YAML would drop the first.
    """
    anchors: list[str | None] = []  # of the enclosing values
    parts: list[list[tuple[str | None, int]]] = [[]]  # of each: (scalar or None, line)
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.NodeEvent) and event.start_mark:
            parts[-1].append((getattr(event, "value", None), event.start_mark.line + 1))
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            parts.append([])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchors.pop()
            own = parts.pop()
            if isinstance(event, yaml.MappingEndEvent):
                _refuse_repeated(own[::2])
        elif isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
            raise yaml.YAMLError(f"*{event.anchor} refers to itself; write it out.")
        if len(anchors) > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep; flatten it.")


def _refuse_repeated(keys: list[tuple[str | None, int]]) -> None:
    lines: dict[str, int] = {}
    for key, line in keys:
        if key is None:
            continue
        if key in lines:
            raise yaml.YAMLError(
                f"{key!r} is given twice, in lines {lines[key]} and {line}; put that together."
            )
        lines[key] = line


def check_configs(words: Sequence[str]) -> None:
    """Refuses config files that are not valid YAML; jsonargparse would not name the file.

    Missing files are left to jsonargparse.

    Raises:
        ValueError: naming the file and the place in it.
    """
    parser = argparse.ArgumentParser(**EARLY)
    parser.add_argument("-c", "--config", action="append", default=[], type=Path)
    for path in filter(Path.is_file, early(parser, words).config):
        try:
            options = load_yaml(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(
                f"{path} holds no options; give lines of `key: value`, or leave it out."
            )


def early(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options that a parser made with `EARLY` knows, among others.

    Raises:
        ValueError: an option is without its value.
    """
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def parse(function: Callable[..., Any], words: Sequence[str], prog: str) -> dict[str, Any]:
    """Checked keyword arguments for a function, its dataclasses built.

    Args:
        function: typed, with a Google docstring; a flag that is False by default needs no value.
        words: the command line after the command.
        prog: how the command is called, for its help.

    Raises:
        ValueError: an unknown or missing key or a wrong type, in one line that names the key.
        SystemExit: after `--help` or `--print_config`.
    """
    parser = _parser(function, prog)
    try:
        options = vars(parser.instantiate(parser.parse_args(list(words))))
    except ArgumentError as error:
        known = [action.dest for action in parser._actions]
        raise ValueError(one_line(str(error), known, words)) from error
    return {name: options[name] for name in inspect.signature(function).parameters}


def build(kind: type[T], values: Any, key: str) -> T:
    """A dataclass from the values under a key of a YAML file.

    Raises:
        ValueError: an unknown or missing field or a wrong type, in one line that names the key.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{key}: {values!r} is not a mapping of keys to values.")
    known = inspect.signature(kind).parameters
    for name in values:
        if name not in known:
            raise ValueError(f"{key}.{name}: unknown key; known: {', '.join(known)}.")
    return construct(kind, values, key)


def construct(kind: type[T], arguments: Mapping[str, Any], key: str) -> T:
    """An object from its arguments, which may come from a user or a stranger's file.

    Raises:
        ValueError: an unknown or missing argument or a wrong type, in one line that names the key.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, key)
    try:
        parsed = parser.parse_object({key: dict(arguments)})
    except ArgumentError as error:
        raise ValueError(one_line(str(error))) from error
    return parser.instantiate(parsed)[key]


def one_line(message: str, known: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """A nested message of jsonargparse as `key: what is wrong`, without the types that it tried.

    For an unknown option the nearest name in `known` is suggested; which option has no value is
    seen in `words`, those of the command line.
    """
    if refused := refusal(message):
        return refused
    if match := re.fullmatch(r"argument (?:-\w/)?(--\S+): expected one argument", message):
        return _without_value(match[1], words) or message
    if match := re.fullmatch(r"the following arguments are required: ([\w., ]+)", message):
        return "required: " + ", ".join(f"--{name}" for name in match[1].split(", "))
    keys, facts = [], []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if _NOISE.match(line):
            continue
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            keys.append(match[1])
            line = match[2]
        facts.append(re.sub(r"<class '(\w+)'>", r"\1", line).replace("a typing.Literal", "one of "))
    text = ": ".join(filter(None, (".".join(keys), " ".join(filter(None, facts)))))
    text = re.sub(r"( is not accepted| has no attribute '\w+') Given value: .*", r"\1", text)
    text = re.sub(r"Call to compute_fn of link '.*' with args \(.*\) failed: ", "", text)
    if re.search(r"Expected a str\b.* Given value: (True|False)$", text):
        text += "; in YAML yes, no, on and off are that too: put it in quotes."
    if re.search(r"Expected a list\b.* (Got|Given) value: [^\[]*,", text):
        text += "; write a list in brackets: '[a, b]'."
    if not _UNKNOWN_KEY.search(text) or text.endswith("lists the options."):
        return text
    of_class = {"data": "--data.help CLASS", "model": "--model.help CLASS"}.get(
        re.split("[.:]", text)[0]
    )
    unknown = re.search(r"(?:--|Option ')(?:\w+\.)*(\w+)", text)
    near = get_close_matches(unknown[1], known, n=1, cutoff=0.7) if unknown else []
    hint = f"did you mean {near[0]}? " if near and unknown and near[0] != unknown[1] else ""
    return f"{text}; {hint}{of_class or '--help'} lists the options."


def _without_value(option: str, words: Sequence[str]) -> str:
    """Names the word that is the option, or a key of it, and has no value; empty without one."""
    for word, follows in zip(words, [*words[1:], "--"], strict=True):
        if follows.startswith("--") and (word == option or word.startswith(f"{option}.")):
            return f"{word} has no value; if it was to be that of a variable, set that first."
    return ""


def _parser(function: Callable[..., Any], prog: str) -> ArgumentParser:
    hints = get_type_hints(function)
    description = re.split(r"\n\s*(?:Args|Raises|Returns):", function.__doc__ or "")[0].strip()
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    if "config" in hints:  # `run`: its YAML is a chain, not options
        parser.add_argument("-c", "--config", type=str, required=True, help="YAML of the chain")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="STAGE.KEY=VALUE",
            help="option of a stage, stronger than the chain's YAML; repeatable",
        )
    else:
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="YAML of these options; repeatable"
        )
    parser.add_function_arguments(
        function, as_group=False, fail_untyped=True, skip={"config", "set"}
    )
    for action in parser._actions:
        if hints.get(action.dest) is bool:
            action.nargs, action.const = "?", True
    return parser
