# SPDX-License-Identifier: Apache-2.0
"""What a memory takes in, from whom, and what a copy of it is."""

import copy
import os
import pickle
import threading

import pytest
import torch
from memories import SmallWriter, make_frames

from hourllava.errors import MemoryFileError, ModelError, VideoError
from hourllava.memory import Repository, VideoMemory, scratch_files

WRITER = SmallWriter()


def make_memory(count, files=None):
    memory = VideoMemory(WRITER.shape, WRITER.fingerprint(), WRITER.device, files)
    memory.attach(WRITER)
    memory.append(make_frames(count))
    return memory


def assert_same(ours, theirs):
    assert ours.frames == theirs.frames
    assert torch.equal(ours.tokens, theirs.tokens)
    for a, b in zip(ours.pages, theirs.pages, strict=True):
        for name in ("key_pages", "value_pages", "key_summary", "page_lengths", "page_table"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(
    ("spoil", "given"),
    [
        (lambda frames: frames.float(), r"torch\.float32 \(4, 3, 8, 8\)"),
        (lambda frames: frames.long(), r"torch\.int64"),
        (lambda frames: frames > 127, r"torch\.bool"),
        (lambda frames: frames.permute(0, 2, 3, 1), r"\(4, 8, 8, 3\)"),
        (lambda frames: frames[0], r"\(3, 8, 8\)"),
        (lambda frames: frames[:, :1], r"\(4, 1, 8, 8\)"),
        (lambda frames: frames[:, :, :0], r"\(4, 3, 0, 8\)"),
        (lambda frames: frames.numpy(), "type ndarray"),
        (list, "type list"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, spoil, given):
    memory, kept = make_memory(5), Repository(tmp_path / "kept").add("film", WRITER)
    for one in (memory, kept):
        before = one.frames
        with pytest.raises(VideoError, match=f"frames: they are .*{given}.*; give a tensor of uint8 RGB"):
            one.append(spoil(make_frames(4)))
        assert one.frames == before
    assert_same(memory, make_memory(5))
    kept.close()


def test_a_model_that_has_changed_appends_no_more():
    writer = SmallWriter()
    memory = VideoMemory(writer.shape, writer.fingerprint(), writer.device)
    memory.attach(writer)
    memory.append(make_frames(5))
    writer.seed += 1
    for append, given in ((memory.append, make_frames(3, 5)), (memory.append_features, torch.zeros(3, 16, 12))):
        with pytest.raises(MemoryFileError, match="it was made by another model"):
            append(given)
    writer.seed -= 1
    memory.append(make_frames(3, 5))
    assert_same(memory, make_memory(8))


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_is_a_memory_of_its_own(tmp_path, in_files, duplicate):
    memory = make_memory(150, scratch_files(tmp_path) if in_files else None)
    memory.damage, memory.source = "3 s are lost", "/films/film.mp4"
    copied = duplicate(memory)
    assert_same(copied, memory)
    assert (copied.damage, copied.source, copied.fingerprint) == (memory.damage, memory.source, memory.fingerprint)
    with pytest.raises(ModelError, match="no model is attached"):
        copied.append(make_frames(1))
    copied.attach(WRITER)
    copied.append(make_frames(20, 150))
    assert memory.frames == 150
    assert_same(copied, make_memory(170))
    memory.append(make_frames(20, 150))
    assert_same(copied, memory)


def test_a_film_whose_name_is_no_utf8(tmp_path):
    memory = make_memory(5)
    memory.source = os.fsdecode(b"/films/film\xff.mp4")
    memory.damage = f"{memory.source}: 3 s are lost"
    path = tmp_path / "film.memory"
    memory.save(tmp_path / os.fsdecode(b"film\xff.memory"))
    with pytest.raises(MemoryFileError, match="its name or a folder's is no UTF-8; rename that"):
        VideoMemory.load(tmp_path / os.fsdecode(b"film\xff.memory"))
    (tmp_path / os.fsdecode(b"film\xff.memory")).rename(path)
    again = VideoMemory.load(path)
    assert_same(again, memory)
    assert again.source == "/films/film\\udcff.mp4"
    assert again.damage == "/films/film\\udcff.mp4: 3 s are lost"
    again.save(path)
    assert VideoMemory.load(path).source == again.source


def test_saving_waits_for_who_appends(tmp_path):
    """A file that is written while its rows change has checksums of other bytes."""
    memory, done = make_memory(2000), threading.Event()

    def append():
        while not done.is_set():
            memory.append(make_frames(1, memory.frames))

    thread = threading.Thread(target=append)
    thread.start()
    try:
        for number in range(5):
            memory.save(tmp_path / f"{number}.memory")
    finally:
        done.set()
        thread.join()
    for number in range(5):
        saved = VideoMemory.load(tmp_path / f"{number}.memory")
        assert_same(saved, make_memory(saved.frames))


def test_threads_that_append_wait_for_each_other():
    memory, parts = make_memory(3), [make_frames(5, 10), make_frames(5, 20)]
    memory.reserve(500)
    threads = [threading.Thread(target=lambda p=p: [memory.append(p) for _ in range(40)]) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.frames == 3 + 2 * 40 * 5
    alike = [make_memory(0), make_memory(0)]
    for part, one in zip(parts, alike, strict=True):
        one.append(part)
    for tokens in memory.tokens[3:].split(5):
        assert any(torch.equal(tokens, one.tokens) for one in alike)
