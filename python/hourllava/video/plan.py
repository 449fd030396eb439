# SPDX-License-Identifier: Apache-2.0
"""Open a video file, and choose from its timestamps the picture that is on screen at each second."""

import math
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from hourllava.errors import VideoError
from hourllava.video.h264 import restart_test

MAX_DEMUX_ERRORS = 100  # a container that fails this often in a row has nothing more to give
MAX_GAP = 3600  # seconds that one picture may stay on screen; more is taken for a damaged timestamp
CLOCK_STEP = 10  # seconds between packets; where there are more, or time goes back by as much, the clock has jumped
MAX_SECONDS = 366 * 86400
GONE = -1  # stands for the timestamp of a picture that is no longer in the file
# In these files packets follow each other, so where a jump in time meets skipped bytes, packets were lost there.
BYTES_IN_ORDER = {"matroska,webm"}
SKIPPED_BYTES = 512  # more than the headers that stand between packets
BROADCAST = {"mpegts", "mpeg"}
# Codecs whose key pictures make a decoder forget all before them, and containers that find them by an index.
RESTARTING = {"vp9", "av1"}
INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
# Formats that are lists of other files. Whoever hands in such a list must not be shown what else lies on this machine.
LISTS = {"concat", "dash", "hls", "image2", "imf", "mlv", "vobsub"}
LIST_HEADS = (b"#EXTM3U", b"ffconcat")
CUT_TOLERANCE = 1.0  # seconds that may be missing before an intact file is ruled out


@dataclass(frozen=True)
class Plan:
    """The picture for each second, in ticks of the stream's time base."""

    targets: np.ndarray  # (n,) int64: start + k seconds, rounded down to a tick
    chosen: np.ndarray  # (n,) int64: timestamp of the picture on screen then, or GONE
    resumed: frozenset[int]  # timestamps of the packets that follow a hole in the file
    cuts: np.ndarray  # (m,) int64: timestamps at which decoding can begin and end without changing a picture
    seconds: float  # what the packets in the file cover
    seconds_expected: float  # what the header promises, or `seconds` where it promises no more; and `jumped`
    jumped: float = 0.0  # seconds of pictures that are in the file, but have no time of their own

    @property
    def intact(self) -> bool:
        """Whether nothing is known to be missing; only a decoder sees damage inside a packet."""
        return self.seconds_expected == self.seconds and not self.resumed


def open_container(path: str | os.PathLike[str]) -> tuple[InputContainer, VideoStream]:
    """Open a local file and find its video stream; cover art does not count as video.

    No other file is read, whatever this one says.

    Raises:
        VideoError: the path is no readable file, no video, a list of other files, or holds sound only.
    """
    path = Path(path)
    _check_file(path)
    formats = ",".join(sorted(av.formats_available - LISTS))
    try:
        # The prefix keeps a colon in a name from being taken for a protocol; the first whitelist keeps FFmpeg off the
        # net.
        options = {"protocol_whitelist": "file", "format_whitelist": formats}
        container = av.open(f"file:{path}", metadata_errors="replace", options=options)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(path, *_why_not_video(path)) from error
    return container, find_stream(container, path)


def find_stream(container: InputContainer, name: str | os.PathLike[str]) -> VideoStream:
    """The video stream of an open file; one without any is closed.

    Raises:
        VideoError: there is none.
    """
    for stream in container.streams.video:
        if av.stream.Disposition.attached_pic not in stream.disposition and stream.codec_context is not None:
            # One thread reports an error at the packet that holds it; frame threads report it pictures later.
            stream.thread_type = "NONE"
            return stream
    kinds = ", ".join(sorted({_kind_of(stream) for stream in container.streams})) or "empty streams"
    container.close()
    raise VideoError(name, f"holds no video, only {kinds}", "give a file with a video track")


def _kind_of(stream: Stream) -> str:
    if stream.type != "video":
        return str(stream.type)
    cover = av.stream.Disposition.attached_pic in stream.disposition
    return "cover art" if cover else "pictures in a form that is not told (it may have been cut off)"


