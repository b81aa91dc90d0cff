"""Third-party data, downloaded on demand, pinned by SHA-256 and cached."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.files import cache_dir, sha256, write_atomically

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 120.0  # for one attempt, from connecting to the last byte
SILENCE_S = 30.0  # between two bytes
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks the others unbounded


@dataclass(frozen=True)
class Download:
    """A member of a zip archive on the web, pinned by the member's SHA-256."""

    url: str
    member: str
    sha256: str
    max_bytes: int  # of the archive, and of the member; both pass through memory


DOWNLOADS = {
    "sms-spam": Download(
        url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        member="SMSSpamCollection",
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        max_bytes=4 << 20,
    )
}


def download(item: Download) -> Path:
    """The member's file in the cache, downloaded if it is missing or damaged.

    Raises:
        OSError: if the archive cannot be downloaded.
        ValueError: if it is larger than pinned, lacks the member, is damaged, or the member's
            digest differs.
    """
    path = cache_dir() / "downloads" / item.sha256[:12] / item.member
    if path.is_file() and sha256(path) == item.sha256:
        return path
    content = _member(item, _fetch(item))
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise ValueError(
            f"{item.member} of {item.url} has another SHA-256 than {item.sha256}: the publisher "
            "or somebody on the way changed it; give a local file as data.source."
        )
    write_atomically(path, content)
    return path


def _fetch(item: Download) -> bytes:
    import httpx
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    def temporary(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code >= 500
        return isinstance(error, httpx.TransportError)

    retrying = Retrying(
        retry=retry_if_exception(temporary),
        stop=stop_after_attempt(3),
        wait=wait_exponential(0.5),
        reraise=True,
    )
    try:
        return retrying(_stream, item)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{item.url} could not be downloaded ({reason}); "
            "go online, or give a local file as data.source."
        ) from error


def _stream(item: Download) -> bytes:
    """The archive as transferred: decompressed by the HTTP client, it could be of any size."""
    import httpx

    archive = bytearray()
    client = httpx.Client(
        follow_redirects=True, timeout=SILENCE_S, headers={"Accept-Encoding": "identity"}
    )
    with deadline(client, PATIENCE_S) as is_over:
        try:
            with client, client.stream("GET", item.url) as response:
                response.raise_for_status()
                for chunk in response.iter_raw():
                    archive += chunk
                    if len(archive) > item.max_bytes:
                        raise ValueError(
                            f"{item.url} is larger than the {item.max_bytes} bytes that it should "
                            "have at most; give a local file as data.source."
                        )
        except httpx.TransportError as error:
            if is_over.is_set():
                raise httpx.TimeoutException(f"not done after {PATIENCE_S:g} s") from error
            raise
    return bytes(archive)


@contextmanager
def deadline(client: httpx.Client, seconds: float) -> Iterator[threading.Event]:
    """Closes a client after some seconds, which aborts its request; the event tells that it did.

    httpx applies its timeout to every single read, and a server may send byte by byte.
    """
    is_over = threading.Event()

    def break_off() -> None:
        is_over.set()
        client.close()

    timer = threading.Timer(seconds, break_off)
    timer.daemon = True  # does not keep the process alive
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()
        timer.join()


def _member(item: Download, archive: bytes) -> bytes:
    """Unpacks the pinned member alone, in memory: names in the archive are never used as paths."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            if opened.getinfo(item.member).compress_type not in _COMPRESSIONS:
                raise zipfile.BadZipFile("another compression than deflate")
            with opened.open(item.member) as member:
                return member.read(item.max_bytes)
    except (KeyError, RuntimeError, OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile):
        raise ValueError(
            f"{item.url} is not a zip archive with {item.member} in it; "
            "give a local file as data.source."
        ) from None
