# SPDX-License-Identifier: Apache-2.0
"""A client names what it may have: every way out of the policy is one line."""

import base64
import os
from pathlib import Path

import pytest

from hourllava.errors import HourLlavaError, SourceError
from hourllava.memory.repository import check_name
from hourllava.serve.fetching import fetch
from hourllava.serve.files import Stop
from hourllava.serve.sources import SourcePolicy, identify, identify_stream, same_source

BODY = os.urandom(1000)


def line_of(error: HourLlavaError) -> str:
    assert "\n" not in str(error)
    assert all((error.what, error.why, error.todo))
    return str(error)


def refusal(text: str, policy: SourcePolicy) -> str:
    with pytest.raises(SourceError) as caught:
        identify(text, policy)
    return line_of(caught.value)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A directory with a film, beside a file that is nobody's business."""
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a film.mp4").write_bytes(BODY)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (folder / "inside").symlink_to(folder / "deep" / "a film.mp4")
    (folder / "outside").symlink_to(tmp_path / "secret.mp4")
    (folder / "up").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "form", ["{}/deep/a film.mp4", "file://{}/deep/a%20film.mp4", "FILE://localhost{}/deep/../inside", "{}/inside"]
)
def test_files_of_the_directory(served: Path, tmp_path: Path, form: str) -> None:
    policy = SourcePolicy(local=served)
    source = identify(form.format(served), policy)
    assert source.record == str(served / "deep" / "a film.mp4")
    assert fetch(source, policy, tmp_path / "unused", Stop()).read_bytes() == BODY
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "form",
    [
        "{}/../secret.mp4",
        "{}/outside",
        "{}/up/secret.mp4",
        "{}/null",
        "{}-too/film.mp4",
        "file://{}/%2e%2e/secret.mp4",
        "/etc/passwd",
        "/dev/zero",
    ],
)
def test_no_other_files(served: Path, form: str) -> None:
    """And the line says nothing about whether there is such a file."""
    line = refusal(form.format(served), SourcePolicy(local=served))
    assert line.endswith("it does not lie in the directory that is served; name a file in the directory that is served")