def codec_of(stream: VideoStream) -> str:
    """FFmpeg's name of the codec, whichever library decodes it here: av1, and not libdav1d."""
    return stream.codec_context.codec.canonical_name


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(path, "is a directory, not a video file", "name one file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(path, "is not a regular file", "save the video to a file first; it is read twice")
        if status.st_size == 0:
            raise VideoError(path, "is empty (0 bytes)", "download or record it again")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise VideoError(path, "there is no such file", "check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(path, f"cannot be opened ({reason})", "check the path and its permissions") from error


def _why_not_video(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":  # an ISO media file, so only its index can be what is missing
        return "its index (moov) is missing or damaged, as in an unfinished download or recording", "get it again"
    if head.startswith(LIST_HEADS):
        return "is not a video but a list of other files", "give the video itself"
    return "is not a video that FFmpeg can read", "check that it plays, or convert it to MP4"


def demux(container: InputContainer, *streams: VideoStream) -> Iterator[Packet]:
    """Yield the packets of these streams (of all if none is named), going on after damage in the container."""
    failures = 0
    while failures < MAX_DEMUX_ERRORS:
        try:
            for packet in container.demux(*streams):
                failures = 0
                yield packet
            return
        except (av.FFmpegError, IndexError):  # the latter where damage makes up a new stream halfway
            failures += 1


def packet_time(packet: Packet) -> int | None:
    """Presentation time in ticks; containers that hold none give the decoding time, which B-frames shift a little."""
    return packet.dts if packet.pts is None else packet.pts


def is_shown(packet: Packet) -> bool:
    """False for the flush packet, for pictures without a time, and for what an edit list cuts off (time below 0)."""
    time = packet_time(packet)
    return packet.size > 0 and time is not None and time >= 0 and not packet.is_discard


def make_plan(path: str | os.PathLike[str]) -> Plan:
    """Read every packet header once, decode nothing, and choose the last picture at or before each second.

    Memory: about 33 bytes a picture.

    Raises:
        VideoError: as :func:`open_container`, or no packet has a timestamp.
    """
    container, stream = open_container(path)
    with container:
        tick = stream.time_base or Fraction(1, av.time_base)
        scan = _scan(container, stream, tick)
        if not scan.times:
            raise VideoError(path, "no picture in it has a timestamp", "convert it to MP4 (ffmpeg -i IN OUT.mp4)")
        order, end = _timeline(scan, int(MAX_GAP / tick))
        start = int(order[0])
        seconds = (end - start) * tick
        if seconds > MAX_SECONDS:
            why = f"its clock is damaged, it claims to last {float(seconds) / 86400:.0f} days"
            raise VideoError(path, why, "convert it to MP4 (ffmpeg -i IN OUT.mp4)")
        missing = _missing(container, stream, seconds, scan.last_of_any)
        jumped = _jumped(scan, order, tick, bool(missing))
    targets = start + np.arange(math.ceil(seconds), dtype=np.int64) * tick.denominator // tick.numerator
    chosen = order[np.searchsorted(order, targets, side="right") - 1]
    for before in scan.holes.values():
        chosen[(chosen < before) & (targets >= before)] = GONE
    intact = not missing and not scan.holes and not jumped
    cuts = _cuts(scan) if intact else np.array([], dtype=np.int64)
    expected = float(seconds) + missing + jumped
    return Plan(targets, chosen, frozenset(scan.holes), cuts, float(seconds), expected, jumped)


@dataclass
class _Scan:
    """What the packet headers of a file say."""

    times: array  # presentation time of each picture, in file order
    stops: array  # when each leaves the screen
    restarts: array  # 1 where the decoder forgets all before it
    jumps: array  # numbers of the pictures before which the clock jumps
    goes_back: bool = False  # one of these is into the past; else pictures may only be sparse
    holes: dict[int, int] = field(default_factory=dict)  # time of the packet after lost bytes: stop of those before
    last_of_any: float = 0.0  # seconds at which the last packet of any stream ends


def _scan(container: InputContainer, stream: VideoStream, tick: Fraction) -> _Scan:
    scan = _Scan(array("q"), array("q"), array("b"), array("q"))
    restarts = _restarting(container, stream)
    # A recording of a broadcast may begin between key pictures; what comes before the first cannot be decoded.
    first_key = None if container.format.name in BROADCAST else 0
    position, skipped, in_order = 0, False, container.format.name in BYTES_IN_ORDER
    before: int | None = None
    clock: int | None = None  # decoding time of the packet before
    for packet in demux(container):
        time = packet_time(packet)
        if first_key is None and packet.stream_index == stream.index and packet.is_keyframe:
            first_key = time
        here = packet.pos or 0
        skipped |= in_order and packet.size > 0 and here - position > SKIPPED_BYTES
        position = here + packet.size
        if time is None or not is_shown(packet):
            continue
        stop = time + (packet.duration or 1)
        scan.last_of_any = max(scan.last_of_any, stop * packet.time_base.numerator / packet.time_base.denominator)
        if packet.stream_index != stream.index or first_key is None or time < first_key:
            continue
        if skipped and before is not None and (time - before) * tick > CUT_TOLERANCE:
            scan.holes[time] = before
        skipped = False
        before = max(stop, before or stop)
        if packet.dts is not None:
            if clock is not None and abs(packet.dts - clock) * tick > CLOCK_STEP:
                scan.jumps.append(len(scan.times))
                scan.goes_back |= packet.dts < clock
            clock = packet.dts
        scan.times.append(time)
        scan.stops.append(stop)
        scan.restarts.append(packet.is_keyframe and not packet.is_corrupt and restarts(packet))
    return scan


def _restarting(container: InputContainer, stream: VideoStream) -> Callable[[Packet], bool]:
    """A test for key packets: can they be sought, and decoded as if nothing had been before them?"""
    codec = codec_of(stream)
    test = restart_test(codec, stream.codec_context.extradata)
    if container.format.name not in INDEXED or (test is None and codec not in RESTARTING):
        return lambda packet: False
    return lambda packet: test is None or test(memoryview(packet))


def _cuts(scan: _Scan) -> np.ndarray:
    """Times of the restarting packets: all before them is shown earlier, all after them later."""
    times = np.frombuffer(scan.times, dtype=np.int64)
    latest_before = np.maximum.accumulate(times)[:-1]
    earliest_after = np.minimum.accumulate(times[::-1])[::-1]
    apart = (times[1:] > latest_before) & (np.append(earliest_after[2:], times.max() + 1) > times[1:])
    return times[1:][apart & (np.frombuffer(scan.restarts, dtype=np.int8)[1:] == 1)]


def _timeline(scan: _Scan, max_gap: int) -> tuple[np.ndarray, int]:
    """Sort the times (n,) and say when the last picture leaves the screen.

    Damaged headers may hold any number: of the runs between gaps longer than ``max_gap`` only the longest counts.
    """
    times, stops = (np.frombuffer(column, dtype=np.int64) for column in (scan.times, scan.stops))
    by_time = np.argsort(times, kind="stable")
    order = times[by_time]
    edges = np.flatnonzero(np.diff(order) > max_gap) + 1
    runs = np.split(by_time, edges)
    longest = max(runs, key=len)
    last = int(times[longest[-1]])
    return times[longest], max(last + 1, int(stops[longest][stops[longest] <= last + max_gap].max(initial=0)))


def _jumped(scan: _Scan, order: np.ndarray, tick: Fraction, told: bool) -> float:
    """Seconds of pictures that others at the same times stand in front of, as in recordings that were put one behind
    the other; and unless that is `told` already, of those that are not on the timeline `order`."""
    stretches = np.split(np.frombuffer(scan.times, dtype=np.int64), scan.jumps) if scan.jumps else []
    on_time = [s for s in stretches if order[0] <= s.min() <= s.max() <= order[-1]] if scan.goes_back else []
    ticks, end = 0, int(order[0])
    for first, last in sorted((int(s.min()), int(s.max())) for s in on_time):
        ticks += max(0, min(last, end) - first)
        end = max(end, last)
    if not told:
        ticks += sum(int(s.max() - s.min()) for s in stretches if s.min() > order[-1] or s.max() < order[0])
    return float(ticks * tick) if ticks * tick > CUT_TOLERANCE else 0.0


def _missing(container: InputContainer, stream: VideoStream, seconds: Fraction, last_of_any: float) -> float:
    """Seconds that the header promises beyond the packets that are there (0 if none)."""
    if stream.duration is not None and stream.time_base is not None:
        missing = float(stream.duration * stream.time_base - seconds)
    elif container.duration is not None:  # to the end of the longest stream
        missing = container.duration / av.time_base - last_of_any
    else:
        return 0.0
    return missing if missing > CUT_TOLERANCE else 0.0
