# SPDX-License-Identifier: Apache-2.0
"""DALI gives the pictures that PyAV gives: of VP9 on the CPU, and of more where there is a GPU."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import SIDE, cut, damage, number_on, numbers, write_clip
from tiny_model import make_model

import hourllava.video.dali as dali_module
import hourllava.video.opening as opening_module
from hourllava.errors import HourLlavaError, VideoError
from hourllava.video import VideoReader, choose_decoder, open_video
from hourllava.video.dali import DaliReader, stretches
from hourllava.video.plan import make_plan
from hourllava.video.resize import resize_frames

needs_dali = pytest.mark.skipif(
    not dali_module.has_dali(), reason=f"NO DALI: its decoder is NOT TESTED; {dali_module.INSTALL}"
)
X264 = {"preset": "veryfast", "bf": "3", "g": "30"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "30"}
CODECS = {"libvpx-vp9": VP9, "libx264": X264, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
# What DALI decodes here: the codec that it knows on the CPU, and with a GPU those of its video engine.
CASES = [("cpu", "libvpx-vp9")] + [("cuda", codec) for codec in CODECS] * torch.cuda.is_available()
GAPS = [10, 33, 50, 400, 1500, 2300]


def dali(path: Path, device: str = "cpu") -> DaliReader:
    reader = open_video(path, "dali", device)
    assert isinstance(reader, DaliReader)
    return reader


def clip_of(path: Path, ticks: list[int], tick: Fraction, codec: str, rotation: int = 0) -> Path:
    """A clip of numbers; where there is a GPU as large as its video engine wants it."""
    return write_clip(path, ticks, tick, codec, CODECS.get(codec), rotation, 160 if torch.cuda.is_available() else SIDE)


def frames_of(reader: VideoReader, size: int = SIDE) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in reader.chunks(size)]).cpu()


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", ["constant", "NTSC", "variable", "slow", "offset"])
def test_the_pictures_are_pyav_s(tmp_path: Path, rate: str, suffix: str, device: str, codec: str) -> None:
    gaps = np.random.default_rng(0).choice(GAPS, size=60)
    ticks, tick = {
        "constant": (list(range(200)), Fraction(1, 20)),
        "NTSC": (list(range(400)), Fraction(1001, 30000)),
        "variable": ([0, *np.cumsum(gaps).tolist()], Fraction(1, 1000)),
        "slow": ([0, 2, 4, 6], Fraction(1)),
        "offset": ([time + 35 for time in range(80)], Fraction(1, 10)),
    }[rate]
    clip = clip_of(tmp_path / f"clip.{suffix}", ticks, tick, codec)
    reader, expected = dali(clip, device), open_video(clip)
    assert numbers(reader.chunks(SIDE)) == numbers(expected.chunks(SIDE))
    assert reader.report == expected.report
    assert reader.duration == expected.duration


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
def test_chunks_do_not_change_the_pictures(tmp_path: Path, device: str, codec: str) -> None:
    clip = clip_of(tmp_path / "clip.mkv", list(range(70)), Fraction(1, 5), codec)
    reader = dali(clip, device)
    chunks = list(reader.chunks(32, chunk=4))
    assert [len(chunk.frames) for chunk in chunks] == [4, 4, 4, 2]
    assert all(chunk.frames.dtype == torch.uint8 and chunk.frames.shape[1:] == (3, 32, 32) for chunk in chunks)
    assert all(chunk.frames.device.type == device for chunk in chunks)
    assert torch.cat([chunk.seconds for chunk in chunks]).tolist() == list(range(14))
    assert reader.report.frames == 14
    (whole,) = reader.chunks(32, chunk=100)  # and a reader can be read again
    assert torch.equal(whole.frames, torch.cat([chunk.frames for chunk in chunks]))


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
def test_stretches_and_calls_change_no_pixel(
    tmp_path: Path, device: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(tmp_path / "clip.mkv", list(range(200)), Fraction(1, 10), codec)
    whole = frames_of(dali(clip, device))
    assert len(list(stretches(clip, make_plan(clip), 64))) == 1
    monkeypatch.setattr(dali_module, "CALL_BYTES", 3 * 160 * 160)  # one picture a call, or some small ones
    assert torch.equal(frames_of(dali(clip, device)), whole)
    parts = stretches(clip, make_plan(clip), 4)
    monkeypatch.setattr(dali_module, "stretches", lambda path, plan: stretches(path, plan, 4))
    assert len(list(parts)) > 3
    assert torch.equal(frames_of(dali(clip, device)), whole)


def scene(number: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: ramps of each colour, edges, and a little noise, moving on with the number."""
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x * 1.5 + number, 255 - y * 1.6, 255 - (x + y) * 0.8], -1)
    ramps[(x // 16 + y // 16 + number) % 2 == 0] *= 0.6
    noise = np.random.default_rng(number).normal(0, 6, ramps.shape)
    return (ramps + noise).clip(0, 255).astype(np.uint8)


def write_scene(path: Path, codec: str, matrix: int = 2, full_range: bool = False, shape: tuple = (160, 160)) -> Path:
    """Twelve pictures, one a second, that say by which matrix and range their colours were made."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1)
        (stream.height, stream.width), stream.pix_fmt, stream.options = shape, "yuv420p", CODECS[codec]
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full_range
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(scene(number, *shape), format="rgb24").reformat(format="yuv420p")
            frame.colorspace, frame.color_range = matrix, 1 + full_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def by_the_book(path: Path) -> torch.Tensor:
    """RGB (n, 3, H, W) float of all pictures of H.273's matrix, their chroma brought to full size linearly."""
    pictures = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            red, blue = {1: (0.2126, 0.0722)}.get(frame.colorspace, (0.299, 0.114))
            full, height, width = frame.color_range == 2, frame.height, frame.width
            planes = torch.from_numpy(frame.to_ndarray()).float().flatten().split([height * width, height * width // 2])
            luma, chroma = planes[0].view(height, width), planes[1].view(1, 2, height // 2, width // 2) - 128
            blueness, redness = torch.nn.functional.interpolate(chroma, scale_factor=2, mode="bilinear")[0]
            light = luma if full else (luma - 16) * 255 / 219
            step = 1 if full else 255 / 224
            r, b = light + (2 - 2 * red) * step * redness, light + (2 - 2 * blue) * step * blueness
            g = (light - red * r - blue * b) / (1 - red - blue)
            pictures.append(torch.stack([r, g, b]).clamp(0, 255))
    return torch.stack(pictures)


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("matrix", "most", "mean"), [(2, 0.6, 0.3), (6, 0.6, 0.3), (1, 12, 0.4)])
def test_colours(
    tmp_path: Path, matrix: int, most: float, mean: float, full_range: bool, device: str, codec: str
) -> None:
    """Rounded once for BT.601, which DALI knows; twice for BT.709, where what one matrix clips stays lost."""
    clip = write_scene(tmp_path / "clip.mp4", codec, matrix, full_range)
    book = by_the_book(clip)
    found, other = frames_of(dali(clip, device), 160).float(), frames_of(open_video(clip), 160).float()
    error = (found - book).abs()
    assert error.max() <= most
    assert error.mean() <= mean
    # PyAV repeats chroma instead of interpolating it, and rounds down: that lies between the two.
    assert (found - other).abs().mean() < 2


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
@pytest.mark.parametrize("size", [48, 224])
def test_resize_is_ours(tmp_path: Path, size: int, device: str, codec: str) -> None:
    clip = write_scene(tmp_path / "clip.mp4", codec)
    ours = resize_frames(frames_of(dali(clip, device), 160), size)
    difference = (frames_of(dali(clip, device), size).int() - ours.int()).abs()
    assert difference.max() <= 4
    assert difference.float().mean() < 0.2


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
def test_pictures_that_are_no_square(tmp_path: Path, device: str, codec: str) -> None:
    clip = write_scene(tmp_path / "clip.mp4", codec, shape=(144, 240))
    difference = (frames_of(dali(clip, device), 96).float() - frames_of(open_video(clip), 96).float()).abs()
    assert difference.mean() < 2


@needs_dali
@pytest.mark.parametrize(("device", "codec"), CASES)
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_telephone_held_sideways(tmp_path: Path, rotation: int, device: str, codec: str) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV reads rotations but cannot write them")
    clip = clip_of(tmp_path / "clip.mp4", list(range(10)), Fraction(1, 2), codec, rotation)
    found = numbers(dali(clip, device).chunks(SIDE))
    assert found == numbers(open_video(clip).chunks(SIDE))
    assert found != list(range(0, 10, 2))


@needs_dali
def test_watching(tmp_path: Path) -> None:
    model = make_model()
    clip = clip_of(tmp_path / "clip.mkv", list(range(40)), Fraction(1, 4), "libvpx-vp9")
    memory = model.watch(open_video(clip, "dali"), progress=False)
    frames = frames_of(dali(clip), model.config.vision_config.image_size)
    assert memory.frames == len(frames) == 10
    assert memory.damage is None
    assert torch.equal(memory.tokens, model.watch(frames, progress=False).tokens)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seconds", [2, 1000])
def test_stretches_hold_the_pictures_that_pyav_chooses(tmp_path: Path, seconds: int, codec: str) -> None:
    """What DALI is handed, whatever the codec, read back by PyAV: each place is that of the picture of its second."""
    gaps = np.random.default_rng(1).choice(GAPS, size=60)
    clip = clip_of(tmp_path / "clip.mp4", [0, *np.cumsum(gaps // 10).tolist()], Fraction(1, 100), codec)
    plan, found, sizes = make_plan(clip), [], []
    for stretch in stretches(clip, plan, seconds):
        path = tmp_path / "stretch.mkv"
        path.write_bytes(stretch.data.tobytes())
        sizes.append(stretch.data.size)
        with av.open(str(path)) as container:
            pictures = sorted(container.decode(video=0), key=lambda frame: frame.pts)
        ticks = [round(frame.pts * frame.time_base / dali_module.TICK) for frame in pictures]
        assert ticks == list(range(ticks[0], ticks[0] + len(pictures)))
        shown = [torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in pictures]
        found += [number_on(shown[place]) for place in stretch.places]
    assert found == numbers(open_video(clip).chunks(SIDE))
    assert (len(sizes) > 3) == (seconds == 2 and len(plan.cuts) > 3)


def test_pictures_that_nobody_needs_are_left_out(tmp_path: Path) -> None:
    clip = clip_of(tmp_path / "clip.mp4", list(range(300)), Fraction(1, 30), "libx264")
    (stretch,) = stretches(clip, make_plan(clip))
    path = tmp_path / "stretch.mkv"
    path.write_bytes(stretch.data.tobytes())
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) < 0.7 * 300


def test_the_choice_of_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clip_of(tmp_path / "clip.mp4", list(range(8)), Fraction(1, 4), "libx264")
    monkeypatch.setattr(opening_module, "has_dali", lambda: False)
    assert choose_decoder("cpu").name == choose_decoder("cuda").name == "pyav"
    assert dali_module.INSTALL in choose_decoder("cuda").why
    assert type(open_video(clip, device="cuda")) is VideoReader
    monkeypatch.setattr(opening_module, "has_dali", lambda: True)
    monkeypatch.setattr(dali_module, "has_dali", lambda: True)
    assert (choose_decoder("cpu").name, choose_decoder("cuda").name) == ("pyav", "dali")
    assert type(open_video(clip)) is type(open_video(clip, "pyav", "cuda")) is VideoReader
    # Its pictures are too small for a video engine: PyAV reads it, unless DALI was named.
    assert type(open_video(clip, device="cuda")) is VideoReader
    large = write_scene(tmp_path / "large.mp4", "libx264")
    assert type(open_video(large, device="cuda")) is DaliReader
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_decoder("cuda").name == "pyav"
    with pytest.raises(HourLlavaError, match=r"decoder: there is no 'ffmpeg'; choose from pyav, dali"):
        open_video(clip, "ffmpeg")


def refusal(path: Path, device: str = "cpu") -> str:
    with pytest.raises(VideoError) as error:
        open_video(path, "dali", device)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(dali_module.USE_PYAV)
    return str(error.value)


def test_what_dali_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_module, "has_dali", lambda: True)
    clip = clip_of(tmp_path / "clip.mkv", list(range(200)), Fraction(1, 10), "libvpx-vp9")
    assert "a part of it is missing" in refusal(cut(clip, tmp_path / "cut.mkv", 0.5))
    h264 = clip_of(tmp_path / "clip.mp4", list(range(8)), Fraction(1, 4), "libx264")
    assert "its codec is h264, and without a GPU DALI is given vp9 only" in refusal(h264)
    assert "64 x 64" in refusal(h264, "cuda")
    mpeg4 = write_clip(tmp_path / "clip.avi", list(range(8)), Fraction(1, 4), "mpeg4")
    assert "its codec is mpeg4, and on a GPU" in refusal(mpeg4, "cuda")
    stream = clip_of(tmp_path / "clip.ts", list(range(8)), Fraction(1, 4), "libx264")
    assert "its format is mpegts" in refusal(stream, "cuda")
    assert "by matrix 9" in refusal(write_scene(tmp_path / "wide.mp4", "libx264", 9), "cuda")
    monkeypatch.setattr(dali_module, "MOST_BYTES", 0)
    assert "only be decoded from its start" in refusal(h264, "cuda")
    monkeypatch.setattr(dali_module, "has_dali", lambda: False)
    with pytest.raises(VideoError, match=r"the decoder dali is not installed; pip install nvidia-dali-cuda130"):
        open_video(clip, "dali")


@needs_dali
def test_damage_that_only_the_decoder_sees(tmp_path: Path) -> None:
    clip = write_scene(tmp_path / "clip.mp4", "libvpx-vp9")
    spoilt = damage(clip, tmp_path / "spoilt.mp4", size=2000, at=0.5)
    with pytest.raises(VideoError, match=r"spoilt.mp4: DALI could not decode it \(.*Invalid data.*\); use the decoder"):
        list(dali(spoilt).chunks(64))
