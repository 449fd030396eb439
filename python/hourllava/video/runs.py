# SPDX-License-Identifier: Apache-2.0
"""Which picture is on screen for which seconds: decoded on every core, given out in order."""

import math
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from hourllava.video.decoder import Decoder
from hourllava.video.plan import Plan
from hourllava.video.resize import resize_frames

SEGMENT = 24  # seconds that one core decodes at a time, or as many more as lie between two cuts
PICTURES_AHEAD = 32  # that a core may decode before anyone wants them


@dataclass(frozen=True)
class Run:
    """One picture, and the seconds it is on screen."""

    picture: Tensor  # (3, size, size) uint8
    time: int  # its timestamp
    first: int  # second from which on
    until: int | None  # second before which; None until the next picture, whenever that is
    can_miss: bool  # a picture that should have come in its place is a lost one


def runs(path: str, plan: Plan, size: int, strict: bool) -> Iterator[Run]:
    """All runs of a video, in order; only as many pictures exist at a time as the cores can be ahead.

    As many cores as torch has threads decode segments between two of the plan's cuts; the pictures are those that one
    decoder would give, bit for bit.
    """
    limits = [None, *borders(plan, SEGMENT), None]
    segments = list(pairwise(limits))
    workers = min(torch.get_num_threads(), len(segments))
    stop = Event()
    decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(workers):
            decoder = Decoder(path, plan, strict)
            stack.callback(decoder.close)
            decoders.put(decoder)
        pool = ThreadPoolExecutor(workers, "decode")
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(stop.set)
        jobs: list[tuple[Future, queue.Queue]] = []
        for k in range(len(segments)):
            # One more than there are cores, so that none waits for the reader.
            while len(jobs) < min(k + workers + 1, len(segments)):
                ready: queue.Queue = queue.Queue(PICTURES_AHEAD)
                job = pool.submit(_decode_segment, decoders, segments[len(jobs)], size, ready, stop)
                jobs.append((job, ready))
            job, ready = jobs[k]
            while (run := ready.get()) is not None:
                yield run
            job.result()


def borders(plan: Plan, seconds: int) -> list[int]:
    """Cuts at least so many seconds apart."""
    found: list[int] = []
    if len(plan.targets) > seconds:
        step = (int(plan.targets[-1]) - int(plan.targets[0])) / (len(plan.targets) - 1) * seconds
        last = -math.inf if not len(plan.cuts) else int(plan.targets[0])
        for cut in plan.cuts.tolist():
            if cut - last >= step:
                found.append(cut)
                last = cut
    return found


def _decode_segment(
    decoders: "queue.SimpleQueue[Decoder]",
    segment: tuple[int | None, int | None],
    size: int,
    ready: "queue.Queue[Run | None]",
    stop: Event,
) -> None:
    decoder = decoders.get()
    try:
        for run in segment_runs(decoder, *segment, size):
            if not _put(ready, run, stop):
                return
    finally:
        decoders.put(decoder)
        _put(ready, None, stop)


def _put(ready: "queue.Queue[Run | None]", run: Run | None, stop: Event) -> bool:
    """Wait for room; False if nobody reads any more."""
    while not stop.is_set():
        try:
            ready.put(run, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def segment_runs(decoder: Decoder, begin: int | None, end: int | None, size: int) -> Iterator[Run]:
    """The runs between two cuts; the last has no end, since the first picture after the cut may be a lost one."""
    targets = decoder.plan.targets
    convert = VideoReformatter()  # one for all pictures: setting it up takes longer than a picture
    shown: VideoFrame | None = None
    k = 0
    for frame in decoder.pictures(begin, end):
        until = int(np.searchsorted(targets, frame.pts or 0))  # these seconds end before `frame` comes on screen
        if shown is None and begin is not None:
            k = until  # they are the segment's before
        shown = shown or frame  # the first sound picture stands in for damaged ones before it
        if until > k:
            yield Run(to_square(shown, size, convert), shown.pts or 0, k, until, decoder.can_miss)
            k = until
        shown = frame
    if shown is not None:
        yield Run(to_square(shown, size, convert), shown.pts or 0, k, None, decoder.can_miss)


def to_square(frame: VideoFrame, size: int, convert: VideoReformatter) -> Tensor:
    """Convert to RGB, turn as the file's display matrix says, and resize: (3, size, size) uint8."""
    picture = torch.from_numpy(convert.reformat(frame, format="rgb24").to_ndarray())  # (H, W, 3)
    turns = round(frame.rotation / 90)  # counter-clockwise
    turned = picture.rot90(turns) if turns else picture
    return resize_frames(turned.permute(2, 0, 1)[None], size)[0]
