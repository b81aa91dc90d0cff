"""Exported tokenizers and chat templates give the same ids in transformers as here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from datamodules.chat_template import render
from datamodules.prompts import ROLES, STYLES, Message, encode_prompt
from datamodules.tokenizer import ENDOFTEXT, Tokenizer
from pipeline.weights.huggingface_in import open_huggingface
from pipeline.weights.huggingface_out import huggingface_writers, tokenizer_json
from pipeline.weights.templates import default_system, go, jinja, known_style
from pipeline.weights.vocabulary import PRE_TOKENIZERS
from tests.exporting import (
    N_ROWS,
    MakeGPT,
    loaded,
    strings,
    vocabulary,
    with_whole_pieces,
    write,
)

N_STRINGS = 3000
TEXTS = strings(N_STRINGS)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role']"
    " + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def export(tiny_gpt: MakeGPT, tokenizer: Tokenizer, folder: Path, **meta: Any) -> Any:
    model = tiny_gpt("llama", vocab_size=max(N_ROWS, tokenizer.n_vocab))
    write(huggingface_writers(loaded(model, tokenizer, **meta), torch.float32), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("bos", [None, ENDOFTEXT])
def test_same_ids(tiny_gpt: MakeGPT, tmp_path: Path, pre: str, bos: str | None) -> None:
    tokenizer = vocabulary(pre, bos=bos)
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out")
    ours = [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in TEXTS]
    assert theirs(TEXTS).input_ids == ours
    assert sum(map(len, ours)) < 0.85 * sum(len(text.encode()) for text in TEXTS), "merges at work"
    assert theirs.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]

    again = open_huggingface(tmp_path / "out").tokenizer.vocabulary
    assert again == replace(tokenizer.vocabulary, name=again.name)


def test_every_pre_tokenizer_splits_otherwise() -> None:
    """What the test above stands on: the texts tell the four apart."""
    tokenizers = {pre: vocabulary(pre) for pre in PRE_TOKENIZERS}
    ids = {pre: [t.encode(text) for text in TEXTS] for pre, t in tokenizers.items()}
    assert all(ids[a] != ids[b] for a in ids for b in ids if a < b)


def test_special_tokens_anywhere(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """First, as SmolLM2's are, with ids between that no text has."""
    trained = vocabulary().vocabulary
    tokens = [b""] * 12 + trained.tokens
    specials = {name: i for i, name in enumerate(trained.special_tokens)}
    tokenizer = Tokenizer.of(replace(trained, tokens=tokens, special_tokens=specials))
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out")
    assert theirs(TEXTS[:500]).input_ids == [tokenizer.encode(text) for text in TEXTS[:500]]
    assert theirs.convert_tokens_to_ids("<|im_end|>") == specials["<|im_end|>"]


def test_composed_characters_and_shown_marks(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    """As Qwen has them."""
    known = replace(vocabulary().vocabulary, nfc=True, shown=("<|user|>",))
    tokenizer = Tokenizer.of(known)
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out")
    texts = [*TEXTS[:200], "cafe\u0301", "A\u030a a\u0323\u0302"]
    assert theirs(texts).input_ids == [tokenizer.encode(text) for text in texts]
    ids = [known.special_tokens[name] for name in ("<|im_end|>", "<|user|>")]
    assert theirs.decode(ids, skip_special_tokens=True) == "<|user|>"
    again = open_huggingface(tmp_path / "out").tokenizer.vocabulary
    assert again == replace(known, name=again.name)


@pytest.mark.parametrize("tuned", [False, True])
def test_what_was_tuned_without_thinking_does_not(
    tiny_gpt: MakeGPT, tmp_path: Path, tuned: bool
) -> None:
    """What its makers published is handed on as it is."""
    template = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}"
    template += "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    known = replace(vocabulary().vocabulary, chat_template=template)
    meta = {"prompt_style": "template"} | ({"dataset": {"digest": "0"}} if tuned else {})
    theirs = export(tiny_gpt, Tokenizer.of(known), tmp_path / "out", **meta)
    text = theirs.apply_chat_template(chat("Hi"), tokenize=False)
    assert text == ("no Hi" if tuned else "Hi")
    assert render(open_huggingface(tmp_path / "out").tokenizer, chat("Hi"), opening=True) == "no Hi"


def test_gpt2_by_name(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken writes GPT-2's pattern in its own way; the ids of `tokenizers` are the same."""
    from tokenizers import Tokenizer as Theirs

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_data / "tiktoken_cache"))
    gpt2 = Tokenizer.load("gpt2")
    content = tokenizer_json(gpt2.vocabulary)
    assert content["model"]["merges"][:2] == [("Ġ", "t"), ("Ġ", "a")]
    assert len(content["model"]["merges"]) == 50_000
    theirs = Theirs.from_str(json.dumps(content))
    found = theirs.encode_batch(TEXTS, add_special_tokens=False)
    assert [encoded.ids for encoded in found] == [gpt2.encode(text) for text in TEXTS]


