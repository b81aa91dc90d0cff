"""The benchmark harness: warm-up is excluded, and unequal work is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import prepare, spam_seeds, workloads
from benchmarks.harness import (
    Contestant,
    Precision,
    Result,
    Workload,
    check_equal_work,
    measure,
)
from benchmarks.peers import CONSTRAINTS, LITGPT, LLAMA_CPP, VLLM, Environment, constraints_of
from benchmarks.record import peak_memory
from benchmarks.report import plot, table

STEPS = """
import sys
from benchmarks.record import Record
record = Record(sys.argv[1])
for tokens, loss in ((999, 9.0), ({tokens}, 2.0), ({tokens}, {loss})):
    record.step(tokens, loss)
record.save()
"""


def contestant(
    name: str,
    *,
    tokens: int = 100,
    loss: float = 1.0,
    precision: Precision = "float32",
    ours: bool = False,
) -> Contestant:
    program = STEPS.format(tokens=tokens, loss=loss)
    return Contestant(name, precision, [sys.executable, "-c", program, "{record}"], is_ours=ours)


def workload(*contestants: Contestant) -> Workload:
    return Workload("P0", "nothing", contestants, 1, 1e6, 0.02, Path(__file__))


@pytest.fixture(scope="module")
def results() -> list[Result]:
    work = workload(contestant("ours", ours=True), contestant("theirs", loss=1.01))
    return measure(work, n_rounds=2)


def test_warm_up_is_left_out_and_reported(results: list[Result]) -> None:
    for result in results:
        assert result.tokens == [200, 200]
        assert [len(v) for v in (result.rates, result.warmup_seconds, result.rss)] == [2, 2, 2]
        rates = [200 / seconds for seconds in result.seconds]
        assert result.rates == pytest.approx(rates)
        assert all(share > 0 for share in result.shares)
        assert all(5e6 < rss < 1e9 for rss in result.rss)  # bytes of a Python process


def test_memory_of_a_process_is_that_of_those_it_started_too() -> None:
    """A server's model may be in a process of its own."""
    started = "x = b'x' * 60_000_000; print(flush=True); input()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {started!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", starts], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 60_000_000 < peak_memory(process.pid) < 200_000_000
        process.communicate(b"\n")


def test_other_work_is_refused(results: list[Result]) -> None:
    ours, theirs = results
    less = Result(**{**vars(theirs), "tokens": [199, 200]})
    with pytest.raises(RuntimeError, match="theirs worked on"):
        check_equal_work(workload(), [ours, less])
    coarse = Result(**{**vars(less), "precision": "q8_0", "outputs": ["0", "0"]})
    with pytest.raises(RuntimeError, match="theirs worked on"):
        check_equal_work(workload(), [ours, coarse])
    check_equal_work(replace(workload(), ends_freely=True), [ours, coarse])
    other = Result(**{**vars(theirs), "outputs": ["0", "0"]})
    with pytest.raises(RuntimeError, match="same output"):
        check_equal_work(workload(), [ours, other])
    worse = Result(**{**vars(theirs), "losses": [1.0, 1.5]})
    with pytest.raises(RuntimeError, match="theirs has mean losses of"):
        check_equal_work(workload(), [ours, worse])


def test_a_contestant_that_fails_says_why() -> None:
    broken = Contestant("ours", "float32", [sys.executable, "-c", "1 / 0"], is_ours=True)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure(workload(broken), n_rounds=1)


def test_no_ceiling_is_known_of_what_torch_does_not_multiply() -> None:
    others = [contestant("theirs", precision=precision) for precision in ("float16", "q8_0")]
    ours, *rest = measure(workload(contestant("ours", ours=True), *others), n_rounds=1)
    assert len(ours.shares) == 1
    assert [result.shares for result in rest] == [[], []]


def test_constraints_but_those_that_a_peer_contradicts() -> None:
    ours = CONSTRAINTS.read_text().splitlines()
    assert constraints_of(LLAMA_CPP).splitlines() == ours
    left_out = set(ours) - set(constraints_of(LITGPT).splitlines())
    assert {line.split("==")[0] for line in left_out} == {"huggingface_hub", "jsonargparse"}
    torch = next(line for line in ours if line.startswith("torch=="))
    assert torch in LITGPT.packages


