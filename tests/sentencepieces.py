"""Small SentencePiece-like vocabularies in several file formats, trained by `tokenizers`."""

import functools
import json
from pathlib import Path
from typing import Any, Literal

import gguf
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import generate_merges

from datamodules.tokenizer import Tokenizer as Ours
from pipeline.weights.huggingface_in import CONFIG
from pipeline.weights.reading import open_foreign
from tests.published import TEXT, fuzz, random_model, save_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ("<unk>", "<s>", "</s>")
FORMS = ("prepend", "always", "first", "never")
Merges = Literal["of scores", "as trained"]
TINYLLAMA = (  # TinyLlama-1.1B-Chat's, which is Zephyr's
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (  # Llama 2's, but for the safety prompt that it can have
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@functools.cache
def learned() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids in the order of Llama 2: special tokens, bytes, merged tokens, characters; and merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    bpe.train_from_iterator([TEXT] * 2 + list(fuzz(200, seed=1)), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    merged = list(dict.fromkeys(map("".join, merges)))
    blanks = ["▁" * n for n in (2, 4, 8, 3, 5)]
    characters = [token for token in bpe.get_vocab() if len(token) == 1]
    tokens = [*SPECIAL, *BYTES, *blanks, *merged, *sorted({*characters, "▁"})]
    return {token: i for i, token in enumerate(tokens)}, merges


def scores() -> list[float]:
    """Of every id, as SentencePiece has them: blanks of more than one have the lowest."""
    ids, merges = learned()
    merged = {*map("".join, merges)}
    return [
        -1e9 if len(token) > 1 and not token.strip("▁") else -float(i) if token in merged else 0.0
        for token, i in ids.items()
    ]


def sentencepiece(form: str, merges: Merges = "of scores") -> Tokenizer:
    """With the steps of Llama 2's tokenizer.json (`prepend`), or Metaspace's."""
    ids, pairs = learned()
    if merges == "as trained":
        ids = {token: i for token, i in ids.items() if token.strip("▁") or len(token) < 2}
    if merges == "of scores":
        by_token = dict(zip(ids, scores(), strict=True))
        pairs = generate_merges(ids, by_token, {*SPECIAL, *BYTES})
    model = models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    bpe = Tokenizer(model)
    if form == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(steps)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if form != "never" else []
    bpe.decoder = decoders.Sequence(back + strip)
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def of_others(theirs: Tokenizer, folder: Path, template: str | None = None) -> Ours:
    """The tokenizer here of one there, in a directory beside a random model."""
    names = {"bos_token": "<s>", "unk_token": "<unk>"}
    save_tokenizer(theirs, folder, eos="</s>", template=template, **names)
    return reopened(folder)


def reopened(folder: Path) -> Ours:
    """The tokenizer of a directory, beside a model that is random unless there is one."""
    if not (folder / CONFIG).exists():
        random_model("llama", len(learned()[0])).save_pretrained(folder)
    return open_foreign(folder).tokenizer


def add_to_gguf(writer: gguf.GGUFWriter, template: str | None = None) -> None:
    """The same vocabulary as llama.cpp's convert_hf_to_gguf writes it."""
    names = list(learned()[0])
    kind = gguf.TokenType
    kinds = {"<unk>": kind.UNKNOWN, "<s>": kind.CONTROL, "</s>": kind.CONTROL}
    kinds |= dict.fromkeys(BYTES, kind.BYTE)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores())
    writer.add_token_types([kinds.get(name, kind.NORMAL) for name in names])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)


@functools.cache
def texts(count: int = 10_000) -> list[str]:
    """The fuzz corpus, runs of blanks, and names of tokens as ordinary text."""
    blanks = [before + " " * n + after for n in range(40) for before in "a" for after in ("", "b")]
    leading = [" " * n + "the" for n in range(40)]
    names = [*SPECIAL, "a</s>b", " <s>", "<0x41>", "<0x0A> <0xE4>", "<|user|>\nhi</s>\n"]
    return [*fuzz(count), "", " ", "\n", "\0", *blanks, *leading, *names]
