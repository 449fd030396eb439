# SPDX-License-Identifier: Apache-2.0
"""Getting a source as a file: no further than allowed, no larger than allowed, and all of it or nothing."""

import base64
import binascii
import http.client
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from hourllava.errors import SourceError
from hourllava.video import without_secrets

from .files import PARTIAL, PartialFile, Stop, Stopped, too_large, unwritable
from .sources import Source, SourcePolicy, identify, regular_file

PIECE = 1 << 20  # bytes, or letters of base64, at a time; a multiple of 4
JPEG = b"\xff\xd8\xff"
REDIRECTS = {301, 302, 303, 307, 308}
MAX_REDIRECTS = 5
HEADERS = {"User-Agent": "hourllava", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
TODO = "check the address, or upload the video"
# What an address may hold without being quoted; what is quoted already stays as it is.
SAFE = "%/:=&?~#+!$,;'@()*[]"


def fetch(source: Source, policy: SourcePolicy, path: Path, stop: Stop) -> Path:
    """A source as a file, or frames as a folder of JPEGs.

    Args:
        source: what a client named.
        policy: what is allowed.
        path: where to put what is not a file of this machine; it is there only once it is whole.
        stop: ends a download.

    Returns:
        `path`, or where the file is.

    Raises:
        SourceError: it cannot be had, or is not what it is said to be.
        SourceSizeError: it has too many bytes.
        StorageError: the disk is full.
        Stopped: it was told to stop.
    """
    if source.kind == "file":
        file = policy.path(source.record)  # again: a link may have changed
        regular_file(str(file), source.text)
        return file
    if source.kind == "web":
        _download(source.text, policy, path, stop)
    elif source.kind == "data":
        _decode(source.text, policy, path)
    else:
        _decode_frames(source.text, policy, path)
    return path


def _download(url: str, policy: SourcePolicy, path: Path, stop: Stop) -> None:
    """Write what an address gives to a file.

    Args:
        url: http or https, of an allowed host.
        policy: says where redirects may lead, how much is taken, and how long to wait for a byte.
        path: the file; it is there only once it is whole.
        stop: ends the download as soon as there is a connection.

    Raises:
        SourceError: it cannot be had, or only in part.
        SourceSizeError: it has too many bytes.
        Stopped: it was told to stop.
    """
    what, at = without_secrets(url), url
    for _ in range(MAX_REDIRECTS + 1):
        with _answer(at, what, policy.timeout, stop) as answer:
            if answer.status not in REDIRECTS:
                _save(answer, policy, path, what, stop)
                return
            at = urljoin(at, quote(answer.getheader("Location", ""), SAFE, encoding="latin-1"))
        try:
            at = identify(at, policy).text if at.partition(":")[0].lower() in ("http", "https") else ""
        except SourceError as error:
            raise SourceError(what, f"it leads elsewhere, where {error.why}", error.todo) from error
        if not at:
            raise SourceError(what, "it leads to what is no http(s) address", TODO)
    raise SourceError(what, f"it leads elsewhere more than {MAX_REDIRECTS} times", TODO)


@contextmanager
def _answer(url: str, what: str, timeout: float, stop: Stop) -> Iterator[http.client.HTTPResponse]:
    """Ask for an address; what goes wrong with the net until the block ends is one line."""
    parts = urlsplit(url)
    try:
        if parts.scheme.lower() == "https":
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        try:
            connection.connect()
            with stop.waking(connection.sock):
                target = quote(parts.path or "/", SAFE) + (f"?{quote(parts.query, SAFE)}" if parts.query else "")
                connection.request("GET", target, headers=HEADERS)
                with connection.getresponse() as response:
                    yield response
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        if stop.is_set():
            raise Stopped from error
        silent = isinstance(error, TimeoutError)
        why = f"nothing came for {timeout:g} s" if silent else f"it cannot be downloaded ({connection_reason(error)})"
        raise SourceError(what, why, TODO) from error


def connection_reason(error: Exception) -> str:
    """What ended a connection, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _save(answer: http.client.HTTPResponse, policy: SourcePolicy, path: Path, what: str, stop: Stop) -> None:
    if answer.status != 200:
        raise SourceError(what, f"the other side answered {answer.status} {answer.reason}".rstrip(), TODO)
    size = answer.length
    if size is not None and size > policy.max_bytes:
        raise too_large(what, size, policy.max_bytes)
    with PartialFile(path, policy.max_bytes, what) as file:
        while data := answer.read1(PIECE):
            file.write(data)
        if stop.is_set():
            raise Stopped
        if size is not None and file.size < size:
            raise SourceError(what, f"it broke off after {file.size} of {size} bytes", "try again")
        file.commit()


def _decode(text: str, policy: SourcePolicy, path: Path) -> None:
    """Write what a data: URL holds to a file."""
    begin = text.index(",") + 1
    size = (len(text) - begin) // 4 * 3
    if size - 2 > policy.max_bytes:
        raise too_large("data: URL", size, policy.max_bytes)
    with PartialFile(path, policy.max_bytes, "data: URL") as file:
        for at in range(begin, len(text), PIECE):
            file.write(_unpacked(text[at : at + PIECE], "data: URL"))
        file.commit()


def _decode_frames(text: str, policy: SourcePolicy, path: Path) -> None:
    """Write the JPEGs of a data: URL, which commas divide, to a folder."""
    try:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    except OSError as error:
        raise unwritable("data: URL", error) from error
    begin, number, total = text.index(",") + 1, 0, 0
    try:
        while begin <= len(text):
            end = text.find(",", begin)
            end = len(text) if end < 0 else end
            what = f"frame {number} of the data: URL"
            if total + (end - begin) // 4 * 3 - 2 > policy.max_bytes:
                raise too_large("data: URL", None, policy.max_bytes)
            data = _unpacked(text[begin:end], what)
            if not data.startswith(JPEG):
                raise SourceError(what, "it is no JPEG", "send JPEGs in base64 with commas between them")
            with PartialFile(partial / f"{number:08}.jpg", policy.max_bytes - total, "data: URL") as file:
                file.write(data)
                file.commit()
            begin, number, total = end + 1, number + 1, total + len(data)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpacked(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SourceError(what, "it is not base64", "encode the bytes of the file, without line breaks") from error
