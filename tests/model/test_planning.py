# SPDX-License-Identifier: Apache-2.0
"""A plan against what is then measured: files, the pool, and everything that torch allocates for a question."""

import json
import threading
import time
import weakref
from fractions import Fraction
from functools import partial

import pytest
import torch
from clips import write_clip
from tiny_model import make_model
from torch.profiler import ProfilerActivity, profile

from hourllava.errors import InputError, ModelError, VideoError
from hourllava.memory import MemoryPool, MemoryShape, Repository, VideoMemory, scratch_files
from hourllava.memory.pages import page_count
from hourllava.model import FrameWriter, tiny_config
from hourllava.model.planning import longest_in, plan
from hourllava.model.released import released_config
from hourllava.video import reader, runs


def allocated_at_most(work, path):
    """Bytes of tensors that a call has alive at once, beside those that were there before."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


class FeaturesAlone(FrameWriter):
    """A writer that has the features of any frames at once, for tests of what is kept of them."""

    def encode(self, frames):
        return torch.ones(len(frames), self.shape.per_frame, self.feature_width)


def held(folder, pattern="*"):
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("at_once", [1, 64, 1000])
def test_the_disk_takes_what_was_planned(tmp_path, at_once, precision):
    """At every length from a minute on, while the memory grows and when it has: by seconds, by chunks, all at once."""
    model = make_model()
    repository = Repository(tmp_path)
    memory = repository.add("film", FeaturesAlone(model), precision, pages=True)
    for frames in (60, 61, 67) if at_once == 1 else (60, 61, 127, 128, 129, 360, 777):
        missing = torch.zeros(frames - memory.frames, 3, 1, 1, dtype=torch.uint8)
        for part in missing.split(at_once):
            memory.append(part)
        planned = plan("tiny", frames / 3600, precision, model.config).disk
        assert held(tmp_path, "features-*") == pytest.approx(planned["features"], rel=0.1)
        assert held(tmp_path, "blocks.*") == pytest.approx(planned["pages"], rel=0.1)
        assert held(tmp_path, "tokens.*") == pytest.approx(planned["tokens"], rel=0.1)
        assert held(tmp_path) == pytest.approx(sum(planned.values()), rel=0.1)


def test_files_are_never_much_larger_than_what_they_hold(tmp_path):
    """Grown second by second, at every length from a minute to a day."""
    shape = MemoryShape(per_frame=64, width=1, blocks=1, kv_heads=1, head_dim=1, dtype=torch.float16)
    memory = VideoMemory(shape, "", torch.device("cpu"), scratch_files(tmp_path))
    grown = 0
    for frames in range(60, 86_401):
        before = len(memory._tokens.rows)
        memory.reserve(frames)
        room = len(memory._tokens.rows)
        assert frames <= room <= 1.08 * frames
        if room != before:
            grown += 1
            assert len(memory._keys[0].rows) <= 1.1 * page_count(frames, shape.per_frame)
    assert grown < 500


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("frames", [400, 1100])
def test_bytes_are_within_a_tenth(tmp_path, frames, precision):
    model = make_model()
    writer, repository = FrameWriter(model), Repository(tmp_path)
    pictures = torch.randint(0, 256, (frames, 3, 64, 64), dtype=torch.uint8)
    memory = repository.add("film", writer, precision, pages=True)
    model.watch(pictures, progress=False, into=memory)
    memory.close()
    planned = plan("tiny", frames / 3600, precision, model.config)
    assert planned.frames == frames
    assert held(tmp_path) == pytest.approx(sum(planned.disk.values()), rel=0.1)
    assert sum(p.nbytes for p in model.parameters()) == planned.device["weights"]
    pool = MemoryPool(repository, writer, planned.device["pages"])
    with pool.use("film") as memory:
        assert pool.usage()[0].used == planned.device["pages"]
        asked = partial(model.ask, memory, "Which colour was the star?", budget="all")
        question = allocated_at_most(asked, tmp_path / "trace.json")
    assert question == pytest.approx(planned.device["question"], rel=0.5)
    measured = planned.device["weights"] + pool.usage()[0].used + question
    assert measured == pytest.approx(planned.device_peak, rel=0.1)
    tower = allocated_at_most(lambda: writer.encode(pictures[: writer.batch]), tmp_path / "trace.json")
    assert tower == pytest.approx(planned.device["tower"], rel=0.5)


def test_a_short_video_is_planned_with_its_repeated_frames():
    config = tiny_config(min_frames=128)
    assert (
        plan("tiny", 60 / 3600, config=config).device["pages"] > plan("tiny", 128 / 3600, config=config).device["pages"]
    )


def test_longest_in_a_budget():
    shape = FrameWriter(make_model()).shape
    for hours in (0.5, 24):
        pages = plan("tiny", hours, config=tiny_config()).device["pages"]
        assert longest_in(shape, pages) == pytest.approx(hours, abs=2 / 3600)
        assert longest_in(shape, pages - 1) < hours


def test_what_cannot_be_planned():
    for hours in (0, -1, float("nan"), float("inf"), 1e-6):
        with pytest.raises(InputError, match="no length of a video"):
            plan("7b", hours)
    config = released_config("3b")
    config.vision_config = None
    with pytest.raises(ModelError, match="without a vision tower"):
        plan("3b", 1, config=config)


@pytest.mark.parametrize("threads", [1, 3])
def test_pictures_on_the_host_are_as_many_as_planned(tmp_path, monkeypatch, threads):
    """Counted while the model is slower than the decoder, so that as many wait as ever do."""
    alive = most = 0
    lock = threading.Lock()

    def counted(make):
        def made(*args):
            nonlocal alive, most
            picture = make(*args)
            with lock:
                alive += picture.nbytes
                most = max(most, alive)
            weakref.finalize(picture, gone, picture.nbytes)
            return picture

        return made

    def gone(size):
        nonlocal alive
        with lock:
            alive -= size

    monkeypatch.setattr(runs, "to_square", counted(runs.to_square))
    monkeypatch.setattr(reader.torch, "stack", counted(torch.stack))
    model = make_model()
    monkeypatch.setattr(VideoMemory, "append", lambda memory, frames: time.sleep(1))
    path = write_clip(tmp_path / "film.mp4", range(384), Fraction(1), options={"g": "10"})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(VideoError, match="no frame"):  # nothing was appended
            model.watch(path, progress=False)
        planned = plan("tiny", 1, config=model.config).host["frames"]
    finally:
        torch.set_num_threads(before)
    assert most == pytest.approx(planned, rel=0.1)
