"""Every stage through the command line, on a tiny model: what it leaves behind, and who uses it."""

import codecs
import io
import itertools
import json
import math
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import rcParams
from matplotlib.cbook import is_math_text
from matplotlib.font_manager import fontManager

from datamodules.tables import read_table
from datamodules.text_classification import SpamDataModule
from datamodules.tokenizer import Tokenizer
from pipeline.checkpoint import read_meta, read_tensors, verify_checkpoint
from pipeline.decoding.packed import PackedLinear
from pipeline.directories import path_digest
from pipeline.inference import load_for_use
from pipeline.models import Loaded, load
from pipeline.runs.journal import read_journal
from pipeline.training.classifier_report import by_label, in_order, read_rival
from pipeline.training.figures import confusion_figure
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, outcome_of, said
from tests.machine import takes_f16_weights


def run_directory(journey: Journey, stage: str) -> Path:
    return journey.best(stage).parents[1]


def metrics_of(journey: Journey, stage: str) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for line, _ in read_journal(run_directory(journey, stage)):
        if line["kind"] == "metric":
            for name in line["values"]:
                steps.setdefault(name, []).append(line["step"])
    return steps


def test_pretraining_reports_bits_per_byte_beside_baselines(tiny: Journey) -> None:
    metrics = tiny.outcomes["pretrain"]["metrics"]
    assert {"val/loss", "val/perplexity", "val/bits_per_byte"} <= metrics.keys()
    assert {"baseline/xz_bits_per_byte", "baseline/5gram_bits_per_byte"} <= metrics.keys()
    assert 0 < metrics["val/bits_per_byte"] < 8


@pytest.mark.parametrize("rate", ["0.001", "1"])
def test_a_model_that_guesses_is_said_to(rate: str, tiny: Journey) -> None:
    words = [*SHORT, *PLAIN, f"--model.init_from={tiny.best('pretrain')}", "--model.trainable=all"]
    words += [f"--model.optimizer.lr={rate}", "--trainer.max_steps=40", "--precision=32-true"]
    code, _, err = said("fit", f"--config={CONFIGS}/spam.yaml", *words)
    assert code == 0, err
    assert ("is no lower than that of guessing blindly, 0.693; lower" in err) == (rate == "1"), err


def test_a_model_knows_which_rows_of_its_head_are_tokens(tiny: Journey) -> None:
    for stage in ("pretrain", "spam", "instruct"):
        loaded = load(tiny.best(stage))
        n_tokens = loaded.tokenizer.n_vocab
        assert loaded.gpt.config.vocab_size > n_tokens == loaded.gpt.n_tokens
    assert load(tiny.best("pretrain")).gpt.logits(torch.zeros(1, 2, 64)).shape == (1, 2, n_tokens)


def test_metrics_are_logged_at_optimizer_steps(tiny: Journey) -> None:
    steps = metrics_of(tiny, "pretrain")
    assert steps["train/loss"] == [5]
    assert steps["val/loss"] == [4, 8]
    assert {"perf/tokens_per_s", "perf/model_flops_utilisation", "train/lr"} <= steps.keys()
    assert steps["best/loss"] == [8], "of the checkpoint that is handed over"


