"""Evaluation data was held out from training and has the same form as in training."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.baselines import tfidf_baseline
from datamodules.instruction import LEARNED_ON
from datamodules.text_classification import SpamDataModule
from datamodules.tokenizer import Tokenizer
from pipeline.checkpoint import read_meta
from pipeline.held_out import check_held_out, published, trained_on
from pipeline.models import load
from pipeline.runs.journal import read_journal
from pipeline.stages.answering import Answering, of_last_response, parent_of, prompts_of
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, said
from tests.training import instruction_data


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    return tmp_path / "mlruns"


def refused(*words: str) -> str:
    code, _, err = said(*words)
    assert code == 2, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("split_seed=7", "data.split_seed was 1, is 7"),
        ("train_fraction=0.5", "data.train_fraction was 0.7, is 0.5"),
        ("suffix=!", "was trained with data.suffix ''"),
        ("max_length=32", "was trained with data.max_length"),
    ],
)
def test_a_test_on_another_split_or_form_is_refused(
    change: str, message: str, tiny: Journey
) -> None:
    words = ["test", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--data.{change}"]
    assert message in refused(*words, f"--ckpt_path={tiny.best('spam')}")


def score(tiny: Journey, *words: str) -> tuple[int, str, str]:
    config = f"--config={CONFIGS}/score.yaml"
    return said("score", config, f"--ckpt={tiny.best('instruct')}", "--max_new_tokens=4", *words)


def test_scores_on_another_split_are_refused(tiny: Journey) -> None:
    code, _, err = score(tiny, '--data={"split_seed": 7}')
    assert code == 2
    assert "what is held out here may have been trained on: data.split_seed was 1, is 7" in err


def test_what_a_score_compares_with_has_not_learned_it_either(tiny: Journey) -> None:
    words = ["fit", f"--config={CONFIGS}/instruct.yaml", *SHORT, *PLAIN, "--data.split_seed=7"]
    code, out, err = said(*words, f"--model.init_from={tiny.best('pretrain')}")
    assert code == 0, err
    before = out.splitlines()[-1]
    code, _, err = score(tiny, f"--before={before}")
    assert code == 2
    error = err.splitlines()[-1]
    assert "trained on: data.split_seed was 7, is 1" in error
    assert f"files that before ({before}) has not seen" in error


@pytest.mark.parametrize(
    ("data", "message"),
    [({"sorce": "x"}, "sorce"), ({"max_length": "long"}, "max_length"), ({"batch_size": 0}, "0")],
)
def test_data_that_cannot_be_is_one_line(data: dict[str, Any], message: str, tiny: Journey) -> None:
    code, _, err = score(tiny, f"--data={json.dumps(data)}")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_split_by_other_keys_is_another(tiny: Journey) -> None:
    """As of an earlier version, to which other texts were equal."""
    meta = read_meta(tiny.best("spam"))
    config, facts = meta["data"], meta["dataset"]
    check_held_out(meta, config, facts, ["test"])
    earlier = {**meta, "dataset": {**facts, "split": "texts"}}
    with pytest.raises(ValueError, match=r"it was split by texts, is split by texts \(keys of"):
        check_held_out(earlier, config, facts, ["test"])


def fingerprint(**sources: str) -> dict[str, Any]:
    return {"sources": sources}


def test_files_decide_whether_data_was_seen() -> None:
    meta = {"dataset": fingerprint(a="1"), "data": {"init_args": {"split_seed": 1}}}
    other, same = ({"init_args": {"split_seed": seed}} for seed in (2, 1))
    check_held_out(meta, other, fingerprint(b="2"), ["test"])  # nothing of it was seen
    check_held_out(meta, same, fingerprint(a="1"), ["test"])
    check_held_out(meta, same, fingerprint(moved="1"), ["test"])
    with pytest.raises(ValueError, match="a is not what it was"):
        check_held_out(meta, same, fingerprint(a="2"), ["test"])
    with pytest.raises(ValueError, match="split_seed was 1, is 2"):
        check_held_out(meta, other, fingerprint(moved="1"), ["test"])
    two = {**meta, "dataset": fingerprint(a="1", b="2")}
    check_held_out(two, same, fingerprint(c="1", d="2"), ["test"])
    with pytest.raises(ValueError, match="a is not what it was; c is not what it was"):
        check_held_out(
            two, same, fingerprint(b="2", c="1"), ["test"]
        )  # its rows are counted otherwise


def test_an_export_tells_files_of_one_name_apart() -> None:
    """Of train/x.jsonl and test/x.jsonl one was learned."""
    sources, apart = {"/a/x": "T", "/b/x": "E", "/c/x'": "V"}, {"test": {"/b/x": "E"}}
    meta = {"dataset": {"sources": sources, "apart": apart}, "data": {"init_args": {}}}
    own, shown = {"sources": {"/e": "E"}}, {"earlier": published(meta)}
    assert "/a" not in str(shown)
    for learned in (meta, shown):
        with pytest.raises(ValueError, match="may have been trained on"):
            check_held_out(learned, {}, {"sources": {"/t": "T"}}, ["test"])
        check_held_out(learned, {}, own, ["test"])


def test_what_was_trained_on_earlier_was_seen_too() -> None:
    """A model is tuned on one split, then that one on another: nothing of either is held out."""
    first = {"dataset": fingerprint(a="1"), "data": {"init_args": {"split_seed": 1}}}
    second = {"dataset": fingerprint(a="1"), "data": {"init_args": {"split_seed": 2}}}
    meta = {**second, "earlier": trained_on(first)}
    assert trained_on(meta) == [first, second]
    with pytest.raises(ValueError, match=r"trained on: data\.split_seed was 1, is 2\."):
        check_held_out(meta, second["data"], fingerprint(a="1"), ["test"])
    other = {**first, "dataset": {**fingerprint(a="1"), "split": "documents"}}
    with pytest.raises(ValueError, match="it was split by documents, is split by texts"):
        check_held_out(other, first["data"], {**fingerprint(a="1"), "split": "texts"}, ["test"])
    elsewhere = {**first, "dataset": fingerprint(prose="9")}
    check_held_out(
        {**second, "earlier": trained_on(elsewhere)}, second["data"], fingerprint(a="1"), ["test"]
    )


@pytest.mark.parametrize(
    "key",
    [
        *("split_seed", "train_fraction", "val_fraction", "shuffle_split", "near_duplicates"),
        *("text_column", "label_column"),
    ],
)
def test_what_decides_the_split_must_be_what_it_was(key: str) -> None:
    was, now = ({"init_args": {key: value}} for value in (0.8, None))
    with pytest.raises(ValueError, match=rf"data\.{key} was 0\.8, is None"):
        check_held_out(
            {"dataset": fingerprint(a="1"), "data": was}, now, fingerprint(a="1"), ["test"]
        )


def test_a_second_tuning_on_another_split_is_warned_of_and_never_tested(
    tiny: Journey, home: Path
) -> None:
    config, other = f"--config={CONFIGS}/spam.yaml", "--data.split_seed=7"
    words = ["fit", config, *PLAIN, other, f"--model.init_from={tiny.best('spam')}"]
    code, out, err = said(*words, "--trainer.max_steps=20", "--trainer.limit_val_batches=1")
    assert code == 0, err
    assert "warning: what is held out here may have been trained on before" in err
    again = Path(out.splitlines()[-1])
    splits = [entry["data"]["init_args"] for entry in trained_on(read_meta(again))]
    assert [split.get("split_seed") for split in splits] == [None, 1, 7], "pretraining has none"
    words = ["test", config, *PLAIN, other, f"--ckpt_path={again}"]
    assert "trained on: data.split_seed was 1, is 7" in refused(*words)
    words = ["test", config, f"--ckpt_path={tiny.best('spam')}", f"--before={again}"]
    code, _, err = said(*words)
    assert code == 2
    assert "test ━" not in err, "before any text is looked at"
    error = err.splitlines()[-1]
    assert "data.split_seed was 7, is 1" in error
    assert f"files that before ({again}) has not seen" in error


def test_going_on_with_another_split_is_remembered_too(tiny: Journey, home: Path) -> None:
    words = ["fit", f"--config={CONFIGS}/spam.yaml", *PLAIN, *SHORT, "--trainer.max_steps=8"]
    adapters = "{rank: 4, alpha: 8, dropout: 0.0, targets: [q, v], rslora: false, dora: false}"
    words += ["--model.trainable=lora", f"--model.lora={adapters}"]
    words += [f"--model.init_from={tiny.best('pretrain')}", f"--ckpt_path={tiny.best('spam')}"]
    for split, seeds in (("1", [None, 1]), ("7", [None, 1, 7])):
        changed = [f"--data.split_seed={split}", "--run.allow_changes=true"]
        code, out, err = said(*words, *changed)
        assert code == 0, err
        assert ("may have been trained on before, in" in err) == (split == "7")
        learned = trained_on(read_meta(Path(out.splitlines()[-1])))
        assert [training["data"]["init_args"].get("split_seed") for training in learned] == seeds
    test = ["test", f"--ckpt_path={out.splitlines()[-1]}"]
    assert "trained on: data.split_seed was 1, is 7" in refused(*test)


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_learned_is_known_again_in_another_file(
    split: str, tiny: Journey, tmp_path: Path
) -> None:
    """A part of the training data under another name shares no file with it."""
    meta = read_meta(tiny.best("spam"))
    module = SpamDataModule(**meta["data"]["init_args"])
    module.read()
    rows = zip(module.labels(split), module.texts(split), strict=True)
    path = tmp_path / "other.tsv"
    path.write_text("\n".join(f"{('ham', 'spam')[i]}\t{text.upper()}!" for i, text in rows))
    words = ["test", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--data.source={path}"]
    words += ["--data.train_fraction=0.4", "--data.val_fraction=0.2"]  # of few rows
    code, _, err = said(*words, f"--ckpt={tiny.best('spam')}")
    assert code == 0, err
    known = re.search(r"(\d+) of (\d+) texts that are evaluated on are what the checkpoint", err)
    assert (known is not None and known[1] == known[2]) == (split == "train"), err
    assert (known is None) == (split == "test"), err


def test_a_test_on_other_data_is_said_and_tracked(
    tiny: Journey, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []

    def spied(texts: list[str], *given: Any) -> Any:
        learned.append(len(texts))
        return tfidf_baseline(texts, *given)

    monkeypatch.setattr("pipeline.training.classifier_report.tfidf_baseline", spied)
    other = tmp_path / "other.tsv"
    lines = (f"{'spam' if n % 3 else 'ham'}\tnote {'x' * n} of the {n}th fox" for n in range(90))
    other.write_text("\n".join(lines))
    words = ["test", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--data.source={other}"]
    code, _, err = said(*words, f"--ckpt_path={tiny.best('spam')}")
    assert code == 0, err
    assert f", and is evaluated on other data, {other}; data.source says on which.\n" in err
    assert learned == [read_meta(tiny.best("spam"))["dataset"]["counts"]["train"]]  # as the model
    (run,) = home.glob("*/*/outcome.json")
    wanted = json.loads(run.read_text())["metrics"]
    assert {"test/accuracy", "baseline/tfidf_accuracy", "test/accuracy_minus_tfidf"} <= set(wanted)
    kept: dict[str, float] = {}
    for line, _ in read_journal(run.parent):
        if line["kind"] == "metric":
            kept |= line["values"]
    assert {name: kept.get(name) for name in wanted} == pytest.approx(wanted)


def test_a_finished_score_holds_while_its_inputs_do(tiny: Journey, tmp_path: Path) -> None:
    entries = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))}
        for n in range(2, 22)
    ]
    source = tmp_path / "counts.json"
    source.write_text(json.dumps(entries))
    before = tmp_path / "before"
    shutil.copytree(tiny.best("pretrain"), before)
    words = [f'--data={{"source": "{source}"}}', f"--before={before}"]
    _, out, first = score(tiny, *words)
    interval = r"[-+]\d+\.\d\d \[[-+]\d+\.\d\d, [-+]\d+\.\d\d\]"
    verdict = r"unclear \(fewer than 6 different questions\)"
    line = rf"^chrf: \d+\.\d{{4}} -> \d+\.\d{{4}}, difference {interval}: {verdict}$"
    assert re.search(line, out, re.MULTILINE)
    assert re.search(r"^2 answers, 95 % intervals; empty: 2 after$", out, re.MULTILINE)
    _, out_again, again = score(tiny, *words)
    assert "already finished" in again
    assert out_again == out
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert Path(first.splitlines()[-1].removeprefix("report: ")).is_file()
    entries[0]["output"] = "corrected"
    source.write_text(json.dumps(entries))
    assert "already finished" not in score(tiny, *words)[2]
    shutil.rmtree(before)
    shutil.copytree(tiny.best("instruct"), before)
    assert "already finished" not in score(tiny, *words)[2]


def test_what_it_was_tuned_from_must_be_that(tiny: Journey) -> None:
    tuned = load(tiny.best("instruct"))
    assert parent_of(tuned) == str(tiny.best("pretrain"))
    tuned.meta["parent"] = {**tuned.meta["parent"], "digest": "0" * 64}
    with pytest.raises(ValueError, match="say with --before"):
        parent_of(tuned)
    tuned.meta["parent"] = None
    assert parent_of(tuned) is None


def test_prompts_keep_their_middle_where_the_context_has_room(
    tiny: Journey, capsys: pytest.CaptureFixture[str]
) -> None:
    data = instruction_data(tiny.tokenizer)
    data.setup("test")

    def prompts(max_new_tokens: int, context: int) -> list[list[int]]:
        return prompts_of(data, Answering("test", max_new_tokens, 8, "32-true"), context)

    whole = prompts(256, 100_000)
    assert not capsys.readouterr().err
    longest = max(map(len, whole))
    cut = prompts(256, 256 + longest - 1)
    assert max(map(len, cut)) == longest - 1
    assert "prompts are longer than" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which leaves 0 of the model's 256 tokens"):
        prompts(256, 256)


def test_prompts_are_those_that_were_learned_from_whatever_day_it_is(tiny: Journey) -> None:
    data = instruction_data(tiny.tokenizer)
    data.setup("test")
    dated = (
        "{{ strftime_now('%d %b %Y') }}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    data.tokenizer = Tokenizer.of(replace(data.tokenizer.vocabulary, chat_template=dated))
    data.prompt_style = "template"
    prompts = prompts_of(data, Answering("test", 8, 8, "32-true"), 1000)
    begin = LEARNED_ON.strftime("%d %b %Y")
    assert all(data.tokenizer.decode(prompt).startswith(begin) for prompt in prompts)


def test_the_reference_of_a_conversation_is_its_last_answer() -> None:
    ignored = [-100, -100]
    labels = torch.tensor([*ignored, 5, 6, *ignored, 7, 8, 9])
    assert of_last_response(labels).tolist() == [*ignored, -100, -100, *ignored, 7, 8, 9]
    assert of_last_response(labels[:4]).tolist() == [*ignored, 5, 6]
    ended = torch.tensor([*ignored, 5, -100])  # a line end after the answer is not learned
    assert of_last_response(ended).tolist() == ended.tolist()


def test_checkpoints_say_what_they_were_trained_on(tiny: Journey) -> None:
    meta = read_meta(tiny.best("spam"))
    data = {p for p in tiny.outcomes["spam"]["sources"] if p != str(tiny.best("pretrain"))}
    assert set(meta["dataset"]["sources"]) == data


def test_a_judge_that_is_not_there_is_said_before_anything_is_answered(tiny: Journey) -> None:
    words = ("--judge.base_url=http://127.0.0.1:9/v1", "--judge.model=m")  # 9: discard
    code, _, err = score(tiny, *words, "--judge.max_attempts=1")
    assert code == 2
    problem = "cannot connect to http://127.0.0.1:9/v1"
    warning, *_, error = (line for line in err.splitlines() if problem in line)
    assert warning.startswith("warning: ")
    assert error.startswith("error: ")


def test_entries_longer_than_the_context_are_cut_as_prompts_are(
    tiny: Journey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything is answered; the data may be longer than any model's context."""
    entries = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(30)]
    entries[25] = {"instruction": "Repeat: " + "so on " * 300, "output": "so on"}  # of the test
    (tmp_path / "long.json").write_text(json.dumps(entries))
    source = f"--data.source={tmp_path / 'long.json'}"
    code, _, err = score(tiny, source, "--data.max_length=4096", "--data.shuffle_split=false")
    assert code == 0, err
    assert "1 of 30 samples are longer than data.max_length 256" in caplog.text