@pytest.fixture
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths alone, and neither weights nor environments."""
    names = {LITGPT: "python of litgpt", LLAMA_CPP: "python of llama.cpp", VLLM: "python of vLLM"}

    def python_with(environment: Environment) -> str:
        return names.get(environment, "python of another")

    monkeypatch.setattr(workloads, "python_with", python_with)
    monkeypatch.setattr(workloads, "PRECISIONS", ("bf16", "float32"))
    monkeypatch.setattr(workloads, "OF_OURS", ("bf16", "float32", "float16"))
    monkeypatch.setattr(workloads, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(workloads, "_adapted_flops", lambda *_: 1.0)
    monkeypatch.setattr(prepare, "smollm2", lambda: Path("smollm2"))
    monkeypatch.setattr(prepare, "smollm2_gguf", lambda kind: Path(f"{kind}.gguf"))
    monkeypatch.setattr(prepare, "smollm2_for_litgpt", lambda python: Path(f"by {python}"))
    monkeypatch.setattr(prepare, "prompts", lambda n: Path(f"prompts-{n}"))
    monkeypatch.setattr(prepare, "instructions", lambda: None)
    monkeypatch.setattr(prepare, "steps_of", lambda _: iter("abc"))
    monkeypatch.setattr(prepare, "instruction_entries", lambda n: Path(f"entries-{n}"))


@pytest.mark.usefixtures("nothing_prepared")
def test_litgpt_has_the_entries_of_trl() -> None:
    for work in (workloads.instruction_tuning(), workloads.instruction_tuning_all()):
        trl = [c.words for c in work.contestants if c.name == "TRL"]
        litgpt = [c for c in work.contestants if c.name == "litgpt"]
        assert [c.precision for c in litgpt] == ["bf16", "float32"]
        for peer, mine, precision in zip(litgpt, trl, ("bf16-mixed", "32-true"), strict=True):
            python, _, module, _, weights, *words = peer.words
            assert (python, weights) == ("python of litgpt", "by python of litgpt")
            assert module == "benchmarks.contestants.litgpt_lora"
            assert words == [mine[5], precision, *mine[7:]]


@pytest.mark.usefixtures("nothing_prepared")
def test_llama_cpp_has_our_prompts_in_files_of_its_precisions() -> None:
    work = workloads.generation(16)
    ours = next(c.words for c in work.contestants if c.is_ours)
    found = {c.precision: list(c.words[3:]) for c in work.contestants if c.name == "llama.cpp"}
    kinds = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
    assert found == {
        precision: ["{record}", f"{kind}.gguf", *ours[5:7], precision]
        for precision, kind in kinds.items()
    }


@pytest.mark.usefixtures("nothing_prepared")
def test_vllm_has_our_prompts_and_weights() -> None:
    ours, vllm = (
        [c for c in workloads.generation(16).contestants if c.name == name]
        for name in ("ours", "vLLM")
    )
    assert [c.precision for c in vllm] == ["bf16", "float32"]
    assert [c.precision for c in ours] == ["bf16", "float32", "float16"]
    assert [c.words[-1] for c in ours] == ["bf16-true", "32-true", "f16-weights"]
    for theirs, mine in zip(vllm, ours, strict=False):
        python, _, module, *words = theirs.words
        assert (python, module) == ("python of vLLM", "benchmarks.contestants.generate_vllm")
        assert words == [*mine.words[3:-1], theirs.precision]


def test_table_and_plot(tmp_path: Path) -> None:
    rows = [
        Result("ours", "bf16", True, rates=[300.0, 310.0, 320.0], rss=[2 * 10**9], shares=[0.5]),
        Result("theirs", "float32", False, rates=[100.0, 103.0, 104.0], rss=[10**9]),
        Result("theirs", "q8_0", False, rates=[620.0], rss=[10**8]),
    ]
    kept = {"key": "P0", "title": "nothing", "unit": "tokens/s"}
    kept["results"] = json.loads(json.dumps([vars(row) for row in rows]))
    text = table([kept])
    assert "310 (300 to 320) tokens/s" in text
    assert "| 3.0x |" in text
    assert "| theirs | q8_0 | 620 (620 to 620) tokens/s | 0.5x |  | 0.10 GB |" in text
    assert "| 50% | 2.00 GB |" in text
    plot([kept], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_seed_that_is_done_already_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain of a seed that is done writes nothing: the newest run is of another seed."""

    def run(words: list[str], **_: object) -> None:
        chain = yaml.safe_load(Path(words[words.index("-c") + 1]).read_text())
        (seed,) = {word.partition("=")[2].rpartition("=")[2] for word in words if "seed=" in word}
        folder = tmp_path / "mlruns" / chain["experiment"]
        for name in (f"spam-test-{seed}", f"smollm2-spam-{seed}"):
            path = folder / name / "outcome.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                outputs = {"spam-test": str(folder / f"spam-test-{seed}")}
                path.write_text(json.dumps({"metrics": {"a": int(seed)}, "outputs": outputs}))

    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))
    monkeypatch.setattr(subprocess, "run", run)
    for seed in (1, 2, 1):
        assert spam_seeds.scores(tmp_path, seed) == {"spam-test": {"a": seed}}