def test_samples_and_curves_are_kept(tiny: Journey) -> None:
    folder = run_directory(tiny, "pretrain")
    table = json.loads((folder / "samples/step-00000008.json").read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert len(table["data"]) == 3
    assert (folder / "figures/loss.png").stat().st_size > 5_000


def test_a_run_names_its_command_and_what_ran_it(tiny: Journey) -> None:
    assert tiny.outcomes["pretrain"]["command"].startswith(f"fit --config={CONFIGS}/pretrain.yaml")
    lines = [line for line, _ in read_journal(run_directory(tiny, "pretrain"))]
    tags = {k: v for line in lines if line["kind"] == "tag" for k, v in line["values"].items()}
    assert tags["command"].startswith("python -m pipeline fit --config=")
    assert tags["version.tiktoken"] == version("tiktoken"), "taken for a secret"


def test_a_checkpoint_is_self_contained(tiny: Journey) -> None:
    path = tiny.best("pretrain")
    verify_checkpoint(path)
    loaded = load(path)
    assert loaded.tokenizer.digest == Tokenizer.load(tiny.tokenizer).digest
    assert loaded.meta["dataset"]["digest"]
    assert loaded.meta["precision"] == "32-true"
    assert loaded.gpt.config.vocab_size % 64 == 0


def test_only_the_best_and_the_last_are_kept(tiny: Journey) -> None:
    folder = tiny.best("pretrain").parent
    kept = {path.name for path in folder.iterdir()}
    outputs = tiny.outcomes["pretrain"]["outputs"]
    assert kept == {Path(outputs["best"]).name, Path(outputs["last"]).name}


def test_an_adapter_checkpoint_holds_nothing_of_the_base(tiny: Journey) -> None:
    for stage, beside in (("instruct", set()), ("spam", {"classifier.weight"})):
        path = tiny.best(stage)
        assert set(read_tensors(path)) == beside
        adapter = read_tensors(path, "adapter_model.safetensors")
        assert adapter
        assert all(".lora_" in name for name in adapter)
        assert read_meta(path)["base"]["digest"]


def test_a_tuned_model_knows_its_parent(tiny: Journey) -> None:
    parent = read_meta(tiny.best("instruct"))["parent"]
    assert parent["path"] == str(tiny.best("pretrain"))


def test_data_and_parent_are_in_the_journal(tiny: Journey) -> None:
    lines = [line for line, _ in read_journal(run_directory(tiny, "instruct"))]
    (dataset,) = (line for line in lines if line["kind"] == "dataset")
    assert dataset["digest"] == read_meta(tiny.best("instruct"))["dataset"]["digest"]
    tags = {k: v for line in lines if line["kind"] == "tag" for k, v in line["values"].items()}
    assert tags["parent.path"] == str(tiny.best("pretrain"))
    assert len(tags["parent.digest"]) == 64


def test_the_classifier_is_scored_beside_a_bag_of_words(tiny: Journey) -> None:
    metrics = tiny.outcomes["spam-test"]["metrics"]
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        for key in (f"test/{name}", f"baseline/tfidf_{name}", f"test/{name}_minus_tfidf"):
            assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
    difference = metrics["test/accuracy"] - metrics["baseline/tfidf_accuracy"]
    assert metrics["test/accuracy_minus_tfidf"] == pytest.approx(difference)
    shown = [row["metric"].partition(" (")[0] for row in tiny.outcomes["spam-test"]["headline"]]
    assert shown == ["test accuracy", "test f1 of spam"]


def test_two_classifiers_are_compared_on_the_same_texts(tiny: Journey, tmp_path: Path) -> None:
    """Beside the bag of words: with the scores of the other one's own test."""
    words = [f"--config={CONFIGS}/spam.yaml", *PLAIN]
    options = [*SHORT, f"--model.init_from={tiny.best('pretrain')}", "--run.experiment=other"]
    code, out, err = said("fit", *words, *options, "--run.name=other", "--model.optimizer.lr=0.1")
    assert code == 0, err
    other = out.splitlines()[-1]
    tests = {
        "its": [f"--ckpt={other}"],
        "both": [f"--ckpt={tiny.best('spam')}", f"--before={other}"],
    }
    for name, given in tests.items():
        code, out, err = said("test", *words, *given, f"--run.experiment={name}")
        assert code == 0, err
    its, both = (outcome_of(tmp_path / "mlruns" / name)["metrics"] for name in tests)
    own = tiny.outcomes["spam-test"]["metrics"]
    assert own["test/auroc"] != pytest.approx(its["test/auroc"], abs=1e-3)
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        assert both[f"test/{name}"] == own[f"test/{name}"]
        for end in ("", "_low", "_high"):
            key = f"before/{name}{end}"
            assert both[key] == pytest.approx(its[f"test/{name}{end}"]), key
        difference = f"test/{name}_minus_before"
        assert both[difference] == pytest.approx(own[f"test/{name}"] - its[f"test/{name}"])
        assert both[f"{difference}_low"] <= both[difference] <= both[f"{difference}_high"]
    assert f"; other {its['test/accuracy']:.3f} [" in out
    headline = outcome_of(tmp_path / "mlruns" / "both")["headline"]
    assert headline[2]["metric"] == "test accuracy (before: other)"
    assert headline[2]["before"] == both["before/accuracy"]
    (run,) = (tmp_path / "mlruns" / "both").iterdir()
    tags = [line["values"] for line, _ in read_journal(run) if line["kind"] == "tag"]
    assert {"before.path": other, "before.digest": path_digest(Path(other))} in tags


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("pretrain", "/step-00000008 is not a classifier; tune one with configs/spam.yaml."),
        ("no/such", "no/such"),
    ],
)
def test_what_is_no_classifier_is_compared_with_none(
    stage: str, message: str, tiny: Journey
) -> None:
    before = tiny.best(stage) if stage in tiny.outcomes else Path(stage)
    words = ["test", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--before={before}"]
    code, _, err = said(*words, f"--ckpt={tiny.best('spam')}")
    assert code == 2
    assert message in err.splitlines()[-1]


def test_classifiers_of_other_labels_are_not_compared(tiny: Journey) -> None:
    source = str(tiny.best("spam"))
    data = SpamDataModule(**read_meta(tiny.best("spam"))["data"]["init_args"])
    data.config = read_meta(tiny.best("spam"))["data"]
    assert read_rival(source, data)[0].words == "spam"
    data.label_names = ["spam", "ham"]
    labels = r"has the labels \['ham', 'spam'\], here they are \['spam', 'ham'\]"
    with pytest.raises(ValueError, match=labels):
        read_rival(source, data)


def test_texts_without_probabilities_are_no_ham() -> None:
    """The likeliest of labels that are all NaN would be the first one."""
    probabilities = torch.tensor([[0.9, 0.1], [math.nan, math.nan], [0.2, 0.8]])
    made = {"sample_ids": torch.tensor([7, 3, 5]), "label": torch.tensor([0, 0, 1])}
    with pytest.raises(ValueError, match="1 of 3 texts, such as sample 3, have NaN"):
        in_order([{**made, "probabilities": probabilities}])
    labels, ordered = in_order([{**made, "probabilities": probabilities.nan_to_num(0.5)}])
    assert labels.tolist() == [0, 1, 0]
    assert ordered[:, 1].tolist() == pytest.approx([0.5, 0.8, 0.1])


def test_each_of_many_labels_is_scored(tiny: Journey, tmp_path: Path) -> None:
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    found = by_label(labels, predicted, ["a", "b", "c"])
    assert found["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "texts": 2}
    assert found["b"]["recall"] == pytest.approx(2 / 3)
    assert found["c"]["texts"] == 0
    assert math.isnan(found["c"]["f1"])
    all_wrong = by_label(np.array([1, 1]), np.array([0, 0]), ["a", "b"])
    assert [repr(found["texts"]) for found in all_wrong.values()] == ["0", "2"]

    table = tmp_path / "moods.csv"
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    names = ["a", "1e5", "12E-3"]  # to a reader of YAML the others are numbers
    rows = [f"{word} is {mood},{mood}" for word in words for mood in names]
    table.write_text("text,label\n" + "\n".join(rows))
    words = [f"--config={CONFIGS}/spam.yaml", f"--config={CONFIGS}/data/table.yaml", *SHORT, *PLAIN]
    words += [f"--data.source={table}", f"--data.label_names={json.dumps(names)}"]
    words += ["--run.experiment=moods", f"--model.init_from={tiny.best('pretrain')}"]
    code, out, err = said("fit", *words)
    assert code == 0, err
    label, best = ["--text=abcd is a", "--threshold=0.5"], Path(out.strip())
    assert "this checkpoint has 3" in said("classify", f"--ckpt={best}", *label)[2]
    code, out, err = said("test", *words, f"--ckpt_path={best}")
    assert code == 0, err
    shown = out.splitlines()
    assert shown[1].startswith("test f1, mean of the labels': ")
    assert [line.split(":")[0] for line in shown[2:]] == [f"  {name}" for name in names]
    alone = said("test", f"--ckpt_path={best}", f"--data.source={table}")
    assert alone[0] == 0, alone[2]
    assert read_meta(best)["data"]["init_args"]["label_names"] == names
    path, *_ = Path(os.environ["GPT_PIPELINE_HOME"]).glob("moods/*-test-*/outcome.json")
    assert json.loads(path.read_text())["metrics"]["test/texts/a"] > 0


def test_names_of_labels_do_not_run_into_one_another() -> None:
    names = ["sadness", "joy", "love", "anger", "fear", "surprise", "disgust", "neutral"]
    figure = confusion_figure([[1_701] * len(names)] * len(names), names)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    counts = [text.get_window_extent() for text in axes.texts[: len(names)]]
    for row in (boxes, counts):
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(row))
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {45.0}
    assert confusion_figure([[1, 2], [3, 4]], ["ham", "spam"]).get_size_inches()[0] < 5


def test_a_label_is_no_formula() -> None:
    names = ["$", "$$", "$5_$", "$50-$100", "a$\\frac$"]
    figure = confusion_figure([[1] * len(names)] * len(names), names)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    shown = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert not any(map(is_math_text, shown))
    assert [text.replace(r"\$", "$") for text in shown] == [*names, *names]


@pytest.mark.filterwarnings("error")  # matplotlib warns of what it shows as a box
def test_labels_that_no_font_has_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["grün", "серый", "垃圾", "a\nb"]
    found = [
        font
        for font in fontManager.ttflist
        if font.name in ("DejaVu Sans", "Last Resort High-Efficiency")
    ]
    monkeypatch.setattr(fontManager, "ttflist", found)
    figure = confusion_figure([[1] * 4] * 4, names)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    shown = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert shown == [*names[:2], "label 3", names[3]] * 2


def test_another_font_writes_what_the_first_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rcParams, "font.sans-serif", ["cmr10"])  # Latin alone
    figure = confusion_figure([[1, 2], [3, 4]], ["ham", "спам"])
    (axes,) = figure.axes
    ham, spam = axes.get_yticklabels()
    assert (ham.get_text(), spam.get_text()) == ("ham", "спам")
    assert spam.get_fontfamily()[0] == "cmr10"
    assert len(spam.get_fontfamily()) > 1


