# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import register_fake


def keyframe_score(features: Tensor, window: int = 9) -> Tensor:
    """Mean cosine of each frame to the nearest ``window - 1`` others; low where the picture changes. No gradient.

    The window is centred on the frame and slides inside the video at both ends; a video shorter than the window is its
    own window, and a lone frame scores 0. Costs T * window * C products, never a T x T matrix.

    Args:
        features: One vector per frame, any length but zero (a zero vector has cosine 0). (T, C) float32, float16,
            bfloat16 or float64
        window: Frames compared, the frame itself included; at least 1.

    Returns:
        The scores. (T,) float32 (float64 for float64)

    Raises:
        RuntimeError: A shape, dtype or number differs from the above.

    Source: keyframe forgetting of Hour-LLaVA, https://arxiv.org/abs/2506.05332.
    """
    return torch.ops.hourllava_ext.keyframe_score(features.detach(), window)


@register_fake("keyframe_score")
def _fake(features: Tensor, window: int = 9) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty(features.shape[0], dtype=dtype)
