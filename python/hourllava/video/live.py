# SPDX-License-Identifier: Apache-2.0
"""Video that is still being made: a file that grows, or a camera's stream, read once and as it comes."""

import os
import queue
import re
import stat
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

import av
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from hourllava.errors import VideoError
from hourllava.video.decoder import decode_packet, drain
from hourllava.video.plan import BROADCAST, MAX_DEMUX_ERRORS, MAX_GAP, find_stream, is_shown, packet_time
from hourllava.video.reader import FrameChunk
from hourllava.video.runs import to_square

POLL = 0.1  # seconds between looks at a file that has not grown
STOPPING = 2.0  # seconds that a stream has to end after it was told to
SECONDS_AHEAD = 64  # that may wait for the model
SECRET = re.compile(
    r"([?&](?:[^=&#]*(?:pass|pwd|secret|token|signature|api.?key)[^=&#]*|sig|auth)=)[^&#]*", re.IGNORECASE
)
SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp")


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a stream's address and no path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(source)) is not None


def without_secrets(url: str) -> str:
    """An address without the name and password in it, and without the values of what its query calls a secret."""
    return SECRET.sub(r"\1...", re.sub(r"(?<=//)[^/?#]*@", "", url, count=1))


class LiveReader:
    """One picture per second of a video that goes on, by the rule of `VideoReader`: once it has ended, the same ones.

    A second is given as soon as a picture behind it has come. From damage to the next key picture the last good picture
    stays on screen. A jump of the stream's clock backwards or over more than an hour does not count as time.

    Args:
        source: a file that grows, in a format that can be read before it is whole (fragmented MP4, MPEG-TS, Matroska);
            a pipe; or the address of a stream that PyAV's FFmpeg opens (http, https, rtsp, rtmp, tcp, udp; srt where
            it was built with libsrt).
        idle: seconds without any data after which the video counts as ended.
        stop: once it is set, the video ends with the seconds that are complete.

    Attributes:
        path: the file's absolute path, or None for a stream.
        name: what to call the source: its path, or its address without passwords and the like.
        lost: pictures that could not be decoded.
        ending: how it ended, for the end of a sentence; None until then.
        broken: whether it ended with an error, and not in silence or as told.

    Raises:
        VideoError: there is no such file, or the address is of no known kind.
    """

    def __init__(self, source: str | os.PathLike[str], idle: float = 30.0, stop: Event | None = None) -> None:
        self.name = without_secrets(os.fspath(source)) if is_url(source) else os.fspath(source)
        self.path: str | None = None
        self.lost = 0
        self.ending: str | None = None
        self.broken = False
        self._source, self._idle, self._stop = os.fspath(source), idle, stop or Event()
        if not is_url(source):
            self._check_file(Path(source))
        elif self._source.partition(":")[0] not in SCHEMES:
            raise VideoError(self.name, "such an address cannot be followed", f"give one of {', '.join(SCHEMES)}")

    @property
    def message(self) -> str | None:
        """One line if pictures were lost."""
        if not self.lost:
            return None
        return f"{self.name}: {self.lost} pictures could not be decoded, the last good ones stand in for them"

    def chunks(self, size: int, chunk: int = SECONDS_AHEAD) -> Iterator[FrameChunk]:
        """The seconds that have come since the last chunk, at least one and at most `chunk`; waits for them.

        Args:
            size: side of the square pictures.
            chunk: most seconds per chunk.

        Raises:
            VideoError: it cannot be read.
        """
        ready: queue.Queue[Tensor | Exception | None] = queue.Queue(SECONDS_AHEAD)
        gone = Event()  # nobody reads any more
        Thread(target=self._fill, args=(size, ready, gone), daemon=True).start()
        given, more = 0, True
        try:
            while more:
                pictures: list[Tensor] = []
                while len(pictures) < chunk and not (pictures and ready.empty()):
                    item = self._next(ready)
                    if isinstance(item, Exception):
                        raise item
                    if item is None:
                        more = False
                        break
                    pictures.append(item)
                if pictures:
                    seconds = given + torch.arange(len(pictures)).double()
                    given += len(pictures)
                    yield FrameChunk(torch.stack(pictures), seconds)
        finally:
            gone.set()

    def _next(self, ready: "queue.Queue[Tensor | Exception | None]") -> Tensor | Exception | None:
        """Wait for the next second; after `stop` no longer than it takes to decode what is there."""
        since = None
        while True:
            try:
                return ready.get(timeout=POLL)
            except queue.Empty:
                if self._stop.is_set():
                    since = since or time.monotonic()
                    if time.monotonic() - since > STOPPING:
                        return None  # a stream from the net that does not answer

    def _check_file(self, path: Path) -> None:
        try:
            kind = path.stat().st_mode
        except OSError as error:
            raise VideoError(path, f"cannot be followed ({error.strerror})", "check the path") from error
        if stat.S_ISDIR(kind):
            raise VideoError(path, "is a directory, not a video file", "name one file inside it")
        if stat.S_ISREG(kind):
            self.path = os.path.abspath(path)

    def _fill(self, size: int, ready: "queue.Queue[Tensor | Exception | None]", gone: Event) -> None:
        """Decode in a thread of its own, so that a stream is taken in while the model works."""

        def put(item: Tensor | Exception | None) -> bool:
            while not gone.is_set():
                try:
                    ready.put(item, timeout=POLL)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            for picture in self._each_second(size):
                if not put(picture):
                    return
            put(None)
        except Exception as error:  # whatever it is, the reader's thread has to hear of it
            put(error)

    def _each_second(self, size: int) -> Iterator[Tensor]:
        """Yield (3, size, size) uint8 for every second, repeating the picture that stays on screen."""
        container, stream, file = self._open()
        tick = stream.time_base or Fraction(1, av.time_base)
        convert = VideoReformatter()
        shown: VideoFrame | None = None
        second, start, last = 0, 0, 0  # ticks since the first picture, jumps left out, are time - start

        def until(time: int) -> Iterator[Tensor]:
            nonlocal second
            picture = None
            while second * tick.denominator // tick.numerator < time - start:
                picture = to_square(shown, size, convert) if picture is None and shown else picture
                assert picture is not None
                yield picture
                second += 1

        try:
            for frame in self._frames(container, stream):
                time = frame.pts or 0
                if shown is None:
                    start = time
                elif not 0 <= time - last <= MAX_GAP / tick:
                    start += time - last - 1
                yield from until(time)
                shown, last = frame, time
            if self._stop.is_set():
                return
            if shown is None:
                raise VideoError(self.name, "not one picture could be decoded", "check that it plays")
            yield from until(last + max(1, shown.duration or 1))
        finally:
            container.close()
            if file is not None:
                file.close()

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Sound pictures in order of presentation, from the first key picture on."""
        first_key: int | None = None
        skipping = True
        for packet in _timed(self._packets(container, stream)):
            if self._stop.is_set():
                return  # what still waits for its turn has holes
            begins = packet.is_keyframe and not packet.is_corrupt
            if first_key is None and begins and is_shown(packet):
                first_key = packet_time(packet) if container.format.name in BROADCAST else 0
            skipping = skipping and not begins
            if packet.size and skipping:
                self.lost += first_key is not None
                continue
            frames, sound = decode_packet(packet, packet.is_corrupt, strict=True)
            skipping = not sound
            self.lost += not sound
            yield from (frame for frame in frames if (frame.pts or 0) >= (first_key or 0))
        if stream.codec_context.is_open:
            yield from drain(stream.codec_context)  # of a stream that ended with an error

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
        """Packets as they come, beyond damage in the container, until the source ends or falls silent."""
        packets = container.demux(stream)
        failures, silent = 0, False
        error: Exception | None = None
        while failures < MAX_DEMUX_ERRORS:
            error, asked = None, time.monotonic()
            try:
                packet: Packet | None = next(packets, None)
            except (av.FFmpegError, IndexError) as caught:  # the latter where damage makes up a new stream halfway
                packet, error = None, caught
            silent = silent or time.monotonic() - asked >= self._idle
            if packet is not None:
                failures = 0
                yield packet
            elif isinstance(error, av.InvalidDataError | IndexError) and not silent:
                failures += 1
                packets = container.demux(stream)
            else:
                break  # the end; or the net: nothing came in time, or a connection broke
        self.broken = error is not None and not silent and not self._stop.is_set()
        if self._stop.is_set():
            self.ending = "it was told to stop"
        elif silent:
            self.ending = f"nothing came for {self._idle:g} s"
        else:
            why = getattr(error, "strerror", None) or error
            self.ending = f"it broke off ({why})" if error else "the other side ended it"

    def _open(self) -> tuple[InputContainer, VideoStream, "_Growing | None"]:
        file = None if is_url(self._source) else _Growing(Path(self._source), self._idle, self._stop)
        asked = time.monotonic()
        try:
            if file is None:
                container = av.open(self._source, "r", metadata_errors="replace", timeout=self._idle)
            else:
                container = av.open(file, "r", metadata_errors="replace", options={"protocol_whitelist": ""})
        except (av.FFmpegError, ValueError) as error:
            why = f"cannot be followed ({getattr(error, 'strerror', None) or error})"
            todo = (
                "a file that grows must be fragmented MP4, MPEG-TS or Matroska; a whole one is watched without --follow"
            )
            if file is None:
                todo = "check the address"
            if file is None and time.monotonic() - asked >= self._idle:
                why, todo = f"nothing came within {self._idle:g} s", "check the address, and that it is sending"
            if isinstance(error, av.ProtocolNotFoundError):
                scheme = self._source.partition(":")[0]
                why, todo = f"the FFmpeg in PyAV does not speak {scheme}", "choose another way to send it"
            raise VideoError(self.name, why, todo) from error
        stream = find_stream(container, self.name)
        stream.codec_context.options = {"err_detect": "explode"}  # as the reader of whole files does
        return container, stream, file


def _timed(packets: Iterator[Packet]) -> Iterator[Packet]:
    """Packets with a time: those without, as the first of RTSP often is in FFmpeg, get that of the next."""
    waiting: list[Packet] = []
    for packet in packets:
        waiting.append(packet)
        time = packet_time(packet)
        if packet.size and time is None:
            continue
        for early in waiting[:-1]:
            early.pts = time
        yield from waiting
        waiting = []
    yield from waiting


class _Growing:
    """A file's bytes as they come, for FFmpeg: it cannot seek, and the end comes when the file no longer grows."""

    def __init__(self, path: Path, idle: float, stop: Event) -> None:
        self._file: BinaryIO = path.open("rb", buffering=0)  # type: ignore[assignment]
        self._idle, self._stop, self._ended = idle, stop, False

    def read(self, count: int) -> bytes:
        waited_since = time.monotonic()
        while not self._ended:
            data = self._file.read(count)
            if data:
                return data
            self._ended = self._stop.wait(POLL) or time.monotonic() - waited_since > self._idle
        return b""

    def close(self) -> None:
        self._file.close()
