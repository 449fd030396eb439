# SPDX-License-Identifier: Apache-2.0
"""One table of cosines and sines a block of tokens, for all heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import INT64, ROWS, check, check_rotation
from hourllava_ext.triton.common import cover, partner, rotation, turn

TOKENS = 16


@triton.jit
def _rope(
    x, position_ids, inv_freq, out, tokens, heads, token_stride, head_stride,
    WIDTH: tl.constexpr, FREQUENCIES: tl.constexpr, INVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D)
    other = partner(dim, FREQUENCIES)
    position = tl.load(position_ids + token, mask=token < tokens, other=0)
    cosine, sine = rotation(position, dim, inv_freq, FREQUENCIES, x.dtype.element_ty)
    if INVERSE:
        sine = -sine
    inside = (token < tokens)[:, None] & (dim < WIDTH)[None, :]
    for head in range(heads):
        rows = x + (token * token_stride + tl.cast(head, tl.int64) * head_stride)[:, None]
        a = tl.load(rows + dim[None, :], mask=inside)
        b = tl.load(rows + other[None, :], mask=inside)
        turned = turn(a, b, cosine, sine, dim, FREQUENCIES).to(x.dtype.element_ty)
        tl.store(out + ((token * heads + head) * WIDTH)[:, None] + dim[None, :], turned, mask=inside)


def rope(x: Tensor, position_ids: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    sizes = check(
        "rope",
        x=(x, "M H D", ROWS),
        position_ids=(position_ids, "M", INT64),
        inv_freq=(inv_freq, "F", (torch.float32,)),
    )
    check_rotation("rope", sizes)
    tokens, heads, width = x.shape
    rows = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(x.shape)
    _rope[(triton.cdiv(tokens, TOKENS),)](
        rows, position_ids.contiguous(), inv_freq.contiguous(), out, tokens, heads, rows.stride(0), rows.stride(1),
        width, inv_freq.shape[0], inverse, TOKENS, cover(width),
    )  # fmt: skip
    return out
