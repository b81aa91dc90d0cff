"""Untrusted files and replies execute nothing, touch nothing outside, and leak no key."""

import ast
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint as files
from pipeline import directories
from pipeline.checkpoint import verify_checkpoint
from pipeline.directories import CheckpointError
from pipeline.models import load
from pipeline.stages.merge_stage import data_of
from pipeline.training.checkpoint_callback import DirectoryCheckpointIO
from pipeline.weights.reading import EXPORT
from tests.faults.servers import Answer, Server, serving, status, whole
from tests.journey import CONFIGS, PLAIN, ROOT, TINY, Journey, run, said
from tests.published import random_model, train, write_gguf

MARKER = "EXECUTED"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.marker = str(folder / MARKER)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.marker,))


def bombs(folder: Path) -> dict[str, bytes]:
    """As pickle writes it, and as torch does."""
    path = folder / "bomb"
    torch.save({"state_dict": Bomb(folder)}, path)
    saved = path.read_bytes()
    path.unlink()
    return {"pickle": pickle.dumps(Bomb(folder)), "torch": saved}


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(bombs(tmp_path)["pickle"])
    assert (tmp_path / MARKER).exists()


def refusal(*words: object) -> str:
    """The one line that a command ends with."""
    code, _, err = said(*map(str, words))
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    return line


def sign(path: Path) -> Path:
    """A manifest that says that the files of a folder are what they should be."""
    names = sorted(p.name for p in path.iterdir() if p.name != files.MANIFEST)
    facts = {name: directories._facts(path / name) for name in names}
    manifest = {"format": files.FORMAT, "files": facts}
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    return path


