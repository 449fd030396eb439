# SPDX-License-Identifier: Apache-2.0
"""The ways out of a library: what is stopped, deleted or closed ends soon, and nothing of it stays behind."""

import os
import threading
from pathlib import Path

import pytest
from libraries import (
    BATCH,
    CHUNK,
    DEADLINE,
    SECONDS,
    Gate,
    data_url,
    films_in,
    held_content,
    library,
    until,
    upload,
)

from hourllava.errors import BusyError, MemoryFileError, UnknownMemoryError
from hourllava.memory import MemoryPool, Repository
from hourllava.memory.catalogue import Video
from hourllava.model import HourLlavaForConditionalGeneration


@pytest.mark.parametrize("way", ["stop", "delete"])
def test_stop_and_delete(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate, way: str
) -> None:
    """What is being watched ends after the chunk in hand; what waits for its turn ends at once."""
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        gate.open(CHUNK // BATCH)
        until(lambda: held.status("film").frames == CHUNK)
        upload(held, "upload", film)
        held.ensure(data_url(film), "data")
        for name in ("upload", "data"):
            getattr(held, way)(name)
        if way == "stop":
            assert [held.status(n).state for n in ("data", "film", "upload")] == ["stopped", "watching", "stopped"]
            assert all(held.wait(name, 0) for name in ("upload", "data"))
        assert [video.name for video in Repository(tmp_path).videos()] == ["film"]
        thread = threading.Thread(target=getattr(held, way), args=("film",))
        thread.start()
        until(lambda: held._jobs["film"].stop.is_set())
        gate.open(CHUNK // BATCH)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        if way == "stop":
            assert held.wait("film", DEADLINE)
            status = held.status("film")
            assert (status.state, status.frames, status.expected) == ("stopped", 2 * CHUNK, SECONDS)
            held.ensure(str(film), "film")  # someone did not want more of it
            assert held.status("film").state == "stopped"
            assert held_content(held, "film")[0].shape[0] == 2 * CHUNK
        else:
            with pytest.raises(UnknownMemoryError):
                held.use("film")
            assert held.statuses() == []
        assert films_in(tmp_path) == set()
        assert gate.batches == 2 * CHUNK // BATCH
    with library(model, tmp_path, film.parent) as held:
        assert [(s.name, s.state) for s in held.statuses()] == ([("film", "stopped")] if way == "stop" else [])
        gate.open()
        held.delete("film") if way == "stop" else None
        held.ensure(str(film), "film")
        assert held.wait("film", DEADLINE)
        assert held.status("film").frames == SECONDS


def test_too_many_videos(
    model: HourLlavaForConditionalGeneration,
    film: Path,
    tmp_path: Path,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hourllava.serve.library.MOST_WAITING", 1)
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        until(lambda: held.status("film").state == "watching")
        held.ensure(data_url(film), "data")
        sent = held.upload("upload")
        sent.write(film.read_bytes())
        for call in (sent.commit, lambda: held.ensure(str(film), "more")):
            with pytest.raises(BusyError, match="1 videos wait to be watched already"):
                call()
        assert held.ensure(data_url(film), "data") == "data"
        assert [status.name for status in held.statuses()] == ["data", "film"]
        held.live("live").close()  # which need not wait
        gate.open()
        assert held.wait("data", DEADLINE)
        assert films_in(tmp_path) == set()
        held.ensure(str(film), "more")


def test_deleting_what_is_being_asked(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    with library(model, tmp_path, film.parent) as held:
        name = held.ensure(str(film), None)
        held.wait(name, DEADLINE)
        with held.use(name) as memory:
            held.delete(name)
            assert len(model.ask(memory, "Which number?").moments)
        assert held.usage()[0].used == 0
        assert not os.path.exists(tmp_path / name)


def test_deleting_what_a_question_is_about_to_read(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears that there is no such memory, and nothing of files that are not there."""
    files = MemoryPool._files
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        held.wait("film", DEADLINE)

        def late(pool: MemoryPool, video: Video) -> object:
            Repository(tmp_path).delete("film")
            return files(pool, video)

        monkeypatch.setattr(MemoryPool, "_files", late)
        with pytest.raises(UnknownMemoryError, match="film: there is no such memory"), held.use("film"):
            pass


def test_damage_is_told_without_the_server_s_folders(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path
) -> None:
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        held.wait("film", DEADLINE)
        (tmp_path / "film" / "tokens.pool").unlink()
        with pytest.raises(MemoryFileError, match=r"^film/tokens\.pool: it cannot be opened"), held.use("film"):
            pass
        assert held.usage()[0].used == 0


def test_no_thread_stays(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with library(model, tmp_path / "kept", Path("/")) as held:
        held.follow(str(film), "followed", 3600.0)
        held.ensure(str(film), "film")
        held.live("camera")
        held.wait("followed", DEADLINE)
        (tmp_path / "silent.ts").touch()
        held.follow(str(tmp_path / "silent.ts"), "silent", 3600.0)
        held.stop("silent")
        assert held.wait("silent", DEADLINE)
        assert (held.status("silent").state, held.status("silent").error) == ("stopped", None)
    assert {"camera", "silent"}.isdisjoint(
        video.name for video in Repository(tmp_path / "kept").videos()
    )  # nothing came
    until(lambda: set(threading.enumerate()) <= before)
    assert {s.state for s in held.statuses()} <= {"stopped", "ready"}
