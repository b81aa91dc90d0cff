"""The command line: fast help, errors that fit on one line, `tokenizer train`."""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.tokenizer import Tokenizer
from pipeline.__main__ import COMMANDS, main
from pipeline.arguments import one_line
from pipeline.commands import FUNCTIONS
from tests.journey import CONFIGS, said

HEAVY = {"torch", "lightning", "mlflow", "pandas", "matplotlib", "sklearn", "httpx", "numpy"}
TRAINING = {"lightning", "mlflow", "torchmetrics", "transformers", "peft"}
Write = Callable[[str, str | bytes], Path]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_is_instant_because_it_imports_nothing_heavy() -> None:
    code = f"""
import sys
from pipeline.__main__ import main
for words in {[*map(str.split, FUNCTIONS), []]!r}:
    assert main([*words, "--help"]) == 0
sys.exit(", ".join({HEAVY!r} & set(sys.modules)) or 0)
"""
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage:") == len(FUNCTIONS) + 1


def test_what_uses_a_model_imports_nothing_of_training() -> None:
    """Lightning takes 5 s to import, which somebody who asks one question would wait for."""
    code = "import sys, pipeline.inference, pipeline.serving.serve, pipeline.stages.export_stage\n"
    code += f"sys.exit(', '.join({TRAINING!r} & set(sys.modules)) or 0)"
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr


def test_a_chain_and_its_vocabulary_import_no_torch() -> None:
    code = "import sys, pipeline.stages.chain, pipeline.stages.tokenizer_stage\n"
    code += f"sys.exit(', '.join({TRAINING | {'torch'}!r} & set(sys.modules)) or 0)"
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in COMMANDS.items():
        assert any(line.split() == [*name.split(), *summary.split()] for line in lines), name
        assert summary.endswith("."), f"{name} needs a sentence"


def test_check_does_not_call_itself_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m pipeline check ")
    assert COMMANDS["check"].removeprefix("Say ") in out
    assert "--data CONFIG" in out
    assert "this makes a finished run longer" in " ".join(out.split())
    assert "hpc" not in out, "one of Lightning's words for a checkpoint, which are refused"


def test_half_a_command_lists_its_continuations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--help"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer train" in out
    assert "generate" not in out
    assert main(["tokenizer"]) == 2
    assert "tokenizer train" in capsys.readouterr().err
    assert main([]) == 2


