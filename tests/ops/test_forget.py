# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_matches_reference,
    assert_repeatable,
    count_compilations,
    cpu_tier,
)
from torch import Tensor

from hourllava_ext import forget, reference

# Frames, patches a frame, width, kept frames, kept patches of each.
SHAPES = [(63, 64, 33, 15, 16), (5, 7, 3, 5, 7), (9, 4, 8, 1000, 3), (3, 4, 5, 0, 2), (3, 4, 5, 2, 0), (3, 4, 0, 2, 1)]


def make(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept frames and patches at random, so that many are kept twice."""
    total, per_frame, width, n, k = shape
    tokens = torch.randn(total, per_frame, width, dtype=dtype, requires_grad=True)
    newline = torch.randn(width, dtype=dtype, requires_grad=True)
    return tokens, torch.randint(total, (n,)), torch.randint(per_frame, (n, k)), newline


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(forget, reference.forget, *make(shape, dtype))


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier(dtype: torch.dtype, tier: str) -> None:
    with cpu_tier(tier):
        assert_matches_reference(forget, reference.forget, *make((9, 8, 83, 5, 7), dtype))


def test_position_ids_count_the_whole_memory() -> None:
    tokens, _, _, newline = make((4, 6, 3, 0, 0), torch.float32)
    every = torch.arange(6).expand(4, -1)
    kept, position_ids = forget(tokens, torch.arange(4), every, newline)
    assert position_ids.flatten().tolist() == list(range(4 * 7))
    torch.testing.assert_close(kept[:, :6], tokens, rtol=0, atol=0)


def test_reads_only_what_it_keeps() -> None:
    tokens, _, _, newline = make((4, 6, 3, 0, 0), torch.float32)
    poisoned = tokens.detach().clone()
    poisoned[0] = poisoned[:, 0] = torch.nan
    kept, _ = forget(poisoned, torch.tensor([3, 1]), torch.tensor([[1, 5], [2, 4]]), newline)
    assert kept.isfinite().all()


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *args: forget(*args)[0], make((3, 4, 3, 5, 3), torch.float64))


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    tokens, frames, patches, newline = make((3, 4, 3, 5, 2), torch.float32)
    torch.library.opcheck(ops.forget.default, (tokens, frames, patches, newline))
    torch.library.opcheck(ops.forget_backward.default, (torch.randn(5, 3, 3), frames, patches, 3, 4))


def test_compile_fullgraph() -> None:
    assert_compiles_fullgraph(forget, *make((3, 4, 3, 5, 2), torch.float32))


def test_another_length_is_not_compiled_anew() -> None:
    videos = [make((frames, 4, 3, 5, 2), torch.float32) for frames in (30, 50, 70, 90)]
    assert count_compilations(forget, videos) == 2  # once for the first length, once for all


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(forget, *make((300, 16, 40, 500, 9), dtype))


def test_bad_arguments() -> None:
    tokens, frames, patches, newline = make((3, 4, 3, 5, 2), torch.float32)
    with pytest.raises(RuntimeError, match=r"tokens must be \(T, N, C\), got shape \(3, 4\)"):
        forget(tokens[..., 0], frames, patches, newline)
    with pytest.raises(RuntimeError, match=r"frames must be \(n,\)"):
        forget(tokens, frames[:, None], patches, newline)
    with pytest.raises(RuntimeError, match=r"patches must be \(n, k\)"):
        forget(tokens, frames, patches[0], newline)
    with pytest.raises(RuntimeError, match=r"newline must be \(C,\)"):
        forget(tokens, frames, patches, newline[None])
    with pytest.raises(RuntimeError, match="frames must be int64"):
        forget(tokens, frames.int(), patches, newline)
    with pytest.raises(RuntimeError, match="patches must be int64"):
        forget(tokens, frames, patches.int(), newline)
    with pytest.raises(RuntimeError, match="newline must have the dtype of tokens"):
        forget(tokens, frames, patches, newline.double())
    with pytest.raises(RuntimeError, match="newline must be as wide as a token, got 2 for 3"):
        forget(tokens, frames, patches, newline[1:])
    with pytest.raises(RuntimeError, match="one row per kept frame, got 5 for 4 frames"):
        forget(tokens, frames[1:], patches, newline)
    with pytest.raises(RuntimeError, match="tokens must be float32, float16, bfloat16 or float64"):
        forget(tokens.int(), frames, patches, newline.int())


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_indices_out_of_range(bad: int) -> None:
    tokens, frames, patches, newline = make((5, 5, 3, 6, 2), torch.float32)
    outside = torch.full_like(frames, bad), torch.full_like(patches, bad)
    with pytest.raises(RuntimeError, match=rf"frames must be in \[0, 5\), got {bad}"):
        forget(tokens, outside[0], patches, newline)
    with pytest.raises(RuntimeError, match=rf"patches must be in \[0, 5\), got {bad}"):
        forget(tokens, frames, outside[1], newline)


def test_bad_backward_arguments() -> None:
    backward = torch.ops.hourllava_ext.forget_backward
    _, frames, patches, _ = make((3, 4, 3, 5, 2), torch.float32)
    with pytest.raises(RuntimeError, match=r"grad must have shape \(5, 3, any\), got \(5, 2, 3\)"):
        backward(torch.randn(5, 2, 3), frames, patches, 3, 4)
    with pytest.raises(RuntimeError, match=r"forget_backward: frames must be in \[0, 0\)"):
        backward(torch.randn(5, 3, 3), frames, patches, 0, 4)
