# SPDX-License-Identifier: Apache-2.0
"""Read a video at one picture per second, in chunks, with memory that does not grow with its length."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from hourllava.errors import VideoError
from hourllava.video.clock import clock
from hourllava.video.h264 import reference_test
from hourllava.video.plan import GONE, Plan, demux, is_shown, make_plan, open_container, packet_time
from hourllava.video.resize import resize_frames

# With these a packet is one picture of the same time, so one that does not come out is lost even if the decoder is
# silent. Elsewhere (packed or hidden pictures) only a reported error makes it so. AVI holds no presentation times.
ONE_TO_ONE = {"h264", "hevc", "av1", "vp9"}


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive seconds of a video."""

    frames: Tensor  # (n, 3, size, size) uint8 RGB
    seconds: Tensor  # (n,) float64, from the first picture


@dataclass(frozen=True)
class ReadReport:
    """What could be read of a video."""

    frames: int  # pictures given out, one per second
    seconds_expected: float  # by the file's header
    seconds_read: float  # covered by pictures that were really decoded
    damaged: int  # seconds that show the last good picture because their own is damaged
    message: str | None  # one line if anything was lost


def open_video(path: str | os.PathLike[str]) -> "VideoReader":
    """Open a video and plan which picture stands for each second.

    Raises:
        VideoError: the path is no readable video; the one line says why and what to do.
    """
    return VideoReader(path)


