# SPDX-License-Identifier: Apache-2.0
"""What cannot be read gives one line; what can be read in part is read, and the loss is counted."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import SIDE, board, cut, damage, numbers, write_clip, write_tone
from PIL import Image

from hourllava.errors import VideoError
from hourllava.video import open_video, write_video

SECONDS = 60
KEY_SECONDS = 5
X264 = {"preset": "veryfast", "bf": "2", "g": str(10 * KEY_SECONDS)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute at 10 pictures a second; second k shows picture 10 k."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return write_clip(path, list(range(10 * SECONDS)), Fraction(1, 10), options=X264)


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(VideoError) as caught:
        list(open_video(path).chunks(SIDE))
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert "; " in line  # what to do
    return line


def test_missing_file(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "absent.mp4")


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "empty (0 bytes)" in refusal(path)


@pytest.mark.parametrize(
    "text", ["This is a diary.\n" * 50, "#EXTM3U\n#EXTINF:5,\nclip.mp4\n", "ffconcat version 1.0\n"]
)
def test_text_named_as_video(tmp_path: Path, text: str) -> None:
    path = tmp_path / "diary.mp4"
    path.write_text(text)
    assert "not a video" in refusal(path)


@pytest.mark.parametrize("where", ["../secret.ts", "{folder}/secret.ts", "file://{folder}/secret.ts", "secret.ts"])
@pytest.mark.parametrize("suffix", ["m3u8", "ffconcat"])
def test_no_other_file_is_read(tmp_path: Path, suffix: str, where: str) -> None:
    """Whoever hands in a list of files sees none of them, wherever they lie."""
    given = tmp_path / "given"
    given.mkdir()
    for folder in (tmp_path, given):
        write_clip(folder / "secret.ts", range(5), Fraction(1))
    other, path = where.format(folder=tmp_path), given / f"list.{suffix}"
    if suffix == "m3u8":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{other}\n#EXT-X-ENDLIST\n")
    else:
        path.write_text(f"ffconcat version 1.0\nfile '{other}'\nduration 5\n")
    assert "a list of other files" in refusal(path)


def test_a_pattern_is_only_a_name(tmp_path: Path) -> None:
    for name in ("secret1.jpg", "secret2.jpg", "secret%d.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    refusal(tmp_path / "secret%d.jpg")


def test_noise_named_as_video(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(20000))
    refusal(path)


def test_a_clock_that_begins_again_is_told(tmp_path: Path) -> None:
    """Recordings that were put one behind the other: their pictures have the same times."""
    parts = [write_clip(tmp_path / f"{k}.ts", range(40 + 20 * k), Fraction(1)).read_bytes() for k in range(2)]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    reader = open_video(path)
    assert len(numbers(reader.chunks(SIDE))) == 60
    assert reader.report.message is not None
    assert "39 s have no time of their own, since the clock in the file jumps" in reader.report.message
    assert "convert it to MP4" in reader.report.message
    assert reader.report.seconds_expected == pytest.approx(99)


def test_pictures_after_hours_without_any_are_told(tmp_path: Path) -> None:
    ticks = [*range(30), *range(20000, 20020)]
    reader = open_video(write_clip(tmp_path / "camera.mkv", ticks, Fraction(1), "mpeg4"))
    assert numbers(reader.chunks(SIDE)) == list(range(30))
    assert reader.report.message is not None
    assert "are lost" in reader.report.message


def test_sparse_pictures_are_no_jumps(tmp_path: Path) -> None:
    ticks = np.cumsum([0, *np.random.default_rng(0).choice([1, 9, 15, 40, 600], size=40)]).tolist()
    for suffix, codec in (("mkv", "libx264"), ("mp4", "libx264"), ("ts", "libx264"), ("mkv", "mpeg4")):
        reader = open_video(write_clip(tmp_path / f"slides.{suffix}", ticks, Fraction(1), codec))
        found = numbers(reader.chunks(SIDE))
        assert [found[tick] for tick in ticks] == list(range(len(ticks)))
        assert reader.report.message is None


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = SIDE
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=8000)
        picture = av.VideoFrame.from_ndarray(board(1), format="rgb24").reformat(format="yuvj420p")
        picture.pts = 0
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        for stream, frame in ((cover, picture), (sound, silence)):
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
    assert "holds no video, only audio, cover art" in refusal(path)


def test_a_quicktime_file_without_its_index(tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "whole.mov", range(50), Fraction(1)), tmp_path / "cut.mov", 0.7)
    assert "it may have been cut off" in refusal(path)


def test_sound_only(tmp_path: Path) -> None:
    assert "holds no video, only audio" in refusal(write_tone(tmp_path / "song.mp4"))


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.mp4"
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)


def test_no_permission(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # as root, chmod would not keep us out
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(clip)


def test_index_missing(clip: Path, tmp_path: Path) -> None:
    """A recording that was cut off before its index was written at the end."""
    data = clip.read_bytes()
    moov = data.index(b"moov") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    path = tmp_path / "unfinished.mp4"
    path.write_bytes(data[:moov] + data[moov + size :])
    assert "its index (moov) is missing" in refusal(path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_end_cut_off(tmp_path: Path, suffix: str) -> None:
    whole = write_clip(tmp_path / f"whole.{suffix}", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    reader = open_video(cut(whole, tmp_path / f"cut.{suffix}", 0.6))
    found = numbers(reader.chunks(SIDE))
    assert 0.4 * SECONDS < len(found) == reader.frames_expected < 0.8 * SECONDS
    assert found[:-1] == [10 * k for k in range(len(found) - 1)]
    report = reader.report
    assert report.seconds_expected == pytest.approx(SECONDS, abs=0.2)
    assert len(found) - 2 <= report.seconds_read <= len(found)
    assert report.message is not None
    assert "of 01:00" in report.message
    lost = round(report.seconds_expected - report.seconds_read)
    assert f"{lost} of 60 seconds are lost" in report.message


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_damaged_middle(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Time stays right: a second shows its own picture, or the last good one before it, and those are counted."""
    whole = write_clip(tmp_path / f"whole.{suffix}", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    reader = open_video(damage(whole, tmp_path / f"damaged.{suffix}", whole.stat().st_size // 6))
    found = numbers(reader.chunks(SIDE))
    assert len(found) == SECONDS
    wrong = [k for k, number in enumerate(found) if number != 10 * k]
    assert 0 < len(wrong) <= SECONDS // 6 + 2 * KEY_SECONDS
    assert all(number <= 10 * k for k, number in enumerate(found))
    report = reader.report
    assert report.damaged == len(wrong)
    assert report.seconds_read == pytest.approx(SECONDS - len(wrong))
    assert report.message is not None
    assert f"{len(wrong)} of 60 seconds are lost" in report.message
    assert capfd.readouterr().err == ""  # FFmpeg keeps quiet


def test_damaged_beginning(clip: Path, tmp_path: Path) -> None:
    """The first sound picture stands in for those before it."""
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 300] = bytes(300)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    reader = open_video(path)
    found = numbers(reader.chunks(SIDE))
    assert found == [10 * max(k, KEY_SECONDS) for k in range(SECONDS)]
    assert reader.report.damaged == KEY_SECONDS


def test_damaged_timestamp(tmp_path: Path) -> None:
    """One picture that claims to come a year later does not make the video a year long."""
    path = write_clip(tmp_path / "clip.mkv", [*range(0, 5000, 100), 365 * 86400 * 1000], Fraction(1, 1000))
    reader = open_video(path)
    assert numbers(reader.chunks(SIDE)) == [0, 10, 20, 30, 40]


def test_nothing_left_to_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, [board(5)], 4, SIDE)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    assert "not one picture could be decoded" in refusal(path)


@pytest.mark.parametrize(
    ("frames", "side", "why"),
    [
        ([], SIDE, "no frame"),
        ([np.zeros((SIDE, SIDE, 3), np.float32)], SIDE, "float32"),
        ([board(0), board(0, 32)], SIDE, "frame 1"),
        ([np.zeros((63, 63, 3), np.uint8)], 63, "even"),
    ],
)
def test_writer_refuses(tmp_path: Path, frames: list[np.ndarray], side: int, why: str) -> None:
    with pytest.raises(VideoError, match=why):
        write_video(tmp_path / "clip.mp4", frames, 4, side)
    assert list(tmp_path.iterdir()) == []  # nothing that looks finished


def test_writer_keeps_the_old_file_when_interrupted(tmp_path: Path) -> None:
    def interrupted():
        yield board(2)
        raise KeyboardInterrupt

    path = tmp_path / "clip.mp4"
    write_video(path, [board(1)], 4, SIDE)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, interrupted(), 4, SIDE)
    assert numbers(open_video(path).chunks(SIDE)) == [1]
    with pytest.raises(VideoError, match="cannot be written"):
        write_video(tmp_path / "absent" / "clip.mp4", [board(1)], 4, SIDE)
