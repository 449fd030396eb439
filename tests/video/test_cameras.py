# SPDX-License-Identifier: Apache-2.0
"""Cameras that are followed over RTSP and HTTP: what they send, that they go away, and that nobody answers."""

import socket
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from cameras import Camera, Http, Rtsp, serving
from clips import SIDE, cut, damage, number_on, write_clip
from tiny_model import make_model

from hourllava.errors import VideoError
from hourllava.video import LiveReader, open_video

SECONDS = 12
PROTOCOLS = [(Http, "http"), (Rtsp, "rtsp")]


def write_film(path: Path, between: int = 2) -> Path:
    """Ten pictures a second, a key picture every two, and so many B-frames in a row."""
    return write_clip(path, range(10 * SECONDS), Fraction(1, 10), options={"g": "20", "bf": str(between)})


def pictures(chunks) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in chunks])


def follow(address: str, idle: float) -> tuple[LiveReader, torch.Tensor | VideoError]:
    """The pictures, or the error; the test fails, and does not hang, if neither comes."""
    reader, found = LiveReader(address, idle), []

    def read() -> None:
        try:
            found.append(pictures(reader.chunks(SIDE)))
        except VideoError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(120)
    assert found, f"{address} is still waited for"
    return reader, found[0]


@pytest.mark.parametrize(("handler", "scheme"), PROTOCOLS)
def test_a_camera_sends_what_the_file_holds(handler: type, scheme: str, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.ts")
    with serving(Camera(handler, film)) as port:
        reader, got = follow(f"{scheme}://127.0.0.1:{port}/film", idle=60)
    assert torch.equal(got, pictures(open_video(film).chunks(SIDE)))
    assert (reader.message, reader.ending, reader.broken) == (None, "the other side ended it", False)


def test_a_camera_without_b_frames(tmp_path: Path) -> None:
    """FFmpeg tells no time of the first picture of such a stream, and of each other that of the one before."""
    film = write_film(tmp_path / "film.ts", between=0)
    with serving(Camera(Rtsp, film)) as port:
        reader, got = follow(f"rtsp://127.0.0.1:{port}/film", idle=60)
    assert len(got) == SECONDS
    assert all(0 <= number_on(picture) - 10 * second <= 1 for second, picture in enumerate(got))
    assert reader.message is None


@pytest.mark.parametrize(("handler", "scheme"), PROTOCOLS)
def test_a_camera_that_falls_silent(handler: type, scheme: str, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.ts")
    with serving(Camera(handler, film, promised=10**9, stays=True)) as port:
        reader, got = follow(f"{scheme}://127.0.0.1:{port}/film", idle=2)
    whole = pictures(open_video(film).chunks(SIDE))
    assert len(got) >= SECONDS - 1  # the last pictures may wait for their end
    assert torch.equal(got, whole[: len(got)])
    assert (reader.ending, reader.broken) == ("nothing came for 2 s", False)


def test_a_connection_that_breaks(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.ts")
    half = cut(film, tmp_path / "half.ts", 0.5)
    with serving(Camera(Http, half, promised=film.stat().st_size)) as port:
        reader, got = follow(f"http://127.0.0.1:{port}/film", idle=60)
    assert 4 <= len(got) <= 8
    assert torch.equal(got[:-1], pictures(open_video(film).chunks(SIDE))[: len(got) - 1])
    assert reader.broken
    assert str(reader.ending).startswith("it broke off (")


def test_what_an_earlier_connection_lost_is_not_forgotten(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mkv")
    bad = damage(film, tmp_path / "bad.mkv", film.stat().st_size // 8)
    model = make_model()
    with serving(Camera(Http, bad, film)) as port:
        address = f"http://127.0.0.1:{port}/film"
        memory = model.watch(LiveReader(address, idle=60), progress=False)
        lost, held = memory.damage, memory.frames
        assert "pictures could not be decoded" in str(lost)
        model.watch(LiveReader(address, idle=60), progress=False, into=memory)
    assert memory.frames == held + SECONDS
    assert memory.damage == lost


@pytest.mark.parametrize("scheme", ["http", "https", "rtsp", "rtmp", "tcp"])
def test_nobody_answers(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes the connection, and nobody reads
        address = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/film"
        _, error = follow(address, idle=0.5)
    assert str(error) == f"{address}: nothing came within 0.5 s; check the address, and that it is sending"
    if scheme != "https":  # OpenSSL keeps the reason to itself
        _, error = follow(address, idle=60)
        assert str(error) == f"{address}: cannot be followed (Connection refused); check the address"


def test_nobody_sends_datagrams() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    _, error = follow(f"udp://127.0.0.1:{port}", idle=0.5)
    assert "nothing came within 0.5 s" in str(error)


def test_a_protocol_that_ffmpeg_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hourllava.video.live.SCHEMES", ("carrierpigeon",))
    _, error = follow("carrierpigeon://roof/1", idle=60)
    assert "the FFmpeg in PyAV does not speak carrierpigeon; choose another way to send it" in str(error)