class VideoReader:
    """One picture per second of a video file: for second k, the last with timestamp <= start + k.

    This is exact for constant and variable frame rates, edit lists and start offsets. A damaged or cut file gives what
    can be read: from an error to the next key picture the last good picture stays on screen, so that time stays right,
    and :attr:`report` counts those seconds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._plan: Plan = make_plan(path)
        self._convert = VideoReformatter()  # one for all pictures: setting it up takes longer than a picture
        self._given = self._damaged = 0
        self._can_miss = False  # a picture that does not come out is a lost one

    @property
    def duration(self) -> float:
        """Seconds of video that the file holds."""
        return self._plan.seconds

    @property
    def frames_expected(self) -> int:
        """How many pictures :meth:`chunks` gives in all."""
        return len(self._plan.targets)

    @property
    def report(self) -> ReadReport:
        """What was read so far; complete after :meth:`chunks` has been exhausted."""
        plan = self._plan
        read = max(0.0, min(plan.seconds, float(self._given)) - self._damaged)
        return ReadReport(self._given, plan.seconds_expected, read, self._damaged, self._message())

    def chunks(self, size: int, chunk: int = 32) -> Iterator[FrameChunk]:
        """Decode from the start and yield up to ``chunk`` seconds at a time; only the last chunk may be shorter.

        Args:
            size: side of the square pictures.
            chunk: seconds per chunk.

        Raises:
            VideoError: not one picture could be decoded, or the file is gone.
        """
        self._given = self._damaged = 0
        frames: list[Tensor] = []
        for picture in self._each_second(size):
            frames.append(picture)
            self._given += 1
            if len(frames) == chunk or self._given == self.frames_expected:
                yield FrameChunk(torch.stack(frames), self._given - len(frames) + torch.arange(len(frames)).double())
                frames = []

    def _each_second(self, size: int) -> Iterator[Tensor]:
        """Yield (3, size, size) uint8 for every second, repeating the picture that stays on screen."""
        targets, chosen = self._plan.targets, self._plan.chosen
        shown: VideoFrame | None = None
        k = 0
        for frame in self._pictures():
            shown = shown or frame  # the first sound picture stands in for damaged ones before it
            until = int(np.searchsorted(targets, frame.pts or 0))  # these seconds end before `frame` comes on screen
            yield from self._repeat(shown, size, chosen[k:until])
            k = max(k, until)
            shown = frame
        if shown is None:
            raise VideoError(self.path, "not one picture could be decoded", "check that it plays, or convert it to MP4")
        yield from self._repeat(shown, size, chosen[k:])

    def _repeat(self, shown: VideoFrame, size: int, chosen: np.ndarray) -> Iterator[Tensor]:
        """Give ``shown`` for each of these seconds; where another was chosen, that one was lost to damage."""
        if not len(chosen):
            return
        square = _to_square(shown, size, self._convert)
        for time in chosen.tolist():
            self._damaged += time == GONE or (self._can_miss and time != shown.pts)
            yield square

    def _pictures(self) -> Iterator[VideoFrame]:
        """Decode, leaving out what nobody needs, and yield pictures in order of presentation."""
        nothing = True
        for frame in self._decode(strict=True):
            nothing = False
            yield frame
        if nothing:
            # Where even the first key picture breaks the rules, that is this encoder's habit and not damage.
            yield from self._decode(strict=False)

    def _decode(self, strict: bool) -> Iterator[VideoFrame]:
        """Yield decoded pictures; ``strict`` leaves out all from an error to the next key picture."""
        wanted = set(self._plan.chosen.tolist())
        container, stream = open_container(self.path)
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}  # else H.264 hides damage behind invented pictures
        codec = stream.codec_context.name
        is_reference = reference_test(codec, stream.codec_context.extradata)
        self._can_miss = codec in ONE_TO_ONE and container.format.name != "avi"
        skipping = strict
        with container:
            for packet in demux(container, stream):
                after_hole = packet_time(packet) in self._plan.resumed and not packet.is_keyframe
                broken = packet.is_corrupt or after_hole
                skipping = skipping and not (packet.is_keyframe and not broken)
                if packet.size and (skipping or _is_unneeded(packet, wanted, is_reference)):
                    continue
                frames, sound = _decode_packet(packet, broken, strict)
                self._can_miss |= not sound  # before the pictures that come out, which may follow the broken one
                skipping = strict and not sound
                yield from frames

    def _message(self) -> str | None:
        plan, lost = self._plan, []
        if plan.seconds_expected > plan.seconds:
            lost.append(f"the file ends at {clock(plan.seconds)} of {clock(plan.seconds_expected)}")
        if self._damaged:
            lost.append(f"{self._damaged} s are damaged and show the last good picture before them")
        if not lost:
            return None
        total = max(1, round(plan.seconds_expected - plan.seconds + self._damaged))
        return (
            f"{self.path}: {total} of {plan.seconds_expected:.0f} seconds are lost, {' and '.join(lost)}; "
            "get an intact copy to use all of it"
        )


def _is_unneeded(packet: Packet, wanted: set[int], is_reference: Callable[[memoryview], bool] | None) -> bool:
    """True for a picture that is neither wanted nor used to decode another."""
    if is_reference is None or not is_shown(packet) or packet_time(packet) in wanted:
        return False
    return not is_reference(memoryview(packet))


def _decode_packet(packet: Packet, broken: bool, strict: bool) -> tuple[list[VideoFrame], bool]:
    """Return the pictures that come out, and whether packet and pictures are sound.

    If ``strict``, a packet that is ``broken`` or cannot be decoded only makes the sound pictures still waiting for
    their turn come out, and the decoder forgets the rest.
    """
    context = packet.stream.codec_context
    try:
        frames, sound = [] if broken and strict else packet.decode(), not broken
    except av.FFmpegError:
        frames, sound = [], False
    if not strict:
        return [frame for frame in frames if _has_time(frame)], sound
    if not sound and context.is_open:
        with contextlib.suppress(av.FFmpegError):
            frames = frames + context.decode(None)
        context.flush_buffers()
    whole = [frame for frame in frames if _has_time(frame) and not frame.is_corrupt]
    return whole, sound and len(whole) == len(frames)


def _has_time(frame: VideoFrame) -> bool:
    """Give a frame without a timestamp its decoding time, as the plan does; False if it has neither."""
    if frame.pts is None:
        frame.pts = frame.dts
    return frame.pts is not None


def _to_square(frame: VideoFrame, size: int, convert: VideoReformatter) -> Tensor:
    """Convert to RGB, turn as the file's display matrix says, and resize: (3, size, size) uint8."""
    picture = torch.from_numpy(convert.reformat(frame, format="rgb24").to_ndarray())  # (H, W, 3)
    turns = round(frame.rotation / 90)  # counter-clockwise
    turned = picture.rot90(turns) if turns else picture
    return resize_frames(turned.permute(2, 0, 1)[None], size)[0]
