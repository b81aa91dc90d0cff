"""`merge`: the certificate states only what was measured; without one nothing is written."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import lora
from pipeline.checkpoint import read_meta, verify_checkpoint
from pipeline.models import load
from pipeline.runs.journal import metric_history, read_journal
from pipeline.stages import merge_stage
from pipeline.weights.lineage import lineage, short_name
from tests.journey import Journey, outcome_of, said

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_a_classifier(tiny: Journey, tmp_path: Path) -> None:
    ckpt, output = tiny.best("spam"), tmp_path / "merged"
    code, out, err = said("merge", f"--ckpt={ckpt}", f"--output={output}")
    assert code == 0, err
    assert out == f"{output}\n"
    verify_checkpoint(output)
    certificate = json.loads((output / "certificate.json").read_text())
    n_test = tiny.outcomes["spam-test"]
    logits, score = certificate["logits"], certificate["score"]
    assert 0 <= logits["mean"] <= logits["max"] < certificate["tolerance"]
    assert certificate["decisions"]["identical"] == certificate["decisions"]["n"] == score["n"]
    assert logits["n"] == 2 * score["n"]
    assert score["name"] == "accuracy"
    assert score["before"] == score["after"]
    assert score["after"] == pytest.approx(n_test["metrics"]["test/accuracy"], abs=1e-6)
    assert f"{score['n']} of {score['n']}" in err

    meta, merged = read_meta(output), load(output)
    assert meta["lora"] is None
    assert meta["adapter"]["path"] == str(ckpt)
    assert meta["label_names"] == ["ham", "spam"]
    with torch.inference_mode():
        assert torch.equal(merged.model(IDS), load(ckpt).model(IDS))
    outcome = outcome_of(tmp_path / "mlruns" / "merge")
    assert outcome["outputs"] == {"best": str(output)}
    (run,) = (tmp_path / "mlruns" / "merge").iterdir()
    told = {name: of_steps[0] for name, of_steps in metric_history(run).items()}
    assert told == outcome["metrics"] != {}, "MLflow has what the model card has"
    assert json.loads((run / "certificate.json").read_text()) == certificate
    (data,) = (line for line, _ in read_journal(run) if line["kind"] == "dataset")
    assert data["digest"] == certificate["data"]


@pytest.fixture(scope="module")
def tuned(tiny: Journey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA checkpoint of instructions."""
    from tests.journey import CONFIGS, PLAIN, SHORT

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("lora")
        patch.setenv("GPT_PIPELINE_HOME", str(home))
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        adapter = "{rank: 4, alpha: 8, dropout: 0.0, targets: [all-linear], rslora: false, "
        code, _, err = said(
            "fit",
            f"--config={CONFIGS}/instruct.yaml",
            *SHORT,
            *PLAIN,
            f"--model.init_from={tiny.best('pretrain')}",
            f"--model.lora={adapter}dora: false}}",
            "--run.experiment=instruct",
        )
        assert code == 0, err
        return Path(outcome_of(home / "instruct")["outputs"]["best"])


def test_a_language_model(tuned: Path, tmp_path: Path) -> None:
    code, out, err = said("merge", f"--ckpt={tuned}")
    assert code == 0, err
    output = Path(out.strip())
    certificate = json.loads((output / "certificate.json").read_text())
    texts, score = certificate["greedy_texts"], certificate["score"]
    assert texts["identical"] == texts["n"] > 0
    assert score["name"] == "perplexity"
    assert score["before"] == pytest.approx(score["after"], rel=1e-5)
    assert 0 < certificate["logits"]["max"] < 1e-4, "float32, logits of size 1"
    assert load(output).meta["prompt_style"] == load(tuned).meta["prompt_style"]
    assert said("export", f"--ckpt={output}", "--format=gguf")[0] == 0
    assert said("merge", f"--ckpt={output.parents[1]}")[2].endswith("nothing to merge.\n")


def test_a_relative_path_keeps_the_lineage(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, output = tiny.best("spam"), tmp_path / "merged"
    monkeypatch.chdir(ckpt.parent)
    code, _, err = said("merge", f"--ckpt={ckpt.name}", f"--output={output}")
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    names = [step["name"] for step in lineage(load(output))]
    assert names[1:] == [short_name(tiny.best(stage)) for stage in ("spam", "pretrain")]


def spoilt(by: float) -> Any:
    merge = lora.merge

    def merge_and_spoil(model: torch.nn.Module) -> None:
        merge(model)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("q.weight")).add_(by)

    return merge_and_spoil


@pytest.mark.parametrize(
    ("by", "message"),
    [(0.05, "moves logits by up to .*nothing was written"), (math.nan, "not made of numbers")],
)
def test_a_merge_that_changes_the_model_is_refused(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, message: str
) -> None:
    monkeypatch.setattr(lora, "merge", spoilt(by))
    code, out, err = said("merge", f"--ckpt={tuned}", f"--output={tmp_path / 'merged'}")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]


def test_another_output_is_refused_too() -> None:
    """Logits within the tolerance are not enough where a text or a decision differs."""
    certificate: dict[str, Any] = {"logits": {"max": 1e-6}, "decisions": {"n": 9, "identical": 9}}
    merge_stage.check(certificate, Path("x"))
    for change in ({"decisions": {"n": 9, "identical": 8}}, {"logits": {"max": float("nan")}}):
        with pytest.raises(ValueError, match="of 9 outputs; nothing was written"):
            merge_stage.check(certificate | change, Path("x"))


def test_data_that_moved_can_be_given(tuned: Path, tmp_path: Path) -> None:
    code, _, err = said("merge", f"--ckpt={tuned}", '--data={"source": "nowhere.json"}')
    assert code == 2
    assert "nowhere.json" in err


def test_data_of_strangers_is_not_imported(tuned: Path) -> None:
    loaded = load(tuned)
    loaded.meta["data"] = {"class_path": "os.getcwd", "init_args": {}}
    with pytest.raises(ValueError, match="does not say which of our data modules"):
        merge_stage.data_of(loaded, None)


def test_a_checkpoint_of_a_run_is_never_written_over(tuned: Path, tmp_path: Path) -> None:
    for ckpt in (tuned, tuned.parent / "nowhere"):
        code, out, err = said("merge", f"--ckpt={ckpt}", f"--output={tuned}")
        assert (code, out) == (2, "")
        assert "exists and was not written by this command" in err
    verify_checkpoint(tuned)
    merged = tmp_path / "merged"
    for _ in range(2):
        code, _, err = said("merge", f"--ckpt={tuned}", f"--output={merged}")
        assert code == 0, err
    assert "nowhere is not a path here" in said("merge", "--ckpt=nowhere")[2]
