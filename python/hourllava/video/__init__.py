# SPDX-License-Identifier: Apache-2.0
"""Video files in, one frame per second and bounded memory; and out, for rendered films."""

from hourllava.video.clock import clock, seconds_of_clock
from hourllava.video.frame_folder import FrameFolder
from hourllava.video.live import LiveReader, is_url, without_secrets
from hourllava.video.opening import DecoderChoice, choose_decoder, open_video
from hourllava.video.reader import FrameChunk, ReadReport, VideoReader
from hourllava.video.resize import resize_frames
from hourllava.video.stills import stills
from hourllava.video.writer import repeat_video, write_video

__all__ = [
    "DecoderChoice",
    "FrameChunk",
    "FrameFolder",
    "LiveReader",
    "ReadReport",
    "VideoReader",
    "choose_decoder",
    "clock",
    "is_url",
    "open_video",
    "repeat_video",
    "resize_frames",
    "seconds_of_clock",
    "stills",
    "without_secrets",
    "write_video",
]
