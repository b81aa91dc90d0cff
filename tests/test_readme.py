"""The commands of the README, run on a tiny model."""

import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.arguments import parse
from pipeline.checkpoint import verify_checkpoint
from pipeline.commands import FUNCTIONS
from pipeline.stages.chain_config import load_chain
from tests.journey import CONFIGS, PLAIN, ROOT, SHORT, TINY, Journey, said
from tests.serving import Served

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.+?)```", README, re.DOTALL)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = [line.strip() for line in LINES if "python -m pipeline" in line]
CHAINS = [line for line in COMMANDS if "pipeline run" in line]
SERVERS = [line for line in COMMANDS if "pipeline serve" in line]
STAGES = [line for line in COMMANDS if line not in (*CHAINS, *SERVERS)]

# what makes a command quick, by its first words
SMALLER = {
    "tokenizer train": ["--source=prose", "--vocab_size=400"],
    "fit -c configs/pretrain.yaml": [*TINY, *PLAIN, "--data.source=prose"],
    "check -c configs/pretrain.yaml": [*TINY, *PLAIN, "--data.source=prose"],
    "fit -c configs/spam.yaml": [*SHORT, *PLAIN],
    "fit -c configs/instruct.yaml": [*SHORT, *PLAIN],
    "test": [],
    "score": ["--max_new_tokens=4"],
    "generate": ["--max_new_tokens=4"],
    "chat": ["--max_new_tokens=4"],
    "classify": [],
    "import": ["--source=published"],
    "export": [],
    "merge": [],
    "ui": ["--sync"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def published(tiny: Journey, home: Path) -> Path:
    """What stands for weights that somebody else made."""
    path = home / "published"
    code, _, err = said(
        "export", f"--ckpt={tiny.best('pretrain')}", "--format=huggingface", f"--output={path}"
    )
    assert code == 0, err
    return path


@pytest.fixture(autouse=True)
def checkout(
    tiny: Journey, home: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder like the one that the README is typed in, after the first command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(home))
    for name, stage in {"BASE": "pretrain", "SPAM": "spam", "TUNED": "instruct"}.items():
        monkeypatch.setenv(name, str(tiny.best(stage)))
    Path("configs").symlink_to(CONFIGS)
    Path("published").symlink_to(published)
    Path("prose").symlink_to(tiny.folder / "prose")
    for name in ("the-verdict.txt", "SMSSpamCollection", "instruction-data.json"):
        Path(name).write_text("the book's data, not read here\n")
    Path("tokenizer.json").write_bytes(tiny.tokenizer.read_bytes())
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line as a shell splits it, its variables set, without `python -m pipeline`."""
    words = shlex.split(os.path.expandvars(line), comments=True)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[:3] == ["python", "-m", "pipeline"]
    assert "$" not in "".join(words)
    return words[3:]


@pytest.mark.parametrize("line", STAGES)
def test_a_command_runs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = typed(line, monkeypatch)
    (smaller,) = (more for key, more in SMALLER.items() if " ".join(words).startswith(key))
    if words[0] == "tokenizer":  # it writes over no other's file
        Path("tokenizer.json").unlink()
    code, out, err = said(*words, *smaller)
    assert code == 0, err
    if words[0] == "fit":  # "the best checkpoint is printed"
        verify_checkpoint(Path(out.strip()))


def test_it_can_be_used_from_python(tiny: Journey, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    exec(block, {"TUNED": str(tiny.best("instruct"))})
    assert len(capsys.readouterr().out) > 1


@pytest.mark.slow  # a server that imports all: tests/test_serving.py has others
@pytest.mark.parametrize("line", SERVERS)
def test_a_server_answers(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served = Served(tmp_path, *typed(line, monkeypatch)[1:])
    (model,) = served.client().models.list()
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = served.client().chat.completions.create(
        model=model.id, messages=messages, max_tokens=4
    )
    assert answer.choices[0].finish_reason
    assert served.stop() == 130


@pytest.mark.parametrize("line", CHAINS)
def test_a_chain_is_whole(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse(FUNCTIONS["run"], typed(line, monkeypatch)[1:], "run")
    assert len(load_chain(Path(options["config"]), options["set"]).stages) >= 6


def test_every_command_is_shown() -> None:
    shown = {key for key in SMALLER if any(f"pipeline {key}" in line for line in STAGES)}
    assert shown == set(SMALLER)
    assert len(CHAINS) == 2
    assert len(SERVERS) == 1


ONCE = "--judge.max_attempts=1"


def test_the_judge_is_asked_where_the_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    (options,) = re.findall(r"`score \.\.\. (--judge.+?)`", README)
    score = typed(next(line for line in STAGES if "pipeline score" in line), monkeypatch)
    code, _, err = said(*score, *SMALLER["score"], *shlex.split(options), ONCE)
    assert code == 2
    assert "cannot connect to http://localhost:11434/v1" in err


def test_files_and_targets_that_are_named_exist() -> None:
    named = set(re.findall(r"\bconfigs/[\w/.-]+\.yaml", README))
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
    code = "\n".join([*BLOCKS, *re.findall(r"`.+?`", README)])
    targets = set(re.findall(r"\bmake ([a-z0-9-]+)", code))
    assert {"demo", "smollm2", "test", "gpu-test"} <= targets
    known = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets <= set(known)
