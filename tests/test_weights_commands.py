"""Commands on published weights: a directory, a GGUF file, a name; with adapters on top."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import cache_dir
from datamodules.tokenizer import Tokenizer
from pipeline.checkpoint import read_meta
from pipeline.directories import path_digest
from pipeline.models import load
from pipeline.weights import fetch
from pipeline.weights.fetch import Packaged, locate
from pipeline.weights.reading import tokenizer_of
from tests.journey import CONFIGS, PLAIN, SHORT, outcome_of, said
from tests.published import random_model, save_tokenizer, train, write_gguf

LORA = "{rank: 4, alpha: 8, dropout: 0.0, targets: [q, v], rslora: false, dora: false}"
DATA = ["--data.prompt_style=template", "--data.max_length=128"]
ENTRIES = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
INSTRUCTIONS = {
    "max_length": 128,
    "train_fraction": 0.8,
    "val_fraction": 0.1,
    "shuffle_split": True,
    "batch_size": 8,
    "max_tokens": 2048,
    "seed": 1,
    "split_seed": 1,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a directory and as a file, both with a blank in their names."""
    folder = tmp_path_factory.mktemp("weights of others")
    bpe = train("smollm")
    model = random_model("llama", bpe.get_vocab_size(), max_position_embeddings=256)
    write_gguf(folder / "a model.gguf", model, bpe)
    model.save_pretrained(folder / "a model")
    save_tokenizer(bpe, folder / "a model")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    return tmp_path / "mlruns"


@pytest.fixture
def instructions(write: Callable[[str, str], Path]) -> str:
    return str(write("instructions.json", json.dumps(ENTRIES)))


