import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import documents as documents_module
from datamodules.corpus import Corpus, prepare
from datamodules.documents import documents
from datamodules.files import cache_dir
from datamodules.pretraining import PretrainingDataModule
from datamodules.sources import PYTHON_DOCS
from datamodules.tokenizer import Tokenizer, train_tokenizer

Write = Callable[..., Path]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache a test, but for the documentation of this Python, which takes seconds to extract."""
    shared = cache_dir() / "python-docs"
    shared.mkdir(parents=True, exist_ok=True)
    fresh = tmp_path / "cache"
    fresh.mkdir()
    (fresh / "python-docs").symlink_to(shared)
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(fresh))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([story(0)], vocab_size=300, min_frequency=2).save(path)
    return path


def story(seed: int, n_lines: int = 30) -> str:
    numbers = np.random.default_rng(seed).integers(0, 1000, (n_lines, 4)).tolist()
    return "".join(f"In {a} the {b} wolves met {c} of the {d} lambs.\n" for a, b, c, d in numbers)


@pytest.fixture
def make(tokenizer_file: Path) -> Callable[..., PretrainingDataModule]:
    def make_module(source: Any, **changes: Any) -> PretrainingDataModule:
        options: dict[str, Any] = {
            "source": str(source) if isinstance(source, Path) else source,
            "text_column": "text",
            "tokenizer": str(tokenizer_file),
            "block_size": 16,
            "batch_size": 4,
            "max_tokens": 32,
            "val_fraction": 0.2,
            "near_duplicates": 0.8,
            "seed": 1,
            "num_workers": 0,
        }
        return PretrainingDataModule(**{**options, **changes})

    return make_module


@pytest.fixture
def stories(write: Write) -> Path:
    """Two hundred documents, as JSONL."""
    rows = [json.dumps({"text": story(seed, 4)}) + "\n" for seed in range(200)]
    return write("stories.jsonl", "".join(rows))


def all_tokens(module: PretrainingDataModule, split: str) -> list[int]:
    return module.corpus.tokens(split).tolist()


# --- documents


def test_every_kind_of_source_gives_documents(write: Write, tmp_path: Path) -> None:
    write("texts/a.txt", "\ufeffone\n")
    write("texts/b.md", "two")
    lines = write("c.ndjson", '{"body": "three"}\n\n{"body": "vier – 四"}\n')
    pd.DataFrame({"id": [1, 2], "body": ["five", "six"]}).to_parquet(tmp_path / "d.parquet")
    write("e.csv", 'id,body\n1,"seven, eight"\n')
    write("f.tsv", "id\tbody\n1\tNA\n")
    sources = [str(tmp_path / "texts"), str(lines), f"{tmp_path}/*.parquet", f"{tmp_path}/*.?sv"]
    assert list(documents(sources, "body")) == [
        *("one\n", "two", "three", "vier – 四", "five", "six", "seven, eight", "NA")
    ]


def test_python_docs_mix_with_other_sources(write: Write) -> None:
    path = write("a.jsonl", '{"body": "mine"}\n')
    found = list(documents([str(path), PYTHON_DOCS], "body"))
    assert found[0] == "mine"
    assert len(found) > 300


def test_a_long_text_is_cut_at_line_ends(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_DOCUMENT_BYTES", 100)
    text = story(1)
    parts = list(documents([str(write("a.txt", text))], "text"))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n") and 100 <= len(part) < 200 for part in parts[:-1])


def test_a_long_line_is_cut_between_characters(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "_DOCUMENT_BYTES", 100)
    text = "x" + "四" * 70_000
    parts = list(documents([str(write("a.txt", text))], "text"))
    assert "".join(parts) == text
    assert len(parts) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\n" * 40 + b"caf\xe9", r"a\.txt: byte 123 \(0xe9\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text" "b"}\n', r"a\.jsonl:2: Expecting ':'.*fix the line"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1: it has no 'text', only \['body'\]; .*text_c"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: 'text' is int, not a text; .*text_column"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a Parquet file"),
        ("a.csv", b"body\na\n", r"a\.csv: row 1: it has no 'text', only \['body'\]; correct"),
        ("a.json", b"[]", r"a\.json is not plain text; give text, \.jsonl, \.parquet, \.csv or"),
    ],
)
def test_a_source_that_is_no_text(
    name: str, content: bytes, message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "_DOCUMENT_BYTES", 50)
    with pytest.raises(ValueError, match=message):
        list(documents([str(write(name, content))], "text"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, r"a\.parquet: row 1: it has no 'text', only \['body'\]; corre"),
        ({"text": ["a", None]}, r"a\.parquet: row 2: 'text' is null, not a text; .* drop the row"),
    ],
)
def test_a_parquet_file_without_text(table: dict, message: str, tmp_path: Path) -> None:
    pd.DataFrame(table).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(documents([str(tmp_path / "a.parquet")], "text"))


def test_a_parquet_file_that_is_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": [f"text {i} " * 50 for i in range(1000)]}).to_parquet(path)
    data = bytearray(path.read_bytes())
    data[40:4000] = bytes(3960)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file, or not whole: "):
        list(documents([str(path)], "text"))


# --- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, r"data\.block_size is 1; give at least 2"),
        ({"max_tokens": 15}, r"data\.max_tokens is 15, but one block has 16 tokens"),
        ({"val_fraction": 0.0}, r"data\.val_fraction is 0\.0; give one between"),
        ({"val_fraction": 1.0}, r"data\.val_fraction is 1\.0"),
        ({"near_duplicates": 80}, r"data\.near_duplicates is 80; .*or null"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"source": []}, r"data\.source is an empty list"),
        ({"tokenizer": "nothing"}, r"tokenizer 'nothing' does not exist"),
    ],
)
def test_impossible_arguments_fail_before_data_is_read(
    changes: dict[str, Any], message: str, make: Callable[..., PretrainingDataModule]
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"source": "nowhere.txt", **changes}).setup("fit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data\.source holds no text: 0 documents"),
        (" \n\n", r"data\.source holds no text: 1 documents, all empty"),
        ("abc" * 9, r"training text has \d+ tokens, but data\.block_size 16 needs 31; lower"),
    ],
)
def test_too_little_text(
    content: str, message: str, write: Write, make: Callable[..., PretrainingDataModule]
) -> None:
    with pytest.raises(ValueError, match=message):
        make(write("a.txt", content)).setup("fit")


def test_too_little_held_out_text(write: Write, make: Callable[..., PretrainingDataModule]) -> None:
    module = make(write("a.txt", "abc" * 90), val_fraction=1e-9)
    with pytest.raises(ValueError, match=r"held-out text has 0 tokens; raise data\.val_fraction"):
        module.setup("fit")


# --- splits and tokens


def test_documents_are_held_out_whole(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    train, heldout = module.train_bytes(1 << 30).split(b"\0"), module.heldout_bytes().split(b"\0")
    assert sorted(train + heldout) == sorted(story(seed, 4).encode() for seed in range(200))
    assert 20 <= len(heldout) <= 60  # 40 expected, standard deviation 6
    assert module.fingerprint["split"] == "document"
    other = make(stories, seed=2)
    other.setup("fit")
    assert other.heldout_bytes() == module.heldout_bytes()  # whatever the seed


def test_documents_are_joined_by_endoftext(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    tokenizer = module.tokenizer
    for split, text in (("train", module.train_bytes(1 << 30)), ("val", module.heldout_bytes())):
        expected: list[int] = []
        for document in text.decode().split("\0"):
            expected += [tokenizer.eos_id] * bool(expected) + tokenizer.encode(document)
        assert all_tokens(module, split) == expected


def test_a_single_text_holds_out_its_end(
    write: Write, make: Callable[..., PretrainingDataModule]
) -> None:
    text = story(1, 100)
    module = make(write("book.txt", text))
    module.setup("fit")
    train, heldout = module.train_bytes(1 << 30).decode(), module.heldout_bytes().decode()
    assert train + heldout == text
    assert train.endswith("\n")
    assert len(heldout) / len(text) == pytest.approx(0.2, abs=0.02)  # a line is 1 %
    assert module.fingerprint["split"] == "tail"
    assert module.tokenizer.eos_id not in all_tokens(module, "train") + all_tokens(module, "val")


def test_a_few_texts_hold_out_the_end_of_each(
    write: Write,
    make: Callable[..., PretrainingDataModule],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last ones in the order of files may be of another kind than the others."""
    books = [story(seed, 40) for seed in range(5)]
    for i, book in enumerate(books):
        write(f"books/{i}.txt", book)
    module = make(tmp_path / "books", val_fraction=0.3)
    with caplog.at_level("INFO"):
        module.setup("fit")
    train, heldout = module.train_bytes(1 << 30), module.heldout_bytes()
    parts = [text.decode().split("\0") for text in (train, heldout)]
    assert [begin + end for begin, end in zip(*parts, strict=True)] == books
    for end, book in zip(parts[1], books, strict=True):
        assert len(end) / len(book) == pytest.approx(0.3, abs=0.03)
        assert end.startswith("In ")
    assert "5 documents are too few to hold out whole ones" in caplog.text
    assert "the last 30% of each is held out" in caplog.text


