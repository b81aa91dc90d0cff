import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from datamodules import baselines, progress, splits
from datamodules.baselines import tfidf_baseline
from datamodules.tables import read_rows, read_table
from datamodules.text_classification import SpamDataModule, TextClassificationDataModule
from datamodules.tokenizer import Tokenizer, train_tokenizer

Write = Callable[[str, str | bytes], Path]
LABELS = ["sport", "food", "law"]
WORDS = ["one", "two", "red", "sea", "tea", "cup", "sun", "map", "ink", "box", "fog", "gym", "jam"]
WORDS += ["oak", "pea"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_tokenizer([" ".join(WORDS)] * 3, vocab_size=300, min_frequency=2).save(path)
    return path


@pytest.fixture
def make(tokenizer_file: Path) -> Callable[..., TextClassificationDataModule]:
    """A data module with small settings, any of them replaced."""

    def make_module(source: Path, **changes: Any) -> TextClassificationDataModule:
        return TextClassificationDataModule(
            **{**OPTIONS, "source": str(source), "tokenizer": str(tokenizer_file), **changes}
        )

    return make_module


OPTIONS = {
    "text_column": "text",
    "label_column": "topic",
    "label_names": LABELS,
    "max_length": 64,
    "suffix": "",
    "train_fraction": 0.6,
    "val_fraction": 0.2,
    "balance": False,
    "batch_size": 4,
    "max_tokens": 256,
    "seed": 0,
    "split_seed": 0,
    "num_workers": 0,
}


def rows(n: int) -> list[tuple[str, str]]:
    """(topic, text): half of them sport, no two texts with the same key."""
    topics = ("sport", "food", "sport", "law")
    return [
        (topics[i % 4], f"{WORDS[i % 15]} {WORDS[i // 15 % 15]} {WORDS[i // 225]}, no. {i}")
        for i in range(n)
    ]


def table(rows: list[tuple[str, str]], separator: str = "\t") -> str:
    return "".join(f"{separator.join(row)}\n" for row in [("topic", "text"), *rows])


def all_ids(module: TextClassificationDataModule) -> list[int]:
    sets = (module.train_set, module.val_set, module.test_set)
    return [sample["sample_id"] for samples in sets for sample in samples]  # type: ignore[attr-defined]


def test_samples_by_hand(write: Write, make: Any, tokenizer_file: Path) -> None:
    module = make(write("t.tsv", table(rows(40))))
    module.setup("fit")
    tokenizer = Tokenizer.load(tokenizer_file)
    for split, samples in (("train", module.train_set), ("test", module.test_set)):
        for i, sample in enumerate(samples):
            topic, text = rows(40)[sample["sample_id"]]
            assert sample["input_ids"].tolist() == tokenizer.encode(text)
            assert sample["input_ids"].dtype == torch.int64
            assert LABELS[sample["label"]] == topic
            assert module.texts(split)[i] == text
            assert module.labels(split)[i] == sample["label"]
    assert sorted(all_ids(module)) == list(range(40))
    assert module.meta() == {"label_names": LABELS, "max_length": 64, "suffix": ""}


def test_counts_say_what_is_where(
    write: Write, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write("t.tsv", table(rows(100)))
    module = make(path)
    module.setup("fit")
    counts = module.fingerprint["counts"]
    assert counts == {
        "rows": 100,
        **{"train": 60, "train/sport": 30, "train/food": 15, "train/law": 15},
        **{"val": 20, "val/sport": 10, "val/food": 5, "val/law": 5},
        **{"test": 20, "test/sport": 10, "test/food": 5, "test/law": 5},
        **{"n_cut": 0, "n_leaked_naive": 0},
    }
    shown = "rows 100, train 60 (sport 30, food 15, law 15), val 20 (sport 10, food 5, law 5), test"
    assert shown in caplog.text
    assert list(module.fingerprint["sources"]) == [str(path)]
    assert json.loads(json.dumps(module.fingerprint)) == module.fingerprint  # primitives


def test_every_format_gives_the_same_samples(write: Write, make: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows(40), columns=["topic", "text"])
    frame.to_csv(tmp_path / "t.csv", index=False)  # the commas in the texts are quoted
    frame.to_csv(tmp_path / "excel.csv", index=False, sep=";", encoding="utf-8-sig")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "t.parquet")
    write("t.tsv", table(rows(40)))
    digests = set()
    for name in ("t.csv", "excel.csv", "t.tsv", "t.jsonl", "t.parquet"):
        module = make(tmp_path / name)
        module.setup("fit")
        digests.add(module.fingerprint["digest"])
    assert len(digests) == 1


def test_a_folder_is_read_file_by_file(write: Write, make: Any, tmp_path: Path) -> None:
    write("data/a.tsv", table(rows(40)[:25]))
    write("data/b.tsv", table(rows(40)[25:]))
    whole, parts = make(write("t.tsv", table(rows(40)))), make(tmp_path / "data")
    whole.setup("fit")
    parts.setup("fit")
    assert whole.fingerprint["digest"] == parts.fingerprint["digest"]
    assert len(parts.fingerprint["sources"]) == 2


def test_the_split_depends_on_split_seed_and_the_order_on_seed(write: Write, make: Any) -> None:
    path = write("t.tsv", table(rows(40)))

    def module(**changes: int) -> TextClassificationDataModule:
        made = make(path, **changes)
        made.setup("fit")
        return made

    first = module()
    assert first.fingerprint == module(seed=1).fingerprint
    assert first.fingerprint["digest"] != module(split_seed=1).fingerprint["digest"]
    assert torch.equal(first.train_order()(3), module().train_order()(3))
    assert not torch.equal(first.train_order()(3), module(seed=1).train_order()(3))


def test_equal_texts_stay_on_one_side(
    write: Write, make: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="datamodules")
    monkeypatch.setattr(progress, "TELL_S", -1.0)
    repeats = [("sport", f"Goal!! {i}, {i}") for i in range(30, 50)]  # equal but for digits
    path = write("t.tsv", table(rows(60) + repeats))
    module = make(path)
    module.setup("fit")
    keys = {
        split: {splits.canonical_key(text, mask_digits=True) for text in module.texts(split)}
        for split in splits.SPLITS
    }
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]
    n_leaked = module.fingerprint["counts"]["n_leaked_naive"]
    assert n_leaked > 0
    assert f"with a naive split {n_leaked} of its 16 test texts would be in training" in caplog.text
    assert "80 rows encoded so far" in caplog.messages