@pytest.fixture
def name(published: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file, fetched before under a name."""
    content = (published / "a model.gguf").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(fetch.PACKAGED, "tiny-135m", Packaged("none", "", "a.gguf", digest, 1))
    cached = cache_dir() / "weights" / "tiny-135m" / "a.gguf"
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(content)
    return "tiny-135m"


@pytest.fixture(params=["a model", "a model.gguf", "by name"])
def source(request: Any, published: Path, name: str) -> str:
    return name if request.param == "by name" else str(published / request.param)


def works(*words: str) -> str:
    """Stdout of a command that ends well."""
    code, out, err = said(*words)
    assert code == 0, err
    return out


def refused(*words: str) -> str:
    """Stderr of a command that is a mistake."""
    code, _, err = said(*words)
    assert code == 2
    assert err.count("error: ") == 1
    return err


def fit(config: str, source: str, home: Path, *words: str) -> str:
    """The best checkpoint of a short fit."""
    where = [f"--model.init_from={source}", f"--run.experiment={config}"]
    works("fit", f"--config={CONFIGS}/{config}.yaml", *SHORT, *PLAIN, *where, *words)
    best: str = outcome_of(home / config)["outputs"]["best"]
    return best


def test_weights_as_they_are(
    source: str,
    instructions: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: Path,
) -> None:
    text = works("generate", f"--ckpt={source}", "--prompt=the quick", "--max_new_tokens=6")
    assert text == works(
        "generate", f"--ckpt={published / 'a model'}", "--prompt=the quick", "--max_new_tokens=6"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n\n"))
    assert works("chat", f"--ckpt={source}", "--max_new_tokens=6") == works(
        "generate", f"--ckpt={source}", "--prompt=Hello!", "--max_new_tokens=6", "--chat=true"
    )
    words = ["generate", f"--ckpt={source}", "--chat=true", "--max_new_tokens=6"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n"))  # the line end is one that echo adds
    assert works(*words, "--prompt=-") == works(*words, "--prompt=Hello!")
    said_so = refused("classify", f"--ckpt={source}", "--text=hi")
    assert f"{source} is not a classifier" in said_so
    assert "--data" in refused("score", f"--ckpt={source}", "--max_new_tokens=2")
    data = f"--data={json.dumps({**INSTRUCTIONS, 'source': instructions})}"
    works("score", f"--ckpt={source}", "--max_new_tokens=2", "--split=val", data)
    assert outcome_of(home / "score")["metrics"]["after/perplexity"] > 1
    (report,) = (home / "score").glob("*/report.html")
    assert path_digest(locate(source)) in report.read_text()


def test_a_file_of_the_hubs_cache(published: Path, tmp_path: Path) -> None:
    """There it is a link to one that is named by its digest."""
    blob, snapshot = tmp_path / "blobs" / "c0ffee", tmp_path / "snapshots" / "abc"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes((published / "a model.gguf").read_bytes())
    (snapshot / "small.gguf").symlink_to("../../blobs/c0ffee")
    assert locate(snapshot / "small.gguf").name == "small.gguf"
    assert load(snapshot / "small.gguf").title == "small"


def test_a_path_with_a_variable_is_no_name(
    published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WEIGHTS", str(published))
    assert load("$WEIGHTS/a model").name is None
    imported = Path(works("import", "--source=$WEIGHTS/a model").strip())
    assert read_meta(imported)["source"]["name"] == "a model"


def test_a_damaged_copy_of_a_tokenizer_is_made_again(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))  # others read the shared one
    file = Path(tokenizer_of(published / "a model"))
    file.write_bytes(b"")
    assert Tokenizer.load(tokenizer_of(published / "a model")).n_vocab > 256
    assert file.stat().st_size


@pytest.mark.parametrize(
    ("command", "source"),
    [("validate", "a model"), ("test", "a model.gguf"), ("predict", "by name")],
    indirect=["source"],
)
def test_measured_as_they_are(command: str, source: str, instructions: str, home: Path) -> None:
    where = [*PLAIN, f"--ckpt_path={source}", "--run.experiment=plain"]
    if command == "predict":
        assert "is not a classifier" in refused(command, f"--config={CONFIGS}/spam.yaml", *where)
        return
    words = [f"--config={CONFIGS}/instruct.yaml", *where, *DATA, f"--data.source={instructions}"]
    works(command, *words, "--model.lora=null")
    metrics = outcome_of(home / "plain")["metrics"]
    assert metrics[f"{'val' if command == 'validate' else 'test'}/loss"] > 1


@pytest.mark.parametrize("source", ["a model", "by name"], indirect=True)
def test_instructions_on_top(source: str, instructions: str, home: Path) -> None:
    words = [*DATA, f"--data.source={instructions}", f"--model.lora={LORA}"]
    best = fit("instruct", source, home, *words)
    loaded = load(best)
    assert loaded.meta["prompt_style"] == "template"
    assert loaded.tokenizer.digest == load(source).tokenizer.digest
    assert loaded.meta["base"]["name"] == (None if Path(source).exists() else source)
    works("generate", f"--ckpt={best}", "--prompt=Hello!", "--max_new_tokens=3", "--chat=true")
    works("score", f"--ckpt={best}", "--max_new_tokens=2")
    metrics = outcome_of(home / "score")["metrics"]
    assert metrics["before/perplexity"] != metrics["after/perplexity"]


@pytest.mark.parametrize("trainable", ["lora", "last_block"])
def test_a_classifier_on_top(trainable: str, published: Path, home: Path, tmp_path: Path) -> None:
    base = shutil.copy(published / "a model.gguf", tmp_path / "base.gguf")
    adapter = LORA if trainable == "lora" else "null"
    words = [f"--model.trainable={trainable}", f"--model.lora={adapter}"]
    best = fit("spam", str(base), home, *words)
    spam = f"--config={CONFIGS}/spam.yaml"
    works("test", spam, *PLAIN, f"--ckpt_path={best}", "--run.experiment=tested")
    assert 0 <= outcome_of(home / "tested")["metrics"]["test/accuracy"] <= 1
    label = json.loads(works("classify", f"--ckpt={best}", "--text=win a prize now"))
    assert label["label"] in ("ham", "spam")

    other = train("smollm")
    model = random_model("llama", other.get_vocab_size(), max_position_embeddings=256)
    model.model.norm.weight.data[0] += 1
    write_gguf(tmp_path / "base.gguf", model, other)
    if trainable == "lora":
        message = refused("classify", f"--ckpt={best}", "--text=win a prize now")
        assert "trained on a base with digest" in message
        assert "put the original back" in message
    else:
        works("classify", f"--ckpt={best}", "--text=win a prize now")


def test_what_cannot_be(published: Path, tmp_path: Path) -> None:
    generate = ("generate", "--prompt=x")
    assert "no/such/thing does not exist" in refused(*generate, "--ckpt=no/such/thing")
    assert "smollm2-135m-instruct" in refused(*generate, "--ckpt=./smollm2.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes((published / "a model.gguf").read_bytes()[:1000])
    assert "damaged.gguf cannot be used: it is truncated" in refused(*generate, f"--ckpt={damaged}")
    spam = [f"--config={CONFIGS}/spam.yaml", *SHORT, *PLAIN, "--model.trainable=all"]
    assert "damaged.gguf" in refused("fit", *spam, f"--model.init_from={damaged}")
    tokenizer = f"--data.tokenizer={published / 'a model.gguf'}"
    long = "--data.max_length=300"
    init = f"--model.init_from={published / 'a model'}"
    assert "block_size" in refused("fit", *spam, init, tokenizer, long)
    other = tmp_path / "other"
    save_tokenizer(train("gpt-2"), other)
    random_model("llama", 500).save_pretrained(other)
    mixed = f"--data.tokenizer={other}"
    assert "is not the tokenizer of" in refused("fit", *spam, init, mixed)