def test_special_token_text_is_ordinary_text(
    write: Write, make: Callable[..., PretrainingDataModule]
) -> None:
    text = "Say <|endoftext|> and <|user|> aloud.\n" * 40
    module = make(write("a.txt", text))
    module.setup("fit")
    assert (module.train_bytes(1 << 30) + module.heldout_bytes()).decode() == text
    assert module.tokenizer.eos_id not in all_tokens(module, "train")


def test_counts_and_bytes_a_token(
    write: Write, make: Callable[..., PretrainingDataModule], tokenizer_file: Path
) -> None:
    texts = [story(seed, 4) for seed in range(100)]
    rows = [*texts, texts[0], texts[1].upper(), "", "naÃ¯ve"]
    module = make(
        write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in rows)), val_fraction=0.5
    )
    module.setup("fit")
    counts = module.fingerprint["counts"]
    n_val = len(module.heldout_bytes().split(b"\0"))
    assert counts["documents"] == {
        "read": 104,
        "empty": 1,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "mojibake_repaired": 1,
        "gutenberg_stripped": 0,
        "kept": 101,
        "train": 101 - n_val,
        "val": n_val,
    }
    n_bytes = sum(len(text.encode()) for text in [*texts, "naïve"])
    assert sum(counts["bytes"].values()) == n_bytes + 101 - 2  # a separator is one byte
    assert counts["bytes"]["val"] == len(module.heldout_bytes())
    expected = len(module.heldout_bytes()) / len(all_tokens(module, "val"))
    assert module.val_bytes_per_token == expected
    assert counts["tokens"]["val"] == len(all_tokens(module, "val"))