def test_balancing_is_within_each_split(write: Write, make: Any) -> None:
    path = write("t.tsv", table(rows(100)))
    module, natural = make(path, balance=True), make(path)
    module.setup("fit")
    natural.setup("fit")
    for split, n in (("train", 15), ("val", 5), ("test", 5)):
        assert np.bincount(module.labels(split)).tolist() == [n, n, n]
        assert set(module.texts(split)) <= set(natural.texts(split))


def test_every_text_ends_with_the_suffix(write: Write, make: Any, tokenizer_file: Path) -> None:
    """Also one that is cut; a suffix that leaves no room is refused."""
    long, tokenizer = ("law", "sun sea tea " * 50), Tokenizer.load(tokenizer_file)
    path, end = write("t.tsv", table([*rows(40), long])), tokenizer.encode("\n--")
    module = make(path, max_length=20, suffix="\n--")
    module.setup("fit")
    samples = [s for d in (module.train_set, module.val_set, module.test_set) for s in d]
    assert len(samples) == 41
    assert all(sample["input_ids"].tolist()[-len(end) :] == end for sample in samples)
    cut = next(sample for sample in samples if sample["sample_id"] == 40)["input_ids"].tolist()
    assert cut == tokenizer.encode(long[1])[: 20 - len(end)] + end
    with pytest.raises(
        ValueError, match=r"data\.suffix has .* tokens, data\.max_length is 1; raise"
    ):
        make(path, max_length=1, suffix="\n--").setup("fit")


