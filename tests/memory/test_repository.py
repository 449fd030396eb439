# SPDX-License-Identifier: Apache-2.0
"""A repository of memories: what is committed stays, what is damaged is said and given up, readers never wait."""

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from memories import SmallWriter, full_disk, make_frames

from hourllava.errors import MemoryFileError, StorageError
from hourllava.memory import Repository, VideoMemory, repair, scratch_files, unpack_features, verify
from hourllava.memory.segments import rounding_error


def everything(memory):
    """All that a reader could see, in one list."""
    seen = memory.prefix()
    inside = torch.arange(128) < memory.page_lengths[:, None]
    rows = [seen.tokens]
    for pages in seen.pages:
        rows += [pages.key_pages.transpose(1, 2)[inside], pages.value_pages.transpose(1, 2)[inside]]
        rows += [pages.key_summary, pages.page_lengths]
    return rows


def assert_same(ours, theirs):
    assert ours.frames == theirs.frames
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(a, b)


def fill(folder, frames=300, chunk=64, **options):
    """A repository with the video "film"; returns it and the memory, still open for appending."""
    repository = Repository(folder)
    memory = repository.add("film", SmallWriter(), **options)
    for first in range(0, frames, chunk):
        memory.append(make_frames(min(chunk, frames - first), first))
    return repository, memory


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("pages", [False, True])
def test_reopened_is_what_was_watched(tmp_path, precision, pages):
    repository, memory = fill(tmp_path, precision=precision, pages=pages)
    before = everything(memory)
    memory.close()
    for again in (repository.open("film", SmallWriter(), append=False), repository.open("film", SmallWriter())):
        for a, b in zip(everything(again), before, strict=True):
            assert torch.equal(a, b)
        again.close()
    assert verify(repository, "film") == []
    assert repair(repository, "film") == []
    (video,) = repository.videos()
    assert (video.name, video.frames, video.precision, video.pages) == ("film", 300, precision, pages)
    errors = [segment.error for segment in repository.catalogue.segments("film")]
    assert all(0 < error < (0.004 if precision == "bfloat16" else 0.01) for error in errors)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_error_that_is_told_is_that_of_what_is_kept(tmp_path, precision):
    """The worst batch of 16 frames tells for a segment, so that no frame's features are worse for it by much."""
    repository, memory = fill(tmp_path, precision=precision)
    memory.close()
    video, seen = repository.catalogue.video("film"), 0
    for segment in repository.catalogue.segments("film"):
        true = SmallWriter().encode(make_frames(segment.frames, segment.first))
        kept = unpack_features(repository.packed(video, segment))
        errors = [rounding_error(t, k) for t, k in zip(true.split(16), kept.split(16), strict=True)]
        assert segment.error == pytest.approx(max(errors), rel=1e-6)
        seen += segment.frames
    assert seen == 300


@pytest.mark.parametrize("pages", [False, True])
def test_chunking_and_reopening_change_nothing(tmp_path, pages):
    _, whole = fill(tmp_path / "whole", frames=200, chunk=200, pages=pages)
    repository, memory = fill(tmp_path / "parts", frames=5, chunk=2, pages=pages)
    for first, end in [(5, 6), (6, 64), (64, 131), (131, 200)]:
        memory.close()
        memory = repository.open("film", SmallWriter())
        memory.append(make_frames(end - first, first))
    assert_same(memory, whole)
    assert verify(repository, "film") == []


def test_ready_pages_need_no_model(tmp_path):
    repository, memory = fill(tmp_path, pages=True)
    assert_same(repository.open("film"), memory)
    fill(tmp_path / "bare")
    with pytest.raises(MemoryFileError, match="no ready pages"):
        Repository(tmp_path / "bare").open("film")


def test_another_model_of_the_same_tower_reads_the_features(tmp_path):
    repository, memory = fill(tmp_path, pages=True)
    memory.close()
    other = SmallWriter(seed=1)
    _, expected = fill(tmp_path / "other", frames=0)
    expected = Repository(tmp_path / "direct").add("film", other)
    expected.append(make_frames(300))
    assert_same(repository.open("film", other, append=False), expected)
    with pytest.raises(MemoryFileError, match="another vision tower"):
        repository.open("film", SmallWriter(per_frame=9))


def test_a_reader_sees_what_was_committed_when_it_opened(tmp_path):
    repository, memory = fill(tmp_path, frames=70, pages=True)
    reader = repository.open("film")
    before = [x.clone() for x in everything(reader)]
    prefix = memory.prefix()
    summaries = [pages.key_summary.clone() for pages in prefix.pages]
    memory.append(make_frames(100, 70))
    assert reader.frames == prefix.frames == 70
    for a, b in zip(everything(reader), before, strict=True):
        assert torch.equal(a, b)
    for pages, summary in zip(prefix.pages, summaries, strict=True):
        assert torch.equal(pages.key_summary, summary)
    assert_same(repository.open("film"), memory)


def test_one_writer_at_a_time(tmp_path):
    repository, memory = fill(tmp_path, frames=10)
    for use in (lambda: repository.open("film", SmallWriter()), lambda: repository.delete("film")):
        with pytest.raises(MemoryFileError, match="another process appends"):
            use()
    repository.open("film", SmallWriter(), append=False)
    memory.close()
    repository.delete("film")
    assert repository.videos() == []
    assert not (tmp_path / "film").exists()


