# SPDX-License-Identifier: Apache-2.0
"""NVIDIA DALI as a decoder: the pictures that the plan chose, decoded and resized on the GPU, and left there.

DALI is handed a stretch of the file at a time: the packets that the wanted pictures need, between two of the plan's
cuts, as a small Matroska file in memory. So neither a file's length nor its timestamps nor the pictures that nobody
wants are DALI's business, and what it is asked for is a place in the order of presentation.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from torch import Tensor

from hourllava.errors import VideoError
from hourllava.video.decoder import Decoder
from hourllava.video.plan import INDEXED, Plan, codec_of, open_container, packet_time
from hourllava.video.reader import FrameChunk, VideoReader
from hourllava.video.runs import borders

INSTALL = "pip install nvidia-dali-cuda130"
USE_PYAV = "use the decoder pyav"
STRETCH = 64  # seconds that DALI is handed at a time, or as many more as lie between two cuts
CALL_BYTES = 2**29  # of pictures in their own size, before they are resized, in one call of DALI
MOST_BYTES = 2**30  # of a file that can only be decoded from its start, and so has to be in memory whole
# Codecs with a picture to a packet, which DALI counts, that it decodes on a GPU and without one.
ON_GPU, ON_CPU = {"h264", "hevc", "vp9"}, {"vp9"}
LEAST_SIDE = 144  # of a picture that the video engine of every GPU takes, whatever the codec
PIXELS = {"yuv420p", "yuvj420p"}  # DALI takes all pictures for 8 bits in 4:2:0
# DALI takes all colours for BT.601. Red's and blue's share of the light in the matrices that PyAV tells from it:
BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)
MATRICES = {1: BT709, 2: BT601, 5: BT601, 6: BT601}  # by the number in H.273, 2 being unspecified
TICK = Fraction(1, 25)  # of the Matroska files, in which picture k stands at tick k


def has_dali() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def why_not_dali(path: str | os.PathLike[str], plan: Plan, device: torch.device) -> str | None:
    """Why DALI cannot give PyAV's pictures of this file, or None if it can."""
    if not plan.intact:
        return "a part of it is missing, and DALI cannot tell which seconds are lost"
    container, stream = open_container(path)
    with container:
        codec, form = codec_of(stream), container.format.name
    gpu = device.type == "cuda"
    supported = ON_GPU if gpu else ON_CPU
    if codec not in supported:
        where = "on a GPU" if gpu else "without a GPU"
        return f"its codec is {codec}, and {where} DALI is given {', '.join(sorted(supported))} only"
    if form not in INDEXED:
        return f"its format is {form}, and DALI is given MP4, MOV, Matroska and WebM only"
    if not len(plan.cuts) and Path(path).stat().st_size > MOST_BYTES:
        return "it can only be decoded from its start, and is too large to be in memory whole"
    first = first_picture(path, plan)
    if first is None:
        return "its first picture is damaged, and DALI cannot tell which seconds are lost"
    if first.format.name not in PIXELS or first.colorspace not in MATRICES:
        return f"its pixels are {first.format.name} by matrix {int(first.colorspace)}, which DALI does not convert"
    if gpu and min(first.width, first.height) < LEAST_SIDE:
        return f"its pictures are {first.width} x {first.height}, and a GPU decodes no side below {LEAST_SIDE}"
    return None


def first_picture(path: str | os.PathLike[str], plan: Plan) -> VideoFrame | None:
    """A video's first picture as PyAV decodes it, or None if it is damaged."""
    decoder = Decoder(path, plan, strict=True)
    try:
        return next(decoder.pictures(), None)
    finally:
        decoder.close()


