import csv
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from datamodules import files
from datamodules.downloads import Download, download
from datamodules.files import decode, file_digests, replacing
from datamodules.sources import PYTHON_DOCS, resolve, source_digests
from datamodules.tables import read_jsonl, read_table, write_table

Write = Callable[..., Path]


# --- finding files


def test_a_folder_gives_its_files_sorted_without_hidden_ones(write: Write, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".hidden", "a/.git/x", "c.jsonl"):
        write(name, "x")
    assert resolve(str(tmp_path)) == [tmp_path / name for name in ("a/z.txt", "b.txt", "c.jsonl")]
    assert resolve(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]
    assert resolve(f"{tmp_path}/*.txt") == [tmp_path / "b.txt"]
    assert resolve(f"{tmp_path}/**/*.txt") == [tmp_path / "a/z.txt", tmp_path / "b.txt"]


def test_links_of_a_folder_are_followed_once(write: Write, tmp_path: Path) -> None:
    """A loop ends, and a folder that is there under its own name is read under no other."""
    for name in ("z/own.txt", "../far/f.txt", "../far/deep/d.txt", "../far/.git/x", "../one.txt"):
        write(f"data/{name}", "x")
    data = tmp_path / "data"
    for name, target in (
        ("a", "z"),
        ("m.txt", "../one.txt"),
        ("more", "../far"),
        ("again", "../far/deep"),
        (".hidden", "../far"),
        (".gone", "nowhere"),
        ("../far/back", "../data"),
        ("../far/deep/self", "."),
    ):
        (data / name).symlink_to(target)
    found = ["again/d.txt", "m.txt", "more/f.txt", "z/own.txt"]
    assert resolve(str(data)) == [data / name for name in found]
    (tmp_path / "link").symlink_to("data")
    assert resolve(str(tmp_path / "link")) == [tmp_path / "link" / name for name in found]


@pytest.mark.parametrize("source", ["data", "data/*.txt", "data/gone.txt", "link"])
def test_a_link_to_nothing_is_named(
    source: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("data/a.txt", "x")
    Path("data/gone.txt").symlink_to("unmounted/gone.txt")
    Path("link").symlink_to("data")
    message = r"gone\.txt is a link to unmounted/gone\.txt, which is not there; restore it, or rem"
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(source)}': (data|link)/{message}"):
        resolve(source)


