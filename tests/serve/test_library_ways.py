# SPDX-License-Identifier: Apache-2.0
"""The ways into a library besides a file: downloads, uploads, frames and streams; and two libraries at once."""

import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from cameras import Camera, Http, serving
from clips import board
from libraries import (
    BATCH,
    CHUNK,
    DEADLINE,
    SECONDS,
    Gate,
    assert_same,
    data_url,
    films_in,
    held_content,
    library,
    until,
    upload,
)
from memories import full_disk
from PIL import Image
from torch import Tensor

from hourllava.errors import (
    InputError,
    MemoryBusyError,
    MemoryFileError,
    SourceConflictError,
    SourceError,
    SourceSizeError,
    StorageError,
    UnknownMemoryError,
    VideoError,
)
from hourllava.memory import Repository
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.video import open_video


def frames_of(model: HourLlavaForConditionalGeneration, film: Path) -> Tensor:
    size = model.config.vision_config.image_size
    return torch.cat([chunk.frames for chunk in open_video(film).chunks(size)])


@pytest.mark.parametrize("keep", [False, True])
def test_a_download_and_its_file(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path, keep: bool
) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(film.parent))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{film.name}"
    with library(model, tmp_path, keep_videos=keep) as held:
        name = held.ensure(f"{url}?token=abc", None)
        assert held.wait(name, DEADLINE)
        assert_same(held_content(held, name), wanted)
        assert held.status(name).source == f"{url}?token=..."
        path = held.film(name)
        assert (path.read_bytes() if path else None) == (film.read_bytes() if keep else None)
        server.shutdown()
        server.server_close()
        thread.join()
        assert held.ensure(f"{url}?token=abc", None) == name  # nobody asks there again
    with library(model, tmp_path) as held:
        assert films_in(tmp_path) == ({name} if keep else set())
        assert (held.film(name) is not None) == keep
        held.delete(name)
    assert films_in(tmp_path) == set()


def test_frames_in_a_url(model: HourLlavaForConditionalGeneration, tmp_path: Path) -> None:
    pictures = []
    for number in range(3):
        buffer = io.BytesIO()
        Image.fromarray(board(number + 1)).save(buffer, "JPEG")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    with library(model, tmp_path, keep_videos=True) as held:
        name = held.ensure(f"data:video/jpeg;base64,{','.join(pictures)}", None)
        assert held.wait(name, DEADLINE)
        status = held.status(name)
        assert (status.state, status.frames) == ("ready", 3)
        assert status.source.startswith("data:video/jpeg;sha256=")
        assert held.film(name) is None
        tokens = held_content(held, name)[0]
        assert not torch.equal(tokens[0], tokens[1])


def test_an_upload(model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path) -> None:
    with library(model, tmp_path, max_bytes=film.stat().st_size) as held:
        broken = held.upload("film")
        broken.write(b"half of it")
        rival = held.upload("film")
        rival.write(b"x")
        assert held.statuses() == []  # a part is nothing yet
        assert len(films_in(tmp_path)) == 2
        broken.abort()
        upload(held, "film", film)
        for refused in (rival.commit, lambda: held.upload("film")):
            with pytest.raises(SourceConflictError, match="there is a video of that name"):
                refused()
        assert held.wait("film", DEADLINE)
        assert_same(held_content(held, "film"), wanted)
        assert held.status("film").source == "upload"
        with pytest.raises(SourceConflictError):
            held.ensure(data_url(film), "film")
        large = held.upload("large")
        large.write(film.read_bytes())
        with pytest.raises(SourceSizeError, match="large: it has more than that"):
            large.write(b"x")
        with pytest.raises(SourceError, match="it is empty"):
            held.upload("empty").commit()
        full = held.upload("full")
        full.write(bytes(1000))  # waits in a buffer
        with full_disk(500), pytest.raises(StorageError, match="cannot be written to the disk"):
            full.commit()
        assert [status.name for status in held.statuses()] == ["film"]
        assert films_in(tmp_path) == set()


