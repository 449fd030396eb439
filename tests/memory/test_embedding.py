# SPDX-License-Identifier: Apache-2.0
"""Features without pages: the same as watching keeps, under one name or several, by one process at a time."""

import multiprocessing
import sqlite3

import pytest
import torch
from memories import SmallWriter, full_disk, make_frames

from hourllava.errors import MemoryBusyError, MemoryFileError
from hourllava.memory import Embedding, Repository, link, packed_features, unpack_features, verify
from hourllava.memory.catalogue import Source


def embed(repository, name="film", frames=300, chunk=64, writer=None, **options):
    with Embedding(repository, name, writer or SmallWriter(), **options) as embedding:
        for first in range(embedding.frames, frames, chunk):
            embedding.append(make_frames(min(chunk, frames - first), first))
        embedding.commit()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_what_is_embedded_is_what_watching_keeps(tmp_path, precision):
    repository, watched = Repository(tmp_path / "embedded"), Repository(tmp_path / "watched")
    embed(repository, precision=precision, source="/films/film.mp4")
    memory = watched.add("film", SmallWriter(), precision)
    for first in range(0, 300, 64):
        memory.append(make_frames(min(64, 300 - first), first))
    ours, theirs = packed_features(repository, "film"), packed_features(watched, "film")
    assert ours.keys() == theirs.keys() == ({"features", "scales"} if precision == "int8" else {"features"})
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert torch.equal(repository.open("film", SmallWriter()).tokens, memory.tokens)
    assert verify(repository, "film") == []
    (video,) = repository.videos()
    assert (video.frames, video.precision, video.pages, video.source) == (300, precision, False, "/films/film.mp4")


def test_features_are_taken_as_they_are(tmp_path):
    repository = Repository(tmp_path)
    features = torch.randn(70, 16, 12)
    with Embedding(repository, "film", SmallWriter()) as embedding:
        embedding.append_features(features[:33])
        embedding.append_features(features[33:])
        embedding.commit()
    assert torch.equal(packed_features(repository, "film")["features"], features.bfloat16())
    assert torch.equal(unpack_features(packed_features(repository, "film")), features.bfloat16().float())


def test_it_goes_on_where_it_ended(tmp_path):
    repository, whole = Repository(tmp_path / "parts"), Repository(tmp_path / "whole")
    for end in (5, 5, 70, 300):  # in the middle of a batch, nothing new, over several commits
        embed(repository, frames=end, chunk=7)
    embed(whole)
    a, b = packed_features(repository, "film"), packed_features(whole, "film")
    assert torch.equal(a["features"], b["features"])
    assert len(repository.catalogue.segments("film")) > len(whole.catalogue.segments("film"))


def test_what_was_not_committed_is_not_there(tmp_path):
    repository = Repository(tmp_path)
    with Embedding(repository, "film", SmallWriter()) as embedding:
        embedding.append(make_frames(300))  # the first 256 are committed by themselves
        embedding.append(make_frames(10, 300))
        assert embedding.frames == 310
    assert repository.videos()[0].frames == 256
    embed(repository, frames=310)
    assert repository.videos()[0].frames == 310
    assert verify(repository, "film") == []


def test_one_at_a_time(tmp_path):
    repository = Repository(tmp_path)
    with (
        Embedding(repository, "film", SmallWriter()),
        pytest.raises(MemoryBusyError, match="another process appends"),
    ):
        Embedding(repository, "film", SmallWriter())
    embed(repository)


def test_what_cannot_be_appended_to(tmp_path):
    repository = Repository(tmp_path)
    embed(repository, frames=10)
    repository.add("pages", SmallWriter(), pages=True).close()
    with pytest.raises(MemoryFileError, match="another vision tower"):
        Embedding(repository, "film", SmallWriter(per_frame=9))
    with pytest.raises(MemoryFileError, match="ready pages are kept"):
        Embedding(repository, "pages", SmallWriter())
    for name in ("", "a/b", ".hidden", "x" * 256):
        with pytest.raises(MemoryFileError, match="no name for a folder"):
            Embedding(repository, name, SmallWriter())
    embed(repository, frames=20)  # the refusals let the lock go


def test_full_disk(tmp_path):
    repository = Repository(tmp_path)
    embed(repository, frames=64)
    with full_disk(5000), pytest.raises(MemoryFileError, match="cannot be written"):
        embed(repository, frames=300)
    assert repository.videos()[0].frames == 64
    embed(repository)
    assert verify(repository, "film") == []


def test_a_second_name_takes_no_room(tmp_path):
    repository = Repository(tmp_path)
    embed(repository)
    link(repository, "film", "other")
    link(repository, "film", "other")  # there already
    assert [video.name for video in repository.videos()] == ["film", "other"]
    files = [sorted((tmp_path / name).glob("features-*")) for name in ("film", "other")]
    assert all(a.samefile(b) for a, b in zip(*files, strict=True))
    repository.delete("film")
    assert packed_features(repository, "other")["features"].shape == (300, 16, 12)
    assert verify(repository, "other") == []
    with pytest.raises(MemoryFileError, match="there is no such video"):
        link(repository, "film", "third")


def test_nothing_to_read(tmp_path):
    repository = Repository(tmp_path)
    Embedding(repository, "film", SmallWriter()).__exit__(None, None, None)
    with pytest.raises(MemoryFileError, match="it holds no frame"):
        packed_features(repository, "film")
    with pytest.raises(MemoryFileError, match="there is no such video"):
        packed_features(repository, "movie")


def test_sources(tmp_path):
    repository = Repository(tmp_path)
    catalogue = repository.catalogue
    assert catalogue.source("/a.mp4") is None
    assert catalogue.sources() == []
    embed(repository)
    catalogue.record(Source("/a.mp4", "film", False, "too dark"))
    catalogue.record(Source("/b.mp4", "movie", False, ""))
    assert catalogue.source("/a.mp4") == Source("/a.mp4", "film", False, "too dark")
    catalogue.record(Source("/a.mp4", "film", True, ""))
    assert catalogue.source("/a.mp4").done
    assert catalogue.sources() == [Source("/a.mp4", "film", True, ""), Source("/b.mp4", "movie", False, "")]
    repository.delete("film")
    assert catalogue.source("/a.mp4") is None
    assert catalogue.source("/b.mp4") is not None


def _open_repository(folder, start):
    start.wait()
    Repository(folder)


def test_many_processes_begin_one_repository(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        start = context.Event()
        folder = tmp_path / str(attempt)
        folder.mkdir()
        processes = [context.Process(target=_open_repository, args=(folder, start)) for _ in range(4)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert Repository(folder).videos() == []


def test_a_catalogue_whose_maker_was_killed(tmp_path):
    (tmp_path / "catalogue.sqlite").touch()
    assert Repository(tmp_path).videos() == []
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(MemoryFileError, match="its format 9 is not 1"):
        Repository(tmp_path)