def test_variables_and_home_are_expanded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.txt", "x")
    monkeypatch.setenv("HERE", str(path.parent))
    monkeypatch.setenv("HOME", str(path.parent))
    assert resolve("$HERE/a.txt") == resolve("${HERE}/a.txt") == resolve("~/a.txt") == [path]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", r"'nowhere\.txt' does not exist in /.*; give a file"),
        ("*.nothing", r"'\*\.nothing' matches no file; correct the pattern"),
        ("$NOT_SET_HERE/x", r"'\$NOT_SET_HERE/x' has an environment variable that is not set"),
        (".", r"'\.' is a folder without files"),
    ],
)
def test_a_source_that_is_not_there(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        resolve(source)


@pytest.mark.parametrize("source", ["bundled:novels", "download:novels"])
def test_an_unknown_name_lists_the_known_ones(source: str) -> None:
    known = "bundled:python-docs" if source.startswith("bundled") else "download:sms-spam"
    with pytest.raises(ValueError, match=f"'{source}' is unknown; give .*{known}"):
        resolve(source)


# --- digests, and writing


def test_digests_are_those_of_the_content(write: Write) -> None:
    path = write("a.txt", "content")
    expected = {str(path): hashlib.sha256(b"content").hexdigest()}
    assert file_digests([path]) == source_digests([str(path)]) == expected


def test_digests_of_big_files_are_remembered_until_they_change(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_REMEMBERED_BYTES", 0)
    path = write("a.txt", "before")
    before, first = path.stat(), file_digests([path])
    with monkeypatch.context() as nothing_is_read:
        nothing_is_read.delattr(files, "sha256")
        assert file_digests([path]) == first
    time.sleep(0.02)  # a tick of the clock of files
    path.write_text("after!")  # in its place, of the same size and date, as rsync --times has it
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digests([path]) == {str(path): hashlib.sha256(b"after!").hexdigest()}


def test_digests_of_big_files_need_no_cache(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_REMEMBERED_BYTES", 0)
    path = write("a.txt", "content")
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(path))  # a file: there can be no folder
    assert file_digests([path]) == {str(path): hashlib.sha256(b"content").hexdigest()}


def test_a_failed_write_leaves_the_old_file_alone(write: Write) -> None:
    path = write("a.txt", "old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


# --- reading


def test_decoding_names_file_and_byte() -> None:
    assert decode(b"\xef\xbb\xbfabc", Path("a.txt")) == "abc"
    assert decode(b"\xef\xbb\xbfabc", Path("a.txt"), offset=4) == "\ufeffabc"
    with pytest.raises(ValueError, match=r"a\.txt: byte 103 \(0xe9\) is not UTF-8; convert"):
        decode(b"caf\xe9", Path("a.txt"), offset=100)
    with pytest.raises(
        ValueError, match=r"notes/a\.png is not text; .* such as \['notes/\*\*/\*\.txt', '"
    ):
        decode(b"\x89PNG\r\n\x1a\n\0\0\0", Path("notes/a.png"))


def test_jsonl_is_read_with_line_numbers(write: Write) -> None:
    path = write("a.jsonl", '\ufeff{"a": 1}\n\n{"a": "\u2028"}\r\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": }\n', r"a\.jsonl:2: Expecting value at column 7; fix the line"),
        (b'{"a": 1}\n[1]\n', r"a\.jsonl:2: a list, not a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl: byte 16 \(0xff\) is not UTF-8"),
        (b'{"a": 1}\n{"a": "x\\ud83d"}\n', r"a\.jsonl:2: \\ud83d is half .* at column 9; fix the"),
        (b'{"a": ["\\uDE00\\uD83D"]}', r"a\.jsonl:1: \\uDE00 is half a .* at column 9; fix"),
        (b'{"\\uD83d": "\\ude00"}', r"a\.jsonl:1: \\uD83d is half a char.* at column 3; fix the"),
        (rb'{"a": "\n\ud83d\ude00\\ud83d\ude00"}', r"a\.jsonl:1: \\ude00 is half .* at column 29"),
    ],
)
def test_a_bad_line_is_named(content: bytes, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_jsonl(write("a.jsonl", content)))


def test_characters_of_two_halves_are_read(write: Write) -> None:
    line = r'{"a": "\ud83d\uDE00 \\ud83d \ue000"}'  # of the second, the backslash is text
    assert list(read_jsonl(write("a.jsonl", line))) == [(1, {"a": "😀 \\ud83d \ue000"})]


def test_what_a_cell_holds_is_whole_in_a_csv(tmp_path: Path) -> None:
    """Long lists, which numpy shows without their middle, a carriage return by itself, and integers
    of a column with gaps.
    """
    long = np.arange(1500.0)
    table = pd.DataFrame({"text": ["a\rb", "c"], "numbers": [long, None], "n": [1, 2]})
    table["id"] = pd.Series([2**60 + 1, None], dtype=object)
    write_table(table, tmp_path / "table.csv")
    written = (tmp_path / "table.csv").read_bytes().decode()
    first, second = csv.DictReader(io.StringIO(written, newline=""))
    assert (first["text"], second["text"], first["n"]) == ("a\rb", "c", "1")
    assert json.loads(first["numbers"]) == long.tolist()
    assert (first["id"], second["id"]) == (str(2**60 + 1), "")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"label": ["ham", "NA"], "text": ["one, 007", "zwei – 二"]})
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    assert read_table(path).to_dict("records") == table.to_dict("records")


@pytest.mark.parametrize(("index", "more"), [("customer", {"customer"}), (None, set())])
def test_an_index_that_has_a_name_is_a_column(
    index: str | None, more: set[str], tmp_path: Path
) -> None:
    table = pd.DataFrame({"text": ["one", "two"]}, index=pd.Index(["x", "y"], name=index))
    table.to_parquet(tmp_path / "a.parquet")
    assert set(read_table(tmp_path / "a.parquet")) == {"text", *more}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(end: str, write: Write) -> None:
    path = write("a.csv", end.join(["a,b", "1,2; 3; 4; 5", '3,"x\ny"', ""]).encode())
    rows = [{"a": "1", "b": "2; 3; 4; 5"}, {"a": "3", "b": "x\ny"}]
    assert read_table(path).to_dict("records") == rows


def test_a_cell_may_hold_a_carriage_return(write: Write) -> None:
    path = write("messages", b"ham\tHello\rthere\nspam\twin\n")
    rows = read_table(path, ["label", "text"]).to_numpy().tolist()
    assert rows == [["ham", "Hello\rthere"], ["spam", "win"]]


def test_a_lone_quotation_mark_swallows_no_rows(write: Write) -> None:
    path = write("messages", 'ham\t"Hello\r\nspam\twin\nham\tshe said "no"\n')
    rows = read_table(path, ["label", "text"]).to_numpy().tolist()
    assert rows == [["ham", '"Hello'], ["spam", "win"], ["ham", 'she said "no"']]


