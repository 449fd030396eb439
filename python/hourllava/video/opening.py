# SPDX-License-Identifier: Apache-2.0
"""Opening a video with the decoder that is named, or with the one that suits where its pictures are wanted."""

import os
from dataclasses import dataclass

import torch

from hourllava.errors import HourLlavaError
from hourllava.video.dali import INSTALL, DaliReader, has_dali, why_not_dali
from hourllava.video.plan import make_plan
from hourllava.video.reader import VideoReader

DECODERS = ("pyav", "dali")


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder and the reason for it."""

    name: str
    why: str


def choose_decoder(device: str | torch.device = "cpu") -> DecoderChoice:
    """The decoder of videos whose pictures are wanted on a device: DALI on NVIDIA GPUs where it is installed."""
    if torch.device(device).type != "cuda":
        return DecoderChoice("pyav", "the pictures are wanted on the CPU; for NVIDIA GPUs it is dali where installed")
    if torch.version.hip is not None:
        return DecoderChoice("pyav", "DALI needs a GPU of NVIDIA")
    if not has_dali():
        return DecoderChoice("pyav", f"DALI is not installed; {INSTALL}")
    return DecoderChoice("dali", "it is installed and there is an NVIDIA GPU; pyav for files that it cannot read alike")


def open_video(
    path: str | os.PathLike[str], decoder: str | None = None, device: str | torch.device = "cpu"
) -> VideoReader:
    """Open a video and plan which picture stands for each second; every decoder gives the same pictures.

    Args:
        path: the video file.
        decoder: "pyav" (any file that FFmpeg reads; the pictures are on the CPU), "dali" (on `device`, which they never
            leave), or None for :func:`choose_decoder`'s, with PyAV for files that DALI cannot read alike.
        device: where the pictures are wanted.

    Raises:
        VideoError: the path is no readable video, or not for the decoder named; the one line says why and what to do.
        HourLlavaError: there is no such decoder.
    """
    if decoder not in (None, *DECODERS):
        raise HourLlavaError("decoder", f"there is no {decoder!r}", f"choose from {', '.join(DECODERS)}")
    device = torch.device(device)
    if (decoder or choose_decoder(device).name) == "pyav":
        return VideoReader(path)
    if decoder == "dali":
        return DaliReader(path, device)
    plan = make_plan(path)
    return VideoReader(path, plan) if why_not_dali(path, plan, device) else DaliReader(path, device, plan)
