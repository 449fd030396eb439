# SPDX-License-Identifier: Apache-2.0
"""A folder of frames is a video: the last frame at or before each second, in the order of names."""

from pathlib import Path

import pytest
import torch
from clips import SIDE
from PIL import Image

from hourllava.errors import VideoError
from hourllava.video import FrameFolder


def write_frames(folder: Path, count: int) -> Path:
    """Frames of one grey level each, 4 for each number; the last is written first."""
    folder.mkdir(parents=True)
    for number in reversed(range(count)):
        Image.new("RGB", (40, 30), (4 * number,) * 3).save(folder / f"frame_{number:03}.png")
    return folder


def numbers(reader: FrameFolder, chunk: int) -> list[int]:
    chunks = list(reader.chunks(SIDE, chunk))
    assert all(one.frames.shape == (len(one.frames), 3, SIDE, SIDE) for one in chunks)
    assert all(len(one.frames) == chunk for one in chunks[:-1])
    assert torch.cat([one.seconds for one in chunks]).tolist() == list(range(reader.frames_expected))
    frames = torch.cat([one.frames for one in chunks])
    assert frames.dtype == torch.uint8
    assert (frames == frames[:, :1, :1, :1]).all()
    return [round(int(frame[0, 0, 0]) / 4) for frame in frames]


@pytest.mark.parametrize(
    ("fps", "given", "seconds"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6], 7),
        (2, [0, 2, 4, 6], 3.5),
        (2.5, [0, 2, 5], 2.8),
        (0.5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], 14),
        (30, [0], 7 / 30),
        (1e9, [0], 7e-9),
    ],
)
@pytest.mark.parametrize("chunk", [3, 32])
def test_a_picture_a_second(fps: float, given: list[int], seconds: float, chunk: int, tmp_path: Path) -> None:
    reader = FrameFolder(write_frames(tmp_path / "walk", 7), fps)
    (tmp_path / "walk/frame_002.txt").write_text("a caption")
    for _ in range(2):  # reading it again starts again
        assert numbers(reader, chunk) == given
    assert reader.duration == pytest.approx(seconds)
    assert reader.report.frames == len(given)
    assert reader.report.message is None


def test_floating_point_moves_no_frame(tmp_path: Path) -> None:
    """100 x 0.29 is a little less than 29 there, and 3 / 0.3 may be a little more than 10."""
    folder = write_frames(tmp_path / "walk", 30)
    assert numbers(FrameFolder(folder, 0.29), 32)[100] == 29
    for count in range(1, 31):
        for fps in (0.1, 0.3, 0.7, 1.1, 2.9):
            reader = FrameFolder(folder, fps)
            reader._files = reader._files[:count]
            last = int(round((reader.frames_expected - 1) * fps, 6))
            assert last < count <= round(reader.frames_expected * fps, 6), (count, fps)


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"is a directory and holds no pictures; name a video file, or a folder of"):
        FrameFolder(tmp_path)
    folder = write_frames(tmp_path / "walk", 3)
    (folder / "frame_001.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"frame_001\.png: it is no picture that can be read") as caught:
        list(FrameFolder(folder).chunks(SIDE))
    assert "\n" not in str(caught.value)
    assert len(list(FrameFolder(folder, 2).chunks(SIDE))) == 1  # which does not need that frame
    (tmp_path / "file").write_text("")
    with pytest.raises(VideoError, match="it cannot be read"):
        FrameFolder(tmp_path / "file")