def test_an_upload_for_whose_entry_the_disk_has_no_room(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was whole already, and does not stay."""
    with library(model, tmp_path) as held:

        def full(*_: object) -> None:
            raise StorageError("catalogue.sqlite", "the disk is full", "free some space")

        with monkeypatch.context() as patch:
            patch.setattr(held._shelf.repository, "declare", full)
            with pytest.raises(StorageError):
                upload(held, "film", film)
        assert (held.statuses(), films_in(tmp_path)) == ([], set())
        upload(held, "film", film)
        assert held.wait("film", DEADLINE)


def test_an_upload_that_is_no_video_says_so_when_it_is_asked(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path
) -> None:
    with library(model, tmp_path) as held:
        sent = held.upload("film")
        sent.write(b"no video" * 100)
        sent.commit()
        with pytest.raises(VideoError, match="is not a video that FFmpeg can read"):
            held.wait("film", DEADLINE)
        with pytest.raises(VideoError, match="is not a video that FFmpeg can read"):
            held.ensure(None, "film")
        upload(held, "film", film)  # the name is free
        assert held.ensure(None, "film") == "film"
        assert held.wait("film", DEADLINE)


def test_what_a_crash_left_is_removed(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate
) -> None:
    with library(model, tmp_path) as held:
        upload(held, "film", film)
        held.upload("other").write(b"half of it")
        (tmp_path / ".videos" / "nobody").mkdir()
        (tmp_path / ".videos" / "nobody" / "0.jpg").touch()
        with library(model, tmp_path):  # as long as one lives, what it is writing is left alone
            assert len(films_in(tmp_path)) == 3
        closing = threading.Thread(target=held.close)
        closing.start()
        until(lambda: held._jobs["film"].stop.is_set())
        gate.open()
        closing.join()
        assert len(films_in(tmp_path)) == 3
    with library(model, tmp_path) as held:
        assert films_in(tmp_path) == {"film"}
        assert held.status("film").state == "stopped"


def test_another_process_appends(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    with library(model, tmp_path, film.parent) as held, library(model, tmp_path, film.parent) as other:
        live = other.live("camera")
        live.append(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        for call in (held.live, held.delete):
            with pytest.raises(MemoryBusyError):
                call("camera")
        assert held_content(held, "camera")[0].shape[0] == 1
        assert held.status("camera").state == "stopped"  # as it will be if the other one dies now
        live.append(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        assert held_content(held, "camera")[0].shape[0] == 2
        live.close()
        held.delete("camera")


def test_another_process_watches(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate
) -> None:
    with library(model, tmp_path, film.parent) as held, library(model, tmp_path, film.parent) as other:
        other.ensure(str(film), "film")
        gate.open(CHUNK // BATCH)
        until(lambda: other.status("film").frames == CHUNK)
        held.ensure(str(film), "film")
        with pytest.raises(MemoryBusyError, match=r"^film: another process appends to it"):
            held.wait("film", DEADLINE)
        assert held.status("film").state == "failed"
        assert held_content(held, "film")[0].shape[0] == CHUNK
        gate.open()
        assert other.wait("film", DEADLINE)
        held.ensure(str(film), "film")
        assert held.wait("film", 0)
        assert held.status("film").state == "ready"
        assert gate.batches == -(-SECONDS // BATCH)


def test_frames_that_a_client_sends(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path
) -> None:
    frames = frames_of(model, film)
    with library(model, tmp_path) as held:
        live = held.live("camera")
        assert not held.wait("camera", 0.01)
        assert live.append(frames[:1]) == 1
        assert held.wait("camera", 0)
        assert (held.status("camera").state, held.status("camera").frames) == ("following", 1)
        for bad in (frames[:0], frames.float(), frames[0], frames[:, :2]):
            with pytest.raises(InputError, match=r"give uint8 \(n, 3, H, W\)"):
                live.append(bad)
        with pytest.raises(SourceConflictError, match="someone sends frames to it"):
            held.live("camera")
        assert held.ensure(None, "camera") == "camera"
        live.append(frames[1:70])
        live.close()
        live.close()
        assert (held.status("camera").state, held.status("camera").source) == ("ready", "frames sent by a client")
        with pytest.raises(MemoryFileError, match="it was closed, or stopped"):
            live.append(frames[70:])
        again = held.live("camera")
        assert held.wait("camera", 0)  # it can be asked already
        again.append(frames[70:100])
        held.stop("camera")
        assert held.status("camera").state == "stopped"
        with pytest.raises(MemoryFileError, match="it was closed, or stopped"):
            again.append(frames[100:])
        held.live("empty").close()
        assert held.status("empty").frames == 0
        with pytest.raises(UnknownMemoryError):
            held.use("empty")
    with library(model, tmp_path) as held:
        assert [(s.name, s.state, s.frames) for s in held.statuses()] == [("camera", "stopped", 100)]
        last = held.live("camera")
        last.append(frames[100:])
        assert_same(held_content(held, "camera"), wanted)
    with pytest.raises(MemoryFileError, match="it was closed, or stopped"):
        last.append(frames[:1])
    with library(model, tmp_path) as held:
        assert (held.status("camera").state, held.status("camera").frames) == ("stopped", SECONDS)


def test_sending_frames_that_fails(model: HourLlavaForConditionalGeneration, tmp_path: Path, gate: Gate) -> None:
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    gate.open()
    with library(model, tmp_path) as held:
        live = held.live("camera")
        live.append(frames)
        gate.error = MemoryFileError("disk", "it is full", "free some space")
        with pytest.raises(MemoryFileError, match="disk: it is full"):
            live.append(frames)
        status = held.status("camera")
        assert (status.state, status.frames, status.error) == ("failed", 1, str(gate.error))
        assert held.wait("camera", 0)  # what is there can be asked
        gate.error = None
        live = held.live("camera")
        assert live.append(frames) == 2


def test_a_file_that_grows(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path
) -> None:
    data, growing = film.read_bytes(), tmp_path / "growing.ts"
    growing.write_bytes(data[: len(data) // 2])
    with library(model, tmp_path / "kept", tmp_path) as held:
        assert held.follow(str(growing), "film", 3600.0) == "film"
        assert held.wait("film", DEADLINE)
        assert held.status("film").state == "following"
        assert held.follow(str(growing), "film", 3600.0) == "film"  # it is followed already
        seen = held.status("film").frames
        with growing.open("ab") as file:
            file.write(data[len(data) // 2 :])
        until(lambda: held.status("film").frames > SECONDS // 2 + 10)
        held.stop("film")
        until(lambda: held.status("film").state == "stopped")
        assert 0 < seen < held.status("film").frames
        held.follow(str(growing), "film", 0.3)
        until(lambda: held.status("film").state == "ready")
        assert_same(held_content(held, "film"), wanted)
        assert held.film("film") == growing
        held.delete("film")
        held.follow(str(growing), "film", 3600.0)
        held.wait("film", DEADLINE)
    assert [video.name for video in Repository(tmp_path / "kept").videos()] == ["film"]
    with library(model, tmp_path / "kept", tmp_path) as held:
        assert held.ensure(None, "film") == "film"
        assert held.status("film").state == "stopped"


def test_a_camera(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    """Its password is nowhere; where it breaks off, what came is kept."""
    with serving(Camera(Http, film)) as port, library(model, tmp_path) as held:
        held.follow(f"http://me:p@ss@127.0.0.1:{port}/", "camera", 5.0)
        until(lambda: held.status("camera").state == "ready")
        assert held.status("camera").frames == SECONDS
        assert held.status("camera").source == f"http://127.0.0.1:{port}/"
    assert not any(b"p@ss" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    size = film.stat().st_size
    with serving(Camera(Http, film, promised=2 * size)) as port, library(model, tmp_path) as held:
        held.follow(f"http://me:p@ss@127.0.0.1:{port}/", "broken", 5.0)
        until(lambda: held.status("broken").state == "failed")
        line = held.status("broken").error or ""
        assert line.startswith(f"http://127.0.0.1:{port}/: it broke off")
        assert held.wait("broken", 0)
        assert held_content(held, "broken")[0].shape[0] == held.status("broken").frames > 0
    with library(model, tmp_path) as held:
        for url in ("http://localhost:1/", "srt://elsewhere:1"):
            with pytest.raises(SourceError, match="the server reads nothing from"):
                held.follow(url, "other", 1.0)
        with pytest.raises(VideoError, match="such an address cannot be followed"):
            held.follow("gopher://127.0.0.1/", "other", 1.0)
        held.follow(f"http://127.0.0.1:{port}/", "other", 1.0)
        with pytest.raises(VideoError, match="cannot be followed"):
            held.wait("other", DEADLINE)
        assert [status.name for status in held.statuses()] == ["broken", "camera", "other"]
        assert len(Repository(tmp_path).videos()) == 2
