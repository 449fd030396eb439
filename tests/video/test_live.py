# SPDX-License-Identifier: Apache-2.0
"""A video that is followed while it is written gives, once it has ended, what reading the whole file gives."""

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clips import SIDE, damage, numbers, write_clip

from hourllava.errors import VideoError
from hourllava.video import LiveReader, open_video
from hourllava.video.live import is_url

SECONDS = 12
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def write_film(path: Path, ticks: list[int] | None = None) -> Path:
    """Ten pictures a second, a key picture every two, B-frames in between; an MP4 in fragments."""
    options = {"g": "20", "bf": "2"}
    ticks = list(range(10 * SECONDS)) if ticks is None else ticks
    if path.suffix != ".mp4":
        return write_clip(path, ticks, Fraction(1, 10), options=options)
    whole = write_clip(path.with_name("whole.mkv"), ticks, Fraction(1, 10), options=options)
    import av

    with av.open(str(whole)) as source, av.open(str(path), "w", options=FRAGMENTED) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


@contextmanager
def growing(whole: Path, to: Path, seed: int = 0, pause: float = 0.01) -> Iterator[None]:
    """Another thread writes the bytes of one file to another, in pieces of any size."""
    data, rng, place = whole.read_bytes(), random.Random(seed), 0
    to.touch()

    def write() -> None:
        nonlocal place
        with to.open("ab", buffering=0) as file:
            while place < len(data):
                size = rng.randint(1, max(2, len(data) // 15))
                file.write(data[place : place + size])
                place += size
                time.sleep(pause)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        writer.join()


def pictures(chunks: Iterator) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in chunks])


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
def test_a_growing_file_is_the_whole_one(suffix: str, tmp_path: Path) -> None:
    whole, live = write_film(tmp_path / f"film{suffix}"), tmp_path / f"live{suffix}"
    with growing(whole, live):
        reader = LiveReader(live, idle=3)
        chunks = list(reader.chunks(32))
    assert torch.equal(pictures(chunks), pictures(open_video(whole).chunks(32)))
    seconds = torch.cat([chunk.seconds for chunk in chunks])
    assert seconds.tolist() == list(range(SECONDS))
    assert reader.message is None
    assert reader.path == str(live)


