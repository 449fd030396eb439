# SPDX-License-Identifier: Apache-2.0
"""Shared by the Triton kernels: block sizes, the table of a rotation, and which tile a program works on.

The kernels divide and take roots by ``tl.div_rn`` and ``tl.sqrt_rn``, which round to nearest as the CPU does: what
``/`` and ``tl.sqrt`` compile to on a GPU is off by up to two units in the last place, more than the error rule leaves.
"""

import torch
import triton
import triton.language as tl


def cover(count: int, least: int = 1) -> int:
    """The power of two that covers ``count``."""
    return max(least, triton.next_power_of_2(max(count, 1)))


def block(count: int, most: int = 1024) -> int:
    """The power of two that covers ``count``, or at most ``most`` at a time."""
    return min(most, cover(count))


def processors(device: torch.device) -> int:
    """How many programs the device runs side by side, one to a multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


@triton.jit
def rotation(position, dim, inv_freq, FREQUENCIES: tl.constexpr, dtype: tl.constexpr):
    """Cosine and signed sine, each (rows, dims) float32, such that ``x * cosine + x[partner] * sine`` is turned.

    The angle is a float32 product, as the model's is; its reduction to an eighth of a turn is exact to 2^29 radians
    because the first two parts of pi / 2 have 24 bits each. Both results are rounded to ``dtype``.
    """
    first = dim < FREQUENCIES
    turned = dim < 2 * FREQUENCIES
    frequency = tl.load(inv_freq + tl.where(first, dim, dim - FREQUENCIES), mask=turned, other=0.0)
    angle = (position.to(tl.float32)[:, None] * frequency[None, :]).to(tl.float64)
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - turns * 1.570796251296997
    x = x - turns * 7.549789415861596e-08
    x = x - turns * 5.390302858158119e-15
    y = x * x
    s = (2.7181216249746892e-06 * y - 0.00019839312269259) * y + 0.008333329304842334
    odd = x + x * y * (s * y - 0.16666666640797054)
    c = (-2.720575267627279e-07 * y + 2.479946013438781e-05) * y - 0.001388888349999741
    even = 1.0 - 0.5 * y + y * y * (c * y + 0.04166666661949054)
    quarter = turns.to(tl.int64)
    swapped = (quarter & 1) == 1
    cosine = tl.where(swapped, odd, even)
    sine = tl.where(swapped, even, odd)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine).to(tl.float32).to(dtype).to(tl.float32)
    sine = tl.where((quarter & 2) == 2, -sine, sine).to(tl.float32).to(dtype).to(tl.float32)
    return cosine, tl.where(first[None, :], -sine, sine)


@triton.jit
def partner(dim, FREQUENCIES: tl.constexpr):
    """The dim that each dim turns with; beyond the rotated ones, itself."""
    second = tl.where(dim < 2 * FREQUENCIES, dim - FREQUENCIES, dim)
    return tl.where(dim < FREQUENCIES, dim + FREQUENCIES, second)


@triton.jit
def turn(x, other, cosine, sine, dim, FREQUENCIES: tl.constexpr):
    """``x`` turned, float32; ``other`` is ``x`` at the partners. Dims that do not rotate are copied."""
    kept = x.to(tl.float32)
    return tl.where(dim[None, :] < 2 * FREQUENCIES, kept * cosine + other.to(tl.float32) * sine, kept)


@triton.jit
def find_tile(tile, cu_seqlens, batch, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Which sample a row tile belongs to: (sample or -1, its first token, its rows, the tile's first row).

    Rows are tokens x heads of a group; the samples' tiles follow each other, so that the host need not know lengths.
    """
    sample = -1
    token = tl.zeros((), tl.int64)
    rows = tl.zeros((), tl.int64)
    row = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int64)
    for b in range(batch):
        begin = tl.load(cu_seqlens + b)
        count = (tl.load(cu_seqlens + b + 1) - begin) * GROUP
        tiles = (count + BLOCK - 1) // BLOCK
        inside = (tile >= start) & (tile < start + tiles)
        sample = tl.where(inside, b, sample)
        token = tl.where(inside, begin, token)
        rows = tl.where(inside, count, rows)
        row = tl.where(inside, (tile - start) * BLOCK, row)
        start += tiles
    return sample, token, rows, row