@pytest.fixture(params=["pickle", "torch"])
def bomb(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    """Its bytes; at the end of the test it has not gone off."""
    yield bombs(tmp_path)[request.param]
    assert not (tmp_path / MARKER).exists(), "the pickle was executed"


def test_a_pickle_by_any_name(bomb: bytes, tmp_path: Path) -> None:
    for suffix in ("ckpt", "pt", "bin", "safetensors", "gguf"):
        path = tmp_path / f"model.{suffix}"
        path.write_bytes(bomb)
        assert str(path) in refusal("generate", f"--ckpt={path}", "--prompt=hi")
    for words in (
        ["import", f"--source={path}"],
        ["export", f"--ckpt={path}", "--format=gguf"],
        ["merge", f"--ckpt={path}"],
    ):
        assert str(path) in refusal(*words)


def test_a_pickle_to_start_from_or_go_on_with(bomb: bytes, tiny: Journey, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(bomb)
    data = [f"--data.source=[{tiny.folder / 'prose'}]", f"--data.tokenizer={tiny.tokenizer}"]
    words = [f"--config={CONFIGS}/pretrain.yaml", *TINY, *PLAIN, *data]
    assert str(path) in refusal("fit", *words, f"--ckpt_path={path}")
    assert str(path) in refusal("test", *words, f"--ckpt_path={path}")
    words = [f"--config={CONFIGS}/spam.yaml", *PLAIN]
    assert str(path) in refusal("fit", *words, f"--model.init_from={path}")


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_pickles_in_a_checkpoint_whose_digests_are_right(
    stage: str, bomb: bytes, tiny: Journey, tmp_path: Path
) -> None:
    """In the place of each of its files; of a whole model, and of an adapter."""
    path = tmp_path / files.step_name(1)
    for name in sorted(p.name for p in tiny.best(stage).iterdir()):
        if name in (files.MANIFEST, files.ADAPTER_CONFIG):  # the latter is for PEFT, never read
            continue
        shutil.copytree(tiny.best(stage), path)
        (path / name).write_bytes(bomb)
        verify_checkpoint(sign(path))
        if name == files.TRAINING:
            with pytest.raises(CheckpointError, match=r"training\.pt holds more than tensors"):
                DirectoryCheckpointIO().load_checkpoint(path)
        else:
            assert (
                name in refusal("generate", f"--ckpt={path}", "--prompt=hi") or name == "meta.json"
            )
        shutil.rmtree(path)


def test_a_pickle_among_published_weights(bomb: bytes, tiny: Journey, tmp_path: Path) -> None:
    path = tmp_path / "model"
    ckpt = f"--ckpt={tiny.best('pretrain')}"
    assert run("export", ckpt, "--format=huggingface", f"--output={path}") == 0
    (path / EXPORT).unlink()
    (path / files.WEIGHTS).write_bytes(bomb)
    assert files.WEIGHTS in refusal("generate", f"--ckpt={path}", "--prompt=hi")
    (path / files.WEIGHTS).rename(path / "pytorch_model.bin")
    assert "is a pickle, which is never read" in refusal("import", f"--source={path}")


UNSAFE = {  # what unpickles, or makes code of data
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "joblib.load",
    "dill.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.export.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "eval",
    "exec",
}


def unsafe_calls(source: str) -> list[str]:
    """Calls that would execute a stranger's file, `torch.load` without weights_only among them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(
                k.arg == "weights_only"
                and isinstance(k.value, ast.Constant)
                and k.value.value is True
                for k in node.keywords
            )
            pickles = any(k.arg == "allow_pickle" for k in node.keywords)  # of numpy.load
            if name in UNSAFE or pickles or (name == "torch.load" and not safe):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "yaml"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name in UNSAFE or name == "torch.load"]
    return found


def test_no_source_unpickles() -> None:
    sources = [
        p
        for folder in ("pipeline", "datamodules", "benchmarks")
        for p in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 50
    assert {str(p): calls for p in sources if (calls := unsafe_calls(p.read_text()))} == {}
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        lines = [line for cell in code for line in cell.splitlines() if line[:1] not in "%!"]
        assert unsafe_calls("\n".join(lines)) == []


@pytest.mark.parametrize(
    ("source", "n_found"),
    [
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=flag)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("from torch import load", 1),
        ("np.load(p)", 0),
        ("np.load(p, allow_pickle=True)", 1),
        ("yaml.safe_load(t) or yaml.load(t)", 1),
    ],
)
def test_that_walk_finds_them(source: str, n_found: int) -> None:
    assert len(unsafe_calls(source)) == n_found


# Paths


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_a_manifest_that_names_a_file_outside(form: str, tiny: Journey, tmp_path: Path) -> None:
    """With the right digest: it would pass if the file were looked at."""
    outside = tmp_path / "secret"
    outside.write_text("of somebody else")
    path = tmp_path / "runs" / files.step_name(1)
    shutil.copytree(tiny.best("pretrain"), path)
    manifest = json.loads((path / files.MANIFEST).read_text())
    name = {"relative": "../../secret", "absolute": str(outside)}[form]
    manifest["files"][name] = directories._facts(outside)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    assert f"lists a file of another folder, '{name}'" in refusal(
        "generate", f"--ckpt={path}", "--prompt=hi"
    )


def test_an_export_that_names_a_file_outside(tiny: Journey, tmp_path: Path) -> None:
    outside, path = tmp_path / "secret", tmp_path / "model"
    outside.write_text("of somebody else")
    ckpt = f"--ckpt={tiny.best('pretrain')}"
    assert run("export", ckpt, "--format=huggingface", f"--output={path}") == 0
    facts = json.loads((path / EXPORT).read_text())
    facts["files"]["../secret"] = directories._facts(outside)
    (path / EXPORT).write_text(json.dumps(facts))
    assert "lists a file of another folder" in refusal("import", f"--source={path}")


def test_a_manifest_of_another_shape(tiny: Journey, tmp_path: Path) -> None:
    path = tmp_path / files.step_name(1)
    shutil.copytree(tiny.best("pretrain"), path)
    whole = json.loads((path / files.MANIFEST).read_text())["files"]
    odd: list[Any] = [[1], 7, "x", None, {**whole, "\0": {}}, {**whole, "..": {}}]
    for listed in odd:
        manifest = {"format": files.FORMAT, "files": listed}
        (path / files.MANIFEST).write_text(json.dumps(manifest))
        assert str(path) in refusal("generate", f"--ckpt={path}", "--prompt=hi")
    for version in ("<script>", [], {"a": 1}, -1, 1e999):
        (path / files.MANIFEST).write_text(json.dumps({"format": version, "files": whole}))
        assert "this version reads" in refusal("generate", f"--ckpt={path}", "--prompt=hi")


@pytest.mark.parametrize("meta", ["{}", "[]", "null", '{"lora": {"rank": "x"}}', '{"lora": null}'])
def test_a_checkpoint_that_says_nothing_of_itself(meta: str, tiny: Journey, tmp_path: Path) -> None:
    path = tmp_path / files.step_name(1)
    shutil.copytree(tiny.best("pretrain"), path)
    (path / files.META).write_text(meta)
    sign(path)
    assert "was not written by this program" in refusal("generate", f"--ckpt={path}", "--prompt=hi")


def test_metadata_of_weights_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file that calls itself `../../evil`, through import, use and export."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    bpe = train("smollm")
    evil = "../../evil"

    def name(writer: Any) -> None:
        for key in ("name", "basename", "author", "license", "source.url", "tags"):
            writer.add_string(f"general.{key}", evil)

    write_gguf(inside / "model.gguf", random_model("llama", bpe.get_vocab_size()), bpe, change=name)
    before = {p for p in tmp_path.rglob("*") if "mlruns" not in p.parts}
    assert run("import", "--source=model.gguf") == 0
    assert run("export", "--ckpt=model.gguf", "--format=gguf", "--output=exported") == 0
    new = {p for p in tmp_path.rglob("*") if "mlruns" not in p.parts} - before
    assert new
    assert all(p.is_relative_to(inside / "exported") for p in new)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "class_path",
    ["os.system", "datamodules.files.sha256", "datamodules.evil.Evil", "datamodules.files.os", ""],
)
def test_a_checkpoint_names_no_code(class_path: str, tiny: Journey) -> None:
    loaded = load(tiny.best("instruct"))
    loaded.meta["data"] = {"class_path": class_path, "init_args": {}}
    with pytest.raises(ValueError, match="which of our data modules"):
        data_of(loaded, None)


# The judge's key

KEY = 'sk-very/secret"<0123456789>'  # characters that JSON escapes, some of them at will
SPELLINGS = [
    KEY,
    json.dumps(KEY)[1:-1],
    json.dumps(KEY)[1:-1].replace("/", "\\/"),
    json.dumps(KEY)[1:-1].replace("<", "\\u003c").replace(">", "\\u003E"),
    "".join(f"\\u{ord(c):04x}" for c in KEY),
]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def judged(
    server: Server, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`score` with a judge that wants a key; the store of MLflow lies in the runs' folder too."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    path = tmp_path / "given.jsonl"
    rows = [{"id": i, "instruction": "?", "reference": "10", "response": "x"} for i in "abcdef"]
    rows = [{**row, "response": f"{row['id']} {ATTACK}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "base_url": f"{server.url}/v1",
        "model": "judge-1",
        "api_key_env": "JUDGE_KEY",
        "max_attempts": 1,
        "max_concurrency": 1,
    }
    words = [f"--judge.{key}={value}" for key, value in options.items()]
    return ["score", f"--responses={path}", *words, "--debug"]


ATTACK = "<script>alert(1)</script><img src=x onerror=\"document.title='EXECUTED'\">"


def chat(content: str) -> Answer:
    return whole(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


def verdict(rationale: str) -> Answer:
    return chat(json.dumps({"rationale": rationale, "score": 50}))


def holding_the_key(folder: Path, *texts: str) -> list[str]:
    """Files, and texts, that hold the key in any spelling; or its part without odd characters."""
    contents = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    contents |= {f"text {i}": text.encode() for i, text in enumerate(texts)}
    assert len(contents) > len(texts)
    traces = [spelling.encode() for spelling in SPELLINGS] + [b"0123456789", b"sk-very"]
    return [name for name, content in contents.items() if any(t in content for t in traces)]


def test_the_key_is_nowhere_but_in_the_request(
    judged: list[str], server: Server, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Journal, YAML, MLflow's database and artifacts, verdicts, report, output, log."""
    echoes = [verdict(f"you sent {KEY}"), chat(KEY), chat(KEY)]
    errors = [status(409, f'{{"error": "bad key {s}"}}'.encode()) for s in SPELLINGS]
    server.answers = [*echoes, *errors]
    with caplog.at_level("DEBUG"):
        code, out, err = said(*judged)
    assert code == 0, err
    assert len(server.requests) == 3 + 4  # the second item is asked about twice
    assert all(f"Authorization: Bearer {KEY}".encode() in request for request in server.requests)
    (run_path,) = home.glob("score/*")
    assert run_path.name.encode() in (home / "mlflow.db").read_bytes()
    assert "you sent [key]" in (run_path / "scores.jsonl").read_text()
    assert holding_the_key(home, out, err, caplog.text) == []


def test_a_refused_key_is_not_said(judged: list[str], server: Server, home: Path) -> None:
    server.answers = [
        status(401, f'{{"error": "wrong key {spelling}"}}'.encode()) for spelling in SPELLINGS
    ]
    for _ in SPELLINGS:
        code, out, err = said(*judged)
        assert code == 2
        assert "wrong key [key]" in err
        assert holding_the_key(home, out, err) == []


# What is shown, and to whom


def test_a_report_shows_scripts_as_text(judged: list[str], server: Server, home: Path) -> None:
    server.answers = [verdict(ATTACK), chat(ATTACK)]
    code, _, err = said(*judged)
    assert code == 0, err
    (path,) = home.glob("score/*/report.html")
    html = path.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "<img" not in html

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("the file is right; there is no browser to show it in")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'browser'}"]
    shown = subprocess.run(
        [browser, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "<script" not in shown
    assert "<title>Evaluation report</title>" in shown


def test_the_ui_listens_on_loopback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append(words))
    before = dict(os.environ)
    assert run("ui", "--port=50917") == 0
    assert os.environ == before
    (words,) = started
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert not {"0.0.0.0", "::"} & set(words)
