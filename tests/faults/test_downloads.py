"""Hostile servers and archives: downloads are bounded or refused, and nothing is left behind."""

import gzip
import hashlib
import io
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules import downloads
from datamodules.downloads import DOWNLOADS, Download, download
from tests.faults import servers
from tests.faults.servers import Answer, Server
from tests.journey import said

CONTENT = b"ham\thello\n" * 100
MAX_BYTES = 1 << 16


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """And little patience with it; what still hangs ends by the test's own timeout."""
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "PATIENCE_S", 0.6)
    monkeypatch.setattr(downloads, "SILENCE_S", 0.3)
    monkeypatch.chdir(tmp_path)
    with servers.serving() as running:
        yield running


def item(server: Server) -> Download:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return Download(f"{server.url}/messages.zip", "messages", digest, MAX_BYTES)


def refusal(server: Server, folder: Path) -> str:
    """The one line that a download ends with; what lies in a folder is as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError)) as refused:
        download(item(server))
    assert sorted(folder.rglob("*")) == before
    assert "give a local file as data.source" in str(refused.value)
    assert server.url in str(refused.value)
    return " ".join(str(refused.value).split())


def archive(
    *entries: tuple[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_DEFLATED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as opened:
        for name, content in entries or [("messages", CONTENT)]:
            opened.writestr(name, content, compress_type=kind)
    return buffer.getvalue()


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def redirects(to: Any) -> None:
    servers.moved(b"/again")(to)


HALF = archive()[: len(archive()) // 2]
SERVERS: dict[str, tuple[Answer, str]] = {
    "reset in the middle": (servers.reset(HALF), "could not be downloaded"),
    "shorter than announced": (servers.short(HALF), "could not be downloaded"),
    "hangs up": (servers.hang_up, "could not be downloaded"),
    "never answers": (servers.silence, "could not be downloaded ("),
    "a header without end": (servers.endless_header, "not done after 0.6 s"),
    "interim answers without end": (servers.endless_continue, "not done after 0.6 s"),
    "a slow body without end": (servers.endless_slow_body, "not done after 0.6 s"),
    "a body without end": (servers.endless_body, f"larger than the {MAX_BYTES} bytes"),
    "redirects without end": (redirects, "could not be downloaded"),
    "a redirect to a file": (servers.moved(b"file:///etc/passwd"), "could not be downloaded"),
    "a redirect to nonsense": (servers.moved(b"http://[::1"), "could not be downloaded"),
    "no HTTP": (servers.no_http, "could not be downloaded"),
    "an error page": (servers.status(403, b"<html>no</html>"), "403"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_does_harm(name: str, server: Server, tmp_path: Path) -> None:
    answer, message = SERVERS[name]
    server.answers = [answer]
    assert message in refusal(server, tmp_path)
    assert len(server.requests) <= 21  # redirects
    assert server.n_sent < 20 * MAX_BYTES + (8 << 20)  # what lies in the buffers of sockets


def test_a_redirect_to_a_page(server: Server, tmp_path: Path) -> None:
    server.answers = [
        servers.moved(b"/login"),
        servers.whole(b"<html>sign in</html>", b"Content-Type: text/html"),
    ]
    assert "is not a zip archive with messages in it" in refusal(server, tmp_path)
    assert len(server.requests) == 2


def test_passing_trouble_is_waited_out(server: Server) -> None:
    server.answers = [servers.reset(HALF), servers.silence, servers.whole(archive())]
    assert download(item(server)).read_bytes() == CONTENT


def test_what_the_transport_unpacks_is_bounded_too(server: Server, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))  # 64 KB on the way
    server.answers = [servers.whole(bomb[: MAX_BYTES - 1], b"Content-Encoding: gzip")]
    with servers.little_memory():
        assert "is not a zip archive" in refusal(server, tmp_path)
    assert b"accept-encoding: identity" in server.requests[0].lower()


def encrypted() -> bytes:
    content = bytearray(archive())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


def corrupt() -> bytes:
    content = bytearray(archive())
    content[40] ^= 0xFF  # in the compressed stream
    return bytes(content)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty": bytes,
    "cut": lambda: HALF,
    "without the member": lambda: archive(("../messages", CONTENT), ("/messages", CONTENT)),
    "the member is a link": lambda: archive(link("messages", "/etc/passwd")),
    "the member is a folder": lambda: archive(("messages/", b"")),
    "a bomb": lambda: archive(("messages", bytes(32 << 20))),
    "a bomb in bzip2": lambda: archive(("messages", bytes(32 << 20)), kind=zipfile.ZIP_BZIP2),
    "a bomb in LZMA": lambda: archive(("messages", bytes(32 << 20)), kind=zipfile.ZIP_LZMA),
    "encrypted": encrypted,
    "corrupt": corrupt,
    "other content": lambda: archive(("messages", CONTENT + b"!")),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_does_harm(name: str, server: Server, tmp_path: Path) -> None:
    content = ARCHIVES[name]()
    assert len(content) < MAX_BYTES
    server.answers = [servers.whole(content)]
    with servers.little_memory():
        said = refusal(server, tmp_path)
    assert "is not a zip archive with messages in it" in said or "has another SHA-256" in said
    assert len(server.requests) == 1


def test_other_names_of_an_archive_are_no_paths(server: Server, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    entries = [("../evil", b"x"), ("../../../../evil", b"x"), (str(evil), b"x")]
    links = [link("link", str(tmp_path)), ("link/evil", b"x")]
    server.answers = [servers.whole(archive(*entries, *links, ("messages", CONTENT)))]
    path = download(item(server))
    assert path.read_bytes() == CONTENT
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_every_flipped_byte_of_an_archive_is_one_line(server: Server, tmp_path: Path) -> None:
    good = archive(("messages", CONTENT))
    for place in range(len(good)):
        content = bytearray(good)
        content[place] ^= 0xFF
        try:
            assert downloads._member(item(server), bytes(content)) is not None
        except ValueError as error:
            assert "is not a zip archive" in str(error)  # noqa: PT017, not all are refused


def test_the_command_says_it_in_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DOWNLOADS, "bad", item(server))
    server.answers = [servers.whole(b"<html>sign in</html>")]
    code, out, err = said(
        "tokenizer",
        "train",
        "--source=download:bad",
        "--vocab_size=300",
        "--min_frequency=1",
        f"--output={tmp_path / 'tokenizer.json'}",
    )
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "is not a zip archive with messages in it" in line
    assert not (tmp_path / "tokenizer.json").exists()
