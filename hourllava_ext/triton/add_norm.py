# SPDX-License-Identifier: Apache-2.0
"""A program normalises a row that it reads once; what rows add to weight and bias is summed by chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import ROWS, WIDE, check
from hourllava_ext.triton.common import cover

COLUMNS, CHUNKS = 32, 32  # of partial sums that a program reads at a time


@triton.jit
def _read_sum(x, residual, at, inside):
    """Rounded as the sum of two tensors is, which the model normalises; float32."""
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return (a + b).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _add_norm(x, residual, weight, bias, out, mean, rstd, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    count = tl.cast(width, tl.float32)
    total = _read_sum(x, residual, row * width + c, inside)
    # From the first column on: the sum of a row far from zero would round away what tells its columns apart.
    start = _read_sum(x, residual, row * width, width > 0)
    centre = start + tl.div_rn(tl.sum(tl.where(inside, total - start, 0.0), 0), count)
    apart = tl.where(inside, total - centre, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(apart * apart, 0), count) + eps))
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + c, (apart * scale * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gradients(
    grad, x, residual, weight, mean, rstd, grad_sum, partial, tokens, width, chunk_rows, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    count = tl.cast(width, tl.float32)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    to_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, tokens)):
        scale = tl.load(rstd + row)
        total = _read_sum(x, residual, row * width + c, inside)
        normed = tl.where(inside, (total - tl.load(mean + row)) * scale, 0.0)
        g = tl.load(grad + row * width + c, mask=inside, other=0.0).to(tl.float32)
        scaled = g * w
        to_weight += g * normed
        to_bias += g
        shift = tl.div_rn(tl.sum(scaled, 0), count)
        slope = tl.div_rn(tl.sum(scaled * normed, 0), count)
        result = scale * (scaled - shift - slope * normed)
        tl.store(grad_sum + row * width + c, result.to(grad_sum.dtype.element_ty), mask=inside)
    tl.store(partial + 2 * chunk * width + c, to_weight, mask=inside)
    tl.store(partial + (2 * chunk + 1) * width + c, to_bias, mask=inside)


@triton.jit
def _sum_chunks(partial, grad_weight, grad_bias, chunks, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # in (2, C)
    # Hundreds of chunks, so they are summed in double.
    sums = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    for begin in range(0, chunks, CHUNKS):
        k = begin + tl.arange(0, CHUNKS).to(tl.int64)
        inside = (k < chunks)[:, None] & (c < 2 * width)[None, :]
        sums += tl.load(partial + (k * 2 * width)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(sums, 0).to(tl.float32).to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + c, total, mask=c < width)
    tl.store(grad_bias + c - width, total, mask=(c >= width) & (c < 2 * width))


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = check(
        "add_norm",
        x=(x, "M C", ROWS),
        residual=(residual, "M C", ROWS),
        weight=(weight, "C", ROWS),
        bias=(bias, "C", ROWS),
    )
    tokens, width, block = sizes["M"], sizes["C"], cover(sizes["C"])
    out = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    _add_norm[(tokens,)](
        x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), out, mean, rstd, width, eps,
        block, num_warps=_warps(block),
    )  # fmt: skip
    return out, mean, rstd


def add_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = check(
        "add_norm_backward",
        grad=(grad, "M C", ROWS),
        x=(x, "M C", ROWS),
        residual=(residual, "M C", ROWS),
        weight=(weight, "C", ROWS),
        mean=(mean, "M", WIDE),
        rstd=(rstd, "M", WIDE),
    )
    tokens, width, block = sizes["M"], sizes["C"], cover(sizes["C"])
    chunk_rows = max(8, triton.cdiv(tokens, 512))
    chunks = triton.cdiv(tokens, chunk_rows)
    grad_sum, partial = grad.new_empty(grad.shape), grad.new_empty(chunks, 2, width, dtype=torch.float32)
    grad_weight, grad_bias = weight.new_empty(width), weight.new_empty(width)
    _norm_gradients[(chunks,)](
        grad.contiguous(), x.contiguous(), residual.contiguous(), weight.contiguous(), mean.contiguous(),
        rstd.contiguous(), grad_sum, partial, tokens, width, chunk_rows, block, num_warps=_warps(block),
    )  # fmt: skip
    _sum_chunks[(triton.cdiv(2 * width, COLUMNS),)](partial, grad_weight, grad_bias, chunks, width, CHUNKS, COLUMNS)
    return grad_sum, grad_weight, grad_bias