def test_seconds_come_while_the_file_grows(tmp_path: Path) -> None:
    """A reader does not wait for the end: what it has given is there before the rest is written."""
    whole, live = write_film(tmp_path / "film.ts").read_bytes(), tmp_path / "live.ts"
    live.write_bytes(whole[: len(whole) * 2 // 3])
    chunks, seen = LiveReader(live, idle=60).chunks(SIDE, chunk=2), []
    while len(seen) < 4:
        seen += numbers([next(chunks)])
    with live.open("ab") as file:
        file.write(whole[len(whole) * 2 // 3 :])
    while len(seen) < 10:
        seen += numbers([next(chunks)])
    chunks.close()
    assert seen == list(range(0, 10 * len(seen), 10))


def test_gaps_and_single_pictures(tmp_path: Path) -> None:
    for number, ticks in enumerate(([0], [0, 1], [3, 4, 9, 35, 36, 80], [0, 10, 20], [5, 25, 49, 50, 51])):
        path = write_film(tmp_path / f"{number}.mkv", ticks)
        assert torch.equal(
            pictures(LiveReader(path, idle=0.1).chunks(SIDE)), pictures(open_video(path).chunks(SIDE))
        ), ticks


def test_damage_shows_the_last_good_picture(tmp_path: Path) -> None:
    whole = write_film(tmp_path / "film.mkv")
    path = damage(whole, tmp_path / "damaged.mkv", whole.stat().st_size // 8)
    reader = LiveReader(path, idle=0.1)
    seen = numbers(reader.chunks(SIDE))
    assert reader.lost > 0
    assert f"{path}: {reader.lost} pictures could not be decoded" in str(reader.message)
    assert all(a <= b <= 10 * second for second, (a, b) in enumerate(zip([0, *seen], seen, strict=False)))


def test_a_clock_that_jumps_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten pictures a second; the stream's clock goes back to 0 after three seconds, and far ahead after six."""
    times = [*range(30), *range(30), *range(10**6, 10**6 + 30)]
    frames = [SimpleNamespace(pts=time, duration=1, number=number) for number, time in enumerate(times)]
    reader = LiveReader(write_film(tmp_path / "film.ts"))
    container = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(reader, "_open", lambda: (container, SimpleNamespace(time_base=Fraction(1, 10)), None))
    monkeypatch.setattr(reader, "_frames", lambda *_: iter(frames))
    monkeypatch.setattr("hourllava.video.live.to_square", lambda frame, *_: torch.tensor(frame.number))
    assert torch.cat([c.frames for c in reader.chunks(SIDE)]).tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80]


def test_stop(tmp_path: Path) -> None:
    """What has been given when it is told to stop is the beginning of the film."""
    stop, whole = threading.Event(), write_film(tmp_path / "film.ts")
    chunks = LiveReader(whole, idle=600, stop=stop).chunks(SIDE, chunk=3)
    given = numbers([next(chunks)])
    stop.set()
    given += numbers(chunks)
    assert given == list(range(0, 10 * SECONDS, 10))[: len(given)]


def test_a_pipe(tmp_path: Path) -> None:
    whole, pipe = write_film(tmp_path / "film.ts"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(whole.read_bytes()))
    writer.start()
    reader = LiveReader(pipe, idle=0.5)
    assert reader.path is None
    assert torch.equal(pictures(reader.chunks(SIDE)), pictures(open_video(whole).chunks(SIDE)))
    writer.join()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address(address: str, tmp_path: Path) -> None:
    whole = write_film(tmp_path / "film.ts")
    reader = LiveReader(f"{address}/film.ts", idle=10)
    assert torch.equal(pictures(reader.chunks(SIDE)), pictures(open_video(whole).chunks(SIDE)))
    assert reader.path is None
    secret = address.replace("//", "//user:word@") + "/nothing.ts"
    with pytest.raises(VideoError, match=r"nothing\.ts: cannot be followed") as caught:
        list(LiveReader(secret, idle=10).chunks(SIDE))
    assert "word" not in str(caught.value)


def test_datagrams(tmp_path: Path) -> None:
    """A transport stream over UDP, seven packets a datagram, as cameras send it; sent once somebody listens."""
    whole = write_film(tmp_path / "film.ts")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def send() -> None:
        padding = b"\x47\x1f\xff\x10" + b"\xff" * 184
        data = whole.read_bytes()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect(("127.0.0.1", port))
            heard = 0
            while heard < 3:  # the system says of a datagram that nobody took when the next is sent
                try:
                    one.send(padding)
                    heard += 1
                except ConnectionRefusedError:
                    heard = 0
                time.sleep(0.05)
            for first in range(0, len(data), 7 * 188):
                one.send(data[first : first + 7 * 188])
                time.sleep(0.001)

    sender = threading.Thread(target=send)
    sender.start()
    got = pictures(LiveReader(f"udp://127.0.0.1:{port}", idle=3).chunks(SIDE))
    sender.join()
    assert torch.equal(got, pictures(open_video(whole).chunks(SIDE)))


def test_what_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="No such file"):
        LiveReader(tmp_path / "nothing.ts")
    with pytest.raises(VideoError, match="is a directory"):
        LiveReader(tmp_path)
    with pytest.raises(VideoError, match="such an address cannot be followed; give one of http"):
        LiveReader("gopher://old.example/film")
    text, empty = tmp_path / "text.ts", tmp_path / "empty.ts"
    text.write_text("Dear diary.\n" * 1000)
    empty.touch()
    for path in (text, empty):
        with pytest.raises(VideoError, match="must be fragmented MP4, MPEG-TS or Matroska"):
            list(LiveReader(path, idle=0.1).chunks(SIDE))


def test_addresses_and_paths() -> None:
    assert is_url("rtsp://camera/1")
    assert not is_url("film.mp4")
    assert not is_url(Path("http:/film.mp4"))
    assert not is_url("C:\\film.mp4")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("rtsp://camera/1?a@b", "rtsp://camera/1?a@b"),
        ("rtsp://me:p@ss:w@camera:554/1@2", "rtsp://camera:554/1@2"),
        ("http://me@camera?x=//y@z", "http://camera?x=//y@z"),
        ("srt://host:9?mode=caller&passphrase=abc#x", "srt://host:9?mode=caller&passphrase=...#x"),
        ("https://s/v?X-Amz-Signature=1f&v=2&access_TOKEN=3", "https://s/v?X-Amz-Signature=...&v=2&access_TOKEN=..."),
        ("https://s/v?sp=r&sig=a%2F&api_key=b&auth=c", "https://s/v?sp=r&sig=...&api_key=...&auth=..."),
        ("https://s/watch?v=pass@word&design=1&author=2", "https://s/watch?v=pass@word&design=1&author=2"),
    ],
)
def test_a_password_is_told_to_nobody(address: str, name: str) -> None:
    assert LiveReader(address).name == name


def test_a_path_holds_no_secret(tmp_path: Path) -> None:
    path = f"{tmp_path}//me@home?token=b"
    Path(path).touch()
    assert LiveReader(path).name == path
