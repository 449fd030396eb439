# SPDX-License-Identifier: Apache-2.0
"""Second k shows the last picture with timestamp <= start + k, whatever the timestamps look like."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import SIDE, board, damage, number_on, numbers, write_clip

import hourllava.video.decoder as decoder_module
from hourllava.video import open_video, write_video

B_FRAMES = {"preset": "veryfast", "bf": "3", "g": "90"}


def on_screen(ticks: list[int], tick: Fraction, last: Fraction) -> list[int]:
    """By definition: the index of the picture on screen at each whole second after the first picture."""
    times = [time * tick for time in ticks]
    seconds = max(1, math.ceil(times[-1] + last - times[0]))
    return [max(i for i, time in enumerate(times) if time <= times[0] + k) for k in range(seconds)]


def test_constant_rate_with_b_frames(tmp_path: Path) -> None:
    ticks = list(range(30 * 20))
    clip = write_clip(tmp_path / "clip.mp4", ticks, Fraction(1, 30), options=B_FRAMES)
    reader = open_video(clip)
    assert reader.frames_expected == 20
    assert reader.duration == pytest.approx(20)
    assert (
        numbers(reader.chunks(SIDE))
        == [30 * k for k in range(20)]
        == on_screen(ticks, Fraction(1, 30), Fraction(1, 30))
    )
    assert reader.report.message is None
    assert (reader.report.frames, reader.report.damaged) == (20, 0)


def test_ntsc_rate_drifts_against_the_clock(tmp_path: Path) -> None:
    tick = Fraction(1001, 30000)
    ticks = list(range(3000))
    clip = write_clip(tmp_path / "clip.mp4", ticks, tick, options=B_FRAMES)
    found = numbers(open_video(clip).chunks(SIDE))
    assert found == on_screen(ticks, tick, tick)
    assert found[-1] != 30 * (len(found) - 1)  # an index-based reader is wrong by now


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate(tmp_path: Path, suffix: str) -> None:
    gaps = np.random.default_rng(0).choice([10, 33, 50, 400, 1500, 2300], size=120)
    ticks = [0, *np.cumsum(gaps).tolist()]
    clip = write_clip(tmp_path / f"clip.{suffix}", ticks, Fraction(1, 1000), options=B_FRAMES)
    found = numbers(open_video(clip).chunks(SIDE))
    by_definition = on_screen(ticks, Fraction(1, 1000), Fraction(1, 1000))
    assert found[: len(by_definition)] == by_definition
    assert set(found[len(by_definition) :]) <= {
        len(ticks) - 1
    }  # how long the last picture lasts is the container's guess


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_start_offset(tmp_path: Path, suffix: str) -> None:
    ticks = [time + 35 for time in range(100)]
    clip = write_clip(tmp_path / f"clip.{suffix}", ticks, Fraction(1, 10), options=B_FRAMES)
    reader = open_video(clip)
    assert numbers(reader.chunks(SIDE)) == [10 * k for k in range(10)]
    assert reader.report.message is None


def test_edit_list_hides_the_beginning(tmp_path: Path) -> None:
    ticks = list(range(120))
    whole = write_clip(tmp_path / "whole.mp4", ticks, Fraction(1, 10), options=B_FRAMES)
    trimmed = tmp_path / "trimmed.mp4"
    with av.open(str(whole)) as source, av.open(str(trimmed), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = int(Fraction(23, 10) / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    reader = open_video(trimmed)
    assert numbers(reader.chunks(SIDE)) == [23 + 10 * k for k in range(10)]
    assert reader.report.message is None


def test_slower_than_one_picture_a_second(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", [0, 2, 4, 6], Fraction(1, 1))
    assert numbers(open_video(clip).chunks(SIDE))[:7] == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx265", "mp4"),
        ("libvpx-vp9", "webm"),
        ("libsvtav1", "mp4"),
        ("mpeg4", "avi"),
        ("mpeg2video", "ts"),
        ("ffv1", "mkv"),
    ],
)
def test_other_codecs_are_decoded_whole(tmp_path: Path, codec: str, suffix: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    clip = write_clip(tmp_path / f"clip.{suffix}", list(range(250)), Fraction(1, 25), codec=codec)
    reader = open_video(clip)
    assert numbers(reader.chunks(SIDE)) == [25 * k for k in range(10)]
    assert reader.report.message is None


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", B_FRAMES), ("mpeg4", {"bf": "2"}), ("libx264", {"bf": "0"})]
)
def test_avi_tells_no_times_but_an_order(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", list(range(200)), Fraction(1, 10), codec, options)
    reader = open_video(clip)
    assert numbers(reader.chunks(SIDE)) == [10 * k for k in range(20)]
    assert reader.report.message is None


def test_damage_in_avi_keeps_the_time(tmp_path: Path) -> None:
    options = B_FRAMES | {"g": "20", "keyint_min": "20"}
    whole = write_clip(tmp_path / "whole.avi", list(range(200)), Fraction(1, 10), "libx264", options)
    with av.open(str(whole)) as container:
        key = [packet for packet in container.demux(video=0) if packet.is_keyframe][5]
    at = (key.pos + key.size / 2) / whole.stat().st_size
    reader = open_video(damage(whole, tmp_path / "spoilt.avi", size=key.size // 3, at=at))
    shown = numbers(reader.chunks(SIDE))
    lost = [k for k, number in enumerate(shown) if number != 10 * k]
    assert lost == [10, 11]
    assert reader.report.damaged == 2


def test_dropping_pictures_changes_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", list(range(300)), Fraction(1, 30), options=B_FRAMES)
    decoded = []
    decode = decoder_module.decode_packet
    monkeypatch.setattr(decoder_module, "decode_packet", lambda *a: decoded.append(a) or decode(*a))
    fast = torch.cat([chunk.frames for chunk in open_video(clip).chunks(SIDE)])
    with_drop = len(decoded)
    monkeypatch.setattr(decoder_module, "reference_test", lambda *_: None)
    full = torch.cat([chunk.frames for chunk in open_video(clip).chunks(SIDE)])
    assert len(decoded) - with_drop >= 300
    assert with_drop < 0.7 * 300
    assert torch.equal(fast, full)


def test_chunks_do_not_change_the_pictures(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", list(range(70)), Fraction(1, 5), options=B_FRAMES)
    reader = open_video(clip)
    chunks = list(reader.chunks(32, chunk=4))
    assert [len(chunk.frames) for chunk in chunks] == [4, 4, 4, 2]
    assert all(chunk.frames.dtype == torch.uint8 and chunk.frames.shape[1:] == (3, 32, 32) for chunk in chunks)
    assert torch.cat([chunk.seconds for chunk in chunks]).tolist() == list(range(14))
    assert chunks[0].seconds.dtype == torch.float64
    (whole,) = reader.chunks(32, chunk=100)  # and a reader can be read again
    assert torch.equal(whole.frames, torch.cat([chunk.frames for chunk in chunks]))
    assert reader.report.frames == 14


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_telephone_held_sideways(tmp_path: Path, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV reads rotations but cannot write them")
    clip = write_clip(tmp_path / "clip.mp4", list(range(10)), Fraction(1, 2), rotation=rotation)
    frames = torch.cat([chunk.frames for chunk in open_video(clip).chunks(SIDE)])
    turned = np.rot90(board(2), rotation // 90).copy()  # counter-clockwise, as the player turns it
    assert number_on(frames[1]) == number_on(torch.from_numpy(turned).permute(2, 0, 1))
    assert number_on(frames[1]) != 2


def test_a_single_picture_is_one_second(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    assert write_video(clip, [board(7)], 4, SIDE) == 1
    reader = open_video(clip)
    assert reader.frames_expected == 1
    assert numbers(reader.chunks(SIDE)) == [7]
    assert reader.report.message is None


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "12:30 film%20#1.mp4", list(range(4)), Fraction(1, 2))
    assert numbers(open_video(clip).chunks(SIDE)) == [0, 2]
