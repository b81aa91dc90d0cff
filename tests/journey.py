"""The whole pipeline on a tiny model, run by command line, for tests that need checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.__main__ import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TINY = [
    f"--config={CONFIGS}/model/tiny.yaml",
    "--model.init_args.gpt.block_size=256",
    "--model.init_args.optimizer.warmup_steps=2",
    "--data.block_size=64",
    "--data.batch_size=8",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=4",
]
PLAIN = [  # no bar, and the same numbers on all hardware
    "--trainer.enable_progress_bar=false",
    "--precision=32-true",
]
SHORT = [
    "--model.optimizer.warmup_steps=2",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=4",
    "--trainer.check_val_every_n_epoch=null",
]

PROSE = """The quick brown fox number {n} jumps over the lazy dog, and writes a note about it.
It returns the {n}th note to the fox, who reads it and goes on to the next dog. Nothing is lost.
"""


def run(*words: str) -> int:
    """One command, in this process; its exit code."""
    return main([str(word) for word in words])


def said(*words: str) -> tuple[int, str, str]:
    """One command: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(*words)
    return code, out.getvalue(), err.getvalue()


def outcome_of(folder: Path) -> dict[str, Any]:
    """outcome.json of the only run below a folder."""
    (path,) = folder.glob("*/outcome.json")
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Journey:
    """Paths of what was made; outcomes by stage."""

    folder: Path
    tokenizer: Path
    outcomes: dict[str, dict[str, Any]]

    def best(self, stage: str) -> Path:
        """The best checkpoint of a stage."""
        return Path(self.outcomes[stage]["outputs"]["best"])

    @classmethod
    def make(cls, folder: Path) -> Journey:
        """Tokenizer, pretraining, spam (LoRA), its test, instructions (LoRA), scores."""
        corpus = folder / "prose"
        corpus.mkdir()
        for n in range(60):
            (corpus / f"{n:02}.txt").write_text(PROSE.format(n=n) * (1 + n % 3))
        tokenizer = folder / "tokenizer.json"
        assert (
            run(
                "tokenizer",
                "train",
                f"--source=[{corpus}]",
                "--vocab_size=400",
                "--min_frequency=2",
                f"--output={tokenizer}",
            )
            == 0
        )
        outcomes: dict[str, dict[str, Any]] = {}

        def stage(name: str, command: str, config: str, *words: str) -> None:
            where = ["--run.experiment", name] if command != "score" else []
            assert run(command, f"--config={CONFIGS}/{config}.yaml", *words, *where) == 0
            outcomes[name] = outcome_of(folder / "mlruns" / name)

        stage(
            "pretrain",
            "fit",
            "pretrain",
            *TINY,
            *PLAIN,
            f"--data.source=[{corpus}]",
            f"--data.tokenizer={tokenizer}",
            "--data.near_duplicates=null",
        )
        base = outcomes["pretrain"]["outputs"]["best"]
        lora = "{rank: 4, alpha: 8, dropout: 0.0, targets: [q, v], rslora: false, dora: false}"
        stage(
            "spam",
            "fit",
            "spam",
            *SHORT,
            *PLAIN,
            f"--model.init_from={base}",
            "--model.trainable=lora",
            f"--model.lora={lora}",
        )
        spam = outcomes["spam"]["outputs"]["best"]
        stage("spam-test", "test", "spam", *PLAIN, f"--ckpt_path={spam}")
        stage("instruct", "fit", "instruct", *SHORT, *PLAIN, f"--model.init_from={base}")
        tuned = outcomes["instruct"]["outputs"]["best"]
        stage("score", "score", "score", f"--ckpt={tuned}", "--max_new_tokens=4")
        return cls(folder, tokenizer, outcomes)