def test_all_messages_of_the_spam_collection_arrive(real_data: Path) -> None:
    table = read_table(real_data / "sms_spam/SMSSpamCollection", ["label", "text"])
    assert len(table) == 5574
    assert table["label"].value_counts().to_dict() == {"ham": 4827, "spam": 747}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", r"a\.xlsx is not a table; give a \.csv"),
        ("a.csv", b"", r"a\.csv cannot be read as \.csv: No columns"),
        ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\t4\n", r"a\.tsv cannot be read as \.tsv: .*line 3"),
        ("a.csv", b"a,b\n1,2,3\n4,5\n", r"a\.csv .*: row 1 has 3 fields but there are 2 columns"),
        ("a.csv", b"a,b\n1,2,\n4,5,\n", r"a\.csv .*: row 1 has 3 fields .*; quote"),
        ("a.tsv", b"a\tb\n1\t2\t3\t4\n", r"a\.tsv .*: row 1 has 4 fields .* drop a tab"),
        ("a.csv", b"a\n\xff\n", r"a\.csv: byte 2 \(0xff\) is not UTF-8"),
        ("a.parquet", b"text", r"a\.parquet cannot be read as \.parquet"),
    ],
)
def test_a_table_that_cannot_be_read(name: str, content: bytes, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(name, content))


def test_a_surplus_field_without_a_header(write: Write) -> None:
    with pytest.raises(ValueError, match=r"messages .*: row 1 has 3 fields but there are 2"):
        read_table(write("messages", "ham\tHello\tthere\nspam\twin\n"), ["label", "text"])


# --- the documentation of this Python


def test_python_docs_are_prose_of_topics_and_docstrings() -> None:
    docs = {row["name"]: row["text"] for _, row in read_jsonl(*resolve(PYTHON_DOCS))}
    assert 1_000_000 < sum(map(len, docs.values())) < 5_000_000
    assert "JSON (JavaScript Object Notation)" in docs["json.__init__"]
    assert "Deserialize ``fp``" in docs["json.__init__"]
    assert "antigravity" not in sys.modules  # read, not imported
    bodies = {
        name: text.partition("\n\n")[2] for name, text in docs.items() if name[:7] == "topics."
    }
    assert len(bodies) > 30
    inside = [n for n, body in bodies.items() for m in bodies if m != n and body in docs[m]]
    assert [name for name in inside if len(docs[name]) > 100] == []


def test_python_docs_are_extracted_once() -> None:
    (path,) = resolve(PYTHON_DOCS)
    written = path.stat().st_mtime_ns
    assert resolve(PYTHON_DOCS) == [path]
    assert path.stat().st_mtime_ns == written
    (name,) = source_digests([PYTHON_DOCS])
    assert name == f"bundled:python-docs@{sys.version.split()[0]}"


# --- downloads, from a server that also misbehaves

CONTENT = b"ham\thello\n" * 100


def archive(member: str = "messages") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("../evil", "x")
        opened.writestr(member, CONTENT)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    replies: list[tuple[int, bytes]]  # the last one again and again
    requests: int = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        replies = self.server.replies
        status, body = replies[min(self.server.requests, len(replies) - 1)]
        self.server.requests += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("GPT_PIPELINE_CACHE", str(tmp_path / "cache"))
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def item(server: Server) -> Download:
    return Download(
        url=f"http://127.0.0.1:{server.server_port}/messages.zip",
        member="messages",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        max_bytes=1 << 16,
    )


def test_a_download_is_fetched_once_and_again_where_it_is_damaged(
    server: Server, item: Download
) -> None:
    server.replies = [(503, b""), (200, archive())]
    path = download(item)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["messages"]
    assert (download(item), server.requests) == (path, 2)
    path.write_bytes(b"damaged")
    assert (download(item).read_bytes(), server.requests) == (CONTENT, 3)


@pytest.mark.parametrize(
    ("replies", "change", "message"),
    [
        ([(200, archive("other"))], {}, "is not a zip archive with messages in it"),
        ([(200, b"<html>")], {}, "is not a zip archive"),
        ([(200, archive())], {"sha256": "0" * 64}, "has another SHA-256 than 000"),
        ([(200, archive())], {"max_bytes": 100}, "is larger than the 100 bytes"),
        ([(404, b"")], {}, r"could not be downloaded .*404.*\); go online, or give a local file"),
    ],
)
def test_a_wrong_download_is_refused(
    server: Server,
    item: Download,
    replies: list[tuple[int, bytes]],
    change: dict[str, Any],
    message: str,
) -> None:
    server.replies = replies
    with pytest.raises((ValueError, OSError), match=message):
        download(replace(item, **change))
    assert server.requests == 1
    assert not list(files.cache_dir().rglob("messages*"))


def test_without_a_network_a_download_says_what_to_do(tmp_path: Path) -> None:
    closed = Download("http://127.0.0.1:9/a.zip", "a", "0" * 64, 100)
    with pytest.raises(OSError, match=r"could not be downloaded .*give a local file"):
        download(closed)