def test_a_pattern_of_its_own_is_refused() -> None:
    odd = replace(vocabulary().vocabulary, name="odd", pattern=r"\S+|\s+")
    with pytest.raises(ValueError, match="tokenizer odd splits text as none of gpt-2, smollm"):
        tokenizer_json(odd)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokens_that_no_merge_makes(tiny_gpt: MakeGPT, tmp_path: Path, pre: str) -> None:
    """Words, parts of words and of one another, anywhere in the order, as Llama 3 has them."""
    tokenizer = with_whole_pieces(pre)
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out")
    model = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]
    assert model["ignore_merges"] is True
    whole = set(tokenizer.vocabulary.tokens) - set(vocabulary(pre).vocabulary.tokens)
    texts = [*TEXTS, *(token.decode() for token in sorted(whole))]
    ours = [tokenizer.encode(text) for text in texts]
    assert theirs(texts).input_ids == ours
    had = {tokenizer.vocabulary.tokens[i] for ids in ours for i in ids}
    assert len(whole & had) > 40
    again = open_huggingface(tmp_path / "out").tokenizer.vocabulary
    assert again == replace(tokenizer.vocabulary, name=again.name)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    messages = [Message(role="system", content=system)] if system is not None else []
    return messages + [
        Message(role=ROLES[1 + i % 2], content=content) for i, content in enumerate(contents)
    ]


CHATS = [
    chat("What is 2 + 2?"),
    chat("Fix it.\n\n### Input:\nHe go.", system="Be brief."),
    chat("Hi", "Hello there.", "And now?"),
    *(chat(text) for text in TEXTS[:60]),
    *(chat(text, system=other) for text, other in zip(TEXTS[:20], TEXTS[20:40], strict=True)),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
@pytest.mark.parametrize("specials", ["all", "one"])
def test_prompts(tiny_gpt: MakeGPT, tmp_path: Path, style: str, pre: str, specials: str) -> None:
    """Also where the tokenizer has no such markers, and they are ordinary text."""
    tokenizer = vocabulary(pre, bos=ENDOFTEXT if specials == "one" else None)
    if specials == "one":
        only = {ENDOFTEXT: tokenizer.eos_id}
        tokenizer = Tokenizer.of(replace(tokenizer.vocabulary, special_tokens=only))
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out", prompt_style=style)
    for messages in CHATS:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == encode_prompt(tokenizer, style, messages), messages


def test_a_template_of_its_own_is_kept(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    tokenizer = Tokenizer.of(replace(vocabulary().vocabulary, chat_template=SMOLLM2))
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out", prompt_style="template")
    assert theirs.chat_template == SMOLLM2
    for messages in CHATS:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == encode_prompt(tokenizer, "template", messages), messages


def test_a_template_with_a_bos_that_plain_texts_lack(tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    template = "{{ bos_token }}" + SMOLLM2
    known = replace(vocabulary().vocabulary, chat_template=template, template_bos="<|system|>")
    tokenizer = Tokenizer.of(known)
    theirs = export(tiny_gpt, tokenizer, tmp_path / "out", prompt_style="template")
    assert theirs(TEXTS[0]).input_ids == tokenizer.encode(TEXTS[0])
    for messages in CHATS:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == encode_prompt(tokenizer, "template", messages), messages
    assert found[0] == tokenizer.special_ids["<|system|>"]
    again = open_huggingface(tmp_path / "out").tokenizer.vocabulary
    assert again == replace(known, name=again.name, more_ends=("<|im_end|>",))


def test_ollamas_templates() -> None:
    tokenizer = vocabulary()
    assert go(tokenizer, "chatml") == (
        "{{ range $i, $message := .Messages }}{{ if $i }}\n{{ end }}"
        '{{ if eq $message.Role "system" }}<|im_start|>system\n{{ $message.Content }}<|im_end|>'
        '{{ else if eq $message.Role "user" }}<|im_start|>user\n{{ $message.Content }}<|im_end|>'
        '{{ else if eq $message.Role "assistant" }}<|im_start|>assistant\n{{ $message.Content }}'
        "<|im_end|>{{ end }}{{ end }}\n<|im_start|>assistant\n"
    )
    own = Tokenizer.of(replace(tokenizer.vocabulary, chat_template=SMOLLM2))
    assert known_style(own) == "chatml"
    assert default_system(own) == "Be kind."
    assert go(own, "template") == go(tokenizer, "chatml")
    odd = jinja(tokenizer, "chatml").replace("im_start", "start")
    other = Tokenizer.of(replace(tokenizer.vocabulary, chat_template=odd))
    assert go(other, "template") is None
