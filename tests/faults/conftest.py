"""The commands that the fault tests break, and the folder where their runs go."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journey import CONFIGS, PLAIN, TINY, Journey


@pytest.fixture(scope="session")
def words(tiny: Journey) -> list[str]:
    """A pretraining with dropout, over epochs, of micro-batches, with validation and a worker."""
    return [
        "fit",
        f"--config={CONFIGS}/pretrain.yaml",
        *TINY,
        *PLAIN,
        f"--data.source=[{tiny.folder / 'prose'}]",
        f"--data.tokenizer={tiny.tokenizer}",
        "--data.near_duplicates=null",
        "--data.num_workers=1",
        "--data.max_tokens=192",  # of the 512 of a step
        "--model.gpt.dropout=0.1",
        f"--trainer.max_steps={60}",
        "--trainer.val_check_interval=20",
        "--checkpoints.every_n_steps=4",
        "--checkpoints.keep_last=2",
    ]


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, with a tracking store in it: to make one takes seconds."""
    home = tmp_path / "mlruns"
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here: this test needs the rights to")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
