# SPDX-License-Identifier: Apache-2.0
"""A plan against what is then measured: files, the pool, and everything that torch allocates for a question."""

import json

import pytest
import torch
from tiny_model import make_model
from torch.profiler import ProfilerActivity, profile

from hourllava.errors import InputError, ModelError
from hourllava.memory import MemoryPool, Repository
from hourllava.model import FrameWriter, tiny_config
from hourllava.model.planning import longest_in, plan
from hourllava.model.released import released_config


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

    def size(pattern):
        return sum(path.stat().st_size for path in (tmp_path / "film").glob(pattern))

    assert size("features-*") == pytest.approx(planned.disk["features"], rel=0.1)
    assert size("blocks.*") == pytest.approx(planned.disk["pages"], rel=0.1)
    assert size("tokens.*") == pytest.approx(planned.disk["tokens"], rel=0.1)
    assert sum(p.nbytes for p in model.parameters()) == planned.device["weights"]
    pool = MemoryPool(repository, writer, planned.device["pages"])
    with pool.use("film") as held:
        assert pool.usage()[0].used == planned.device["pages"]
        question = allocated_at_most(lambda: model.ask(held, "Which colour was the star?"), tmp_path / "trace.json")
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
