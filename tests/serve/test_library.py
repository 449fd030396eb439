# SPDX-License-Identifier: Apache-2.0
"""A server's videos: watched once whoever asks, kept, gone on with after an end of any kind, and never half there."""

import logging
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clips import write_clip
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
from torch import Tensor

from hourllava.errors import (
    HourLlavaError,
    InputError,
    MemoryFileError,
    SourceConflictError,
    SourceError,
    UnknownMemoryError,
    VideoError,
)
from hourllava.memory import Repository, repair, verify
from hourllava.model import FrameWriter, HourLlavaForConditionalGeneration
from hourllava.serve.jobs import Job
from hourllava.serve.watchers import FETCHERS
from hourllava.video import VideoReader


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("films") / "film.mp4", range(SECONDS), Fraction(1))


def test_a_file_is_watched_and_asked(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path
) -> None:
    with library(model, tmp_path, film.parent) as held:
        name = held.ensure(str(film), None)
        assert held.wait(name, DEADLINE)
        with held.use(name) as memory:
            assert len(model.ask(memory, "Which number?").moments)
        assert_same(held_content(held, name), wanted)
        status = held.status(name)
        assert (status.state, status.frames, status.expected, status.source) == ("ready", SECONDS, SECONDS, str(film))
        assert (status.damage, status.error, status.name) == (None, None, name)
        assert abs(status.created - time.time()) < 3600
        assert held.statuses() == [status]
        assert held.film(name) == film
        assert held._jobs[name].memory is held._jobs[name].asked is None  # which may be large
        assert held.usage()[0].memories == (name,)
        assert held.ensure(f"file://{film}", name) == held.ensure(None, name) == name
    repository = Repository(tmp_path)
    assert [video.name for video in repository.videos()] == [name]
    assert verify(repository, name) == repair(repository, name) == []
    with library(model, tmp_path) as held:
        assert held.status(name) == status
        assert held.wait(name)
        assert held.film(name) is None  # here no files may be read
        assert_same(held_content(held, name), wanted)


