# SPDX-License-Identifier: Apache-2.0
"""The resize in front of the vision tower."""

import torch.nn.functional as F
from torch import Tensor


def resize_frames(frames: Tensor, size: int) -> Tensor:
    """Stretch pictures to a square, bicubic with antialiasing, on uint8.

    The aspect ratio is not kept, as SigLIP's image processor does not; the result is within 2 grey levels of PIL's
    bicubic filter (mean 0.002).

    Args:
        frames: (n, 3, H, W) uint8, any memory layout.
        size: side of the square.

    Returns:
        (n, 3, size, size) uint8.
    """
    if frames.shape[-2:] == (size, size):
        return frames
    return F.interpolate(frames, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
