# SPDX-License-Identifier: Apache-2.0
"""Four taps a pooled cell; the backward gathers the cells that touched a patch, so no two programs add to one place."""

import math

import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import ROWS, check, require
from hourllava_ext.triton.common import block


@triton.jit
def _tap(cell, side, grid):
    """The two patches that a cell reads along one axis, and the weight of the second; exact in integers."""
    # Centres of cells on the patch axis, in halves of a cell; those before the first centre read the first patch.
    centre = tl.maximum((2 * cell + 1) * side - grid, 0)
    low = tl.minimum(centre // (2 * grid), side - 1)
    weight = tl.div_rn(tl.cast(centre - low * 2 * grid, tl.float32), tl.cast(2 * grid, tl.float32))
    return low, tl.minimum(low + 1, side - 1), weight


@triton.jit
def _pool(patches, out, side, grid, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)  # in (T, G * G)
    frame = place // (grid * grid)
    y0, y1, wy = _tap(place // grid % grid, side, grid)
    x0, x1, wx = _tap(place % grid, side, grid)
    image = patches + frame * side * side * width
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        a = tl.load(image + (y0 * side + x0) * width + c, mask=c < width, other=0.0).to(tl.float32)
        b = tl.load(image + (y0 * side + x1) * width + c, mask=c < width, other=0.0).to(tl.float32)
        d = tl.load(image + (y1 * side + x0) * width + c, mask=c < width, other=0.0).to(tl.float32)
        e = tl.load(image + (y1 * side + x1) * width + c, mask=c < width, other=0.0).to(tl.float32)
        cell = (1 - wy) * (1 - wx) * a + (1 - wy) * wx * b + wy * (1 - wx) * d + wy * wx * e
        tl.store(out + place * width + c, cell.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _readers(patch, side, grid):
    """A range of cells along one axis that holds all that read a patch."""
    first = tl.maximum((2 * patch - 1) * grid - side, 0) // (2 * side)
    last = tl.minimum(((2 * patch + 3) * grid - side + 2 * side) // (2 * side) + 1, grid)
    return first, last


@triton.jit
def _share(cell, patch, side, grid):
    low, high, weight = _tap(cell, side, grid)
    return tl.where(low == patch, 1 - weight, 0.0) + tl.where(high == patch, weight, 0.0)


@triton.jit
def _pool_backward(grad, grad_patches, side, grid, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)  # in (T, S * S)
    cells = grad + place // (side * side) * grid * grid * width
    y = place // side % side
    x = place % side
    y_first, y_last = _readers(y, side, grid)
    x_first, x_last = _readers(x, side, grid)
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for gy in range(y_first, y_last):
            for gx in range(x_first, x_last):
                weight = _share(gy, y, side, grid) * _share(gx, x, side, grid)
                if weight > 0:
                    value = tl.load(cells + (gy * grid + gx) * width + c, mask=c < width, other=0.0)
                    total += weight * value.to(tl.float32)
        tl.store(grad_patches + place * width + c, total.to(grad_patches.dtype.element_ty), mask=c < width)


def _side(op: str, count: int) -> int:
    side = math.isqrt(count)
    require(
        side >= 1 and side * side == count,
        f"{op}: patches must come from a square image, got {count} a frame; pass (T, S * S, C)",
    )
    return side


def pool_grid(patches: Tensor, grid: int) -> Tensor:
    check("pool_grid", patches=(patches, "T S*S C", ROWS))
    frames, count, width = patches.shape
    side = _side("pool_grid", count)
    require(grid >= 1, f"pool_grid: grid must be at least 1, got {grid}")
    out = patches.new_empty(frames, grid * grid, width)
    _pool[(frames * grid * grid,)](patches.contiguous(), out, side, grid, width, block(width))
    return out


def pool_grid_backward(grad: Tensor, grid: int, count: int) -> Tensor:
    side = _side("pool_grid_backward", count)
    check("pool_grid_backward", grad=(grad, f"T {grid * grid} C", ROWS))
    frames, _, width = grad.shape
    out = grad.new_empty(frames, count, width)
    _pool_backward[(frames * side * side,)](grad.contiguous(), out, side, grid, width, block(width))
    return out