def test_a_figure_of_many_labels_stays_one_that_can_be_drawn() -> None:
    """With a count in each cell, 500 labels would take 275 inches and 250,000 texts."""
    names = [f"intent-{i}" for i in range(500)]
    figure = confusion_figure(np.eye(500, dtype=int).tolist(), names)
    axes, _ = figure.axes  # and that of the colours
    assert figure.get_size_inches()[0] < 30
    assert not axes.texts
    assert [label.get_text() for label in axes.get_yticklabels()] == names[::10]


def test_the_test_stage_scores_what_the_fit_stage_saved(tiny: Journey) -> None:
    """Predictions of the test stage equal those of the loaded checkpoint, text by text."""
    folder = next((tiny.folder / "mlruns/spam-test").glob("*/predictions.jsonl"))
    rows = [json.loads(line) for line in folder.read_text().splitlines()]
    _, out, _ = said(
        "classify", "--ckpt", str(tiny.best("spam")), "--text", text_of(rows[0]["sample_id"])
    )
    given = json.loads(out)
    assert rows[0]["text"] == text_of(rows[0]["sample_id"])
    assert given["label"] == rows[0]["predicted"]
    assert given["probabilities"]["spam"] == pytest.approx(
        rows[0]["probabilities"]["spam"],
        abs=1e-4,  # merged and unmerged differ by rounding
    )


