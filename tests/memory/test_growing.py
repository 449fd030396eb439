# SPDX-License-Identifier: Apache-2.0
"""Appends of a second: few segments stay, readers are not disturbed, and none costs more than the first ones."""

import itertools
import shutil

import pytest
import torch
from memories import SmallWriter, make_frames
from torch.utils._python_dispatch import TorchDispatchMode

from hourllava.errors import MemoryFileError
from hourllava.memory import Repository, VideoMemory, repair, verify
from hourllava.memory.catalogue import Segment
from hourllava.memory.segments import GATHERED, to_gather


def append(memory, count, at_once=1):
    for _ in range(0, count, at_once):
        memory.append(make_frames(at_once, memory.frames))


def rows_of(memory):
    inside = torch.arange(128) < memory.page_lengths[:, None]
    rows = [p.key_pages.transpose(1, 2)[inside] for p in memory.pages]
    return [memory.tokens, *rows, *(p.key_summary for p in memory.pages)]


def assert_same(ours, theirs):
    assert ours.frames == theirs.frames
    for a, b in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert torch.equal(a, b)


def test_a_day_of_seconds_is_few_segments():
    """The rule alone, on numbers: 86,400 appends, and how often a frame is written."""
    held, written = [], 0
    for second in range(86_400):
        gathered = to_gather(held[-GATHERED:], 1)
        held = held[: len(held) - len(gathered)]
        first = gathered[0].first if gathered else second
        held.append(Segment(first, second + 1 - first, "", "", 0, 0.0, 0.0))
        written += held[-1].frames
        assert sum(segment.frames < GATHERED for segment in held[-7:]) <= 6
    assert len(held) == 86_400 / GATHERED
    assert written / 86_400 <= 7
    assert to_gather([Segment(0, 64, "", "", 0, 0.0, 0.0)], 64) == []


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("pages", [False, True])
def test_gathered_segments_hold_the_same(tmp_path, precision, pages):
    repository = Repository(tmp_path / "seconds")
    memory = repository.add("camera", SmallWriter(), precision, pages)
    append(memory, GATHERED + 7)
    segments = repository.catalogue.segments("camera")
    assert [segment.frames for segment in segments] == [GATHERED, 4, 2, 1]
    assert {path.name for path in (tmp_path / "seconds" / "camera").glob("features-*")} == {s.file for s in segments}
    assert verify(repository, "camera") == []
    memory.close()
    assert repair(repository, "camera") == []
    whole = Repository(tmp_path / "whole").add("camera", SmallWriter(), precision, pages)
    whole.append(make_frames(GATHERED + 7))
    again = repository.open("camera", SmallWriter())
    assert_same(again, whole)
    append(again, 1)
    assert [segment.frames for segment in repository.catalogue.segments("camera")] == [GATHERED, 8]
    assert max(s.error for s in repository.catalogue.segments("camera")) < 0.01


def test_a_reader_while_segments_are_gathered(tmp_path, monkeypatch):
    """A writer appends between any two files that a reader opens: it gets what was committed when it began."""
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter())
    append(memory, 27)
    read, more = Repository.packed, itertools.chain([1, 1, 3], itertools.repeat(0))

    def packed(self, video, segment):
        append(memory, next(more))
        return read(self, video, segment)

    monkeypatch.setattr(Repository, "packed", packed)
    seen = repository.open("camera", SmallWriter(), append=False)
    expected = VideoMemory(SmallWriter().shape, "writer 0", torch.device("cpu"))
    expected.attach(SmallWriter())
    expected.append_features(SmallWriter().encode(make_frames(27)).bfloat16().float())
    assert_same(seen, expected)
    assert memory.frames == 32
    more = itertools.chain([1], itertools.repeat(0))
    assert verify(repository, "camera") == []


def test_what_is_missing_or_damaged_is_said(tmp_path):
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter())
    append(memory, 7)
    segments = repository.catalogue.segments("camera")
    assert [segment.frames for segment in segments] == [4, 2, 1]
    last = tmp_path / "camera" / segments[-1].file
    kept = tmp_path / "kept"
    shutil.move(last, kept)
    for use in (lambda: append(memory, 1), lambda: repository.open("camera", SmallWriter(), append=False)):
        with pytest.raises(MemoryFileError, match="memory repair"):
            use()
    assert memory.frames == 7
    shutil.move(kept, last)
    append(memory, 1)
    assert [segment.frames for segment in repository.catalogue.segments("camera")] == [8]


def test_a_reader_may_come_first(tmp_path):
    """A video is in the catalogue before its writer has made a file."""
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter(), pages=True)
    for path in (tmp_path / "camera").glob("*.pool"):
        path.unlink()
    assert repository.open("camera").frames == 0
    assert repository.open("camera", SmallWriter(), append=False).frames == 0
    memory.close()


def test_pages_take_no_rows_of_another_model(tmp_path):
    repository = Repository(tmp_path)
    repository.add("camera", SmallWriter(), pages=True).close()
    with pytest.raises(MemoryFileError, match="another model made its ready pages; use that model, or only read"):
        repository.open("camera", SmallWriter(seed=1))
    repository.open("camera", SmallWriter()).close()


class Work(TorchDispatchMode):
    """Counts the elements that operators of torch read and write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A view touches nothing, and the operators of ours are given only the pages that get rows.
        if not function.is_view:
            tensors = [x for x in [*args, result] if isinstance(x, torch.Tensor)]
            self.elements += sum(x.numel() for x in tensors)
        return result


def test_opening_touches_next_to_nothing(tmp_path):
    """Ready pages are mapped: what is computed on is how full the pages are, and the last two of them."""
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter(), pages=True)
    touched = []
    for frames in (200, 1000):
        append(memory, frames - memory.frames, at_once=100)
        with Work() as work:
            again = repository.open("camera")
        assert again.frames == frames
        touched.append(work.elements)
    held = sum(x.numel() for x in rows_of(memory))
    assert touched[1] < held / 20
    assert touched[1] - touched[0] < held / 100


@pytest.mark.parametrize("kept", ["in RAM", "in files", "in a repository"])
def test_an_append_costs_the_same_however_long_the_memory(tmp_path, kept):
    """Work is counted, not timed: at 128 seconds and at 1024, one second more touches as many elements."""
    if kept == "in a repository":
        memory = Repository(tmp_path).add("camera", SmallWriter(), pages=True)
    else:
        from hourllava.memory import scratch_files

        files = scratch_files(tmp_path) if kept == "in files" else None
        memory = VideoMemory(SmallWriter().shape, "writer 0", torch.device("cpu"), files)
        memory.attach(SmallWriter())
    memory.reserve(2000)
    counts = []
    for length in (128, 1024):
        memory.append(make_frames(length - memory.frames, memory.frames))
        frame = make_frames(1, memory.frames)
        with Work() as work:
            memory.append(frame)
        counts.append(work.elements)
    assert counts[0] == counts[1] > 0
