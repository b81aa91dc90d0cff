"""Fixtures of all tests: no network but loopback, one thread, real data where it is provided."""

import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import cache_dir

# equal bits; and on a busy machine, threads that wait for one another cost fifty times the work
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # so that no command looks how busy it is
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# a shell has what it runs in the background ignore Ctrl-C, and so would every command started here
signal.signal(signal.SIGINT, signal.default_int_handler)

USERS_CACHE = cache_dir()  # before the tests get one of their own
FORKS = re.compile(r"\b(Started|PROCESSES)\b")
LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0", ""}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that fork commands have one worker: the server that they fork from imports for long."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "forks" if FORKS.search((config.rootpath / file).read_text()) else file

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """Connections to anything but this machine fail at once, with the address in the message."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise ConnectionRefusedError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, from GPT_PIPELINE_DATA."""
    folder = os.environ.get("GPT_PIPELINE_DATA")
    if not folder:
        pytest.skip("GPT_PIPELINE_DATA is not set: it names the folder that holds the real data")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in the user's own cache, where any use of its name puts it."""
    from pipeline.weights.fetch import packaged_path

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_PIPELINE_CACHE", str(USERS_CACHE))
        path = packaged_path("smollm2-135m-instruct")
    if not path.is_file():
        pytest.skip(f"{path} is not there; `generate --ckpt smollm2-135m-instruct` fetches it")
    return path


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest-xdist's workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True, scope="session")
def shared_folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, of_all_workers: Path
) -> Iterator[None]:
    """The cache, the tracking store, runs that are no one test's."""
    folder = tmp_path_factory.getbasetemp()
    if folder != of_all_workers:  # a few tests may need none
        shutil.copy(request.getfixturevalue("empty_database"), folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_PIPELINE_HOME", str(folder / "mlruns"))
        patch.setenv("GPT_PIPELINE_CACHE", str(of_all_workers / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield


@pytest.fixture(autouse=True)
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a test are its own."""
    monkeypatch.setenv("GPT_PIPELINE_HOME", str(tmp_path / "mlruns"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file below the test's folder and returns its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Makes a small GPTConfig of a family, but for gpt2 of grouped queries, fields changed."""
    from pipeline.gpt import GPTConfig

    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 96}
    shape |= {"mlp_hidden": 64, "norm_eps": 1e-5, "rope_theta": 10000.0, "dropout": 0.0}
    gpt2 = {"n_kv_head": 4, "norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
    llama = {"n_kv_head": 2, "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
    qwen2, qwen3 = {**llama, "qkv_bias": True}, {**llama, "qk_norm": True, "head_dim": 16}
    families = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}

    def make(family: str = "gpt2", **changes: Any) -> Any:
        common = {**shape, "tie_embeddings": family == "gpt2", "causal": True}
        return GPTConfig(**{**common, **families[family], **changes})

    return make


@pytest.fixture(scope="session")
def tiny_gpt(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a small GPT in eval mode, every parameter (biases and norms too) random but fixed."""
    import torch

    from pipeline.gpt import GPT

    def make(family: str = "gpt2", *, seed: int = 0, **changes: Any) -> Any:
        model = GPT(tiny_config(family, **changes)).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.tensors().items():
            tensor.normal_(float("norm.weight" in name), 0.15, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def empty_database(of_all_workers: Path) -> Path:
    """MLflow's database, made once: it takes seconds."""
    from filelock import FileLock
    from mlflow import MlflowClient

    path = of_all_workers / "empty.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole journey on a tiny model, made once through the command line: see `tests.journey`."""
    from tests.journey import Journey

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("journey")
        patch.setenv("GPT_PIPELINE_HOME", str(folder / "mlruns"))
        return Journey.make(folder)
