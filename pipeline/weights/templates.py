"""The prompt styles of `datamodules.prompts` as chat templates: Jinja, and Go for Ollama.

Rendered and encoded by other tools, a prompt has the same ids as from `encode_prompt` (shown for
transformers in tests/test_export_tokenizers.py).
"""

import json
from dataclasses import replace

from datamodules.chat_template import Message, render
from datamodules.prompts import ROLES, STYLES, TEMPLATE, PromptStyle, reply_end, stop_ids
from datamodules.tokenizer import Tokenizer

_PROBE = [
    Message(role="system", content="s"),
    Message(role="user", content="u"),
    Message(role="assistant", content="a"),
    Message(role="user", content="u"),
]


def jinja(tokenizer: Tokenizer, style: str) -> str:
    """A style as Jinja source; for the style `template`, the tokenizer's own."""
    if style == TEMPLATE:
        return tokenizer.vocabulary.chat_template or ""
    written = STYLES[style]
    source = "{{ bos_token }}" if tokenizer.vocabulary.bos else ""
    if written.preamble:
        preamble = _quoted(written.preamble)
        source += f"{{% if messages[0]['role'] != 'system' %}}{preamble}{{% endif %}}"
    source += "{% for message in messages %}"
    if written.between:
        source += f"{{% if not loop.first %}}{_quoted(written.between)}{{% endif %}}"
    for branch, role in zip(("if", "elif", "elif"), ROLES, strict=True):
        opening, end = _around(tokenizer, written, role)
        source += f"{{% {branch} message['role'] == '{role}' %}}"
        source += f"{_quoted(opening)}{{{{ message['content'] }}}}{_quoted(end)}"
    source += "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    return source + _quoted(_reply_opening(tokenizer, written)) + "{% endif %}"


def go(tokenizer: Tokenizer, style: str) -> str | None:
    """A style as Ollama's TEMPLATE, without BOS, which Ollama adds; None for unknown ones."""
    if style == TEMPLATE:
        known = known_style(tokenizer)
        return go(tokenizer, known) if known else None
    written = STYLES[style]
    source = f"{{{{ if not .System }}}}{written.preamble}{{{{ end }}}}" if written.preamble else ""
    source += "{{ range $i, $message := .Messages }}"
    if written.between:
        source += f"{{{{ if $i }}}}{written.between}{{{{ end }}}}"
    for branch, role in zip(("if", "else if", "else if"), ROLES, strict=True):
        opening, end = _around(tokenizer, written, role)
        source += f'{{{{ {branch} eq $message.Role "{role}" }}}}'
        source += f"{opening}{{{{ $message.Content }}}}{end}"
    return source + "{{ end }}{{ end }}" + _reply_opening(tokenizer, written)


def known_style(tokenizer: Tokenizer) -> str | None:
    """The style, if any, that renders as the tokenizer's own template, given a system message."""
    try:
        theirs = render(tokenizer, _PROBE, opening=True)
    except ValueError:  # some templates take no system message
        return None
    for name in STYLES:
        vocabulary = replace(tokenizer.vocabulary, chat_template=jinja(tokenizer, name))
        if render(replace(tokenizer, vocabulary=vocabulary), _PROBE, opening=True) == theirs:
            return name
    return None


def default_system(tokenizer: Tokenizer) -> str | None:
    """The system message that the tokenizer's own template, if known, adds where none is given."""
    known = known_style(tokenizer)
    if known is None:
        return None
    opening, end = _around(tokenizer, STYLES[known], "system")
    text = render(tokenizer, [Message(role="user", content="")], opening=False)
    is_there = end and text.startswith(opening)
    return text.removeprefix(opening).partition(end)[0] if is_there else None


def stop_words(tokenizer: Tokenizer, style: str | None) -> list[str]:
    """Special tokens that end an answer, or a text if there is no style."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    return [names[i] for i in stop_ids(tokenizer, style)]


def _around(tokenizer: Tokenizer, style: PromptStyle, role: str) -> tuple[str, str]:
    """The text before and after the content of a turn."""
    end = reply_end(tokenizer, style) if role == "assistant" else style.end or ""
    return "".join(style.opening[role]), end if role in style.ends else ""


def _reply_opening(tokenizer: Tokenizer, style: PromptStyle) -> str:
    return style.between + _around(tokenizer, style, "assistant")[0]


def _quoted(text: str) -> str:
    """A text as a Jinja expression, since a template could drop its line ends otherwise."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
