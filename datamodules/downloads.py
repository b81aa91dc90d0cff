"""Data of others, fetched when asked for, pinned by SHA-256 and kept in the cache."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import cache_dir, replacing, sha256


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
    """The member's file in the cache, fetched where it is not there yet.

    Raises:
        OSError: if the archive cannot be fetched.
        ValueError: if it is larger than pinned, lacks the member, or the member's digest differs.
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
    with replacing(path) as temporary:
        temporary.write_bytes(content)
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
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{item.url} could not be downloaded ({reason}); "
            "go online, or give a local file as data.source."
        ) from error


def _stream(item: Download) -> bytes:
    import httpx

    archive = bytearray()
    with httpx.stream("GET", item.url, follow_redirects=True, timeout=30) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            archive += chunk
            if len(archive) > item.max_bytes:
                raise ValueError(
                    f"{item.url} is larger than the {item.max_bytes} bytes that it should have "
                    "at most; give a local file as data.source."
                )
    return bytes(archive)


def _member(item: Download, archive: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened, opened.open(item.member) as member:
            return member.read(item.max_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"{item.url} is no zip archive with {item.member} in it; "
            "give a local file as data.source."
        ) from error