def test_many_ask_for_the_same(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate
) -> None:
    names: list[str] = []
    with library(model, tmp_path, film.parent) as held:
        url = data_url(film)

        def ask(source: str) -> None:
            name = held.ensure(source, None)
            held.wait(name, DEADLINE)
            names.append(name)

        threads = [threading.Thread(target=ask, args=(source,)) for source in [str(film), url] * 8]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join()
        assert len(names) == 16
        assert sorted(set(names)) == [status.name for status in held.statuses()]
        assert len(set(names)) == 2
        assert gate.batches == 2 * -(-SECONDS // BATCH)
        assert films_in(tmp_path) == set()


def test_it_is_asked_while_it_grows(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path, gate: Gate
) -> None:
    with library(model, tmp_path, film.parent) as held:
        name = held.ensure(str(film), "film")
        with pytest.raises(MemoryFileError, match="it holds no frame yet"), held.use(name):
            pass
        assert not held.wait(name, 0.01)
        gate.open(CHUNK // BATCH)
        until(lambda: held.status(name).frames == CHUNK)
        status = held.status(name)
        assert (status.state, status.expected) == ("watching", SECONDS)
        held.ensure(str(film), "film")
        assert held.status(name).state == "watching"  # and not waiting to begin once more
        with held.use(name) as memory:
            assert memory.frames == CHUNK
            assert torch.equal(memory.prefix().tokens, wanted[0][:CHUNK])
        gate.open()
        assert held.wait(name, DEADLINE)
        assert_same(held_content(held, name), wanted)


def test_names_and_sources(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "other.mp4", range(2), Fraction(1))
    with library(model, tmp_path / "kept", Path("/")) as held:
        held.ensure(str(film), "film")
        for done in (False, True):
            with pytest.raises(SourceConflictError, match="it stands for another video"):
                held.ensure(str(other), "film")
            for call in (held.upload, held.live, lambda name: held.follow(str(other), name, 1)):
                with pytest.raises(SourceConflictError):
                    call("film")
            assert done or held.wait("film", DEADLINE)
        for call in (
            lambda name: held.ensure(None, name),
            held.wait,
            held.use,
            held.status,
            held.film,
            held.stop,
            held.delete,
        ):
            with pytest.raises(UnknownMemoryError, match="no: there is no such memory"):
                call("no")
        watching = [lambda name: held.ensure(str(film), name), lambda name: held.follow(str(film), name, 1)]
        for call in (*watching, held.upload, held.live):
            for bad in ("a/b", "", ".videos", "x" * 300):
                with pytest.raises(MemoryFileError, match="no name for a folder"):
                    call(bad)
        with pytest.raises(InputError, match="neither a source nor a name"):
            held.ensure(None, None)
        with pytest.raises(SourceError, match="cannot be watched to its end"):
            held.ensure("rtsp://127.0.0.1/1", None)
        assert [status.name for status in held.statuses()] == ["film"]


def test_what_another_program_watched_is_left_as_it_is(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path
) -> None:
    repository = Repository(tmp_path)
    memory = repository.add("film", FrameWriter(model), source=str(film))
    memory.append(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    memory.close()
    with library(model, tmp_path, film.parent) as held:
        assert held.ensure(str(film), "film") == "film"
        assert held.wait("film")
        assert (held.status("film").state, held.status("film").frames) == ("ready", 3)
        assert held.film("film") == film
        with pytest.raises(SourceConflictError):
            held.ensure(data_url(film), "film")


@pytest.mark.parametrize("how", ["file", "url", "upload"])
def test_the_next_server_goes_on(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path, gate: Gate, how: str
) -> None:
    """Where the last one was closed in the midst of a video: nothing is watched twice, and nothing is missing."""
    source = {"file": str(film), "url": data_url(film), "upload": None}[how]
    before = threading.active_count()
    with library(model, tmp_path, film.parent) as held:
        upload(held, "film", film) if source is None else held.ensure(source, "film")
        held.ensure(data_url(film).replace("mp4", "webm"), "next")  # waits for its turn
        gate.open(CHUNK // BATCH)
        until(lambda: held.status("film").frames == CHUNK)
        closing = threading.Thread(target=held.close)
        closing.start()
        until(lambda: held._jobs["film"].stop.is_set())
        gate.open(CHUNK // BATCH)  # the chunk in hand
        closing.join(DEADLINE)
        assert not closing.is_alive()
        assert threading.active_count() == before
        assert held.wait("film", 0)
        assert [s.state for s in held.statuses()] == ["stopped", "stopped"]
        with pytest.raises(HourLlavaError, match="shutting down"):
            held.ensure(str(film), None)
    assert gate.batches == 2 * CHUNK // BATCH
    assert films_in(tmp_path) >= ({"film"} if how == "upload" else set())
    gate.open()
    with library(model, tmp_path, film.parent) as held:
        status = held.status("film")
        assert (status.state, status.frames, status.expected) == ("stopped", 2 * CHUNK, None)
        held.ensure(None if how == "upload" else source, "film")
        assert held.wait("film", DEADLINE)
        assert held.status("film").state == "ready"
        assert_same(held_content(held, "film"), wanted)
    assert gate.batches == -(-SECONDS // BATCH)
    assert "film" not in films_in(tmp_path)


def test_what_fails_at_once_is_forgotten(model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_text("no video")
    with library(model, tmp_path / "kept", tmp_path) as held:
        held.ensure(str(path), "film")
        for _ in range(2):
            with pytest.raises(VideoError, match="is not a video") as caught:
                held.wait("film", DEADLINE)
        status = held.status("film")
        assert (status.state, status.frames, status.error) == ("failed", 0, str(caught.value))
        assert Repository(tmp_path / "kept").videos() == []
        assert held.statuses() == [status]
        path.write_bytes(film.read_bytes())
        held.ensure(str(path), "film")
        assert held.wait("film", DEADLINE)
        assert held.status("film").frames == SECONDS
        for source in (
            f"data:video/mp4;base64,{'A' * 400}",
            "http://127.0.0.1:9/film.mp4",
            "data:video/jpeg;base64,/9j/",
        ):
            name = held.ensure(source, None)
            with pytest.raises(HourLlavaError) as caught:
                held.wait(name, DEADLINE)
            assert str(tmp_path) not in str(caught.value)
            held.delete(name)
        assert films_in(tmp_path / "kept") == set()
        assert [status.name for status in held.statuses()] == ["film"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryFileError("disk", "it is full", "free some space")])
def test_what_fails_later_is_kept_and_tried_again(
    model: HourLlavaForConditionalGeneration,
    film: Path,
    wanted: list[Tensor],
    tmp_path: Path,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """An error of ours is in the log, with its traceback; one that people can act on is only told."""
    with library(model, tmp_path) as held:
        upload(held, "film", film)
        gate.open(CHUNK // BATCH)
        until(lambda: held.status("film").frames == CHUNK)
        gate.error = error
        gate.error.__cause__ = ValueError("inside")
        gate.open()
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                held.wait("film", DEADLINE)
            assert caught.value.__cause__ is caught.value.__context__ is None  # they would hold pictures
        status = held.status("film")
        ours = isinstance(error, RuntimeError)
        assert (status.state, status.frames) == ("failed", CHUNK)
        assert status.error == (
            "film: an error of the server, which its log holds (RuntimeError)" if ours else str(error)
        )
        assert ["Traceback" in logging.Formatter().format(r) for r in caplog.records] == [ours]
        with held.use("film") as memory:
            assert memory.frames == CHUNK
        gate.error = None
        held.ensure(None, "film")
        assert held.wait("film", DEADLINE)
        assert_same(held_content(held, "film"), wanted)
        assert films_in(tmp_path) == set()


def test_what_another_program_deletes_is_gone(
    model: HourLlavaForConditionalGeneration, film: Path, wanted: list[Tensor], tmp_path: Path
) -> None:
    """Its file, too, which is not taken for that of the next video of the name."""
    short = write_clip(tmp_path / "short.mp4", range(5), Fraction(1))
    with library(model, tmp_path / "kept", keep_videos=True) as held:
        held.ensure(data_url(short), "film")
        assert held.wait("film", DEADLINE)
        assert held.film("film") is not None
        Repository(tmp_path / "kept").delete("film")
        assert held.statuses() == []
        for call in (held.status, held.use, held.film, lambda name: held.ensure(None, name)):
            with pytest.raises(UnknownMemoryError):
                call("film")
        held.ensure(data_url(film), "film")
        assert held.wait("film", DEADLINE)
        assert_same(held_content(held, "film"), wanted)


def test_failures_are_told_and_forgotten_in_the_end(
    model: HourLlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hourllava.serve.library.FAILURES_TOLD", 2)
    with library(model, tmp_path) as held:
        for number in range(5):
            name = held.ensure(f"data:video/mp4;base64,{number}", f"video{number}")
            with pytest.raises(SourceError, match="it is not base64"):
                held.wait(name, DEADLINE)
        assert [status.name for status in held.statuses()] == ["video2", "video3", "video4"]


def test_a_whole_memory_is_not_decoded_again(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last server came to the end and could no longer say so."""
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        assert held.wait("film", DEADLINE)
    catalogue = Repository(tmp_path).catalogue
    (mark,) = catalogue.sources()
    catalogue.record(replace(mark, done=False))
    monkeypatch.delattr(VideoReader, "chunks")
    with library(model, tmp_path, film.parent) as held:
        assert held.status("film").state == "stopped"
        held.ensure(None, "film")
        assert held.wait("film", DEADLINE)
        assert held.status("film").state == "ready"


def test_files_are_fetched_a_little_ahead(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_at_once: list[int] = []
    encode = FrameWriter.encode

    def counts(writer: FrameWriter, frames: Tensor) -> Tensor:
        held_at_once.append(len(films_in(tmp_path)))
        return encode(writer, frames)

    monkeypatch.setattr(FrameWriter, "encode", counts)
    with library(model, tmp_path) as held:
        names = [held.ensure(data_url(film), f"film{number}") for number in range(5)]
        until(lambda: len(films_in(tmp_path)) == FETCHERS)
        gate.open()
        assert all(held.wait(name, DEADLINE) for name in names)
    assert max(held_at_once) == FETCHERS


def test_a_stop_between_fetching_and_watching(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a job finds it in the fetcher's hands; it ends all the same, whatever is watched meanwhile."""
    with library(model, tmp_path, film.parent) as held:
        held.ensure(str(film), "film")
        give_back = Job.give_back

        def just_before(job: Job) -> None:
            held.stop(job.name)
            give_back(job)

        monkeypatch.setattr(Job, "give_back", just_before)
        held.ensure(data_url(film), "data")
        assert held.wait("data", DEADLINE)
        assert [status.state for status in held.statuses()] == ["stopped", "watching"]
        gate.open()