def test_every_text_can_be_given_on_the_command_line(
    tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what YAML takes for null; and one from stdin, without the line end that echo adds."""
    words = ("classify", "--ckpt", str(tiny.best("spam")), "--text")
    for text in ("#1 winner!", "null", "~"):
        code, out, err = said(*words, text)
        assert code == 0, err
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n"))
        assert said(*words, "-")[1] == out


def text_of(row: int) -> str:
    lines = (CONFIGS.parent / "datamodules/samples/sms.tsv").read_text().splitlines()
    return lines[1 + row].split("\t", 1)[1]


def test_scores_compare_before_and_after(tiny: Journey) -> None:
    outcome = tiny.outcomes["score"]
    metrics = outcome["metrics"]
    for measure in ("chrf", "rouge_l", "exact_match", "perplexity", "corpus_bleu"):
        assert {f"before/{measure}", f"after/{measure}", f"difference/{measure}"} <= metrics.keys()
    responses = Path(outcome["outputs"]["responses"]).read_text().splitlines()
    scores = Path(outcome["outputs"]["scores"]).read_text().splitlines()
    assert len(scores) == 3 * len(responses)
    _, out, _ = said("score", f"--responses={outcome['outputs']['responses']}", "--batch_size=7")
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == [
        "chrf",
        "rouge_l",
        "exact_match",
        "perplexity",
    ]
    report = Path(outcome["outputs"]["report"]).read_text()
    assert "<html" in report
    for stage in ("instruct", "pretrain"):
        assert path_digest(tiny.best(stage)) in report


def test_responses_of_any_model_can_be_scored(tiny: Journey, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    row = {"id": 1, "instruction": "Say hi.", "input": "", "reference": "Hi.", "response": "Hi."}
    path.write_text(json.dumps(row) + "\n")
    code, _, err = said("score", f"--responses={path}")
    assert code == 0, err


def test_responses_that_can_be_read_once_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, _, err = said("score", f"--responses={tmp_path / 'pipe'}")
    assert (code, err) == (
        2,
        f"error: responses: {tmp_path / 'pipe'} is no file; write what it says into one.\n",
    )


def test_a_perplexity_of_some_is_no_verdict_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    row = {"id": 1, "instruction": "Say hi.", "input": "", "reference": "Hi.", "response": "Hi."}
    known = {**row, "id": 2, "reference_nats": 2.0, "reference_tokens": 2}
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, known)))
    first, again = (said("score", f"--responses={path}") for _ in range(2))
    assert first[0] == again[0] == 0
    assert "verdict" not in first[2]
    assert "already finished" in again[2]


def test_generate_prints_the_continuation_alone(tiny: Journey) -> None:
    words = ["generate", f"--ckpt={tiny.best('pretrain')}", "--prompt=The quick brown"]
    code, out, err = said(*words, "--max_new_tokens=6")
    assert code == 0, err
    assert out
    assert "The quick brown" not in out
    again = said(*words, "--max_new_tokens=6")[1]
    assert again == out
    drawn = [said(*words, "--temperature=1.5", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert said(*words, "--max_new_tokens=6", "--num_beams=3")[0] == 0


@takes_f16_weights
@pytest.mark.parametrize("command", ["generate", "chat", "score"])
def test_precision_is_that_of_the_model(
    command: str, tiny: Journey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The head of every model that is loaded."""
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hi.\n\n"))
    packed: list[PackedLinear] = []

    def noting(*args: Any) -> Loaded:
        loaded = load_for_use(*args)
        packed.append(loaded.gpt.head)
        return loaded

    monkeypatch.setattr("pipeline.inference.load_for_use", noting)
    few = [{"instruction": f"Say {word}.", "output": word} for word in ("no", "yes")]
    (tmp_path / "few.json").write_text(json.dumps(few))
    asked = {"generate": ["--prompt=x"], "score": [f"--data.test_source={tmp_path / 'few.json'}"]}
    more = asked.get(command, [])
    for precision in ("32-true", "bf16-true", "f16-weights"):
        words = [f"--ckpt={tiny.best('instruct')}", "--max_new_tokens=1", *more]
        code, _, err = said(command, *words, f"--precision={precision}")
        assert code == 0, err
        heads, packed[:] = [*packed], []
        assert len(heads) == (2 if command == "score" else 1)
        for head in heads:
            assert head.in_f16 == (precision == "f16-weights")
            dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
            assert head.weight.dtype == dtype
    if command == "score":
        reports = [path.read_text() for path in tmp_path.glob("score/*/report.html")]
        named = [p for p in ("32-true", "bf16-true", "f16-weights") for r in reports if p in r]
        assert named == ["32-true", "bf16-true", "f16-weights"]


def test_chat_wraps_the_prompt(tiny: Journey) -> None:
    words = ["--prompt=Say hi.", "--max_new_tokens=3", "--chat"]
    assert said("generate", f"--ckpt={tiny.best('instruct')}", *words)[0] == 0
    told = "--system=You are terse."
    assert said("generate", f"--ckpt={tiny.best('instruct')}", *words, told)[0] == 0
    code, _, err = said("generate", f"--ckpt={tiny.best('instruct')}", *words[:2], told)
    assert (code, "--system comes before a user's message; add --chat" in err) == (2, True)
    code, _, err = said("generate", f"--ckpt={tiny.best('pretrain')}", "--prompt=a", "--seed=-1")
    assert (code, "seed is -1; give a whole number from 0" in err) == (2, True)
    code, _, err = said("generate", f"--ckpt={tiny.best('pretrain')}", *words)
    assert code == 2
    assert "not tuned to follow instructions" in err


def test_classify_labels_a_column(tiny: Journey, tmp_path: Path) -> None:
    table = tmp_path / "messages.csv"
    table.write_text('id,text\n1,"Win, now"\n2,See you at eight\n')
    out = tmp_path / "labelled.csv"
    words = [f"--ckpt={tiny.best('spam')}", f"--file={table}", f"--output={out}"]
    code, _, err = said("classify", *words)
    assert code == 0
    assert "labelling" in err  # a table may take hours
    header, *rows = out.read_text().splitlines()
    assert header == "id,text,predicted,probability_ham,probability_spam"
    assert len(rows) == 2
    code, _, err = said("classify", "--ckpt=nowhere", *words[1:])
    assert code == 2
    assert f"output {out} exists; give a new file" in err
    assert out.read_text().splitlines() == [header, *rows]
    out.unlink()
    assert said("classify", *words, "--threshold=0.000001")[0] == 0
    assert all(",spam," in row for row in out.read_text().splitlines()[1:])


def test_classify_writes_a_csv_as_it_was(tiny: Journey, tmp_path: Path) -> None:
    """As a spreadsheet with decimal commas has made it, and reads it."""
    table, out = tmp_path / "tickets.csv", tmp_path / "labelled.csv"
    table.write_bytes('\ufeffNr;text\r\n1;"Grüße; bis 8"\r\n2;WIN now\r\n'.encode())
    words = [f"--ckpt={tiny.best('spam')}", f"--file={table}", f"--output={out}"]
    assert said("classify", *words)[0] == 0
    assert out.read_bytes().startswith(codecs.BOM_UTF8)
    header, *rows = out.read_bytes().decode("utf-8-sig").split("\r\n")[:-1]
    assert header == "Nr;text;predicted;probability_ham;probability_spam"
    assert re.fullmatch(r'1;"Grüße; bis 8";(ham|spam);\d,\d+;\d,\d+', rows[0])
    assert read_table(out)["text"].tolist() == ["Grüße; bis 8", "WIN now"]


def test_an_end_that_is_not_looked_at_is_said(tiny: Journey, tmp_path: Path) -> None:
    ckpt = f"--ckpt={tiny.best('spam')}"
    code, _, err = said("classify", ckpt, f"--text={'word ' * 1000}")
    assert code == 0
    assert "warning: 1 of 1 texts have more than the 128 tokens" in err
    assert "warning" not in said("classify", ckpt, "--text=word")[2]


def test_classify_writes_what_is_read_here(tiny: Journey, tmp_path: Path) -> None:
    """A tab-separated file is never quoted: quotation marks are text, a tab in one is refused."""
    table = tmp_path / "messages.jsonl"
    texts = ['"Win, now"', 'she said "no"']
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "labelled.tsv"
    words = [f"--ckpt={tiny.best('spam')}", f"--file={table}", f"--output={out}"]
    assert said("classify", *words)[0] == 0
    assert read_table(out)["text"].tolist() == texts
    out.unlink()
    for text in ("one\ttwo", "one\ntwo"):
        table.write_text(json.dumps({"text": text}))
        code, _, err = said("classify", *words)
        assert code == 2
        assert f"cannot hold the tab or line break in {text!r} (column 'text'); give a .csv" in err
        assert not out.exists()


def test_classify_keeps_the_other_columns(tiny: Journey, tmp_path: Path) -> None:
    """Whatever forms they go through: numbers exactly, times readable, what is missing missing."""
    row = {"text": "hello a", "id": 1234567890123456789, "at": "2024-01-02T03:04:05.000006"}
    row |= {"share": 0.1234567890123456, "small": 1e-12, "parts": [{"b": 1}]}
    others = {"text": "hello b", **dict.fromkeys(list(row)[1:])}
    table = tmp_path / "in.jsonl"
    table.write_text("".join(json.dumps(r) + "\n" for r in (row, {"text": "hello b"})))
    for form in ("jsonl", "parquet", "again.jsonl"):
        out = tmp_path / f"out.{form}"
        words = [f"--ckpt={tiny.best('spam')}", f"--file={table}", f"--output={out}"]
        code, _, err = said("classify", *words)
        assert code == 0, err
        frame = read_table(out).drop(columns=["predicted", "probability_ham", "probability_spam"])
        if form == "parquet":
            frame["at"] = pd.to_datetime(frame["at"])
            frame.to_parquet(tmp_path / "in.parquet")
            table = tmp_path / "in.parquet"
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: r[key] for key in row} for r in kept] == [row, others]


