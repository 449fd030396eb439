# SPDX-License-Identifier: Apache-2.0
"""Where a client may have videos taken from, and what they are called."""

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from hourllava.errors import SourceError
from hourllava.video import without_secrets

DATA = re.compile(r"data:video/([\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d*)?", re.IGNORECASE)
PATH_TODO = "name a file in the directory that is served"
PIECE = 1 << 20  # letters at a time


@dataclass(frozen=True)
class SourcePolicy:
    """What clients may name as a source.

    Args:
        local: files may be named in this directory only, links resolved; None for no files.
        domains: hosts of which addresses may be read, compared as a whole and without the port; "*" is every host, also
            those that only this machine reaches. Redirects lead nowhere else.
        max_bytes: of one download, upload or data: URL, decoded.
        timeout: seconds without a byte after which a download has failed.
    """

    local: Path | None = None
    domains: tuple[str, ...] = ()
    max_bytes: int = 16 << 30
    timeout: float = 30.0

    def path(self, text: str) -> Path:
        """The file that a path or file: URL names, links resolved, whether or not it is there.

        Raises:
            SourceError: it does not lie where it may.
        """
        if self.local is None:
            raise SourceError(text, "files of this machine are not served", "name an address, or upload the video")
        url = split(text) if text[:5].lower() == "file:" else None
        if url is not None and url.netloc not in ("", "localhost"):
            raise SourceError(text, "it names a file of another machine", PATH_TODO)
        try:
            path = Path(unquote(url.path) if url else text).resolve()
            inside = path.is_relative_to(self.local.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a path of no sense
            raise SourceError(text, "it is no path of a file", PATH_TODO) from error
        if not inside:
            raise SourceError(text, "it does not lie in the directory that is served", PATH_TODO)
        return path

    def check_host(self, url: str) -> None:
        """Raise SourceError unless an address is well formed and one of a host that may be read."""
        what, host = without_secrets(url), split(url).netloc.rpartition("@")[2]
        if re.search(r"[\s\\\x00-\x1f\x7f]", url):
            raise SourceError(what, "it is no address, for it holds blanks or backslashes", "write them as %20 or %5C")
        if not HOST.fullmatch(host):
            raise SourceError(what, "it names no host", "write the host in ASCII letters")
        wanted = _bare_host(host)
        if "*" not in self.domains and wanted not in map(_bare_host, self.domains):
            todo = "upload the video, or have the host added to the domains of the server"
            raise SourceError(what, f"the server reads nothing from {wanted}", todo)


def _bare_host(host: str) -> str:
    """A host without its port and, of an IPv6 address, the brackets."""
    if host.count(":") > 1 and not host.startswith("["):
        return host.lower()
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def split(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        SourceError: it is none.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SourceError(without_secrets(url), f"it is no address ({error})", "check it") from error
    return parts


@dataclass(frozen=True)
class Source:
    """A video as a client named it, which the policy allows.

    Attributes:
        kind: where it is: a file of this machine, on the web, or in the URL itself, as a file or as JPEG frames.
        record: what the repository calls it: the same for the same video, and without a password.
        text: as it was named.
    """

    kind: Literal["file", "web", "data", "frames"]
    record: str
    text: str = field(repr=False)

    def name(self) -> str:
        """A name for its memory: the same for the same source, and another where a file has changed.

        Raises:
            SourceError: there is no such file.
        """
        key, stem = self.text, "data"
        if self.kind == "file":
            status = regular_file(self.record, self.text)
            key, stem = f"{self.record}\n{status.st_size}\n{status.st_mtime_ns}", Path(self.record).stem
        elif self.kind == "web":
            stem = Path(unquote(split(self.text).path)).stem
        else:
            key = self.record
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:40].strip("-_") or "video"
        return f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def identify(text: str, policy: SourcePolicy) -> Source:
    """What a client named: an http(s) or data: URL, a file: URL or an absolute path.

    Raises:
        SourceError: it is none of these, or the policy does not allow it.
    """
    scheme = text[:200].partition(":")[0].lower()  # a data: URL can be long, and is not to be copied
    if scheme == "data":
        return _identify_data(text)
    if text.startswith("/") or scheme == "file":
        return Source("file", str(policy.path(text)), text)
    shown = without_secrets(text)
    if scheme not in ("http", "https"):
        todo = "give an http(s), data: or file: URL or an absolute path; what goes on, such as a camera, is followed"
        raise SourceError(shown[:200] or "source", "such a source cannot be watched to its end", todo)
    if "@" in split(text).netloc:
        raise SourceError(shown, "it holds a user's name", "leave out what stands before the @, or upload the video")
    policy.check_host(text)
    return Source("web", shown, text)


def _identify_data(text: str) -> Source:
    head = DATA.match(text)
    if head is None:
        todo = "write data:video/mp4;base64,... or, for frames of one a second, data:video/jpeg;base64,...,..."
        raise SourceError("data: URL", "it is no video in base64", todo)
    digest = hashlib.sha256()
    for at in range(0, len(text), PIECE):
        digest.update(text[at : at + PIECE].encode(errors="replace"))
    frames = head[1].lower() == "jpeg"
    return Source("frames" if frames else "data", f"data:video/{head[1]};sha256={digest.hexdigest()}", text)


def same_source(recorded: str, source: Source) -> bool:
    """Whether what the repository calls a video's source may be this one; it does not always know."""
    return recorded in ("", source.record) or (source.kind == "file" and os.path.realpath(recorded) == source.record)


def identify_stream(text: str, policy: SourcePolicy) -> tuple[str, str]:
    """What `LiveReader` takes for a source that goes on, and what the repository calls it, without a password.

    Raises:
        SourceError: it is no address and no path, or the policy does not allow it.
    """
    scheme, _, rest = text.partition("://")
    if text.startswith("/") or scheme.lower() == "file":
        path = str(policy.path(text))
        regular_file(path, text)
        return path, path
    if not rest:
        todo = "give the address of a stream, or a file: URL or an absolute path"
        raise SourceError(without_secrets(text)[:200] or "source", "such a source cannot be followed", todo)
    policy.check_host(text)
    return f"{scheme.lower()}://{rest}", without_secrets(text)


def regular_file(path: str, what: str) -> os.stat_result:
    """The status of a file.

    Raises:
        SourceError: there is none, or it is a directory, a device or a pipe.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(what, f"it cannot be read ({error.strerror})", "check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(what, "it is no regular file", "name a video file")
    return status
