# SPDX-License-Identifier: Apache-2.0
"""Inverse norms first, then each frame's product with the sum of its neighbours' directions: O(T * window * C)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import ROWS, check, require
from hourllava_ext.triton.common import block


@triton.jit
def _norms(features, inverse_norms, width, BLOCK: tl.constexpr):
    frame = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        x = tl.load(features + frame * width + c, mask=c < width, other=0.0).to(tl.float32)
        squares += x * x
    # A frame of zeros has no direction: the floor makes its cosines 0.
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), 1e-12)
    tl.store(inverse_norms + frame, tl.div_rn(1.0, norm))


@triton.jit
def _neighbours(features, inverse_norms, score, frames, width, window, BLOCK: tl.constexpr):
    frame = tl.program_id(0).to(tl.int64)
    # The window slides inside the video: at both ends it still holds window - 1 neighbours.
    first = tl.minimum(tl.maximum(frame - window // 2, 0), frames - window)
    products = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(first, first + window):
            x = tl.load(features + other * width + c, mask=(c < width) & (other != frame), other=0.0)
            total += tl.load(inverse_norms + other) * x.to(tl.float32)
        own = tl.load(features + frame * width + c, mask=c < width, other=0.0).to(tl.float32)
        products += own * total
    total = tl.sum(products, 0) * tl.load(inverse_norms + frame)
    tl.store(score + frame, tl.div_rn(total, tl.cast(tl.maximum(window - 1, 1), tl.float32)))


def keyframe_score(features: Tensor, window: int = 9) -> Tensor:
    check("keyframe_score", features=(features, "T C", ROWS))
    require(window >= 1, f"keyframe_score: window must be at least 1 frame, got {window}")
    frames, width = features.shape
    rows = features.contiguous()
    inverse_norms, score = (features.new_empty(frames, dtype=torch.float32) for _ in range(2))
    _norms[(frames,)](rows, inverse_norms, width, block(width))
    _neighbours[(frames,)](rows, inverse_norms, score, frames, width, min(window, frames), block(width))
    return score
