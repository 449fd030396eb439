# SPDX-License-Identifier: Apache-2.0
"""What is fetched is whole, and no more than may be taken; of what fails one line is left and nothing else."""

import base64
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from memories import full_disk

from hourllava.errors import HourLlavaError, SourceError, SourceSizeError, StorageError
from hourllava.serve.fetching import MAX_REDIRECTS, PIECE, fetch
from hourllava.serve.files import PartialFile, Stop, Stopped
from hourllava.serve.sources import SourcePolicy, identify

BODY = os.urandom(200_000)
DEADLINE = 20.0
LOCAL = SourcePolicy(domains=("127.0.0.1",), timeout=DEADLINE)
Answer = Callable[[BaseHTTPRequestHandler], None]


def sends(body: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


@contextmanager
def serving(answers: dict[str, Answer]) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with these paths, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answers[self.path](self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def line_of(error: HourLlavaError) -> str:
    assert "\n" not in str(error)
    assert all((error.what, error.why, error.todo))
    return str(error)


def failure(text: str, folder: Path, policy: SourcePolicy = LOCAL, kind: type[HourLlavaError] = SourceError) -> str:
    """The line with which a fetch fails; nothing is left of it."""
    with pytest.raises(kind) as caught:
        fetch(identify(text, policy), policy, folder / "film", Stop())
    assert list(folder.iterdir()) == []
    return line_of(caught.value)


def test_a_download(tmp_path: Path) -> None:
    answers = {
        "/film.mp4?v=a%20b": sends(BODY, Content_Length=str(len(BODY))),
        "/unknown-length": sends(BODY),
        "/chunked": sends(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", Transfer_Encoding="chunked"),
        "/%C3%A4": sends(b"umlaut"),
    }
    bodies = {"/film.mp4?v=a%20b": BODY, "/unknown-length": BODY, "/chunked": b"abcde", "/ä": b"umlaut"}
    with serving(answers) as (url, asked):
        for path, body in bodies.items():
            assert fetch(identify(url + path, LOCAL), LOCAL, tmp_path / "film", Stop()).read_bytes() == body
        assert asked == list(answers)
    assert [path.name for path in tmp_path.iterdir()] == ["film"]


def test_redirects(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {"/film": sends(BODY), "/loop": sends(b"", 302, Location="/loop")}
    for status in (301, 302, 303, 307, 308):
        answers[f"/{status}"] = sends(b"", status, Location="/film")
    with serving(answers) as (url, asked):
        port = url.rpartition(":")[2]
        for status in (301, 302, 303, 307, 308):
            assert fetch(identify(f"{url}/{status}", LOCAL), LOCAL, tmp_path / "film", Stop()).read_bytes() == BODY
            (tmp_path / "film").unlink()
        del asked[:]
        assert f"it leads elsewhere more than {MAX_REDIRECTS} times" in failure(f"{url}/loop", tmp_path)
        assert asked == ["/loop"] * (MAX_REDIRECTS + 1)
        del asked[:]
        for target, why in (
            (f"http://localhost:{port}/film", "it leads elsewhere, where the server reads nothing from localhost"),
            (f"http://me:word@127.0.0.1:{port}/film", "it leads elsewhere, where it holds a user's name"),
            ("file:///etc/passwd", "it leads to what is no http(s) address"),
            ("ftp://127.0.0.1/film", "it leads to what is no http(s) address"),
            ("data:video/mp4;base64,AAAA", "it leads to what is no http(s) address"),
            (f"http://127.0.0.1:{port}\\@localhost/film", "it leads elsewhere, where"),
        ):
            answers["/away"] = sends(b"", 302, Location=target)
            line = failure(f"{url}/away", tmp_path)
            assert line.startswith(f"{url}/away: {why}")
            assert "word" not in line
        assert set(asked) == {"/away"}


def test_downloads_that_fail(tmp_path: Path) -> None:
    def hangs_up(request: BaseHTTPRequestHandler) -> None:
        request.connection.close()

    answers = {
        "/gone": sends(b"no", 404),
        "/part": sends(BODY[:1000], 206),
        "/short": sends(BODY[:1000], Content_Length="2000"),
        "/cut": sends(b"5\r\nab", Transfer_Encoding="chunked"),
        "/empty": sends(b""),
        "/nothing": hangs_up,
    }
    whys = {
        "/gone": "the other side answered 404 Not Found",
        "/part": "the other side answered 206",
        "/short": "it broke off after 1000 of 2000 bytes",
        "/cut": "it cannot be downloaded (",
        "/empty": "it is empty (0 bytes)",
        "/nothing": "it cannot be downloaded (",
    }
    with serving(answers) as (url, _):
        for path, why in whys.items():
            assert failure(url + path, tmp_path).startswith(f"{url}{path}: {why}")
        assert "it cannot be downloaded (" in failure(url.replace("http:", "https:"), tmp_path)
    assert "it cannot be downloaded (Connection refused)" in failure(url, tmp_path)


def test_downloads_that_are_too_large(tmp_path: Path) -> None:
    policy = SourcePolicy(domains=("127.0.0.1",), max_bytes=len(BODY) - 1, timeout=DEADLINE)
    answers = {"/told": sends(b"", Content_Length="100000000000"), "/untold": sends(BODY)}
    with serving(answers) as (url, _):
        assert "it has 93.1 GiB, and at most 195 KiB are taken" in failure(
            f"{url}/told", tmp_path, policy, SourceSizeError
        )
        assert "it has more than that" in failure(f"{url}/untold", tmp_path, policy, SourceSizeError)


def test_a_silent_server(tmp_path: Path) -> None:
    policy, over = SourcePolicy(domains=("127.0.0.1",), timeout=0.2), threading.Event()

    def half(request: BaseHTTPRequestHandler) -> None:
        sends(BODY[:1000], Content_Length="2000")(request)
        over.wait(DEADLINE)

    with serving({"/half": half}) as (url, _):
        assert "nothing came for 0.2 s" in failure(f"{url}/half", tmp_path, policy)
        over.set()


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_download_that_is_stopped(tmp_path: Path, where: str) -> None:
    """At once, and not when the other side says something at last."""
    reached, over, stop = threading.Event(), threading.Event(), Stop()
    policy = SourcePolicy(domains=("127.0.0.1",), timeout=3600.0)

    def half(request: BaseHTTPRequestHandler) -> None:
        if where == "body":
            sends(BODY[:1000], Content_Length="2000")(request)
        reached.set()
        over.wait(DEADLINE)

    def stops() -> None:
        assert reached.wait(DEADLINE)
        stop.set()

    with serving({"/half": half}) as (url, asked):
        thread = threading.Thread(target=stops)
        thread.start()
        with pytest.raises(Stopped):
            fetch(identify(f"{url}/half", policy), policy, tmp_path / "film", stop)
        thread.join()
        assert not over.is_set()
        with pytest.raises(Stopped):
            fetch(identify(f"{url}/half", policy), policy, tmp_path / "film", stop)
        assert asked == ["/half"]  # the second time it was not even asked
        over.set()
    assert list(tmp_path.iterdir()) == []


def test_a_socket_after_its_download_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    stop = Stop()
    with stop.waking(ours):
        pass
    stop.set()
    theirs.sendall(b"x")
    assert ours.recv(1) == b"x"
    ours.close()
    theirs.close()


@pytest.mark.parametrize("size", [1, 2, 3, PIECE // 4 * 3, PIECE + 1])
def test_a_video_in_the_url(tmp_path: Path, size: int) -> None:
    """Exactly as many bytes as are taken, of pieces of any length, and not one more."""
    body = os.urandom(size)
    text = f"data:video/mp4;codecs=avc1;base64,{base64.b64encode(body).decode()}"
    policy = SourcePolicy(max_bytes=size)
    source = identify(text, policy)
    assert fetch(source, policy, tmp_path / "film", Stop()).read_bytes() == body
    assert len(source.record) < 120
    (tmp_path / "film").unlink()
    if size > 1:
        assert "at most" in failure(text, tmp_path, SourcePolicy(max_bytes=size - 1), SourceSizeError)


@pytest.mark.parametrize("text", ["AAA", "AA A", "AA\nAA", "A@AA", "AA%3D%3D", "äAAA"])
def test_what_is_not_base64(tmp_path: Path, text: str) -> None:
    assert "it is not base64" in failure(f"data:video/mp4;base64,{text}", tmp_path)
    assert "frame 0 of the data: URL: it is not base64" in failure(f"data:video/jpeg;base64,{text}", tmp_path)


def test_a_url_without_a_video(tmp_path: Path) -> None:
    assert "it is empty" in failure("data:video/mp4;base64,", tmp_path)
    for text in ("data:", "data:video/mp4,abc", "data:text/plain;base64,AAAA", "data:image/png;base64,AAAA"):
        assert "it is no video in base64" in failure(text, tmp_path)


def test_frames_in_the_url(tmp_path: Path) -> None:
    frames = [b"\xff\xd8\xff" + bytes([number]) * number for number in range(1, 4)]
    letters = [base64.b64encode(frame).decode() for frame in frames]
    url = f"data:video/jpeg;base64,{','.join(letters)}"
    policy = SourcePolicy(max_bytes=sum(map(len, frames)))
    folder = fetch(identify(url, policy), policy, tmp_path / "film", Stop())
    assert [path.read_bytes() for path in sorted(folder.glob("*.jpg"))] == frames
    assert len(list(folder.iterdir())) == 3
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at most" in failure(url, empty, SourcePolicy(max_bytes=policy.max_bytes - 1), SourceSizeError)
    png = base64.b64encode(b"\x89PNG").decode()
    for wrong in (f"{url},{png}", f"{url},", f"{url},,{letters[0]}"):
        assert "frame 3 of the data: URL: it is no JPEG" in failure(wrong, empty)


def test_a_file_that_is_not_committed_is_gone(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "film", 10, "film") as file:
        file.write(b"abc")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="it cannot be written to the disk"):
        PartialFile(tmp_path / "no folder" / "film", 10, "film")


def test_a_full_disk(tmp_path: Path) -> None:
    text = "data:video/mp4;base64," + base64.b64encode(bytes(2 * PIECE)).decode()
    with full_disk(PIECE):
        line = failure(text, tmp_path, kind=StorageError)
    assert "it cannot be written to the disk" in line
    assert line.endswith("free some space on the server")
