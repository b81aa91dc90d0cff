"""Files: atomic writes, digests, and decoding with errors that name the place."""

import codecs
import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# raised by reading JSON, or by using it where it has another form than expected
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_REMEMBERED_BYTES = 64 << 20  # digests of files from this size on are remembered
_DIGEST = re.compile("[0-9a-f]{64}")


def cache_dir() -> Path:
    """Folder for what can be made again: GPT_PIPELINE_CACHE, or ours in the user's cache."""
    if own := os.environ.get("GPT_PIPELINE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpt-pipeline"


def expanded(source: str | Path) -> Path:
    """Expands `~` and environment variables in a path, which need not exist."""
    return Path(os.path.expandvars(source)).expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file whole or, whatever happens, leaves it as it was; makes its folder."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())


def resolved(path: Path) -> Path:
    """Absolute path without links, except that a file keeps its name, which may tell its format."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value of primitives; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digests(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file by its path."""
    return {str(path): remembered_sha256(path) for path in paths}


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; that of a big one is cached, where the cache can be read and written.

    The key is path, inode, size and times: a file put in its place with its old date is read anew.
    """
    stat = path.stat()
    if stat.st_size < _REMEMBERED_BYTES:
        return sha256(path)
    state = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    note = cache_dir() / "digests" / hashlib.sha256(state.encode()).hexdigest()
    with contextlib.suppress(OSError):
        if _DIGEST.fullmatch(known := note.read_text(errors="replace")):
            return known
    digest = sha256(path)
    with contextlib.suppress(OSError), replacing(note) as temporary:
        temporary.write_text(digest)
    return digest


@contextmanager
def at(place: str) -> Iterator[None]:
    """Raises errors of the block as ValueErrors that name a place."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def decode(data: bytes, path: Path, offset: int = 0) -> str:
    """Decodes UTF-8 bytes from `offset` on in a file, without a byte-order mark at its start.

    Raises:
        ValueError: naming the file and the first byte that is not UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(
                f"{path} is UTF-16; convert it, for example with iconv -f UTF-16 -t UTF-8."
            ) from error
        if b"\0" in data:
            raise ValueError(
                f"{path} is not text; take it out, or give patterns such as "
                f"['{path.parent}/**/*.txt', '{path.parent}/**/*.md']."
            ) from error
        raise ValueError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "convert the file, for example with iconv -t UTF-8."
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text
