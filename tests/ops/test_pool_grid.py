# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_compiles_once,
    assert_matches_reference,
    assert_repeatable,
    cpu_tier,
)

from hourllava_ext import pool_grid, reference

# Frames, patches a side, cells a side, width: the model's own 27 to 8, odd ratios, growing, one patch, nothing.
SHAPES = [
    (3, 27, 8, 63),
    (2, 24, 8, 5),
    (5, 7, 3, 33),
    (2, 3, 5, 4),
    (1, 1, 2, 3),
    (2, 4, 4, 1),
    (0, 4, 2, 8),
]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    frames, side, grid, width = shape
    return torch.randn(frames, side * side, width, dtype=dtype, requires_grad=True), grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(pool_grid, reference.pool_grid, *make(shape, dtype))


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier(dtype: torch.dtype, tier: str) -> None:
    with cpu_tier(tier):
        assert_matches_reference(pool_grid, reference.pool_grid, *make((2, 27, 8, 83), dtype))


def test_same_grid_copies() -> None:
    patches, grid = make((2, 5, 5, 7), torch.float32)
    torch.testing.assert_close(pool_grid(patches, grid), patches, rtol=0, atol=0)


def test_no_width() -> None:
    assert pool_grid(torch.zeros(2, 16, 0), 2).shape == (2, 4, 0)


def test_strided_input() -> None:
    patches = torch.randn(2, 9, 4).transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(pool_grid(patches, 2), pool_grid(patches.contiguous(), 2), rtol=0, atol=0)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(pool_grid, make((2, 5, 3, 3), torch.float64))


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    torch.library.opcheck(ops.pool_grid.default, make((2, 5, 3, 3), torch.float32))
    torch.library.opcheck(ops.pool_grid_backward.default, (torch.randn(2, 9, 3), 3, 25))


def test_compile_fullgraph() -> None:
    assert_compiles_fullgraph(pool_grid, *make((2, 5, 3, 3), torch.float32))


def test_compiles_once_for_images_of_any_size() -> None:
    assert_compiles_once(pool_grid, *(make((n, 2 * n, n + 1, n), torch.float32) for n in (2, 3, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(pool_grid, *make((9, 27, 8, 40), dtype))


def test_bad_arguments() -> None:
    patches, grid = make((2, 5, 3, 3), torch.float32)
    with pytest.raises(RuntimeError, match=r"patches must be \(T, S \* S, C\), got shape \(2, 25\)"):
        pool_grid(patches[..., 0], grid)
    with pytest.raises(RuntimeError, match="patches must come from a square image, got 24 a frame"):
        pool_grid(patches[:, 1:], grid)
    with pytest.raises(RuntimeError, match="patches must come from a square image, got 0 a frame"):
        pool_grid(patches[:, :0], grid)
    with pytest.raises(RuntimeError, match="grid must be at least 1, got 0"):
        pool_grid(patches, 0)
    with pytest.raises(RuntimeError, match="patches must be float32, float16, bfloat16 or float64"):
        pool_grid(patches.int(), grid)


def test_bad_backward_arguments() -> None:
    backward = torch.ops.hourllava_ext.pool_grid_backward
    with pytest.raises(RuntimeError, match="grid must be at least 1, got 0"):
        backward(torch.randn(2, 9, 3), 0, 25)
    for count in (0, 24):
        with pytest.raises(RuntimeError, match=f"patches must come from a square image, got {count} a frame"):
            backward(torch.randn(2, 9, 3), 3, count)
    with pytest.raises(RuntimeError, match=r"grad must have shape \(any, 4, any\), got \(2, 9, 3\)"):
        backward(torch.randn(2, 9, 3), 2, 25)
