# SPDX-License-Identifier: Apache-2.0
"""Rates of a machine: their arithmetic, and that layers which are timed alone count as those that are run."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from clips import write_clip
from tiny_model import make_model

from hourllava.errors import VideoError
from hourllava.model import calibration, tiny_config
from hourllava.model.calibration import Rates
from hourllava.model.planning import plan

RATES = Rates(decode=2.0, encode=3.0, write=5.0, row=7.0, page=11.0, score=13.0, least=17.0, rows=1024)


def test_times_of_a_video_and_a_question():
    config = tiny_config()
    planned = plan("tiny", 1, config=config)
    assert planned.pages_read == planned.pages == 1829
    rows, blocks = planned.queries, config.memaug_depth
    times = RATES.times(config, planned)
    assert times == {
        "decode": 2.0 * 3600,
        "encode": 3.0 * 3600,
        "write": 5.0 * 3600,
        "question": 17.0 + rows * (7.0 + blocks * 1829 * 11.0),
    }
    part = RATES.times(config, replace(planned, pages_read=229))
    assert part["question"] == 17.0 + rows * (7.0 + blocks * (229 * 11.0 + 1829 * 13.0))


def test_rows_beyond_those_measured_look_at_each_other():
    config = tiny_config()
    long = replace(plan("tiny", 1, config=config), queries=1024 + 256)
    at_once = replace(RATES, rows=1024 + 256)
    more = RATES.times(config, long)["question"] - at_once.times(config, long)["question"]
    pages = config.memaug_depth * 2 + config.text_config.num_hidden_layers * 2 / 2
    assert more == pytest.approx((1024 + 256) * pages * 11.0)


def test_a_tower_too_large_to_be_run_is_timed_by_the_layer(monkeypatch):
    monkeypatch.setattr(calibration, "CLIP_SECONDS", 2)
    monkeypatch.setattr(calibration, "WATCHES", 1)
    monkeypatch.setattr(calibration, "SEGMENT", 1)
    monkeypatch.setattr(calibration, "FLOP", 1.0)  # none is run beside the decoder, then
    monkeypatch.setattr(calibration, "_layer_time", lambda config: 1000.0)
    config = make_model().config
    config.vision_config.num_hidden_layers = 100
    rates = calibration.measure(config, torch.float32, 100)
    assert 100 * 1000 < rates.encode < 101 * 1000
    assert rates.rows == 100
    assert min(rates.decode, rates.write, rates.least) > 0
    assert torch.get_default_dtype() == torch.float32


def test_a_video_like_those_to_come(tmp_path, monkeypatch):
    """Its own pictures are decoded, no more of them than a clip has, or all there are; what is none is told."""
    seen = []

    class Seen(calibration._Writer):
        def encode(self, frames):
            seen.append(frames)
            return super().encode(frames)

    monkeypatch.setattr(calibration, "_Writer", Seen)
    monkeypatch.setattr(calibration, "SEGMENT", 1)
    monkeypatch.setattr(calibration, "WATCHES", 1)
    for seconds, watched in ((230, 192), (150, 64), (3, 3)):
        path = tmp_path / f"{seconds}.mp4"
        write_clip(path, range(seconds), Fraction(1))
        seen.clear()
        rates = calibration.measure(make_model().config, torch.float32, 100, str(path))
        filled = sum(int((frames.amax((1, 2, 3)) > 127).sum()) for frames in seen)
        assert filled == 2 * (watched - 1)  # picture 0 is black, as what fills a batch up
        assert rates.decode > 0
    with pytest.raises(VideoError):
        calibration.measure(make_model().config, torch.float32, 100, str(tmp_path / "none.mp4"))


@pytest.mark.parametrize(("budget", "read"), [("all", 1829), ("1/8", 229), ("100p", 100), ("60s", 31), ("5000p", 1829)])
def test_pages_that_a_question_reads(budget, read):
    assert plan("tiny", 1, config=tiny_config(memory_budget=budget)).pages_read == read