def test_train_bytes_are_the_end_of_the_training_text(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    whole = module.train_bytes(1 << 30)
    assert [module.train_bytes(limit) for limit in (1, 100, 999)] == [
        whole[-limit:] for limit in (1, 100, 999)
    ]


# --- batches


def test_an_epoch_is_disjoint_blocks_at_another_place(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    order, tokens = module.train_order(), all_tokens(module, "train")
    n_blocks = (len(tokens) - 15) // 16
    offsets = set()
    for epoch in range(20):
        starts = order(epoch)
        assert torch.equal(starts, module.train_order()(epoch))
        ascending = sorted(starts.tolist())
        offsets.add(ascending[0])
        assert ascending == [ascending[0] + 16 * i for i in range(n_blocks)]
        assert 0 <= ascending[0] < 16
        assert ascending[-1] + 16 <= len(tokens)
        assert starts.tolist() != ascending
    assert len(offsets) > 8


def test_a_sample_is_its_tokens(stories: Path, make: Callable[..., PretrainingDataModule]) -> None:
    module = make(stories)
    module.setup("fit")
    tokens = all_tokens(module, "train")
    sample = module.train_set[37]
    assert sample["input_ids"].tolist() == sample["labels"].tolist() == tokens[37:53]
    assert (sample["sample_id"], sample["input_ids"].dtype) == (37, torch.int64)


def test_a_file_that_is_cut_in_use_gives_no_short_sample(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    path = module.corpus.path("train")
    os.truncate(path, 2 * 50)  # two bytes a token
    assert len(module.train_set[34]["input_ids"]) == 16
    with pytest.raises(ValueError, match=r"train\.bin was cut while in use"):
        module.train_set[35]


@pytest.mark.parametrize("block_size", [2, 16, 31])
def test_validation_predicts_every_token_once(
    block_size: int, stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories, block_size=block_size)
    module.setup("fit")
    blocks = [sample["labels"].tolist() for sample in module.val_set]  # type: ignore[attr-defined]
    assert len(blocks) == len(module.val_set)  # type: ignore[arg-type]
    assert all(len(block) == block_size for block in blocks[:-1])
    assert 2 <= len(blocks[-1]) <= block_size
    predicted = [token for block in blocks for token in block[1:]]
    assert predicted == all_tokens(module, "val")[1:]
    assert module.test_set is module.val_set


def test_loaders_give_steps(stories: Path, make: Callable[..., PretrainingDataModule]) -> None:
    module = make(stories)
    module.setup("fit")
    steps = list(module.train_dataloader())
    assert len(steps) == len(module.train_dataloader())
    assert [tuple(micro["input_ids"].shape) for micro in steps[0]] == [(2, 16), (2, 16)]
    ids = [i for step in steps for micro in step for i in micro["sample_ids"].tolist()]
    assert sorted(ids) == sorted(module.train_order()(0).tolist())
    n_val = sum(len(micro["input_ids"]) for step in module.val_dataloader() for micro in step)
    assert n_val == len(module.val_set)  # type: ignore[arg-type]


def test_blocks_are_pickled_without_their_tokens(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    assert len(pickle.dumps(module.train_set)) < 1000


# --- the cache


def files_of(module: PretrainingDataModule) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in module.corpus.folder.iterdir()}


def test_a_second_start_tokenises_nothing(
    stories: Path, make: Callable[..., PretrainingDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(stories)
    first.setup("fit")

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode", refuse)
    moved = stories.rename(stories.with_name("moved.jsonl"))  # a key of content, not of place
    second = make(moved)
    second.setup("fit")
    assert files_of(second) == files_of(first)
    assert sorted(files_of(second)) == ["corpus.json", "train.bin", "val.bin"]
    assert second.fingerprint["digest"] == first.fingerprint["digest"]
    digest = hashlib.sha256(moved.read_bytes()).hexdigest()
    assert second.fingerprint["sources"] == {str(moved): digest}


def test_what_decides_the_tokens_makes_another_corpus(
    stories: Path, make: Callable[..., PretrainingDataModule], tmp_path: Path
) -> None:
    train_tokenizer([story(0)], vocab_size=270, min_frequency=2).save(tmp_path / "other.json")
    digests = set()
    for changes in (
        {},
        {"near_duplicates": None},
        {"val_fraction": 0.3},
        {"tokenizer": str(tmp_path / "other.json")},
        {"source": [str(stories), str(stories)]},
    ):
        module = make(**{"source": stories, **changes})
        module.setup("fit")
        digests.add(module.fingerprint["digest"])
    stories.write_text(stories.read_text() + '{"text": "more"}\n')
    module = make(stories)
    module.setup("fit")
    assert len(digests | {module.fingerprint["digest"]}) == 6


def cut(content: bytes) -> bytes:
    return content[:-2]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def miscount(content: bytes) -> bytes:
    facts = json.loads(content)
    facts["bytes"]["val"] += 1
    return json.dumps(facts).encode()


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("val.bin", cut),
        ("val.bin", flip_a_bit),
        ("corpus.json", cut),
        ("corpus.json", empty),
        ("corpus.json", miscount),
    ],
)
def test_a_damaged_cache_is_made_again(
    name: str,
    damage: Callable[[bytes], bytes],
    stories: Path,
    make: Callable[..., PretrainingDataModule],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = make(stories)
    first.setup("fit")
    heldout = first.heldout_bytes()
    path = first.corpus.folder / name
    path.write_bytes(damage(path.read_bytes()))
    second = make(stories)
    second.setup("fit")
    assert second.heldout_bytes() == heldout
    assert f"{name} is damaged in the cache" in caplog.text


def test_what_a_kill_left_is_cleared_away(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    first = make(stories)
    first.setup("fit")
    folder = first.corpus.folder
    folder.rename(folder.with_suffix(".tmp"))  # killed just before the end
    second = make(stories)
    second.setup("fit")
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]
    assert second.corpus.facts == first.corpus.facts


def test_the_facts_hold_the_files_digests(
    stories: Path, make: Callable[..., PretrainingDataModule]
) -> None:
    module = make(stories)
    module.setup("fit")
    for split, digest in module.corpus.facts["sha256"].items():
        assert hashlib.sha256(module.corpus.path(split).read_bytes()).hexdigest() == digest


PREPARE = """
import sys
from datamodules.corpus import prepare
from datamodules.tokenizer import Tokenizer

corpus = prepare(
    [sys.argv[1]],
    text_column="text",
    tokenizer=Tokenizer.load(sys.argv[2]),
    near_duplicates=None,
    val_fraction=0.1,
)
print(corpus.path("train").stat().st_ino)
"""


def test_processes_that_start_together_make_one_corpus(stories: Path, tokenizer_file: Path) -> None:
    command = [sys.executable, "-c", PREPARE, str(stories), str(tokenizer_file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    made = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(made) == 1


def test_a_large_vocabulary_takes_four_bytes(
    stories: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(tokenizer_file)

    def made() -> Corpus:
        options: dict[str, Any] = {"near_duplicates": None, "val_fraction": 0.1}
        return prepare([str(stories)], text_column="text", tokenizer=tokenizer, **options)

    small = made().tokens("train")
    monkeypatch.setattr(Tokenizer, "n_vocab", (1 << 16) + 1)
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(stories.parent / "other"))
    large = made().tokens("train")
    assert (small.dtype, large.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert small.tolist() == large.tolist()


# --- the whole


def test_training_text_can_be_streamed_without_heavy_imports() -> None:
    code = (
        "import sys; import datamodules.corpus, datamodules.tokenizer;"
        "heavy = {'torch', 'lightning', 'pandas', 'datasketch', 'ftfy', 'tokenizers', 'httpx'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_python_docs_by_default_hold_what_the_demo_needs(
    make: Callable[..., PretrainingDataModule],
) -> None:
    module = make(PYTHON_DOCS)
    module.setup("fit")
    counts = module.fingerprint["counts"]
    assert sum(counts["bytes"].values()) > 1_000_000
    assert module.fingerprint["split"] == "document"
    assert [name.split("@")[0] for name in module.fingerprint["sources"]] == [PYTHON_DOCS]


def test_the_verdict_with_gpt2(
    real_data: Path, make: Callable[..., PretrainingDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_data / "tiktoken_cache"))
    monkeypatch.setenv("GPT_PIPELINE_DATA", str(real_data))
    module = make("$GPT_PIPELINE_DATA/pretraining/the-verdict.txt", tokenizer="gpt2")
    module.setup("fit")
    n_tokens = module.fingerprint["counts"]["tokens"]
    assert sum(n_tokens.values()) == 5145  # as in the book, chapter 2
    nats = math.log(50257)  # of a model that knows nothing: log2(50257) bits for 4 bytes
    assert nats / math.log(2) / module.val_bytes_per_token == pytest.approx(15.6 / 3.9, rel=0.1)
