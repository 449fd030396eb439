# SPDX-License-Identifier: Apache-2.0
"""The routes of `/v1/memories`, of a server whose library is scripted."""

import socket
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import number_on, write_clip
from PIL import Image
from servers import PATIENCE, Client, Scripted, until

from hourllava.errors import MemoryFileError, SourceSizeError, StorageError
from hourllava.serve.sources import SourcePolicy

FILM = {
    "object": "memory",
    "name": "film",
    "source": "/films/film.mp4",
    "state": "ready",
    "frames": 60,
    "expected": None,
    "damage": None,
    "error": None,
    "created": 1.5,
}


def test_what_is_held(client: Client) -> None:
    assert client.ask("GET", "/v1/memories").json() == {"object": "list", "data": [FILM]}
    assert client.ask("GET", "/v1/memories/film").json() == FILM


def test_a_video_comes_in(client: Client, scene: Scripted) -> None:
    reply = client.ask("POST", "/v1/memories", {"url": "/films/day.mp4"})
    assert (reply.status, reply.json()["name"], reply.json()["state"]) == (202, "day", "waiting")
    reply = client.ask("POST", "/v1/memories", {"url": "/films/day.mp4", "name": "day"})
    assert (reply.status, scene.library.asked[-1]) == (202, ("/films/day.mp4", "day"))
    assert client.ask("POST", "/v1/memories", {"url": "/films/night.mp4", "name": "day"}).status == 409


def test_a_stream_is_followed_and_stopped(client: Client, scene: Scripted) -> None:
    body = {"url": "rtsp://camera/1", "name": "door", "follow": True, "idle": 5}
    reply = client.ask("POST", "/v1/memories", body)
    assert (reply.status, reply.json()["state"]) == (202, "following")
    assert scene.library.asked == [("rtsp://camera/1", "door", 5.0)]
    reply = client.ask("POST", "/v1/memories/door/stop")
    assert (reply.status, reply.json()["state"]) == (200, "stopped")


def test_a_video_is_deleted(client: Client) -> None:
    assert client.ask("DELETE", "/v1/memories/film").json() == {"id": "film", "object": "memory", "deleted": True}
    for method, path in [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/stop"),
        ("GET", "/picture?second=1"),
        ("GET", "/video"),
    ]:
        reply = client.ask(method, f"/v1/memories/film{path}")
        assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_what_is_in_use_is_not_deleted(client: Client, scene: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> None:
        raise MemoryFileError(name, "it is damaged", "run `hourllava memory repair`")

    monkeypatch.setattr(scene.library, "delete", damaged)
    assert client.ask("DELETE", "/v1/memories/film").status == 500


def test_a_file_is_sent(client: Client, scene: Scripted) -> None:
    data = np.random.default_rng(0).bytes(3_500_000)
    reply = client.ask("PUT", "/v1/memories/My%20holiday%20%C3%A9", data)
    assert (reply.status, reply.json()["name"], reply.json()["state"]) == (202, "My holiday é", "waiting")
    (pieces,) = scene.library.uploads.values()
    assert b"".join(pieces) == data
    assert len(pieces) > 2  # it is never held as a whole
    assert scene.library.aborted == []


def test_a_file_that_is_too_large(client: Client, scene: Scripted) -> None:
    scene.library.full = SourceSizeError("new", "it has more than that", "send a smaller video")
    reply = client.ask("PUT", "/v1/memories/new", b"film")
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    assert (scene.library.aborted, scene.library.uploads) == (["new"], {})


def test_a_file_for_which_the_disk_has_no_room(client: Client, scene: Scripted) -> None:
    scene.library.full = StorageError("new", "it cannot be written to the disk", "free some space on the server")
    reply = client.ask("PUT", "/v1/memories/new", b"film")
    assert (reply.status, reply.error["type"], reply.error["code"]) == (507, "server_error", "no_space")
    assert reply.error["message"] == "new: it cannot be written to the disk; free some space on the server"
    assert (scene.library.aborted, scene.library.uploads) == (["new"], {})
    scene.library.full = None
    assert client.ask("PUT", "/v1/memories/new", b"film").status == 202


def test_a_file_that_is_too_large_is_not_even_sent(client: Client, scene: Scripted) -> None:
    scene.service.policy = SourcePolicy(max_bytes=1000)
    with socket.create_connection(client.address, PATIENCE) as connection:
        head = (
            b"PUT /v1/memories/new HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n"
        )
        connection.sendall(head)
        assert connection.recv(10000).startswith(b"HTTP/1.1 413 ")
    assert client.ask("PUT", "/v1/memories/new", b"x" * 1000).status == 202
    assert scene.library.aborted == []


def test_a_file_that_breaks_off_leaves_nothing(client: Client, scene: Scripted) -> None:
    with socket.create_connection(client.address, PATIENCE) as connection:
        connection.sendall(b"PUT /v1/memories/new HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n")
        connection.sendall(b"x" * 2_000_000)
    until(lambda: scene.library.aborted)
    assert (scene.library.aborted, scene.library.uploads) == (["new"], {})
    assert "new" not in scene.library.held


@pytest.fixture
def film(scene: Scripted, tmp_path: Path) -> bytes:
    """The file of the video "film", whose second n shows the number 10 n."""
    path = write_clip(tmp_path / "film.mp4", range(100), Fraction(1, 10), options={"g": "20"}, side=128)
    scene.library.film_path = path
    scene.library.add("film", "ready", 10)
    return path.read_bytes()


@pytest.mark.parametrize(("width", "side"), [(None, 128), (64, 64)])
def test_a_picture_of_a_second(width: int | None, side: int, film: bytes, client: Client) -> None:
    reply = client.ask("GET", f"/v1/memories/film/picture?second=7{f'&width={width}' if width else ''}")
    assert (reply.status, reply.headers["content-type"]) == (200, "image/jpeg")
    assert reply.headers["cache-control"] == "private, max-age=600"
    picture = Image.open(BytesIO(reply.body))
    assert (picture.format, picture.size) == ("JPEG", (side, side))
    assert number_on(torch.from_numpy(np.array(picture)).permute(2, 0, 1)) == 70


def test_no_picture(film: bytes, client: Client, scene: Scripted) -> None:
    reply = client.ask("GET", "/v1/memories/film/picture?second=10")
    assert (reply.status, reply.error["param"]) == (404, "second")
    scene.library.film_path = None
    for path in ("picture?second=1", "video"):
        reply = client.ask("GET", f"/v1/memories/film/{path}")
        assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_the_video_s_file(film: bytes, client: Client) -> None:
    whole = client.ask("GET", "/v1/memories/film/video")
    assert (whole.status, whole.headers["content-type"], whole.body) == (200, "video/mp4", film)
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.ask("GET", "/v1/memories/film/video", headers={"range": "bytes=100-199"})
    assert (part.status, part.body) == (206, film[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(film)}"


@pytest.mark.parametrize("name", ["film.html", "film.svg", "film"])
def test_a_file_is_no_page(name: str, client: Client, scene: Scripted, tmp_path: Path) -> None:
    scene.library.film_path = tmp_path / name
    scene.library.film_path.write_text("<script>alert(1)</script>")
    reply = client.ask("GET", "/v1/memories/film/video")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-content-type-options"] == "nosniff"