def test_names(tmp_path):
    repository, _ = fill(tmp_path, frames=1)
    for name in ("", "a/b", ".hidden", ".."):
        with pytest.raises(MemoryFileError, match="no name for a folder"):
            repository.add(name, SmallWriter())
    foreign = os.fsdecode(b"caf\xe9")
    for use in (lambda: repository.add(foreign, SmallWriter()), lambda: repository.open(foreign)):
        with pytest.raises(MemoryFileError, match="only names and paths in UTF-8; rename the file"):
            use()
    assert [video.name for video in repository.videos()] == ["film"]
    with pytest.raises(MemoryFileError, match="there is a video of that name"):
        repository.add("film", SmallWriter())
    with pytest.raises(MemoryFileError, match=r"there is no such video.*it holds film"):
        repository.open("movie")


def test_export_is_a_memory_file(tmp_path):
    repository, memory = fill(tmp_path / "repository", pages=True)
    repository.export("film", tmp_path / "film.memory")
    assert_same(VideoMemory.load(tmp_path / "film.memory"), memory)


@pytest.mark.parametrize("kind", ["features", "pool"])
def test_damage_is_found_and_given_up(tmp_path, kind):
    repository, memory = fill(tmp_path, pages=True)
    memory.close()
    suffix = "safetensors" if kind == "features" else "pool"
    files = sorted((tmp_path / "film").glob(f"*.{suffix}"))
    path = files[1] if kind == "features" else next(f for f in files if "value_pages" in f.name)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)
    problems = verify(repository, "film")
    assert len(problems) == 1
    done = repair(repository, "film")
    assert "lost" in done[0] if kind == "features" else "ready pages were damaged" in done[0]
    assert verify(repository, "film") == []
    again = repository.open("film", SmallWriter())
    assert again.frames == (64 if kind == "features" else 300)
    again.append(make_frames(10, again.frames))
    _, expected = fill(tmp_path / "expected", frames=again.frames, chunk=1000)
    assert_same(again, expected)


def test_a_missing_or_short_file_is_one_line(tmp_path):
    repository, memory = fill(tmp_path, pages=True)
    memory.close()
    pool = next((tmp_path / "film").glob("*tokens.pool"))
    with pool.open("r+b") as file:
        file.truncate(100)
    for _ in range(2):
        with pytest.raises(MemoryFileError, match=r"memory repair") as caught:
            repository.open("film")
        assert "\n" not in str(caught.value)
        pool.unlink(missing_ok=True)
    repair(repository, "film")
    assert repository.open("film", SmallWriter()).frames == 300


def test_full_disk(tmp_path):
    repository, memory = fill(tmp_path, frames=64, pages=True)
    before = [x.clone() for x in everything(memory)]
    for size in (0, 100, 5000, 100_000):
        with full_disk(size), pytest.raises(StorageError):
            memory.append(make_frames(300, 64))
        assert memory.frames == repository.videos()[0].frames == 64
        for a, b in zip(everything(repository.open("film")), before, strict=True):
            assert torch.equal(a, b)
    memory.append(make_frames(300, 64))
    _, whole = fill(tmp_path / "whole", frames=364, chunk=364, pages=True)
    assert_same(memory, whole)
    assert verify(repository, "film") == []


def test_read_only_disk():
    with tempfile.TemporaryDirectory() as place:
        repository, memory = fill(Path(place) / "memories", pages=True)
        memory.close()
        Path(place).chmod(0o755)
        for folder in (repository.folder / "film", repository.folder):
            folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # the superuser may write anywhere
        try:
            assert Repository(repository.folder).open("film").frames == 300
            with pytest.raises(MemoryFileError, match="cannot be written"):
                repository.open("film", SmallWriter())
            with pytest.raises(MemoryFileError, match="cannot be"):
                repository.add("movie", SmallWriter())
        finally:
            os.seteuid(user)
            for folder in (repository.folder, repository.folder / "film"):
                folder.chmod(0o755)


@pytest.mark.parametrize("in_files", [False, True])
def test_questions_while_frames_arrive(tmp_path, in_files):
    """Every prefix that a thread gets is what watching so many frames gives, however fast frames arrive."""

    def new_memory(files=None):
        memory = VideoMemory(SmallWriter().shape, "writer 0", torch.device("cpu"), files)
        memory.attach(SmallWriter())
        return memory

    expected, alone = [], new_memory()
    for frame in range(140):
        alone.append(make_frames(1, frame))
        expected.append((alone.tokens.clone(), [p.key_summary.clone() for p in alone.pages]))
    memory, prefixes = new_memory(scratch_files(tmp_path) if in_files else None), []

    def ask():
        while memory.frames < len(expected):
            prefixes.append(memory.prefix())
            time.sleep(0.001)

    asking = threading.Thread(target=ask)
    asking.start()
    for first in range(0, len(expected), 5):
        memory.append(make_frames(5, first))
        time.sleep(0.001)
    asking.join()
    assert len({seen.frames for seen in prefixes}) > 2
    for seen in prefixes:
        if not seen.frames:
            continue
        tokens, summaries = expected[seen.frames - 1]
        assert torch.equal(seen.tokens, tokens)
        for pages, summary in zip(seen.pages, summaries, strict=True):
            assert torch.equal(pages.key_summary, summary)
