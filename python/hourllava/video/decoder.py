# SPDX-License-Identifier: Apache-2.0
"""Decode a stretch of a video, leaving out what nobody needs and what damage has spoilt."""

import contextlib
import heapq
import os
from collections.abc import Iterator

import av
from av.packet import Packet
from av.video.frame import VideoFrame

from hourllava.video.h264 import reference_test
from hourllava.video.plan import Plan, codec_of, demux, is_shown, open_container, packet_time

# With these a packet is one picture of the same time, so one that does not come out is lost even if the decoder is
# silent. Elsewhere (packed or hidden pictures) only a reported error makes it so.
ONE_TO_ONE = {"h264", "hevc", "av1", "vp9"}
# AVI holds no presentation times. FFmpeg finds those of older codecs; of these it gives the packets' order instead.
UNTIMED_IN_AVI = {"h264", "hevc"}
MOST_WAITING = 16  # pictures that such a decoder holds back until their turn


class Decoder:
    """Pictures of one file, in order of presentation, from any of the plan's cuts on.

    Args:
        path: the video file.
        plan: which pictures are wanted.
        strict: leave out all from an error to the next key picture; else take what the decoder makes of it.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan, strict: bool) -> None:
        self.path, self.plan, self.strict = path, plan, strict
        self._wanted = set(plan.chosen.tolist())
        self._open()
        avi, codec = self._container.format.name == "avi", codec_of(self._stream)
        self._untimed = avi and codec in UNTIMED_IN_AVI
        self._waiting: list[int] = []  # a heap of times of packets whose pictures have not come out
        self.can_miss = codec in ONE_TO_ONE and not avi
        """Whether a picture that did not come out so far is a lost one."""

    def _open(self) -> None:
        self._container, self._stream = open_container(self.path)
        self._codec = self._stream.codec_context
        if self.strict:
            self._codec.options = {"err_detect": "explode"}  # else H.264 hides damage behind invented pictures
        self._is_reference = reference_test(codec_of(self._stream), self._codec.extradata)

    def close(self) -> None:
        self._container.close()

    def pictures(self, begin: int | None = None, end: int | None = None) -> Iterator[VideoFrame]:
        """Decode from the cut ``begin`` (None: from the start of the file) up to the cut ``end`` (None: all)."""
        skipping = self.strict
        for packet in self.packets(begin, end):
            after_hole = packet_time(packet) in self.plan.resumed and not packet.is_keyframe
            broken = packet.is_corrupt or after_hole
            skipping = skipping and not (packet.is_keyframe and not broken)
            if packet.size and (skipping or not self.needs(packet)):
                continue
            frames, sound = decode_packet(packet, broken, self.strict)
            if self._untimed:
                self._give_times(packet, frames, sound)
            self.can_miss |= not sound  # before the pictures that come out, which may follow the broken one
            skipping = self.strict and not sound
            yield from frames
        if end is not None:
            yield from drain(self._codec)

    def _give_times(self, packet: Packet, frames: list[VideoFrame], sound: bool) -> None:
        """The packets' times, to pictures that come out in their order of presentation."""
        if (time := packet_time(packet)) is not None and packet.size:
            heapq.heappush(self._waiting, time)
        for frame in frames:
            if self._waiting:
                frame.pts = heapq.heappop(self._waiting)
        if not sound:
            self._waiting.clear()
        while len(self._waiting) > MOST_WAITING:  # a picture was lost in silence
            heapq.heappop(self._waiting)

    def needs(self, packet: Packet) -> bool:
        """False for a picture that is neither wanted nor used to decode another."""
        if self._is_reference is None or not is_shown(packet) or packet_time(packet) in self._wanted:
            return True
        return self._is_reference(memoryview(packet))

    def packets(self, begin: int | None, end: int | None) -> Iterator[Packet]:
        """Every packet from the cut ``begin`` up to the cut ``end``, in the order of decoding; see :meth:`pictures`."""
        packets = demux(self._container, self._stream)
        if begin is not None:
            self._container.seek(begin, stream=self._stream)
            first = next(packets, None)
            while first is not None and (time := packet_time(first)) != begin:
                if time is not None and first.is_keyframe and time > begin:
                    # The file's index points too far; its packets are all there when read from the start.
                    self.close()
                    self._open()
                    packets = demux(self._container, self._stream)
                first = next(packets, None)
            if first is None:
                return
            yield first
        for packet in packets:
            if end is not None and packet.is_keyframe and packet_time(packet) == end:
                return
            yield packet


def decode_packet(packet: Packet, broken: bool, strict: bool) -> tuple[list[VideoFrame], bool]:
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
        frames = frames + drain(context)
        context.flush_buffers()
    whole = [frame for frame in frames if _has_time(frame) and not frame.is_corrupt]
    return whole, sound and len(whole) == len(frames)


def drain(context: av.VideoCodecContext) -> list[VideoFrame]:
    """The pictures that still wait for their turn."""
    with contextlib.suppress(av.FFmpegError):
        return [frame for frame in context.decode(None) if _has_time(frame) and not frame.is_corrupt]
    return []


def _has_time(frame: VideoFrame) -> bool:
    """Give a frame without a timestamp its decoding time, as the plan does; False if it has neither."""
    if frame.pts is None:
        frame.pts = frame.dts
    return frame.pts is not None
