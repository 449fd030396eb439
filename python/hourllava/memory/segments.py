# SPDX-License-Identifier: Apache-2.0
"""Segments: features of consecutive frames in a file, in bfloat16 or in int8 with a scale per token."""

import time
from pathlib import Path

import torch
from torch import Tensor

from hourllava.errors import MemoryFileError

from .catalogue import Segment, Video
from .storage import Pieces, read_memory_file, write_memory_file

PRECISIONS = ("bfloat16", "int8")
GATHERED = 64  # frames of a segment that shorter appends are gathered into; as many as `watch` appends at once
REPAIR = "run `hourllava memory repair`, which keeps what comes before it"


def pack_features(features: Tensor, precision: str) -> dict[str, Tensor]:
    """What is written of features (n, N, Cv): bfloat16, or int8 and the largest magnitude of each token over 127."""
    if precision == "bfloat16":
        return {"features": features.bfloat16()}
    scale = features.float().abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"features": (features.float() / scale[..., None]).round().to(torch.int8), "scales": scale}


def packed_bytes(precision: str, per_frame: int, width: int) -> int:
    """Bytes of what `pack_features` gives of one frame (N, Cv)."""
    if precision == "bfloat16":
        return per_frame * width * torch.bfloat16.itemsize
    return per_frame * (width * torch.int8.itemsize + torch.float32.itemsize)


def unpack_features(packed: dict[str, Tensor]) -> Tensor:
    """Features (n, N, Cv) float32 of what `pack_features` gave."""
    features = torch.empty(packed["features"].shape)
    fill_features(features, packed)
    return features


def fill_features(out: Tensor, packed: dict[str, Tensor]) -> None:
    """Put the features of what `pack_features` gave into `out` (n, N, Cv), with no copy in between."""
    out.copy_(packed["features"])
    if "scales" in packed:
        out.mul_(packed["scales"][..., None])


def rounding_error(features: Tensor, rounded: Tensor) -> float:
    """Root mean square of what rounding changed, as a share of the features' own."""
    change = (rounded.double() - features.double()).norm()
    return float(change / features.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def write_segment(folder: Path, video: Video, first: int, packed: dict[str, Tensor], error: float) -> Segment:
    """Write what `pack_features` gave of frames `first` on, with its rounding error.

    Raises:
        MemoryFileError: the disk is full or read-only.
    """
    frames = len(packed["features"])
    path = folder / f"features-{first:09d}-{first + frames:09d}.safetensors"
    notes = {"video": video.name, "tower": video.tower, "precision": video.precision, "first": str(first)}
    digest = write_memory_file(path, {name: Pieces.of(tensor) for name, tensor in packed.items()}, notes)
    return Segment(first, frames, path.name, digest, path.stat().st_size, error, time.time())


def to_gather(last: list[Segment], frames: int) -> list[Segment]:
    """Which of a video's last segments go into one with `frames` new frames, in order of their frames.

    Those that are no longer than what comes after them, up to `GATHERED` frames in all: as in a binary counter, so that
    a frame is written again 6 times at most, and appends of one second leave a few short segments at the end.
    """
    gathered: list[Segment] = []
    for segment in reversed(last):
        if segment.frames > frames or segment.frames + frames > GATHERED:
            break
        gathered.insert(0, segment)
        frames += segment.frames
    return gathered


def read_packed(path: Path, segment: Segment) -> dict[str, Tensor]:
    """What `pack_features` gave, every byte checked.

    Raises:
        MemoryFileError: the file is missing, damaged, or another than the catalogue means.
    """
    try:
        packed, notes = read_memory_file(path)
    except MemoryFileError as error:
        raise MemoryFileError(path, error.why, REPAIR) from error
    if notes["sha256"] != segment.sha256:
        raise MemoryFileError(path, "it is not the file that the catalogue means", REPAIR)
    return packed
