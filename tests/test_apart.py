"""Validation and test sets in separate files stay whole; their repeats leave the training set."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from datamodules.splits import SPLITS, shares
from datamodules.text_classification import TextClassificationDataModule
from pipeline.checkpoint import read_meta
from pipeline.held_out import check_held_out
from tests.journey import CONFIGS, PLAIN, SHORT, TINY, Journey, run, said
from tests.training import instruction_data, pretraining_data, spam_data

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    return tmp_path / "mlruns"


def messages(folder: Path, name: str, said_by: list[str]) -> str:
    """A file of messages, every other one spam."""
    kinds = ("ham", "spam")
    path = folder / name
    path.write_text("".join(f"{kinds[i % 2]}\t{text}\n" for i, text in enumerate(said_by)))
    return str(path)


def greetings(word: str, n: int = 40) -> list[str]:
    return [f"{word} {NAMES[i % 10]} and {NAMES[i // 10]}" for i in range(n)]


def questions(folder: Path, name: str, asked: list[str]) -> str:
    path = folder / name
    entries = [{"instruction": f"Greet {text}.", "output": f"Hello {text}."} for text in asked]
    path.write_text(json.dumps(entries))
    return str(path)


def test_shares_of_what_is_left() -> None:
    plain = shares(0.7, 0.1, ())
    assert tuple(plain.values()) == (0.7, 0.1, 1 - 0.7 - 0.1), "the same to the last bit"
    left = shares(0.7, 0.1, {"test"})
    assert left == pytest.approx({"train": 0.875, "val": 0.125, "test": 0})
    assert shares(0.7, 0.1, {"val", "test"}) == {"train": 1, "val": 0, "test": 0}


@pytest.mark.parametrize("own", [{"test"}, {"val"}, {"val", "test"}])
def test_texts(own: set[str], tiny: Journey, tmp_path: Path, caplog: Any) -> None:
    told, tested = greetings("validate"), greetings("test")
    learned = [*greetings("learn"), tested[3].upper(), told[5] + "!", told[6]]
    files = {
        "source": messages(tmp_path, "train.tsv", learned),
        "val_source": messages(tmp_path, "val.tsv", told) if "val" in own else None,
        "test_source": messages(tmp_path, "test.tsv", [*tested, told[7]])
        if "test" in own
        else None,
    }
    fractions = {"train_fraction": 0.6, "val_fraction": 0.2}
    data = spam_data(tiny.tokenizer, **fractions, **files)
    with caplog.at_level("INFO", "datamodules"):
        data.setup("fit")
    assert set(data.texts("test")) >= {*tested, told[7]} or "test" not in own
    assert set(data.texts("val")) >= set(told) - {told[7]} or "val" not in own
    keys = {split: set(data.keys(split)) for split in SPLITS}
    assert not keys["train"] & (keys["val"] | keys["test"]) | keys["val"] & keys["test"]

    n_repeated = ("test" in own) + 2 * ("val" in own) + (own == {"val", "test"})
    assert data.fingerprint["counts"].get("n_repeated", 0) == n_repeated
    assert f"{n_repeated} rows repeat what is held out" in caplog.text
    n_read = len(learned) + sum(map(len, (told,) * ("val" in own))) + 41 * ("test" in own)
    assert sum(len(data.texts(split)) for split in SPLITS) == n_read - n_repeated
    share = 1 if own == {"val", "test"} else 0.75
    assert share * len(learned) - 4 <= len(data.texts("train")) <= share * len(learned)
    assert set(data.fingerprint["apart"]) == own
    assert {Path(name).stem for name in data.fingerprint["sources"]} == {"train", *own}
    assert [sample["label"] for sample in data.test_set] == data.labels("test")  # type: ignore[attr-defined]


def test_a_training_set_that_is_held_out_whole(tiny: Journey, tmp_path: Path) -> None:
    texts = messages(tmp_path, "train.tsv", greetings("learn"))
    data = spam_data(tiny.tokenizer, source=texts, test_source=texts)
    why = r"has no row of label .*\d+ rows were left out: they repeat what data\.val_source or"
    with pytest.raises(ValueError, match=why):
        data.setup("fit")
    entries = questions(tmp_path, "train.json", ["the cat", "a dog", "a fox"])
    data = instruction_data(tiny.tokenizer, source=entries, test_source=entries)
    with pytest.raises(ValueError, match=r"the train split of 3 items, .* 3 rows were left out"):
        data.setup("fit")


@pytest.mark.parametrize("shuffle_split", [False, True])
def test_entries(shuffle_split: bool, tiny: Journey, tmp_path: Path) -> None:
    tested = questions(tmp_path, "test.json", ["the cat", "a dog!"])
    asked = [f"{name} {i}" for name in NAMES for i in range(3)]
    source = questions(tmp_path, "train.json", ["THE CAT", *asked])
    fractions = {"train_fraction": 0.25, "val_fraction": 0.25, "shuffle_split": shuffle_split}
    data = instruction_data(tiny.tokenizer, source=source, test_source=tested, **fractions)
    data.setup("fit")
    assert [item["input"] + item["reference"] for item in data.items("test")] == [
        "Hello the cat.",
        "Hello a dog!.",
    ]
    assert min(len(data.items("train")), len(data.items("val"))) >= 14
    assert len(data.items("train")) + len(data.items("val")) == len(asked)
    counts = data.fingerprint["counts"]
    assert counts["n_repeated"] == 1
    assert counts["n_leaked_naive"] == 1 or shuffle_split, "the first is one to train on"
    assert len(data.test_set) == 2  # type: ignore[arg-type]


def test_documents(tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))
    prose = [" ".join(f"{a} met {b} by the {c}{n}." for a in NAMES for b in NAMES for c in NAMES)
             for n in range(4)]  # fmt: skip
    for name, texts in {"train": prose[:3], "val": [prose[3], prose[0]]}.items():
        rows = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, *rows[:1]]))
    almost = prose[3].replace("fox met gnu", "fox saw gnu")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": almost}))
    source, val_source = tmp_path / "train.jsonl", str(tmp_path / "val.jsonl")
    made = []
    for fraction in (0.1, 0.5):  # is not asked for
        options: dict[str, Any] = {"near_duplicates": 0.8, "val_fraction": fraction}
        data = pretraining_data(tiny.tokenizer, source, val_source=val_source, **options)
        data.setup("fit")
        made.append(data)
    assert made[0].heldout_bytes() == "\0".join([prose[3], prose[0]]).encode()
    assert made[0].train_bytes(1 << 30) == "\0".join(prose[1:3]).encode()
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].fingerprint["split"] == "apart"
    assert list(made[0].fingerprint["apart"]["val"]) == [val_source]
    counts = made[0].fingerprint["counts"]["documents"]
    assert counts["exact_duplicates"] == 3
    assert counts["near_duplicates"] == 1
    alone = pretraining_data(tiny.tokenizer, source)
    alone.setup("fit")
    assert "apart" not in alone.fingerprint
    assert alone.corpus
    assert made[0].corpus
    assert alone.corpus.key != made[0].corpus.key


def facts(source: str, **own: str) -> dict[str, Any]:
    """A fingerprint of files whose content is their name."""
    found: dict[str, Any] = {"sources": {name: name for name in (*source, *own.values())}}
    if own:
        found["apart"] = {split: {name: name} for split, name in own.items()}
    return found


@pytest.mark.parametrize(
    ("learned", "here", "refused"),
    [
        (facts("a", test="b"), facts("a", test="b"), None),
        (facts("a", test="b"), facts("a", test="c"), None),
        (facts("a"), facts("a", test="b"), None),
        (facts("a"), facts("", test="b"), None),
        (facts("a"), facts("", test="a"), "data.val_source and data.test_source named other"),
        (facts("ab"), facts("a", test="b"), "data.val_source and data.test_source named other"),
        (facts("a"), facts("c", test="a"), "c is not what it was"),
        (facts("a", test="b"), facts("a"), "b is not what it was"),
        (facts("a", test="b"), facts("b"), None),  # it was held out
        (facts("a", test="b"), facts("b", test="a"), "data.val_source and data.test_source named"),
        (facts("a", val="b"), facts("a"), "b is not what it was"),
    ],
)
def test_only_what_was_learned_is_refused(
    learned: dict[str, Any], here: dict[str, Any], refused: str | None
) -> None:
    meta = {"dataset": learned, "data": {"init_args": {}}}
    if refused is None:
        check_held_out(meta, {"init_args": {}}, here, ["test"])
    else:
        with pytest.raises(ValueError, match=refused):
            check_held_out(meta, {"init_args": {}}, here, ["test"])


@pytest.mark.parametrize(
    ("source", "test", "n_said"), [("a", "d", 1), ("c", "d", 0), ("a", "b", 0)]
)
def test_rows_that_a_checkpoint_may_have_learned_are_told(
    source: str, test: str, n_said: int, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = {"dataset": facts("a", test="b"), "data": {"init_args": {}}}
    here = {**facts(source, test=test), "counts": {"n_repeated": 2}}
    check_held_out(meta, {"init_args": {}}, here, ["test"])
    assert capsys.readouterr().err.count("2 rows of data.source repeat what is held out") == n_said


def test_fit_and_test(tiny: Journey, tmp_path: Path) -> None:
    source = messages(tmp_path, "train.tsv", [*greetings("learn"), "test ant and ant"])
    tested = messages(tmp_path, "test.tsv", greetings("test"))
    words = [f"--config={CONFIGS}/spam.yaml", *SHORT, *PLAIN, f"--data.source={source}"]
    words += [f"--data.test_source={tested}", f"--model.init_from={tiny.best('pretrain')}"]
    code, out, err = said("fit", *words)
    assert code == 0, err
    assert "test 40 (ham 20, spam 20); with a naive split 1 of its 40 test texts" in err
    assert "1 rows repeat what is held out" in err
    best = out.strip()
    assert list(read_meta(Path(best))["dataset"]["apart"]) == ["test"]

    code, out, err = said("test", f"--ckpt_path={best}")
    assert code == 0, err
    assert "warning" not in err
    assert "test accuracy" in out

    other = messages(tmp_path, "other.tsv", ["learn ant and ant!", *greetings("try")])
    code, _, err = said("test", f"--ckpt_path={best}", f"--data.test_source={other}")
    assert code == 0, err
    assert f"warning: the checkpoint was trained on {source}, and is evaluated on" in err
    assert f"other data, {other}; data.test_source says on which" in err
    assert "warning: 1 rows of data.source repeat what is held out here" in err

    code, _, err = said("test", f"--ckpt_path={best}", "--data.test_source=null")
    assert code == 2
    assert f"may have been trained on: {tested} is not what it was" in err


def test_a_file_is_answered_whole(tiny: Journey, tmp_path: Path, home: Path) -> None:
    """Also by a model that does not say what it was tuned on."""
    source = questions(tmp_path, "questions.json", NAMES[:3])
    words = ["--max_new_tokens=4", f"--data.test_source={source}"]
    published = tmp_path / "published"
    form = ["--format=huggingface", f"--output={published}"]
    assert run("export", f"--ckpt={tiny.best('instruct')}", *form) == 0
    code, out, err = said("score", f"--ckpt={published}", *words)
    assert code == 0, err
    assert out.startswith("3 answers")
    assert re.search(r"^chrf: \d+\.\d+ \[\d+\.\d\d, \d+\.\d\d\]$", out, re.MULTILINE)
    code, out, err = said("score", f"--ckpt={tiny.best('instruct')}", *words)
    assert code == 0, err
    assert out.startswith("3 answers")
    assert "and is evaluated on other data" in err
    assert "bundled:instructions: items " in err, "what the data have to say is shown here, too"
    code, out, err = said("score", f"--ckpt={published}", *words)
    assert "already finished" in err
    questions(tmp_path, "questions.json", NAMES[:4])
    code, out, err = said("score", f"--ckpt={published}", *words)
    assert out.startswith("4 answers")

    words = [f"--config={CONFIGS}/instruct.yaml", *SHORT, *PLAIN, "--data.source=null"]
    code, _, err = said("fit", *words, f"--model.init_from={tiny.best('pretrain')}")
    assert code == 2
    assert "data.source is null, and so is data.test_source" in err
    words += [f"--data.test_source={source}"]
    code, _, err = said("fit", *words, f"--model.init_from={tiny.best('pretrain')}")
    assert code == 2
    assert "data.source is null, there is nothing to train on" in err


def test_an_untuned_model_is_asked_in_a_style_that_is_given(
    tiny: Journey, tmp_path: Path, home: Path
) -> None:
    source = questions(tmp_path, "questions.json", NAMES[:3])
    words = ["--max_new_tokens=4", f"--data.test_source={source}", "--before="]
    base, tuned = (f"--ckpt={tiny.best(name)}" for name in ("pretrain", "instruct"))
    code, _, err = said("score", base, *words)
    assert code == 2
    assert "score with --data.prompt_style" in err
    code, out, err = said("score", base, *words, "--data.prompt_style=alpaca")
    assert code == 0, err
    assert out.startswith("3 answers")
    code, _, err = said("score", tuned, *words, "--data.prompt_style=phi3")
    assert code == 2
    assert "was tuned with data.prompt_style 'alpaca', here it is 'phi3'" in err
    code, _, err = said("score", base, *words, "--data.prompt_style=alpacca")
    assert code == 2
    assert "data.prompt_style is 'alpacca'; choose one of" in err


def test_a_chain_looks_for_them_first(tmp_path: Path) -> None:
    chain = tmp_path / "chain.yaml"
    stage = {"name": "spam", "command": "fit", "config": str(CONFIGS / "spam.yaml")}
    stage["set"] = {"data.test_source": "not-there.csv", "model.init_from": "x"}  # type: ignore
    chain.write_text(json.dumps({"experiment": "own", "stages": [stage]}))
    code, _, err = said("run", f"--config={chain}")
    assert code == 2
    assert re.search("stage 'spam': .*not-there.csv", err)


def test_pretraining_beside_a_file_of_its_own(tiny: Journey, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("The quick heron stood in the rain.\n" * 20)
    words = [f"--config={CONFIGS}/pretrain.yaml", *TINY, *PLAIN]
    words += [f"--data.source=[{tiny.folder / 'prose'}]", f"--data.tokenizer={tiny.tokenizer}"]
    code, out, err = said("fit", *words, f"--data.val_source={held_out}")
    assert code == 0, err
    dataset = read_meta(Path(out.strip()))["dataset"]
    assert dataset["counts"]["documents"]["val"] == 1
    assert dataset["counts"]["bytes"]["val"] == 700
    assert list(dataset["apart"]["val"]) == [str(held_out)]

    another = tmp_path / "another.txt"
    another.write_text("A lazy heron stood there, too.\n" * 20)
    tested = [f"--ckpt_path={out.strip()}", f"--data.val_source={another}"]
    code, out, err = said("test", *PLAIN, *tested)
    assert code == 0, err
    assert "test/loss: " in out + err
    assert "pretraining has no third split" in out + err
    assert (
        f"is evaluated on other data, {another}; data.val_source says on which; which texts" in err
    )


def test_a_table_needs_something_to_train_on(tiny: Journey, tmp_path: Path) -> None:
    tested = messages(tmp_path, "test.tsv", greetings("test"))
    data = spam_data(tiny.tokenizer, source=tested, test_source=tested)
    assert isinstance(data, TextClassificationDataModule)
    with pytest.raises(ValueError, match=r"the train split .* has no row of label 'ham'"):
        data.setup("fit")
