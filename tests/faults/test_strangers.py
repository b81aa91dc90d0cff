"""An untrusted config: with `--safe`, nothing that it names is run, wherever it is named."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.processes import PROCESSES, Started
from tests.journey import CONFIGS, PLAIN, TINY, Journey, said

OURS = "tests.faults.stranger"
CALLBACK = {"class_path": f"{OURS}.Callback"}
NESTED = {
    "class_path": "lightning.pytorch.strategies.DDPStrategy",
    "init_args": {"cluster_environment": {"class_path": f"{OURS}.Environment"}},
}
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
STRANGE: dict[str, tuple[dict[str, Any], str]] = {  # YAML, the name that is refused
    "callbacks": ({"trainer": {"callbacks": [CALLBACK]}}, f"{OURS}.Callback"),
    "a name alone": ({"trainer": {"callbacks": f"{OURS}.Callback"}}, f"{OURS}.Callback"),
    "logger": ({"trainer": {"logger": CALLBACK}}, f"{OURS}.Callback"),
    "nested": ({"trainer": {"strategy": NESTED}}, f"{OURS}.Environment"),
    "model": ({"model": CALLBACK}, f"{OURS}.Callback"),
    "data": ({"data": CALLBACK}, f"{OURS}.Callback"),
    "another's import": (
        {"trainer": {"callbacks": [{"class_path": "pipeline.cli.os.system"}]}},
        "posix.system",
    ),
    "what calls": ({"trainer": {"callbacks": [{"class_path": LAMBDA}]}}, LAMBDA),
    "torch's loader": ({"trainer": {"profiler": {"class_path": "torch.hub.load"}}}, "torch.hub"),
}


def _say(cases: list[list[str]], environment: dict[str, str], results: Any) -> None:
    os.environ.update(environment)
    results.put([said("--safe", *words) for words in cases])


def refused(cases: list[list[str]], written: Path, tmp_path: Path) -> list[tuple[int, str, str]]:
    """What each command says, in a process that stays safe from the first on."""
    environment = {"STRANGER_WRITES": str(written), "GPT_PIPELINE_HOME": str(tmp_path / "mlruns")}
    results: Any = PROCESSES.Queue()
    process: Any = PROCESSES.Process(target=_say, args=(cases, environment, results))
    process.start()
    said_all: list[tuple[int, str, str]] = results.get(timeout=240)
    process.join()
    return said_all


def test_nothing_that_a_config_names_is_imported(tmp_path: Path) -> None:
    written, cases = tmp_path / "written", []
    base = ["fit", f"--config={CONFIGS}/pretrain.yaml"]
    for i, (values, _) in enumerate(STRANGE.values()):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump(values))
        cases.append([*base, f"--config={path}"])
    cases.append([*base, f"--trainer.callbacks+={OURS}.Callback"])
    results = refused(cases, written, tmp_path)
    places = [str(tmp_path / f"{i}.yaml") for i in range(len(STRANGE))] + ["command line"]
    names = [name for _, name in STRANGE.values()] + [f"{OURS}.Callback"]
    for (code, _, err), place, name in zip(results, places, names, strict=True):
        (line,) = (line for line in err.splitlines() if line.startswith("error:"))
        assert code == 2
        assert name in line, line
        assert "not imported with --safe" in line
        assert place in line or name == "posix.system", line
    assert not written.exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_chain_passes_it_on(tmp_path: Path) -> None:
    written, stage, chain = (tmp_path / name for name in ("written", "stage.yaml", "chain.yaml"))
    stage.write_text(
        yaml.safe_dump(
            yaml.safe_load((CONFIGS / "pretrain.yaml").read_text()) | {"model": CALLBACK}
        )
    )
    stages = [{"name": "pretrain", "command": "fit", "config": "stage.yaml"}]
    chain.write_text(yaml.safe_dump({"experiment": "theirs", "stages": stages}))
    ((code, _, _),) = refused([["run", f"--config={chain}"]], written, tmp_path)
    assert code == 2
    assert not written.exists()


def test_own_configs_are_safe_and_without_it_a_config_is_code(
    tiny: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "written"
    monkeypatch.setenv("STRANGER_WRITES", str(written))
    words = ["fit", f"--config={CONFIGS}/pretrain.yaml", *TINY, *PLAIN, "--trainer.max_steps=4"]
    words += [f"--data.source=[{tiny.folder / 'prose'}]", f"--data.tokenizer={tiny.tokenizer}"]
    safe = Started(["--safe", *words], tmp_path / "safe.txt")
    assert safe.wait() == 0, safe.said()
    trusting = Started([*words, f"--trainer.callbacks+={OURS}.Callback"], tmp_path / "said.txt")
    assert trusting.wait() == 0, trusting.said()
    assert written.exists()
