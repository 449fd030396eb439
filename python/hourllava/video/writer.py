# SPDX-License-Identifier: Apache-2.0
"""Write frames to an H.264 file that any player opens."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from hourllava.errors import VideoError

SECONDS_PER_KEYFRAME = 10  # at most this much is lost around a damaged place
CRF = "18"  # visually lossless: small coloured shapes keep their colour through the 4:2:0 chroma


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: int | Fraction,
    size: int | tuple[int, int],
) -> int:
    """Encode frames as H.264 (yuv420p, index at the front of the file) and return how many were written.

    The file appears under its name only when it is complete, so an interrupted run leaves nothing that looks finished.

    Args:
        path: the MP4 file to write; an existing file is replaced.
        frames: uint8 RGB arrays (height, width, 3), consumed one at a time.
        fps: frames per second, exact (30000/1001 is ``Fraction(30000, 1001)``).
        size: the side of a square picture, or (height, width); both even.

    Raises:
        VideoError: a frame has another shape or dtype, an odd side, there is no frame, or the folder is not writable.
    """
    path = Path(path)
    height, width = (size, size) if isinstance(size, int) else size
    if height % 2 or width % 2:
        raise VideoError(path, f"H.264 in yuv420p needs even sides, got {height}x{width}", "choose even sides")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        count = _encode(partial, path, frames, Fraction(fps), (height, width))
        os.replace(partial, path)
    except (OSError, av.FFmpegError) as error:
        reason = error.strerror or type(error).__name__
        raise VideoError(path, f"cannot be written ({reason})", "check the folder and the free space") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _encode(partial: Path, path: Path, frames: Iterable[np.ndarray], fps: Fraction, shape: tuple[int, int]) -> int:
    """Encode into ``partial``; ``path`` is the name that errors show."""
    count = 0
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        stream.gop_size = max(1, round(SECONDS_PER_KEYFRAME * fps))
        stream.options = {"preset": "veryfast", "crf": CRF}
        for array in frames:
            if array.dtype != np.uint8 or array.shape != (*shape, 3):
                got = f"{array.dtype} {tuple(array.shape)}"
                raise VideoError(path, f"frame {count} is {got}, not uint8 {(*shape, 3)}", "pass uint8 RGB frames")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = count, 1 / fps
            container.mux(stream.encode(frame))
            count += 1
        if count:
            container.mux(stream.encode(None))
    if not count:
        raise VideoError(path, "there is no frame to write", "pass at least one frame")
    return count


def repeat_video(path: str | os.PathLike[str], target: str | os.PathLike[str], times: int) -> None:
    """Write the packets of an MP4 file that begins with a key picture again and again, end to end; none is encoded."""
    with av.open(os.fspath(target), "w", options={"movflags": "+faststart"}) as container:
        stream = None
        for number in range(times):
            with av.open(os.fspath(path)) as source:
                video = source.streams.video[0]
                stream = stream or container.add_stream_from_template(video)
                later = number * (video.duration or 0)
                for packet in source.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                    container.mux(packet)
