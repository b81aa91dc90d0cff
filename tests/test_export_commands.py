"""`import` and `export` as commands: what they write, keep, print and refuse."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from datamodules.prompts import Message, encode_prompt
from pipeline.checkpoint import model_writers, read_meta, verify_checkpoint, write_checkpoint
from pipeline.directories import path_digest
from pipeline.inference import label_probabilities
from pipeline.models import load
from pipeline.runs.journal import metric_history
from pipeline.weights.card import card
from pipeline.weights.huggingface_out import huggingface_writers
from pipeline.weights.lineage import short_name
from tests.exporting import N_ROWS, MakeGPT, loaded, vocabulary
from tests.exporting import write as write_all
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, outcome_of, said

IDS = torch.arange(24).reshape(2, 12)
SMS = ["WIN a FREE prize now!!! Call 0900 123", "see you at lunch, then?", "ok"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def export(ckpt: Path, *words: str) -> Path:
    """Runs the command; the path that it prints."""
    code, out, err = said("export", f"--ckpt={ckpt}", *words)
    assert code == 0, err
    return Path(out.strip())


def check_files(path: Path) -> None:
    """export.json has the digest of every file beside it."""
    stated = json.loads((path / "export.json").read_text())["files"]
    assert set(stated) == {file.name for file in path.iterdir()} - {"export.json"}
    for name, facts in stated.items():
        content = (path / name).read_bytes()
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert facts == expected


@torch.inference_mode()
def test_instructions_to_huggingface_and_back(tiny: Journey, tmp_path: Path) -> None:
    """Adapters are merged; the prompt template goes along, and comes back with an import."""
    ckpt = tiny.best("instruct")
    path = export(ckpt, "--format=huggingface", f"--output={tmp_path / 'my model'}")
    assert path == tmp_path / "my model"
    check_files(path)
    ours, theirs = load(ckpt), AutoModelForCausalLM.from_pretrained(path)
    assert (theirs(IDS).logits - ours.gpt.head(ours.gpt(IDS))).abs().max() < 1e-4
    messages = [Message(role="user", content="Name a colour.")]
    rendered = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, add_generation_prompt=True
    )
    prompt = encode_prompt(ours.tokenizer, ours.meta["prompt_style"], messages)
    assert rendered["input_ids"] == prompt

    code, out, err = said("import", f"--source={path}")
    assert code == 0, err
    assert "parameters in float32, each tensor used once" in err
    imported = Path(out.strip())
    verify_checkpoint(imported)
    again = load(imported)
    assert again.meta["prompt_style"] == "template"
    assert encode_prompt(again.tokenizer, "template", messages) == prompt
    assert again.gpt.config == ours.gpt.config
    for name, tensor in ours.gpt.tensors().items():
        assert torch.equal(again.gpt.tensors()[name], tensor)
    outcome = outcome_of(tmp_path / "mlruns" / "import")
    assert outcome["outputs"] == {"best": str(imported)}
    assert outcome["metrics"]["n_parameters"] == ours.gpt.n_parameters()

    assert said("import", f"--source={path}")[1:] == (f"{imported}\n", _already(imported))
    with contextlib.chdir(tmp_path):
        here = said("import", f"--source={path}", "--output=here")[1].strip()
    assert here == str((tmp_path / "here").resolve()), "found from any folder"
    (tmp_path / "other").mkdir()
    with contextlib.chdir(tmp_path / "other"):
        assert said("import", f"--source={path}", "--output=here")[1].strip() != here
    code, _, err = said("import", f"--source={imported}")
    assert code == 2
    assert "is a checkpoint of ours already" in err


def test_an_export_knows_what_was_learned(tiny: Journey, tmp_path: Path) -> None:
    """It is compared with what it is of; nothing that its model learned is scored."""
    path = export(tiny.best("pretrain"), "--format=huggingface", f"--output={tmp_path / 'base'}")
    learned = json.loads((path / "export.json").read_text())["trained_on"]
    assert [training["data"]["init_args"]["val_fraction"] for training in learned] == [0.05]
    assert str(tiny.folder) not in json.dumps(learned)
    assert set(learned[0]["dataset"]["sources"]) >= {"00.txt", "59.txt"}

    score = ["score", f"--config={CONFIGS}/score.yaml", "--max_new_tokens=4"]
    code, _, err = said(*score, f"--ckpt={tiny.best('instruct')}", f"--before={path}")
    assert code == 0, err

    imported = said("import", f"--source={path}")[1].strip()
    for source in (path, imported):
        words = ["validate", f"--config={CONFIGS}/pretrain.yaml", *PLAIN, "--data.block_size=64"]
        words += [f"--data.source=[{tiny.folder / 'prose'}]", "--data.near_duplicates=null"]
        words += ["--model.gpt=null", f"--model.init_from={source}", "--data.tokenizer=null"]
        code, _, err = said(*words, "--data.val_fraction=0.3")
        assert (code, "data.val_fraction was 0.05, is 0.3" in err) == (2, True), err
        code, _, err = said(*words)
        assert code == 0, err


def _already(checkpoint: Path) -> str:
    return f"already finished: {checkpoint.parents[1]}\n"


def test_an_output_that_another_took_is_made_again(tiny: Journey, tmp_path: Path) -> None:
    output, digests = f"--output={tmp_path / 'model'}", []
    for stage in ("pretrain", "instruct", "pretrain", "pretrain"):
        path = export(tiny.best(stage), "--format=huggingface", output)
        digests.append(path_digest(path / "model.safetensors"))
    assert digests[0] == digests[2] == digests[3] != digests[1]
    assert len(list((tmp_path / "mlruns" / "export").iterdir())) == 3


def test_a_classifier(tiny: Journey) -> None:
    ckpt = tiny.best("spam")
    path = export(ckpt, "--format=huggingface")
    check_files(path)
    assert path.parts[-3] == "export"
    theirs, reads = (
        kind.from_pretrained(path) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    batch = reads(SMS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = theirs(**batch).logits.softmax(-1)
    wanted = torch.tensor(label_probabilities(load(ckpt), SMS))
    assert (found - wanted).abs().max() < 1e-5
    assert theirs.config.id2label == {0: "ham", 1: "spam"}


def test_an_adapter(tiny: Journey, tmp_path: Path) -> None:
    from peft import PeftModel

    ckpt = tiny.best("spam")
    base = export(tiny.best("pretrain"), "--format=huggingface", f"--output={tmp_path / 'base'}")
    path = export(ckpt, "--format=peft", f"--output={tmp_path / 'adapter'}")
    check_files(path)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs, ours = PeftModel.from_pretrained(plain, path).eval(), load(ckpt).model
    with torch.inference_mode():
        assert (theirs(IDS).logits - ours(IDS)).abs().max() < 1e-4
    card = (path / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "num_labels=2" in card
    assert AutoTokenizer.from_pretrained(path)(SMS[0]).input_ids == load(ckpt).tokenizer.encode(
        SMS[0]
    )


def test_an_adapter_keeps_its_template(tiny: Journey) -> None:
    """Its base has another, or none."""
    ckpt = tiny.best("instruct")
    path = export(ckpt, "--format=peft")
    check_files(path)
    theirs, ours = AutoTokenizer.from_pretrained(path), load(ckpt)
    question = [Message(role="user", content="Hi")]
    wanted = encode_prompt(ours.tokenizer, ours.meta["prompt_style"], question)
    found = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert found == wanted
    ends = GenerationConfig.from_pretrained(path).eos_token_id
    assert sorted(ends) == sorted(ours.meta["stop_ids"])
    (code,) = re.findall("```python\n(.+?)```", (path / "README.md").read_text(), re.DOTALL)
    assert "generation_config" in code
    compile(code, "the card's", "exec")


def test_gguf(tiny: Journey, tmp_path: Path) -> None:
    path = export(tiny.best("instruct"), "--format=gguf", "--dtype=q8_0")
    check_files(path)
    assert {file.name for file in path.iterdir()} == {
        "model.gguf",
        "Modelfile",
        "README.md",
        "export.json",
    }
    assert load(path / "model.gguf").gpt.config == load(tiny.best("instruct")).gpt.config
    assert path.parent.name.startswith("instruct-gguf-"), "runs are told apart by their models"


@pytest.mark.parametrize(
    ("form", "file"), [("huggingface", "model.safetensors"), ("gguf", "model.gguf")]
)
def test_a_bit_that_flipped_in_an_export_is_seen(form: str, file: str, tiny: Journey) -> None:
    """Neither safetensors nor GGUF would see it; the directory alone names the model."""
    path = export(tiny.best("pretrain"), f"--format={form}")
    assert load(path).gpt.config == load(tiny.best("pretrain")).gpt.config
    content = bytearray((path / file).read_bytes())
    content[-100] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"its {file} is missing or damaged; export it anew"):
        load(path)


def test_a_card_says_what_it_was_made_from(tiny: Journey, tmp_path: Path) -> None:
    path = export(tiny.best("spam"), "--format=huggingface", f"--output={tmp_path / 'spam-model'}")
    card = (path / "README.md").read_text()
    outcome = tiny.outcomes["spam"]
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification")
    assert "# spam-model\n" in card
    assert "Labels: ham, spam" in card
    for stage in ("spam", "pretrain"):
        assert "/".join(tiny.best(stage).parts[-4:]) in card
    assert "bundled:sms" in card
    assert "| train/spam |" in card
    for name, value in outcome["metrics"].items():
        assert f"| {name} | {value:.4g} |" in card
    assert str(tiny.folder) not in (path / "export.json").read_text(), "no path of this machine"
    steps = json.loads((path / "export.json").read_text())["lineage"]
    assert [step["kind"] for step in steps] == ["classifier", "language_model"]


@pytest.mark.parametrize("form", ["huggingface", "peft", "gguf"])
def test_every_card_has_the_digests_of_data_and_ancestors(form: str, tiny: Journey) -> None:
    path = export(tiny.best("instruct"), f"--format={form}")
    card = (path / "README.md").read_text()
    samples = read_meta(tiny.best("instruct"))["dataset"]["digest"]
    assert f"SHA-256 of the samples `{samples}`" in card
    assert len(samples) == 64
    for stage in ("instruct", "pretrain"):
        ckpt = tiny.best(stage)
        name, digest = "/".join(ckpt.parts[-4:]), path_digest(ckpt)
        data = read_meta(ckpt)["dataset"]["digest"]
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert f"| `{digest[:12]}` |" in line
        assert f"(`{data[:12]}`)" in line


def test_what_follows_every_text_is_in_the_card(tiny: Journey) -> None:
    model, steps = load(tiny.best("spam")), [{"name": "it", "digest": "0"}]
    for suffix, said_of_it in (("\n", r" tokens, '\n' included, which the"), ("", " tokens.")):
        meant = replace(model, meta={**model.meta, "suffix": suffix})
        assert said_of_it in card(meant, steps, name="it", form="huggingface")


def test_ollama_is_told_a_name_that_it_takes(tiny: Journey) -> None:
    model, steps = load(tiny.best("instruct")), [{"name": "it", "digest": "0"}]
    for name, taken in (("my model", "my-model"), ("gpt2-v1.0", "gpt2-v1.0"), ("模型", "model")):
        said_there = card(model, steps, name=name, form="gguf")
        assert f"ollama create {taken} -f Modelfile && ollama run {taken} " in said_there


@pytest.mark.parametrize(
    ("stage", "form", "told"),
    [
        ("spam", "huggingface", "it is a classifier (config.json: architectures, "),
        ("instruct", "peft", "an adapter in PEFT's form alone is not read"),
    ],
)
def test_exports_that_are_not_read_back_are_named(
    stage: str, form: str, told: str, tiny: Journey
) -> None:
    path = export(tiny.best(stage), f"--format={form}")
    with pytest.raises(ValueError, match=re.escape(told)):
        load(path)


def test_a_license_goes_along(tiny: Journey, tiny_gpt: MakeGPT, tmp_path: Path) -> None:
    source = loaded(tiny_gpt("gpt2", vocab_size=N_ROWS), vocabulary())
    path = write_all(huggingface_writers(source, torch.float32), tmp_path / "published")
    (path / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\n# A model\n")
    code, out, err = said("import", f"--source={path}", f"--output={tmp_path / 'imported'}")
    assert code == 0, err
    assert out == f"{tmp_path / 'imported'}\n"
    assert said("import", f"--source={path}", f"--output={tmp_path / 'imported'}")[0] == 0
    trained = tmp_path / "trained"
    shutil.copytree(tiny.best("spam"), trained)
    code, _, err = said("import", f"--source={path}", f"--output={trained}")
    assert (code, "exists and was not written by this command" in err) == (2, True)
    verify_checkpoint(trained)
    exported = export(tmp_path / "imported", "--format=gguf")
    assert "license: mit" in (exported / "README.md").read_text()
    steps = json.loads((exported / "export.json").read_text())["lineage"]
    assert [step["name"] for step in steps] == ["imported", "published"]


def test_a_checkpoint_that_was_copied_without_its_run(tiny: Journey, tmp_path: Path) -> None:
    best = tiny.best("pretrain")
    alone = shutil.copytree(best, tmp_path / "mine" / "checkpoints" / best.name)
    steps = json.loads((export(alone, "--format=huggingface") / "export.json").read_text())
    assert steps["lineage"][0]["metrics"] == {}


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_what_an_export_was_made_from_is_told_of_what_is_made_from_it(
    form: str, tiny: Journey, tmp_path: Path
) -> None:
    base = export(tiny.best("pretrain"), f"--format={form}")
    (before,) = json.loads((base / "export.json").read_text())["lineage"]
    assert before["data"]["source"] == "prose"
    source = base / "model.gguf" if form == "gguf" else base
    imported = tmp_path / "imported"
    assert said("import", f"--source={source}", f"--output={imported}")[0] == 0
    fit = ["fit", f"--config={CONFIGS}/spam.yaml", *SHORT, *PLAIN, f"--model.init_from={source}"]
    tuned = said(*fit, "--run.experiment=again")[1].strip()
    for made in (tuned, imported, export(imported, "--format=huggingface")):
        again = export(made, "--format=huggingface", f"--output={tmp_path / 'again'}")
        step = json.loads((again / "export.json").read_text())["lineage"][-1]
        assert step == {**before, "license": None}
        assert (
            f"| {before['name']} | `{before['digest'][:12]}` | prose ("
            in (again / "README.md").read_text()
        )


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"digest": "0"}, "it lacks 'name'"),
        ({"name": "it", "digest": "0", "data": {"source": "s"}}, "it lacks 'digest'"),
        ({"name": "it", "digest": 7}, "its metadata is damaged (lineage: ['it', 7])"),
        ("it", "its metadata is damaged"),
    ],
)
def test_a_lineage_that_is_none_is_one_line(step: object, told: str, tiny: Journey) -> None:
    path = export(tiny.best("pretrain"), "--format=huggingface")
    stated = json.loads((path / "export.json").read_text())
    (path / "export.json").write_text(json.dumps(stated | {"lineage": [step]}))
    code, _, err = said("export", f"--ckpt={path}", "--format=gguf")
    assert (code, f"{path} cannot be used: {told}" in err) == (2, True), err


def test_ancestors_that_moved_along_are_told(
    tiny: Journey, tiny_gpt: MakeGPT, tmp_path: Path
) -> None:
    """And with them the license of what all began with."""
    home = tmp_path / "before" / "mlruns"
    names = [Path("import", "p-01234567"), Path("fit", "f-01234567"), Path("merge", "m-01234567")]
    paths = [home / name / "checkpoints" / "step-00000004" for name in names]
    source = loaded(tiny_gpt("gpt2", vocab_size=N_ROWS), vocabulary())
    write_all(huggingface_writers(source, torch.float32), tmp_path / "published")
    (tmp_path / "published" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert said("import", f"--source={tmp_path / 'published'}", f"--output={paths[0]}")[0] == 0
    for key, parent, path in (("parent", *paths[:2]), ("adapter", *paths[1:])):
        made = load(parent)
        origin = {"path": str(parent), "digest": path_digest(parent)}
        meta = {**made.meta, "source": None, "parent": None, "step": 4, key: origin}
        write_checkpoint(path, model_writers(made.model.tensors(), meta, made.tokenizer))
    (tmp_path / "before").rename(tmp_path / "after")
    exported = export(
        tmp_path / "after" / paths[2].relative_to(tmp_path / "before"), "--format=gguf"
    )
    steps = json.loads((exported / "export.json").read_text())["lineage"]
    assert [step["name"] for step in steps] == [*map(short_name, reversed(paths)), "published"]
    assert "license: mit" in (exported / "README.md").read_text()


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "dtype": (("--format=gguf", "--dtype=bfloat16"), "dtype is bfloat16; for gguf give f32 or"),
    "peft": (("--format=peft",), "holds no adapter; export it with --format huggingface"),
    "output": (("--format=huggingface", "--output=mine"), "output mine exists and was not written"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(
    tiny: Journey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    code, out, err = said("export", f"--ckpt={tiny.best('pretrain')}", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_an_export_is_replaced_whole(tiny: Journey, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(tiny.best("instruct"), "--format=gguf", f"--output={output}")
    export(tiny.best("instruct"), "--format=huggingface", f"--output={output}")
    check_files(output)
    assert not (output / "model.gguf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlruns", "out"]


def test_outputs_that_stand_for_another_folder(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that a link leads to is filled; the one that the user is in is not taken away."""
    words = ("--format=huggingface", f"--ckpt={tiny.best('pretrain')}")
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    for dtype in ("float32", "bfloat16"):
        code, _, err = said("export", *words, f"--dtype={dtype}", f"--output={tmp_path / 'link'}")
        assert code == 0, err
    check_files(tmp_path / "big")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "big")
    for output in (".", "..", str(tmp_path / "link")):
        code, _, err = said("export", *words, f"--output={output}")
        assert (code, f"output {output} holds the current directory" in err) == (2, True)
    code, _, err = said("export", *words, "--output=README.md/below")
    assert code == 2
    assert "Correct that, then repeat the command" in err
    names = ["big", "link", "mlruns"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(("form", "file"), [("huggingface", "README.md"), ("gguf", "Modelfile")])
def test_what_is_there_for_people_may_be_edited(form: str, file: str, tiny: Journey) -> None:
    path = export(tiny.best("instruct"), f"--format={form}")
    with (path / file).open("a") as text:
        text.write("PARAMETER temperature 0.2\n")
    assert load(path).gpt.config == load(tiny.best("instruct")).gpt.config
    export(tiny.best("instruct"), f"--format={form}")
    assert (path / file).read_text().endswith("PARAMETER temperature 0.2\n"), "as it was left"


def test_a_file_that_others_made_beside_an_export(tiny: Journey, tmp_path: Path) -> None:
    """As llama-quantize does; what is read is no part of the export."""
    path = export(tiny.best("pretrain"), "--format=gguf", f"--output={tmp_path / 'out'}")
    (path / "model.gguf").rename(path / "other.gguf")
    assert load(path / "other.gguf").gpt.config == load(tiny.best("pretrain")).gpt.config
    (path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"its model\.gguf is missing or damaged"):
        load(path / "model.gguf")


def test_an_output_in_the_home_folder(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ~ alone behind =."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = export(tiny.best("pretrain"), "--format=huggingface", "--output=~/out")
    assert path == tmp_path / "home" / "out"
    assert not (tmp_path / "~").exists()


def test_a_card_has_the_metrics_of_its_own_checkpoint(tiny: Journey, tmp_path: Path) -> None:
    """Not of the best one of its run."""
    best = tiny.best("pretrain")
    run = shutil.copytree(best.parents[1], tmp_path / "mlruns" / "default" / "run-01234567")
    other = run / "checkpoints" / best.name
    outcome = json.loads((run / "outcome.json").read_text())
    outcome["outputs"]["best"] = str(other.with_name("step-00000004"))
    outcome["metrics"]["val/loss"] = 0.25
    (run / "outcome.json").write_text(json.dumps(outcome))
    for path, loss in (
        (best, tiny.outcomes["pretrain"]["metrics"]["val/loss"]),
        (other, metric_history(run)["val/loss"][read_meta(other)["step"]]),
    ):
        exported = export(path, "--format=huggingface")
        facts = json.loads((exported / "export.json").read_text())["lineage"][0]["metrics"]
        assert facts["val/loss"] == pytest.approx(loss)
        assert all(name.startswith("val/") for name in facts) == (path == other)


def test_a_full_disk_leaves_nothing(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.weights.huggingface_out as out

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(out, "save_file", full)
    words = ("--format=huggingface", f"--output={tmp_path / 'out'}")
    code, _, err = said("export", f"--ckpt={tiny.best('pretrain')}", *words)
    assert code == 2
    assert "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]
    monkeypatch.undo()
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    check_files(export(tiny.best("pretrain"), *words))


KILLED = """
import os, signal, sys
import pipeline.directories as files
from pipeline.__main__ import main
facts = files._facts
def killed(path):
    if path.name == "config.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return facts(path)
files._facts = killed
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_the_middle_it_is_absent(tiny: Journey, tmp_path: Path) -> None:
    words = ["--format=huggingface", f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "-c", KILLED, "export", f"--ckpt={tiny.best('pretrain')}", *words]
    ended = subprocess.run(command, env={**os.environ}, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out-*")), "it was on its way"
    check_files(export(tiny.best("pretrain"), *words))
    assert not list(tmp_path.glob(".out-*"))


def test_in_a_chain(tiny: Journey, tmp_path: Path, write: Callable[[str, str], Path]) -> None:
    """Import, then export what was imported; the second time there is nothing to do."""
    published = export(
        tiny.best("pretrain"), "--format=huggingface", f"--output={tmp_path / 'published'}"
    )
    chain = write(
        "chain.yaml",
        f"""experiment: passing-on
stages:
  - name: base
    command: import
    set: {{source: {published}}}
  - name: out
    command: export
    set: {{format: gguf}}
    inputs: {{ckpt: base}}
""",
    )
    for _ in range(2):
        code, _, err = said("run", f"--config={chain}")
        assert code == 0, err
    (exported,) = tmp_path.glob("mlruns/passing-on/*/exported/model.gguf")
    assert load(exported).gpt.config == load(tiny.best("pretrain")).gpt.config


@pytest.mark.slow  # four chains of processes
def test_a_table_of_a_stage_is_what_the_chain_made_last(
    tiny: Journey, tmp_path: Path, write: Callable[[str, str], Path]
) -> None:
    """The file of one form of the chain is replaced by another's, and made again for the first."""
    texts, output = write("in.csv", "text\nso glad\n"), tmp_path / "out.csv"
    chain = write(
        "chain.yaml",
        f"""experiment: labels
stages:
  - name: labels
    command: classify
    set: {{ckpt: {tiny.best("spam")}, file: {texts}, output: {output}, threshold: 0.999999}}
""",
    )
    output.write_text("somebody's")
    code, _, err = said("run", f"--config={chain}")
    assert code == 2
    assert f"stage 'labels': output {output} exists; give a new file, or remove it" in err
    assert output.read_text() == "somebody's"
    output.unlink()
    for threshold, label in ((0.999999, "ham"), (0.000001, "spam"), (0.999999, "ham")):
        words = (f"--config={chain}", "--set", f"labels.threshold={threshold}")
        code, _, err = said("run", *words)
        assert code == 0, err
        assert f"so glad,{label}," in output.read_text()
        if label == "spam":
            output.unlink()  # it is missed
    assert "every stage is done already" in said("run", f"--config={chain}")[2]
    outcome = json.loads(max(tmp_path.glob("mlruns/labels/labels-*/outcome.json")).read_text())
    assert outcome["outputs"] == {"labels": str(output)}
    assert outcome["sources"].keys() == {str(texts)}
    assert outcome["elapsed_s"] > 0.01


def test_a_stage_that_keeps_no_run(
    tiny: Journey, write: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    stage = f"{{name: one, command: classify, set: {{ckpt: {tiny.best('spam')}, text: so glad}}}}"
    chain = write("chain.yaml", f"experiment: labels\nstages: [{stage}]\n")
    code, _, err = said("run", f"--config={chain}")
    assert code == 0, err
    assert json.loads(capfd.readouterr().out)["label"] in {"ham", "spam"}
    (kept,) = Path(os.environ["GPT_PIPELINE_HOME"]).glob("labels/one-*/outcome.json")
    assert json.loads(kept.read_text())["elapsed_s"] > 0.5