def test_classify_refuses_what_it_cannot_keep(tiny: Journey, tmp_path: Path) -> None:
    table, out = tmp_path / "messages.jsonl", tmp_path / "labelled.tsv"
    words = [f"--ckpt={tiny.best('spam')}", f"--file={table}", f"--output={out}"]
    table.write_text(json.dumps({"text": "ok", "label": "ham\tspam"}))
    code, _, err = said("classify", *words)
    assert code == 2
    assert "cannot hold the tab or line break in 'ham\\tspam' (column 'label')" in err
    table.write_text(json.dumps({"text": "ok", "predicted": "ham", "probability_spam": 1}))
    code, _, err = said("classify", *words)
    assert code == 2
    assert "columns ['predicted', 'probability_spam'], which would be written over" in err
    assert not out.exists()
    for other in ('"one"', "12345678901234567890"):  # ids that are hashes have 64 bits, no sign
        table.write_text(f'{{"text": "ok", "n": 1}}\n{{"text": "ok", "n": {other}}}\n')
        code, _, err = said("classify", *words[:2], f"--output={tmp_path / 'labelled.parquet'}")
        assert code == 2
        assert "labelled.parquet (column 'n'): " in err
        assert "give a .jsonl file" in err


def test_a_vocabulary_that_was_removed_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    (tmp_path / "a.txt").write_text("one two three four five six seven " * 50)
    words = [
        "tokenizer",
        "train",
        f"--source=[{tmp_path}/a.txt]",
        "--vocab_size=270",
        "--min_frequency=2",
    ]
    code, out, _ = said(*words)
    assert code == 0
    assert said(*words)[1] == out
    Path(out.strip()).unlink()
    code, again, _ = said(*words)
    assert code == 0
    assert Path(again.strip()).is_file()
    assert again != out


