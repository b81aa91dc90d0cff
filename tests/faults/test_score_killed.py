"""`score` killed while a model answers: finished answers are kept and not asked for again."""

import json
import signal
from pathlib import Path

import pytest

from tests.faults.processes import Started
from tests.journey import CONFIGS, Journey, said


def test_a_killed_score_goes_on(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path))
    words = ["score", f"--config={CONFIGS}/score.yaml", f"--ckpt={tiny.best('instruct')}"]
    words += ["--max_new_tokens=30", "--precision=32-true"]

    def answered() -> list[Path]:
        found = list(tmp_path.glob("score/*/answers.jsonl"))
        return [path for path in found if path.read_bytes().count(b"\n") >= 3]

    command = Started([*words, "--batch_size=1"], tmp_path / "said.txt")
    command.until(lambda: bool(answered()))
    command.send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL

    (path,) = answered()
    rows = [json.loads(line) for line in path.read_text().splitlines()[:3]]
    rows[0]["text"] = "as it was kept"
    lines = [json.dumps(row) for row in rows]
    half = json.dumps({"key": rows[2]["key"]})
    path.write_text("\n".join([*lines[:2], half, lines[2][:20]]))  # the third is cut short, twice
    code, out, err = said(*words)
    assert code == 0, err
    assert f"{path}: passing over a damaged line" in err
    responses = [json.loads(line) for line in (path.parent / "responses.jsonl").open()]
    assert out.startswith(f"{len(responses)} answers")
    texts = [response["response"] for response in responses]
    assert texts.count("as it was kept") == 1
    assert rows[2]["text"] in texts, "answered anew, the same"
    assert not path.exists()