class DaliReader(VideoReader):
    """One picture per second as :class:`VideoReader` gives, the same ones, decoded by DALI on a device.

    The device is an NVIDIA GPU, whose video engine decodes; on the CPU DALI decodes VP9 only. Colours come from chroma
    that is interpolated, where PyAV's is repeated, and the resize is DALI's bicubic: in the mean, grey levels differ by
    one or two. Damage that only a decoder sees is an error, unless the decoder hides it.

    Args:
        path: the video file.
        device: where the pictures are decoded, resized and left.

    Raises:
        VideoError: DALI is not installed, the file is no readable video, or DALI cannot give PyAV's pictures of it.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device, plan: Plan | None = None) -> None:
        if not has_dali():
            raise VideoError(path, "the decoder dali is not installed", f"{INSTALL}, or {USE_PYAV}")
        super().__init__(path, plan)
        if (why := why_not_dali(path, self._plan, device)) is not None:
            raise VideoError(path, why, USE_PYAV)
        self.device = device

    def chunks(self, size: int, chunk: int = 32) -> Iterator[FrameChunk]:
        """See :meth:`VideoReader.chunks`; the frames are on the device."""
        self._given = 0
        held: list[Tensor] = []
        for frames in self._decoded(size):
            held.append(frames)
            waiting = sum(map(len, held))
            ended = self._given + waiting == self.frames_expected
            while waiting >= chunk or (ended and waiting):
                given, *rest = torch.cat(held).split([min(chunk, waiting), max(0, waiting - chunk)])
                held, waiting = rest, waiting - len(given)
                seconds = self._given + torch.arange(len(given)).double()
                self._given += len(given)
                yield FrameChunk(given, seconds)

    def _decoded(self, size: int) -> Iterator[Tensor]:
        """All pictures in order, (n, 3, size, size) uint8 on the device, as many at a time as DALI gives."""
        first = first_picture(self.path, self._plan)
        if first is None:
            raise VideoError(self.path, "its first picture cannot be decoded any more", USE_PYAV)
        turns = round(first.rotation / 90)  # counter-clockwise
        colours = None if MATRICES[first.colorspace] == BT601 else _from_bt601(*MATRICES[first.colorspace])
        pipeline = _pipeline(_calls(self.path, self._plan), size, self.device)
        while True:
            try:
                (batch,) = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                # The reason stands behind a traceback of the graph's definition.
                said = (str(error).partition("encountered:")[2] or str(error)).strip().partition("\n")[0]
                raise VideoError(self.path, f"DALI could not decode it ({said})", USE_PYAV) from error
            frames = torch.from_dlpack(batch.as_tensor())[0].permute(0, 3, 1, 2).rot90(turns, (2, 3))
            if colours is not None:
                right = torch.einsum("oc,nchw->nohw", colours.to(self.device), frames.float())
                frames = right.round_().clamp_(0, 255).to(torch.uint8)
            # A copy, and a finished one: what DALI gave is its own to write again once it is asked for more.
            frames = frames.clone(memory_format=torch.contiguous_format)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            yield frames


@dataclass(frozen=True)
class Stretch:
    """A part of a video as DALI reads it."""

    data: np.ndarray  # (bytes,) uint8: a Matroska file
    places: np.ndarray  # (n,) int32: for each second, the place of its picture in the order of presentation


def stretches(path: str | os.PathLike[str], plan: Plan, seconds: int = STRETCH) -> Iterator[Stretch]:
    """Cut an intact video into stretches of at least so many seconds; together they hold every second once, in order.

    Only one stretch exists at a time, and in it only what its wanted pictures are decoded from.
    """
    decoder = Decoder(path, plan, strict=True)
    try:
        for begin, end in pairwise([None, *borders(plan, seconds), None]):
            packets = [packet for packet in decoder.packets(begin, end) if packet.size and decoder.needs(packet)]
            times = np.array([packet_time(packet) for packet in packets], dtype=np.int64)
            first = 0 if begin is None else np.searchsorted(plan.chosen, begin)
            until = len(plan.chosen) if end is None else np.searchsorted(plan.chosen, end)
            order = np.argsort(times, kind="stable")
            places = np.searchsorted(times, plan.chosen[first:until], side="right", sorter=order) - 1
            yield Stretch(_matroska(packets, order.argsort()), places.astype(np.int32))
    finally:
        decoder.close()


def _matroska(packets: list[Packet], ranks: np.ndarray) -> np.ndarray:
    """A file of these packets (bytes,), the one of rank k standing at tick k."""
    late = int((np.arange(len(ranks)) - ranks).max())  # by so many packets is a picture decoded after its rank
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream_from_template(packets[0].stream, opaque=True)
        for number, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
            packet.stream, packet.time_base = stream, TICK
            packet.pts, packet.dts = rank + late, number
            packet.duration = 1
            container.mux(packet)
    return np.frombuffer(file.getbuffer(), dtype=np.uint8)


def _calls(path: str, plan: Plan) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """What DALI is fed, a batch of one at a time: a file and places in it, as few as its memory allows."""
    container, stream = open_container(path)
    with container:
        picture = 3 * stream.codec_context.width * stream.codec_context.height
    at_once = max(1, CALL_BYTES // picture)
    for stretch in stretches(path, plan):
        for begin in range(0, len(stretch.places), at_once):
            yield [stretch.data], [stretch.places[begin : begin + at_once]]


def _pipeline(calls: Iterator[tuple[list[np.ndarray], list[np.ndarray]]], size: int, device: torch.device) -> Any:
    """DALI's graph: file and places to (1, n, size, size, 3) uint8. The next call is decoded while one is used."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    number = (torch.cuda.current_device() if device.index is None else device.index) if gpu else None

    @pipeline_def(batch_size=1, num_threads=1, device_id=number, exec_dynamic=True, prefetch_queue_depth=2)
    def pictures() -> Any:
        file, places = fn.external_source(source=calls, num_outputs=2, dtype=[types.UINT8, types.INT32], ndim=[1, 1])
        decoded = fn.decoders.video(file, device="mixed" if gpu else "cpu", frames=places)
        return fn.resize(decoded, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)

    pipeline = pictures()
    pipeline.build()
    return pipeline


def _from_bt601(red: float, blue: float) -> Tensor:
    """What turns RGB that BT.601's matrix made into RGB by another matrix (3, 3); but for colours that were clipped."""

    def to_rgb(red: float, blue: float) -> Tensor:
        by_red, by_blue, green = 2 - 2 * red, 2 - 2 * blue, 1 - red - blue
        rows = [[1, 0, by_red], [1, -blue * by_blue / green, -red * by_red / green], [1, by_blue, 0]]
        return torch.tensor(rows, dtype=torch.float64)

    return (to_rgb(red, blue) @ to_rgb(*BT601).inverse()).float()