def test_the_same_command_does_nothing_twice(
    tiny: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tiny.folder / "mlruns"))
    words = [
        "fit",
        f"--config={CONFIGS}/instruct.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        "--run.experiment=instruct",
    ]
    code, _, err = said(*words)
    assert code == 0
    assert "already finished" in err
    assert len(list((tiny.folder / "mlruns/instruct").iterdir())) == 1


def test_other_data_or_another_vocabulary_are_not_the_same(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    texts = [f"{kind} number {'abcdefghij'[n]}" for n in range(10) for kind in ("win", "see you")]
    rows = [f"{'spam' if 'win' in text else 'ham'}\t{text}\n" for text in texts]
    data, tokenizer = tmp_path / "sms.tsv", tmp_path / "tokenizer.json"
    data.write_text("".join(rows))
    words = ["test", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--data.source={data}"]
    words += [f"--ckpt_path={tiny.best('spam')}", f"--data.tokenizer={tokenizer}"]
    tokenizer.write_bytes(tiny.tokenizer.read_bytes())

    def run_twice(changed: Path | None = None) -> None:
        code, _, err = said(*words)
        assert (code, "already finished" in err) == (0, False), err
        why = re.search(r"^anew: \S+ is finished, but (\S+) has changed$", err, re.MULTILINE)
        assert (why and Path(why[1])) == changed
        code, _, err = said(*words)
        assert (code, "already finished" in err, "anew: " in err) == (0, True, False), err

    run_twice()
    data.write_text("".join(rows).replace("number", "numbers"))
    run_twice(data)
    tokenizer.write_text(tokenizer.read_text() + "\n")
    run_twice(tokenizer)
    data.write_text("".join(rows))  # what was made of it then does not hold: another vocabulary
    run_twice(data)


def test_predict_writes_a_line_a_sample(tiny: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tiny.folder / "predictions"))
    code, _, err = said(
        "predict", f"--config={CONFIGS}/spam.yaml", *PLAIN, f"--ckpt_path={tiny.best('spam')}"
    )
    assert code == 0, err
    path = next((tiny.folder / "predictions").glob("*/*/predictions.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == sorted(row["sample_id"] for row in rows)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)


def test_validate_gives_the_metrics_of_fit(tiny: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tiny.folder / "validations"))
    best = tiny.best("spam")
    code, _, err = said("validate", f"--ckpt_path={best}")
    assert code == 0, err
    assert f"options: {best.parents[1] / 'config.yaml'}" in err
    outcome = json.loads(next((tiny.folder / "validations").glob("*/*/outcome.json")).read_text())
    ours = tiny.outcomes["spam"]["metrics"]["val/loss"]
    assert outcome["metrics"]["val/loss"] == pytest.approx(ours, abs=1e-5)  # merged adapters
    assert said("validate", f"--ckpt_path={best.parents[1]}")[2].count("options: ") == 1
    shutil.copytree(best, tiny.folder / "elsewhere")
    assert "is not in a run" in said("test", f"--ckpt_path={tiny.folder / 'elsewhere'}")[2]
    scored = Path(tiny.outcomes["score"]["outputs"]["report"]).parent
    assert "is not in a run of fit, whose" in said("test", f"--ckpt_path={scored}")[2]


def test_base_bits_are_unchanged_by_adapters(tiny: Journey) -> None:
    """The tuned model differs from its base, whose file on disk is as it was."""
    base, tuned = load(tiny.best("pretrain")).gpt, load(tiny.best("instruct")).gpt
    moved = [n for n, p in base.tensors().items() if not torch.equal(p, tuned.tensors()[n])]
    assert moved
    assert all(".attention." in name or ".mlp." in name for name in moved)
