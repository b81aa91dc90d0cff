"""Random untrusted files and replies: read, or refused in words; never a traceback."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datamodules.documents import documents
from datamodules.tables import read_table
from pipeline.evaluation.rubric import parse_verdict
from pipeline.models import load
from pipeline.stages.chain_config import load_chain
from tests.journey import CONFIGS, PLAIN, SHORT, Journey, said
from tests.training import instruction_data

CASES, COMMANDS = 200, 10  # of each kind: of a reader, and of a whole command
fuzzed = settings(
    max_examples=CASES,
    deadline=5_000,  # ms: none may hang
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sampled = settings(fuzzed, max_examples=COMMANDS, deadline=20_000)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def ends_well(call: Callable[[], Any]) -> bool:
    """Success, or one of the two errors that the command line says in one line, with words."""
    try:
        call()
    except (ValueError, OSError) as error:
        return bool(str(error).strip())
    return True


def refused(*words: str) -> bool:
    """A whole command ends with 2, and says one line."""
    code, _, err = said(*words)
    return (code, sum(line.startswith("error: ") for line in err.splitlines())) == (2, 1)


def cut(content: bytes, noise: bytes, place: int) -> bytes:
    """A file with some bytes of it overwritten by others, at so many thousandths of it."""
    start = place * len(content) // 1000
    return content[:start] + noise + content[start + len(noise) :]


LINE = st.builds(json.dumps, st.dictionaries(st.sampled_from(["text", "label"]), JSON) | JSON)
DEEP = st.sampled_from(["[" * 100_000, '{"text":' * 50_000, '{"text": ' + "9" * 5_000 + "}"])


@fuzzed
@given(st.lists(LINE | st.text() | DEEP, max_size=4).map("\n".join), st.binary(max_size=3))
def test_jsonl(tmp_path: Path, text: str, noise: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode(errors="replace") + noise)
    assert ends_well(lambda: list(documents([str(path)], "text")))
    assert ends_well(lambda: read_table(path))


FIELDS = st.sampled_from(["instruction", "input", "output", "messages", "role", "content"])
ENTRY = st.recursive(
    st.text(max_size=5) | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.lists(ENTRY, max_size=5).map(json.dumps) | LINE | DEEP | st.text()


@fuzzed
@given(ENTRIES, st.binary(max_size=3))
@example("[" * 100_000, b"")
@example("[" + "9" * 5_000 + "]", b"")
def test_json(tiny: Journey, tmp_path: Path, text: str, noise: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="replace") + noise)
    assert ends_well(lambda: instruction_data(tiny.tokenizer, source=str(path)).setup("fit"))


@sampled
@given(ENTRIES)
@example("[" * 100_000)
def test_json_in_a_command(tiny: Journey, tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, errors="replace")
    words = ["fit", f"--config={CONFIGS}/instruct.yaml", *SHORT, *PLAIN]
    words += [f"--model.init_from={tiny.best('pretrain')}", f"--data.source={path}"]
    assert refused(*words), "of so few entries none can be held out"


@fuzzed
@given(st.text(alphabet='a,"\n\r\t;é\0', max_size=60).map(str.encode) | st.binary(max_size=60))
def test_csv(tmp_path: Path, content: bytes) -> None:
    for suffix in (".csv", ".tsv"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        assert ends_well(lambda path=path: read_table(path))  # type: ignore[misc]


@fuzzed
@given(
    st.text() | LINE | DEEP | st.builds(lambda s: json.dumps({"score": s, "rationale": ""}), JSON)
)
def test_judge_replies(reply: str) -> None:
    assert ends_well(lambda: parse_verdict(reply))


TANGLED = st.sampled_from(["[" * 100_000, "- " * 50_000, "ckpt: &a [*a]", "ckpt: " + "9" * 5_000])
KEYS = st.sampled_from(["experiment", "stages", "name", "command", "config", "set", "inputs", "x"])
WORDS = st.sampled_from(["fit", "score", "generate", "tokenizer train", "a", "${NO}", "../a.yaml"])
CHAIN = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=10,
)


@fuzzed
@given(CHAIN.map(yaml.safe_dump) | TANGLED | st.text(alphabet="a:-[]{}&*!|>#'\" \n", max_size=40))
def test_chains(tmp_path: Path, text: str) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(text, errors="replace")
    assert ends_well(lambda: load_chain(path))


OPTIONS = st.sampled_from(["ckpt", "responses", "model", "class_path", "init_args", "trainer"])
STAGE = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(OPTIONS, inner, max_size=4),
    max_leaves=10,
).map(yaml.safe_dump)


@fuzzed
@given(STAGE | TANGLED | st.text(alphabet="a:-[]{}&*!|>#'\" \n", max_size=40))
@example("[" * 100_000)
def test_a_stages_yaml(tmp_path: Path, text: str) -> None:
    path, chain = tmp_path / "stage.yaml", tmp_path / "chain.yaml"
    path.write_text(text, errors="replace")
    chain.write_text("{experiment: x, stages: [{name: a, command: fit, config: stage.yaml}]}")
    assert ends_well(lambda: load_chain(chain))


@sampled
@given(STAGE | TANGLED)
@example("[" * 100_000)
def test_a_stages_yaml_in_commands(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(text, errors="replace")
    for command in ("score", "fit"):
        assert refused(command, f"--config={path}")


@pytest.fixture(scope="module")
def published(tiny: Journey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in the form in which others publish them, without the digests of our exports."""
    from tests.journey import run

    path = tmp_path_factory.mktemp("published") / "model"
    ckpt = f"--ckpt={tiny.best('pretrain')}"
    assert run("export", ckpt, "--format=huggingface", f"--output={path}") == 0
    (path / "export.json").unlink(missing_ok=True)
    return path


@fuzzed
@given(st.binary(max_size=12), st.integers(0, 999), st.none() | st.integers(0, 2**64 - 1))
def test_safetensors_headers(
    published: Path, tmp_path: Path, noise: bytes, place: int, length: int | None
) -> None:
    path = tmp_path / "model"
    if not path.exists():
        shutil.copytree(published, path)
    content = (published / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = cut(content[8 : 8 + size], noise, place)
    prefix = struct.pack("<Q", size if length is None else length)
    (path / "model.safetensors").write_bytes(prefix + header + content[8 + size :])
    assert ends_well(lambda: load(path))