JUDGE = ("score", "--responses", "r.jsonl", "--judge.base_url", "http://localhost/v1")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("trian",), ["unknown command 'trian'"]),
        (("generat", "--prompt", "x"), ["'generat'", "did you mean generate?"]),
        (("tokenizer", "tran"), ["unknown command 'tokenizer'"]),
        (("generate", "--ckpt", "x", "--promt", "y"), ["--promt"]),
        (("generate", "--ckpt", "x"), ["required", "prompt"]),
        (("generate", "--ckpt", "x", "--prompt", "y", "--top_k", "many"), ["top_k:", "many"]),
        (("generate", "--ckpt", "x", "--prompt", "y", "--top_k", "5"), ["top_k 5", "temperature"]),
        (("classify", "--ckpt", "x"), ["--text", "--file"]),
        (("classify", "--ckpt", "x", "--file", "a.csv"), ["--output"]),
        (("classify", "--ckpt", "x", "--text", "a", "--threshold", "2"), ["threshold is 2.0"]),
        (("score",), ["--ckpt", "--responses"]),
        (("score", "--responses", "r.jsonl", "--split", "all"), ["split:", "all"]),
        ((*JUDGE, "--judge.model", "m", "--judge.max_tokens", "few"), ["judge.max_tokens:", "few"]),
        ((*JUDGE, "--judge.modle", "m"), ["judge:", "modle"]),
        (("ui", "--port", "0"), ["port is 0"]),
        (("run",), ["required", "config"]),
        (("run", "-c", "no.yaml"), ["error: no.yaml: no such file or directory"]),
        (("tokenizer", "train", "-c", "no.yaml"), ["config", "no.yaml"]),
        (("tokenizer", "train", "-c", "typo.yaml"), ["vocabsize"]),
        (("tokenizer", "train", "-c", "broken.yaml"), ["broken.yaml is not valid YAML"]),
        (("export", "--ckpt", "x", "--output", "y"), ["error: required: --format"]),
        (
            ("test", "--ckpt", "no/run"),
            ["ckpt_path no/run does not exist: it is not in a run of f"],
        ),
        (("chat", "--ckpt"), ["--ckpt has no value; if it was to be that of a variable"]),
        (
            ("fit", "--model.init_from", "--run.name", "x"),
            ["error: --model.init_from has no value"],
        ),
        (("test", "--ckpt_path", "--data.seed=1"), ["argument --ckpt_path: expected one argument"]),
        (("validate", "-c"), ["argument -c/--config: expected one argument"]),
        (("tokenizer", "train", "-c", "good.yaml"), ["source 'nowhere.txt' does not exist"]),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], parts: list[str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("typo.yaml", "source: a.txt\nvocabsize: 300\nmin_frequency: 2\n")
    write("broken.yaml", "source: [a.txt\nvocab_size: 300\n")
    write("good.yaml", "source: nowhere.txt\nvocab_size: 300\nmin_frequency: 2\n")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    for part in parts:
        assert part in captured.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "score"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["score"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_windows_is_told_of_wsl() -> None:
    found = python("-c", "import sys; sys.platform = 'win32'; import pipeline.__main__")
    assert "in WSL" in found.stderr.splitlines()[-1]


def test_interrupt_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        """Interrupted."""
        raise KeyboardInterrupt

    monkeypatch.setitem(FUNCTIONS, "ui", interrupted)
    monkeypatch.setattr("pipeline.arguments.parse", lambda *_: {})
    assert main(["ui"]) == 130


def test_a_closed_stdin_says_nothing() -> None:
    command = f"{sys.executable} -m pipeline generate --ckpt=no.gguf --prompt=- <&-"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("error: no.gguf does not exist;"), told.stderr


def test_a_stdout_that_takes_no_such_character_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*_: object) -> None:
        "猫".encode("latin-1")

    monkeypatch.setattr("pipeline.__main__._dispatch", say)
    assert "stdout takes latin-1 alone; set PYTHONIOENCODING=utf-8." in said("generate")[2]


def test_a_closed_pipe_is_no_mistake() -> None:
    command = f"{sys.executable} -m pipeline --help | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stderr == ""


def test_messages_of_jsonargparse_become_one_line() -> None:
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'x.A'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'x.A':
        Parser key "lr":
          Expected a <class 'float'>. Got value: fast
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    assert one_line(message) == "model.lr: Expected a float. Got value: fast"
    unknown = "unrecognized arguments: --x; --help lists the options."
    assert one_line("unrecognized arguments: --x") == unknown
    given = "Option 'x' is not accepted Given value: {'init_args': {'x': 1}}"
    assert one_line(given) == "Option 'x' is not accepted; --help lists the options."
    moved = "module 'pipeline' has no attribute 'lit_step' Given value: {'class_path': 'x'}"
    assert one_line(moved) == "module 'pipeline' has no attribute 'lit_step'"
    known = ["lr", "batch_size", "max_epochs"]
    for asked, hint in {
        "--trainer.max_epoch=3": "did you mean max_epochs? ",
        "--modle.lr=3": "",
        "--colour": "",
    }.items():
        text = one_line(f"unrecognized arguments: {asked}", known)
        assert text == f"unrecognized arguments: {asked}; {hint}--help lists the options."
    of_class = one_line("data: Option 'batchsize' is not accepted")
    assert (
        of_class == "data: Option 'batchsize' is not accepted; --data.help CLASS lists the options."
    )
    assert one_line(of_class) == of_class, "said once"
    nested = one_line("model.lora: Option 'r' is not accepted")
    assert nested.endswith("; --model.help CLASS lists the options.")
    yes = one_line('Parser key "data.label_names":\n  Expected a str Given value: True')
    assert yes.startswith("data.label_names: Expected a str Given value: True; in YAML yes, no")


def test_a_list_needs_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    table = [f"--config={CONFIGS}/spam.yaml", f"--config={CONFIGS}/data/table.yaml"]
    assert main(["fit", *table, "--data.label_names=a,b"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: data.label_names: Expected a list")
    assert said.endswith("value: a,b; write a list in brackets: '[a, b]'.")


def test_half_precision_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", f"--config={CONFIGS}/spam.yaml", "--precision=16-mixed"]
    assert main([*words, "--trainer.accelerator=cpu"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "error: precision is 16-mixed, which takes a GPU; give auto."
    assert main([*words[:2], "--precision=bf16-true"]) == 2, "means would be taken in bf16, too"


def test_an_option_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--config={CONFIGS}/spam.yaml", "--trainer.max_epoch=1"]) == 2
    assert "unrecognized arguments: --trainer.max_epoch=1;" in capsys.readouterr().err


def test_a_vocabulary_smaller_than_asked_for_is_said(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("text.txt", "the cat sat on the mat. " * 50)
    words = ["tokenizer", "train", "--source", "text.txt", "--vocab_size", "4000"]
    assert main([*words, "--min_frequency", "2"]) == 0
    captured = capsys.readouterr()
    n_vocab = Tokenizer.load(captured.out.strip()).n_vocab
    assert f"warning: {n_vocab} tokens, not 4,000: no other pair occurs 2 times" in captured.err


def test_tokenizer_train(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the cat sat on the mat. " * 50
    write("texts/a.txt", text)
    write("texts/b.txt", "a dog barked at the cat on the mat. " * 50)
    words = ["tokenizer", "train", "--source", "texts", "--vocab_size", "280"]
    words += ["--min_frequency", "2", "--output", "out/vocab.json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == "out/vocab.json\n"
    tokenizer = Tokenizer.load("out/vocab.json")
    assert tokenizer.n_vocab == 280
    assert "tokens, not" not in captured.err
    assert tokenizer.decode(tokenizer.encode(text)) == text

    (run,) = (tmp_path / "mlruns" / "tokenizer").iterdir()
    outcome = json.loads((run / "outcome.json").read_text())
    assert Tokenizer.load(outcome["outputs"]["tokenizer"]).digest == tokenizer.digest
    assert set(outcome["sources"]) == {"texts/a.txt", "texts/b.txt"}
    both = text + "a dog barked at the cat on the mat. " * 50
    n_tokens = sum(len(tokenizer.encode(part.read_text())) for part in Path("texts").iterdir())
    assert outcome["metrics"]["bytes_per_token"] == pytest.approx(len(both) / n_tokens)
    assert outcome["headline"][0]["after"] == outcome["metrics"]["bytes_per_token"]

    Path("out/vocab.json").unlink()
    assert main(words) == 0  # the same command again: done already, and the copy is there again
    assert "already finished" in capsys.readouterr().err
    assert Tokenizer.load("out/vocab.json").digest == tokenizer.digest

    kept = Path("out/vocab.json").read_bytes()
    write("texts/b.txt", "other words now. " * 50)
    assert main(words) == 2
    assert "out/vocab.json, which is there and is not this tokenizer" in capsys.readouterr().err
    assert Path("out/vocab.json").read_bytes() == kept
    assert len(list((tmp_path / "mlruns" / "tokenizer").iterdir())) == 2


def test_tokenizer_train_refuses_emptiness(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write("empty.txt", " \n")
    words = ["tokenizer", "train", "--source", "empty.txt", "--vocab_size", "280"]
    assert main([*words, "--min_frequency", "2"]) == 2
    assert "empty.txt holds no text" in capsys.readouterr().err
    (run,) = (tmp_path / "mlruns" / "tokenizer").iterdir()
    assert not (run / "outcome.json").exists()
    assert '"FAILED"' in (run / "journal.jsonl").read_text()


WAITING = """
import os, sys
from pipeline.__main__ import main
main(sys.argv[1:])
print({key: os.environ.get(key) for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")})
"""


@pytest.mark.parametrize("busy", [False, True])
def test_threads_wait_as_the_machine_is_busy(busy: bool) -> None:
    """Busy: every core has a process that only computes while the command starts."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
        if busy
    ]
    given = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    try:
        time.sleep(0.5 * busy)
        words = ["ui", "--port", "0"]  # refused, but only after the choice
        done = subprocess.run(
            [sys.executable, "-c", WAITING, *words], env=given, capture_output=True, text=True
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    chosen = ast.literal_eval(done.stdout)
    if busy:  # the machine of the tests may be busy anyway: idle is not ours to make
        assert chosen == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": None}
    assert sum(value is not None for value in chosen.values()) == 1
