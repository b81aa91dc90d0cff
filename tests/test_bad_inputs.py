"""A user's mistake gives one line that names the key, file or row, and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.journey import CONFIGS, PLAIN, SHORT, TINY, Journey, said

Write = Callable[[str, str | bytes], Path]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    return tmp_path / "mlruns"


def refused(*words: str) -> str:
    """The one line that a command says before it ends with 2."""
    code, _, err = said(*words)
    lines = [line for line in err.splitlines() if not line.startswith("INFO")]
    errors = [line for line in lines if line.startswith("error:")]
    assert code == 2, err
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


def pretrain(journey: Journey, *words: str) -> str:
    return refused(
        "fit",
        f"--config={CONFIGS}/pretrain.yaml",
        *TINY,
        *PLAIN,
        f"--data.tokenizer={journey.tokenizer}",
        "--data.near_duplicates=null",
        f"--data.source=[{journey.folder / 'prose'}]",
        *words,
    )


def tune(journey: Journey, config: str, *words: str) -> str:
    base = f"--model.init_from={journey.best('pretrain')}"
    return refused("fit", f"--config={CONFIGS}/{config}.yaml", *SHORT, *PLAIN, base, *words)


BEFORE_ANY_DATA = {
    "--model.gpt.n_head=3": ["model.gpt.n_embd", "model.gpt.n_head"],
    "--model.gpt.dropout=1.5": ["model.gpt.dropout"],
    "--model.gpt.causal=false": ["model.gpt.causal", "has to predict"],
    "--model.optimizer.warmup_steps=9": ["model.optimizer.warmup_steps", "trainer.max_steps"],
    "--model.optimizer.lr=-1": ["model.optimizer.lr"],
    "--model.optimizer.lr=fast": ["optimizer.lr"],
    "--model.optimiser.lr=1": ["optimiser", "--model.help CLASS lists"],
    "--trainer.max_stepz=3": ["max_stepz", "did you mean max_steps? --help lists"],
    "--run.experiment=../elsewhere": ["run.experiment", "'../elsewhere' is not a name"],
    "--data.sorce=x": ["data", "sorce", "did you mean source? --data.help CLASS lists"],
    "--data.seed=-1": ["data.seed is -1"],
    "--data.block_size=512": ["data.block_size", "model.gpt.block_size"],
    "--data.batch_size=0": ["data.batch_size"],
    "--data.val_fraction=2": ["data.val_fraction"],
    "--precision=8-bit": ["precision", "one of ['auto', '32-true', "],
    "--trainer.accumulate_grad_batches=4": ["trainer.accumulate_grad_batches", "data.batch_size"],
    "--model.init_from=somewhere": ["model.gpt", "model.init_from"],
    "--checkpoints.mode=up": ["checkpoints.mode"],
    "--data.tokenizer=nowhere.json": ["nowhere.json"],
}


@pytest.mark.parametrize("option", BEFORE_ANY_DATA)
def test_refused_before_any_data_is_read(option: str, tiny: Journey, own_home: Path) -> None:
    # the source does not exist: whoever reads data first says so instead
    line = pretrain(tiny, "--data.source=[/no/such/folder]", option)
    for key in BEFORE_ANY_DATA[option]:
        assert key in line, line
    assert "/no/such/folder" not in line
    assert not list(own_home.glob("*/*")), "a run directory for a mistake"


@pytest.mark.parametrize(
    ("yaml", "key"),
    [
        ("trainer: {max_stepz: 3}", "trainer.max_stepz"),
        ("model: {init_args: {optimizer: {learning_rate: 3}}}", "learning_rate"),
        ("data: {init_args: {sorce: x}}", "sorce"),
    ],
)
def test_a_misspelt_key_in_a_file_is_named(
    yaml: str, key: str, tiny: Journey, write: Write
) -> None:
    line = pretrain(tiny, f"--config={write('typo.yaml', yaml)}")
    assert f"'{key}'" in line
    assert "lists the options" in line


def test_corpora_that_cannot_be(tiny: Journey, write: Write) -> None:
    empty = write("empty.txt", "")
    assert "data.source holds no text" in (line := pretrain(tiny, f"--data.source=[{empty}]"))
    assert "give some text" in line
    latin = write("latin.txt", "caf\xe9 ".encode("latin-1") * 100)
    line = pretrain(tiny, f"--data.source=[{latin}]")
    assert str(latin) in line
    assert "byte 3" in line
    assert "iconv" in line
    short = write("short.txt", "Too short for a block. ")
    line = pretrain(tiny, f"--data.source=[{short}]")
    assert "lower data.block_size or give more text" in line
    lines = write("bad.jsonl", '{"text": "fine"}\n{"text": \n')
    line = pretrain(tiny, f"--data.source=[{lines}]")
    assert "bad.jsonl:2" in line
    assert "fix the line" in line
    column = write("column.jsonl", '{"text": "fine"}\n{"body": "no text"}\n')
    line = pretrain(tiny, f"--data.source=[{column}]")
    assert "column.jsonl:2" in line
    assert "correct text_column" in line
    line = pretrain(tiny, "--data.source=[nothing*.txt]")
    assert "nothing*.txt" in line
    assert "correct the pattern" in line


def test_tables_that_cannot_be(tiny: Journey, write: Write) -> None:
    good = "".join(f"ham\thello {i}\nspam\twin {i}\n" for i in "abcdefghijklmnopq")
    for name, content, parts in (
        (
            "column.tsv",
            "class\ttext\nham\thi\n",
            ["column.tsv", "'label'", "configs/data/table.yaml"],
        ),
        ("label.tsv", good + "eggs\thello\n", ["label.tsv", "row 35", "'eggs'", "correct the row"]),
        ("unlabelled.tsv", good + "\thello\n", ["unlabelled.tsv", "row 35", "drop it"]),
        (
            "one.tsv",
            "ham\thi there\nham\tso long\nham\tgood day\n" * 9,
            ["one.tsv", "'spam'", "add such rows"],
        ),
        ("latin.tsv", b"ham\tcaf\xe9\nspam\twin\n", ["latin.tsv", "byte 7", "iconv"]),
        ("nothing.tsv", "", ["nothing.tsv", "fill it"]),
    ):
        line = tune(tiny, "spam", f"--data.source={write(name, content)}")
        for part in parts:
            assert part in line, line


def test_instructions_that_cannot_be(tiny: Journey, write: Write) -> None:
    entry = {"instruction": "Say hi.", "input": "", "output": "Hi."}
    long = [{**entry, "instruction": f"Say {i}."} for i in "abcdefghijklmnopqrstuvwxyz"]
    long[3]["output"] = "word " * 900
    for name, content, parts in (
        (
            "object.json",
            json.dumps(entry),
            ["object.json", "not a list", "put the entries into [...]"],
        ),
        ("broken.json", "[{", ["broken.json:1", "correct the JSON"]),
        ("line.jsonl", json.dumps(entry) + "\n{oops\n", ["line.jsonl:2", "fix the line"]),
        (
            "missing.json",
            json.dumps([entry, {"instruction": "x"}]),
            ["missing.json", "entry 1", "'output'", "complete"],
        ),
        (
            "number.json",
            json.dumps([{**entry, "output": 4}]),
            ["number.json", "entry 0", "'output'", "correct or drop"],
        ),
        (
            "blank.json",
            json.dumps([entry, {**entry, "output": " "}]),
            ["blank.json", "entry 1", "empty", "complete"],
        ),
        ("latin.json", b'[{"instruction": "caf\xe9"}]', ["latin.json", "byte 21", "iconv"]),
        ("long.json", json.dumps(long), ["long.json", "entry 3", "data.max_length", "raise it"]),
    ):
        line = tune(tiny, "instruct", f"--data.source={write(name, content)}")
        for part in parts:
            assert part in line, line


def test_special_token_text_is_ordinary_text(tiny: Journey, write: Write) -> None:
    """Not refused: encoded as the characters that it is."""
    entries = [
        {"instruction": f"Repeat {i} <|endoftext|>", "input": "", "output": "<|endoftext|> <|end|>"}
        for i in "abcdefghijklmnopqrstuvwxyz"
    ]
    source = write("markers.json", json.dumps(entries))
    code, _, err = said(
        "fit",
        f"--config={CONFIGS}/instruct.yaml",
        *SHORT,
        *PLAIN,
        f"--model.init_from={tiny.best('pretrain')}",
        f"--data.source={source}",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
    )
    assert code == 0, err


def test_another_tokenizer_is_refused(tiny: Journey, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    words = [f"--source=[{tiny.folder / 'prose'}]", "--min_frequency=2", f"--output={other}"]
    assert said("tokenizer", "train", *words, "--vocab_size=300")[0] == 0
    line = tune(tiny, "instruct", f"--data.tokenizer={other}")
    assert "data.tokenizer" in line
    assert "not the tokenizer of" in line
    assert "leave it null" in line


def test_a_target_that_matches_nothing_is_refused(tiny: Journey) -> None:
    line = tune(tiny, "instruct", "--model.lora.targets=[c_attn]")
    assert "model.lora.targets ['c_attn']" in line
    assert "choose from" in line
    assert "'q'" in line


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tiny: Journey) -> None:
    assert "model.gpt.vocab_size is 300 but" in pretrain(tiny, "--model.gpt.vocab_size=300")


def test_lora_has_to_be_said_twice(tiny: Journey) -> None:
    assert "model.trainable" in tune(tiny, "spam", "--model.trainable=lora")


@pytest.mark.parametrize(
    "options", [["instruct"], ["spam", f"--config={CONFIGS}/model/lora_classifier.yaml"]]
)
def test_adapters_of_a_new_model_are_refused(options: list[str], tiny: Journey) -> None:
    """Their checkpoints would be without what they stand on."""
    config, *words = options
    new = [f"--config={CONFIGS}/model/tiny.yaml", f"--data.tokenizer={tiny.tokenizer}"]
    line = refused("fit", f"--config={CONFIGS}/{config}.yaml", *SHORT, *PLAIN, *new, *words)
    assert "model.lora" in line
    assert "model.init_from" in line


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_model_that_has_learned_nothing_is_not_evaluated(command: str, tiny: Journey) -> None:
    new = [f"--config={CONFIGS}/model/tiny.yaml", f"--data.tokenizer={tiny.tokenizer}"]
    for words in ([], new):
        line = refused(command, f"--config={CONFIGS}/spam.yaml", *PLAIN, *words)
        assert line == f"error: there is no checkpoint to {command}; give --ckpt_path."


def test_prompts_that_cannot_be(tiny: Journey) -> None:
    ckpt = f"--ckpt={tiny.best('pretrain')}"
    assert "block_size" in refused("generate", ckpt, "--prompt", "word " * 400)
    assert "prompt is empty" in refused("generate", ckpt, "--prompt", "")
    assert "top_p" in refused("generate", ckpt, "--prompt=x", "--temperature=1", "--top_p=2")
    line = refused("generate", ckpt, "--prompt=x", "--temperature=1", "--num_beams=2")
    assert "num_beams" in line
    assert "classifier" in refused("generate", f"--ckpt={tiny.best('spam')}", "--prompt=x")
    assert "not a classifier" in refused("classify", ckpt, "--text=x")
    assert "/no/such" in refused("generate", "--ckpt=/no/such", "--prompt=x")


def test_a_monitor_that_is_not_logged(tiny: Journey) -> None:
    line = pretrain(tiny, "--checkpoints.monitor=val/f1")
    assert "checkpoints.monitor" in line
    assert "val/loss" in line


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "prompt is empty"), ("word " * 99, "tokens but")]
)
def test_sample_texts_that_cannot_be_gone_on_from(tiny: Journey, prompt: str, said: str) -> None:
    name = "pipeline.training.callbacks.SampleTexts"
    words = [f"--trainer.callbacks+={name}", f"--trainer.callbacks.prompts={json.dumps([prompt])}"]
    line = pretrain(tiny, *words, "--trainer.callbacks.max_new_tokens=3")
    assert f"SampleTexts.prompts, {prompt[:60]!r}" in line
    assert said in line


def test_sample_texts_that_are_none(tiny: Journey) -> None:
    name = "pipeline.training.callbacks.SampleTexts"
    words = [f"--trainer.callbacks+={name}", '--trainer.callbacks.prompts=["Win"]']
    line = pretrain(tiny, *words, "--trainer.callbacks.max_new_tokens=0")
    assert "SampleTexts.max_new_tokens is 0" in line
    line = tune(tiny, "spam", *words, "--trainer.callbacks.max_new_tokens=3")
    assert "SampleTexts needs a model that writes text" in line


@pytest.mark.parametrize("command", ["fit", "check", "score", "generate", "run"])
@pytest.mark.parametrize("content", [b"data: [", b"a: \xff", b"data: {x: 1}\ndata: {y: 2}"])
def test_options_that_are_no_yaml(command: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    assert f"{path} is not valid YAML" in refused(command, "-c", str(path))
    path.write_text("# nothing\n")
    assert f"{path} holds no options" in refused(command, "-c", str(path))


@pytest.mark.parametrize("command", ["fit", "test", "check"])
def test_a_command_without_options_says_where_they_come_from(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "for example -c configs/pretrain.yaml" in line