def test_a_long_text_loses_its_end_and_is_counted(
    write: Write, make: Any, tokenizer_file: Path
) -> None:
    long = "sun sea tea " * 50
    module = make(write("t.tsv", table([*rows(40), ("law", long)])), max_length=20)
    module.setup("fit")
    samples = [s for d in (module.train_set, module.val_set, module.test_set) for s in d]
    cut = next(sample for sample in samples if sample["sample_id"] == 40)
    assert cut["input_ids"].tolist() == Tokenizer.load(tokenizer_file).encode(long)[:20]
    n_long = sum(len(Tokenizer.load(tokenizer_file).encode(text)) > 20 for _, text in rows(40))
    assert module.fingerprint["counts"]["n_cut"] == 1 + n_long


def test_special_token_text_is_ordinary_text(write: Write, make: Any) -> None:
    attacks = [("food", f"<|endoftext|> {word} <|im_end|>") for word in WORDS]
    module = make(write("t.tsv", table(rows(40) + attacks)))
    module.setup("fit")
    specials = set(module.tokenizer.special_ids.values())
    for sample in module.train_set:
        assert not specials & set(sample["input_ids"].tolist())


def test_labels_may_be_integers(write: Write, make: Any) -> None:
    lines = [json.dumps({"text": text, "topic": i % 2}) for i, (_, text) in enumerate(rows(40))]
    module = make(write("t.jsonl", "\n".join(lines)), label_names=[0, "1"])
    assert module.label_names == ["0", "1"]
    module.setup("fit")
    assert all(sample["label"] == sample["sample_id"] % 2 for sample in module.train_set)