def test_a_directory_that_is_a_link(served: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(served)
    source = identify(str(tmp_path / "link" / "inside"), SourcePolicy(local=tmp_path / "link"))
    assert source.record == str(served / "deep" / "a film.mp4")


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("{}/deep", "it is no regular file"),
        ("{}/pipe", "it is no regular file"),
        ("{}/gone.mp4", "it cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_file(served: Path, tmp_path: Path, form: str, why: str) -> None:
    policy = SourcePolicy(local=served)
    source = identify(form.format(served), policy)
    for use in (source.name, lambda: fetch(source, policy, tmp_path / "unused", Stop())):
        with pytest.raises(SourceError) as caught:
            use()
        assert why in line_of(caught.value)


def test_a_file_that_has_become_a_link(served: Path, tmp_path: Path) -> None:
    policy, film = SourcePolicy(local=served), served / "deep" / "a film.mp4"
    source = identify(str(film), policy)
    film.unlink()
    film.symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(SourceError, match="it does not lie in the directory"):
        fetch(source, policy, tmp_path / "unused", Stop())


def test_paths_of_no_sense(served: Path) -> None:
    policy = SourcePolicy(local=served)
    assert "it is no path of a file" in refusal(f"{served}/a\0b", policy)
    assert "it names a file of another machine" in refusal("file://other/film.mp4", policy)
    assert "files of this machine are not served" in refusal(str(served / "inside"), SourcePolicy(domains=("*",)))
    circle = str(served / "circle")
    with pytest.raises(SourceError):
        fetch(identify(circle, policy), policy, served / "unused", Stop())


@pytest.mark.parametrize(
    "text", ["", "film.mp4", "ftp://example.com/film.mp4", "rtsp://example.com/1", "concat:/a|/b", "javascript:1"]
)
def test_other_kinds_of_sources(text: str) -> None:
    assert "such a source cannot be watched to its end" in refusal(text, SourcePolicy(Path("/"), ("*",)))


@pytest.mark.parametrize(
    ("url", "domains"),
    [
        ("http://example.com/a", ("example.com",)),
        ("HTTPS://EXAMPLE.com:8443/a", ("Example.COM",)),
        ("http://example.com", ("other.org", "example.com:80")),
        ("http://[2001:DB8::1]:80/a", ("2001:db8::1",)),
        ("http://[2001:db8::1]/a", ("[2001:db8::1]",)),
        ("http://anything.at.all/a", ("*",)),
    ],
)
def test_hosts_that_may_be_read(url: str, domains: tuple[str, ...]) -> None:
    source = identify(url, SourcePolicy(domains=domains))
    assert (source.kind, source.text) == ("web", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com.evil.org/",
        "http://evil.org/example.com",
        "http://evil.org?example.com",
        "http://evil.org#@example.com",
        "http://www.example.com/",
        "http://example.com./",
        "http://xample.com/",
        "http://127.0.0.1/",
        "http:///etc/passwd",
        "http:example.com",
        "http://example.com:port/",
        "http://example.com:99999/",
        "http://[::1/",
        "http://example.com\\@evil.org/",
        "http://evil.org\\.example.com/",
        "http://exam\nple.com/",
        "http://example.com/a b",
        "http://exämple.com/",
        "http://example%2ecom/",
    ],
)
def test_other_hosts(url: str) -> None:
    refusal(url, SourcePolicy(domains=("example.com",)))
    refusal(url, SourcePolicy())


def test_a_password_is_refused_and_not_told() -> None:
    line = refusal("http://me:open%20sesame@example.com/a", SourcePolicy(domains=("example.com",)))
    assert line.startswith("http://example.com/a: it holds a user's name")
    assert "sesame" not in line


def test_names_of_memories(served: Path) -> None:
    """The same for the same source, fit for a folder, and another for a file that has changed."""
    policy = SourcePolicy(served, ("*",))
    film = served / "deep" / "a film.mp4"
    jpeg = base64.b64encode(b"\xff\xd8\xff").decode()
    texts = [
        str(film),
        "http://a.org/x/%C3%A4/The%20Film.mp4?v=1",
        "http://a.org/x/%C3%A4/The%20Film.mp4?v=2",
        f"http://a.org/{'x' * 400}",
        "http://a.org/",
        "data:video/mp4;base64,AAAA",
        "data:video/webm;base64,AAAA",
        "data:video/mp4;base64,BBBB",
        f"data:video/jpeg;base64,{jpeg},{jpeg}",
    ]
    names = [identify(text, policy).name() for text in texts]
    assert names == [identify(text, policy).name() for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        check_name(name)
        assert name.isascii()
        assert len(name) <= 60
    assert names[0].startswith("a-film-")
    assert names[1].startswith("The-Film-")
    assert identify(str(served / "inside"), policy).name() == names[0]
    status = film.stat()
    os.utime(film, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = identify(str(film), policy).name()
    film.write_bytes(BODY + b"more")
    os.utime(film, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len({names[0], touched, identify(str(film), policy).name()}) == 3


def test_a_record_may_be_the_same_source(served: Path) -> None:
    source = identify(str(served / "inside"), SourcePolicy(served))
    assert same_source(source.record, source)
    assert same_source(str(served / "inside"), source)
    assert same_source("", source)
    assert not same_source(str(served / "pipe"), source)
    assert not same_source(source.record, identify("http://a/", SourcePolicy(domains=("*",))))


def test_sources_that_go_on(served: Path) -> None:
    policy = SourcePolicy(served, ("camera",))
    at, record = identify_stream("RTSP://me:word@camera:554/1?token=a", policy)
    assert (at, record) == ("rtsp://me:word@camera:554/1?token=a", "RTSP://camera:554/1?token=...")
    film = str(served / "deep" / "a film.mp4")
    assert identify_stream(f"file://{served}/inside", policy) == (film, film)
    for text, why in (
        ("rtsp://me:word@other/1", "reads nothing from other"),
        ("udp://0.0.0.0:1", "reads nothing from 0.0.0.0"),
        (str(served / "outside"), "does not lie in the directory"),
        (str(served / "pipe"), "no regular file"),
        ("camera", "cannot be followed"),
        ("data:video/mp4;base64,AAAA", "cannot be followed"),
        ("rtmp://camera/a tcurl=rtmp://other/", "blanks"),
    ):
        with pytest.raises(SourceError) as caught:
            identify_stream(text, policy)
        assert why in line_of(caught.value)
        assert "word" not in str(caught.value)