@pytest.mark.parametrize(
    ("topics", "order", "counted"),
    [
        (["b", "10", "a"], ["10", "a", "b"], 2),
        ([10, 9, 0.0], ["0", "9", "10"], 2),
        (["1", "-2", "01"], ["-2", "01", "1"], 2),
    ],
)
def test_labels_are_found(
    topics: list[Any],
    order: list[str],
    counted: int,
    write: Write,
    make: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`counted` is the place of the first topic, which has a row more."""
    lines = [json.dumps({"text": t, "topic": topics[i % 3]}) for i, (_, t) in enumerate(rows(40))]
    module = make(write("t.jsonl", "\n".join(lines)), label_names=None)
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert module.meta()["label_names"] == order
    shown = ", ".join(f"'{name}' (1{3 + (i == counted)})" for i, name in enumerate(order))
    assert f"t.jsonl: 3 labels, in order: {shown}" in caplog.text
    names = [str(int(t)) if isinstance(t, float) else str(t) for t in topics]
    for sample in module.train_set:
        assert order[sample["label"]] == names[sample["sample_id"] % 3]


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("always", r"'topic' holds one label alone, 'always' \(40\); give rows of another one"),
        (None, r"'topic' holds 40 labels in 40 rows: 'row 0' \(1\), .* \.\.\.; set data.label_col"),
    ],
)
def test_a_column_that_holds_no_labels_is_refused(
    topic: str | None, message: str, write: Write, make: Any
) -> None:
    own = [(topic or f"row {i}", text) for i, (_, text) in enumerate(rows(40))]
    with pytest.raises(ValueError, match=message):
        make(write("t.tsv", table(own)), label_names=None).setup("fit")


def test_a_label_of_a_held_out_file_alone_is_named_with_its_row(write: Write, make: Any) -> None:
    source, held_out = write("t.tsv", GOOD), write("test.tsv", "topic\ttext\nLaw\tto sue them\n")
    message = (
        r"the train split of .*/t.tsv has no row of label 'Law', only .*/test.tsv: row 1 has it; "
        r"add such rows, or correct or drop these"
    )
    with pytest.raises(ValueError, match=message):
        make(source, label_names=None, test_source=str(held_out)).setup("fit")


def test_a_second_setup_changes_nothing(write: Write, make: Any) -> None:
    module = make(write("t.tsv", table(rows(40))))
    module.setup("fit")
    train_set = module.train_set
    module.setup("test")
    assert module.train_set is train_set


GOOD = table(rows(40))
BAD_DATA = {
    "no column": (
        "t.tsv",
        GOOD.replace("topic", "kind", 1),
        r"no column 'topic', only \['kind', .*; set data.text_column and data.label_c",
    ),
    "no text": (
        "t.tsv",
        GOOD.replace("text", "body", 1),
        r"no column 'text', only \['topic', 'body'\]; set data.text_column",
    ),
    "unknown": (
        "t.tsv",
        GOOD + "art\tpaint\n",
        r"row 41: it has label 'art', data.label_names is \['s.* read are 'sport' .*, 'art' \(1\)",
    ),
    "no label": ("t.tsv", GOOD + "\tpaint\n", r"t.tsv: row 41: it has no 'topic'; give it a label"),
    "several": (
        "t.tsv",
        GOOD + "\tpaint\n" * 2 + "law\t\nart\tx\n",
        r"t.tsv: row 41: it has no 'topic'; .* 3 more have .*t.tsv: row 42, .*row 43, .*w 44\. The",
    ),
    "null label": ("t.jsonl", '{"topic": null, "text": "x"}', r"t.jsonl: row 1: it has no 'topic'"),
    "null text": ("t.jsonl", '{"topic": "law", "text": null}', r"row 1: it has no 'text'; give it"),
    "no key": ("t.jsonl", '{"topic": "law", "text": "x"}\n{"text": "y"}', r"row 2: it has no 'top"),
    "blank": ("t.tsv", GOOD + "law\t  \n", r"t.tsv: row 41: 'text' is empty; correct or drop"),
    "number": ("t.jsonl", '{"topic": "law", "text": 3}', r"row 1: 'text' is 3, not a text; corr"),
    "one class": ("t.tsv", table([("law", w) for w in WORDS]), r"no row of label 'sport'; add"),
    "bytes": (
        "t.tsv",
        GOOD.encode() + b"law\t\xe9t\xe9\n",
        r"t.tsv: byte \d+ \(0xe9\) is not UTF-8",
    ),
    "json": ("t.jsonl", '{"topic": "law", "text": "x"}\n{oops', r"t.jsonl:2: .*; fix the line"),
    "empty": ("t.tsv", "", r"t.tsv holds no rows; fill it, or leave it out"),
    "header only": ("t.tsv", "topic\ttext\n", r"t.tsv holds no rows"),
    "few": (
        "t.tsv",
        table(rows(4)),
        r"the test split of 4 items, 4 of them different, is empty; give more",
    ),
}


def test_a_text_with_two_labels_is_said(
    write: Write, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for more, said in (("", False), ("law\ta goal\nsport\ta goal \n", True)):
        make(write("t.tsv", GOOD + more)).setup("fit")
        expected = "1 texts appear with different labels: 'a goal'."
        assert (expected in caplog.text) is said


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_by_file_and_row(write: Write, make: Any, name: str) -> None:
    file_name, content, message = BAD_DATA[name]
    module = make(write(file_name, content))
    with pytest.raises(ValueError, match=message) as caught:
        module.setup("fit")
    assert "\n" not in str(caught.value)
    assert file_name in str(caught.value) or name == "few"


@pytest.mark.parametrize(
    ("topics", "texts", "message"),
    [
        (pd.array(["law", None], "string"), ["x", "y"], r"row 2: it has no 'topic'; give it a lab"),
        (pd.array([1, None], "Int64"), ["x", "y"], r"row 2: it has no 'topic'; give it a label"),
        (["law", "1"], pd.array(["x", None], "string"), r"row 2: it has no 'text'; give it a text"),
        (["law", "1"], [["x", "y"], ["z"]], r"row 1: 'text' is .*'x', 'y'.*, not a text; correct"),
        ([["law", "1"], ["1"]], ["x", "y"], r"row 1: 'topic' is .*'law' '1'.*; give it a single"),
        (["law", " "], ["x", "y"], r"row 2: it has no 'topic'; give it a label"),
    ],
)
@pytest.mark.parametrize("names", [["law", "1"], None])
def test_a_cell_of_parquet_that_is_no_text_or_label(
    make: Any, tmp_path: Path, names: list[str] | None, topics: Any, texts: Any, message: str
) -> None:
    """pandas' own NA is not even equal to itself, and lists arrive as arrays."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"topic": topics, "text": texts}).to_parquet(path)
    with pytest.raises(ValueError, match=rf"t\.parquet: {message}"):
        make(path, label_names=names).setup("fit")


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "max_length": ({"max_length": 0}, "data.max_length is 0"),
    "one name": ({"label_names": ["law"]}, "data.label_names is"),
    "equal names": ({"label_names": ["law", "law"]}, "data.label_names is"),
    "fraction": ({"train_fraction": 1.5}, "data.train_fraction is 1.5"),
    "no test": ({"val_fraction": 0.4}, "leave nothing to test on"),
    "batch": ({"batch_size": 0}, "data.batch_size is 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_impossible_arguments_are_refused_before_reading(make: Any, name: str) -> None:
    changes, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        make(Path("does-not-exist.tsv"), **changes)


def test_balancing_needs_every_class_in_every_split(write: Write, make: Any) -> None:
    path = write("t.tsv", table([*rows(40), ("law", "alone")]).replace("law\talone", "art\talone"))
    with pytest.raises(ValueError, match=r"the val split of .* has no row of label 'art'"):
        make(path, balance=True, label_names=[*LABELS, "art"]).setup("fit")


SPAM = {k: v for k, v in OPTIONS.items() if not k.startswith(("text", "label"))}


def test_spam_with_and_without_header(write: Write, tokenizer_file: Path) -> None:
    quotes = ['"unfinished', 'it"s "quoted"', "plain", '"', "N/A", "null", "5\" of 'rain'"]
    lines = "".join(
        f"{('ham', 'spam')[i % 2]}\t{quotes[i % 7]} {WORDS[i % 15]}\n" for i in range(60)
    )
    modules = []
    for name, content in (
        ("SMSSpamCollection", lines),
        ("bom.tsv", "\ufeff" + lines),
        ("sms.tsv", "label\ttext\n" + lines),
        ("windows.tsv", "label\ttext\n" + lines.replace("\n", "\r\n")),
    ):
        source = str(write(name, content))
        modules.append(SpamDataModule(**SPAM, source=source, tokenizer=str(tokenizer_file)))
        modules[-1].setup("fit")
    assert all(module.fingerprint["counts"]["rows"] == 60 for module in modules)
    assert len({module.fingerprint["digest"] for module in modules}) == 1
    assert modules[0].meta()["label_names"] == ["ham", "spam"]


def test_spam_of_another_form_is_told_what_to_do(write: Write, tokenizer_file: Path) -> None:
    source = str(write("kaggle.csv", "v1,v2\nham,Hello\nspam,Win\n"))
    module = SpamDataModule(**SPAM, source=source, tokenizer=str(tokenizer_file))
    with pytest.raises(ValueError, match=r"no column 'label', only \['v1', 'v2'\]; .*table\.yaml"):
        module.setup("fit")


def test_the_whole_sms_spam_collection_arrives(real_data: Path, tokenizer_file: Path) -> None:
    path = real_data / "sms_spam" / "SMSSpamCollection"
    options = {**SPAM, "train_fraction": 0.7, "val_fraction": 0.1, "split_seed": 123}
    module = SpamDataModule(**options, source=str(path), tokenizer=str(tokenizer_file))
    module.setup("fit")
    counts = module.fingerprint["counts"]
    assert counts["rows"] == counts["train"] + counts["val"] + counts["test"] == 5574
    assert sum(counts[f"{split}/spam"] for split in splits.SPLITS) == 747
    assert counts["test/spam"] == 149
    assert counts["n_leaked_naive"] == 137  # of 1,115
    lines = path.read_text(encoding="utf-8").splitlines()
    for split in splits.SPLITS:
        for text in module.texts(split):
            assert isinstance(text, str)
    sample = module.test_set[0]
    assert lines[sample["sample_id"]].partition("\t")[2] == module.texts("test")[0]


def test_the_baseline_separates_what_words_tell(write: Write) -> None:
    generator = np.random.default_rng(0)
    labels = [i % 3 for i in range(90)]
    texts = [" ".join([WORDS[label], *generator.choice(WORDS[3:], 4).tolist()]) for label in labels]
    probabilities = tfidf_baseline(texts[:50], labels[:50], texts[50:70], labels[50:70], texts[70:])
    assert probabilities.shape == (20, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)  # float64 rounding
    assert (probabilities.argmax(1) == labels[70:]).all()


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_baseline_reads_characters_where_there_are_no_words() -> None:
    texts, labels = ["🙂🎉", "😡 👎", "🙂", "👎😡😡"] * 5, [0, 1, 0, 1] * 5
    probabilities = tfidf_baseline(texts, labels, texts, labels, ["🎉", "👎", "word"])
    assert probabilities.shape == (3, 2)
    assert probabilities[:2].argmax(1).tolist() == [0, 1]


def test_the_baseline_on_real_messages(real_data: Path, tokenizer_file: Path) -> None:
    path = real_data / "sms_spam" / "SMSSpamCollection"
    options = {**SPAM, "train_fraction": 0.7, "val_fraction": 0.1, "split_seed": 123}
    module = SpamDataModule(**options, source=str(path), tokenizer=str(tokenizer_file))
    module.setup("fit")
    probabilities = tfidf_baseline(
        module.texts("train"),
        module.labels("train"),
        module.texts("val"),
        module.labels("val"),
        module.texts("test"),
    )
    truth = np.array(module.labels("test"))
    predicted = probabilities.argmax(1)
    # 0.990 and 0.962 when written; the bounds leave room for other versions of scikit-learn
    assert (predicted == truth).mean() > 0.98
    assert f1_score(truth, predicted) > 0.94


def test_tfidf_of_many_labels_keeps_its_coefficients_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as many as words and labels multiplied: of 500 labels, more than memory holds."""
    shapes, fit = [], LogisticRegression.fit

    def noted(model: Any, texts: Any, labels: Any) -> Any:
        shapes.append(texts.shape[1])
        return fit(model, texts, labels)

    monkeypatch.setattr(LogisticRegression, "fit", noted)
    monkeypatch.setattr(baselines, "MAX_COEFFICIENTS", 60)
    names = ["red", "green", "blue"]
    texts = [f"it is {names[i % 3]} {i} of {i * i}" for i in range(60)]
    labels = [i % 3 for i in range(60)]
    probabilities = tfidf_baseline(texts, labels, texts, labels, texts)
    assert set(shapes) == {20}
    assert probabilities.argmax(1).tolist() == labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    """pandas would number the second, and take the first."""
    path = tmp_path / f"moods{suffix}"
    if suffix == ".parquet":
        columns = [pa.array(["a", "b"])] * 3
        parquet.write_table(pa.Table.from_arrays(columns, ["text", "label", "label"]), path)
    else:
        between = "," if suffix == ".csv" else "\t"
        odd = "a\rb" if suffix == ".tsv" else "ab"  # no end of a line there
        rows = (["text", "label", "label", odd], ["a", "joy", "anger", "b"])
        path.write_text("\n".join(between.join(row) for row in rows), newline="")
    for read in (lambda: read_table(path), lambda: list(read_rows(path, "text"))):
        with pytest.raises(ValueError, match="has 'label' twice among its columns; rename one"):
            read()
