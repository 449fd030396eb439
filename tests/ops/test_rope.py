# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tools import CPU_TIERS, DTYPES, assert_compiles_fullgraph, assert_matches_reference, assert_repeatable, cpu_tier
from torch import Tensor

from hourllava_ext import reference, rope

SHAPES = [(1, 1, 2, 1), (7, 3, 10, 2), (63, 2, 128, 32), (5, 2, 6, 0), (0, 2, 8, 2), (4, 0, 8, 2)]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width, frequencies = shape
    x = torch.randn(tokens, heads, width, dtype=dtype, requires_grad=True)
    # 5.6 million: the last position of a 24 hour memory.
    position_ids = torch.randint(0, 5_600_000, (tokens,))
    inv_freq = 10000.0 ** -(torch.arange(frequencies) / max(frequencies, 1))
    return x, position_ids, inv_freq


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, inverse: bool) -> None:
    assert_matches_reference(rope, reference.rope, *make(shape, dtype), inverse)


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier(dtype: torch.dtype, tier: str) -> None:
    with cpu_tier(tier):
        assert_matches_reference(rope, reference.rope, *make((63, 2, 128, 27), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype: torch.dtype) -> None:
    _, position_ids, inv_freq = make((9, 2, 8, 2), dtype)
    heads_of_a_projection = torch.randn(9, 3, 2, 8, dtype=dtype)[:, 1]
    last_dim_apart = torch.randn(9, 8, 2, dtype=dtype).transpose(1, 2)
    for x in (heads_of_a_projection, last_dim_apart):
        torch.testing.assert_close(
            rope(x, position_ids, inv_freq), rope(x.contiguous(), position_ids, inv_freq), rtol=0, atol=0
        )


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
def test_float16_overflows_as_it_should(tier: str) -> None:
    """65520 is halfway to what the next float16 would be, and becomes infinity; what lies below, the largest number."""
    x, angles = torch.full((1, 1, 128), 65504, dtype=torch.float16), torch.linspace(0, 5e-4, 64)
    with cpu_tier(tier):
        out = rope(x, torch.ones(1, dtype=torch.int64), angles)
    torch.testing.assert_close(out, reference.rope(x, torch.ones(1), angles), rtol=0, atol=0)
    assert 0 < out.isinf().sum() < 64


@pytest.mark.parametrize("tier", CPU_TIERS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_tables_are_those_of_float64_rounded(dtype: torch.dtype, tier: str) -> None:
    """A day of tokens, both sides of every limit of a vector's arithmetic, numbers far beyond, and below zero."""
    limits = torch.tensor([0, 1, 6_500_000, 8_388_608, 2**24, 2**31, 2**40])
    near = (limits[:, None] + torch.arange(-3, 4)).flatten()
    position_ids = torch.cat([torch.randint(-5_700_000, 5_700_000, (4000,)), near])
    inv_freq = 10000.0 ** -(torch.arange(40) / 40)
    x = torch.zeros(len(position_ids), 1, 80, dtype=dtype)
    x[..., :40] = 1
    with cpu_tier(tier):
        table = rope(x, position_ids, inv_freq)[:, 0].double()
    angle = (position_ids.float()[:, None] * inv_freq).double()
    exact = torch.cat([angle.cos(), angle.sin()], dim=1)
    info = torch.finfo(dtype)
    # Half a unit of the last place, and the error before it was rounded: of float32 another half.
    allowed = exact.abs() * (info.eps / 2 + min(info.eps / 2, 4e-7)) + info.tiny * info.eps / 2
    assert ((table - exact).abs() <= allowed).all()


def test_inverse_returns() -> None:
    x, position_ids, inv_freq = make((63, 2, 16, 4), torch.float64)
    there = rope(x, position_ids, inv_freq)
    torch.testing.assert_close(rope(there, position_ids, inv_freq, inverse=True), x, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    args = make((5, 2, 10, 3), torch.float64)
    assert torch.autograd.gradcheck(rope, args)
    assert torch.autograd.gradgradcheck(rope, args)


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(inverse: bool) -> None:
    torch.library.opcheck(torch.ops.hourllava_ext.rope.default, (*make((7, 2, 10, 3), torch.float32), inverse))


def test_compile() -> None:
    assert_compiles_fullgraph(rope, *make((7, 2, 10, 3), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(rope, *make((1000, 2, 64, 16), dtype))


@pytest.mark.parametrize("tier", CPU_TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frequency_that_is_nan_spoils_no_other(dtype: torch.dtype, tier: str) -> None:
    """Not even one whose angles are beyond what the fast cosines take."""
    inv_freq = torch.tensor([1e9, torch.nan, *[1.0] * 20])
    args = torch.randn(3, 2, 48, dtype=dtype), torch.tensor([1000, 5_600_000, 3]), inv_freq
    with cpu_tier(tier):
        assert_matches_reference(rope, reference.rope, *args)


def test_bad_arguments() -> None:
    x, position_ids, inv_freq = make((7, 2, 10, 3), torch.float32)
    with pytest.raises(RuntimeError, match=r"x must be \(M, H, D\), got shape \(7, 2\)"):
        rope(x[..., 0], position_ids, inv_freq)
    with pytest.raises(RuntimeError, match=r"position_ids must be \(M,\)"):
        rope(x, position_ids[None], inv_freq)
    with pytest.raises(RuntimeError, match=r"inv_freq must be \(F,\)"):
        rope(x, position_ids, inv_freq[None])
    with pytest.raises(RuntimeError, match="position_ids must be int64"):
        rope(x, position_ids.int(), inv_freq)
    with pytest.raises(RuntimeError, match="inv_freq must be float32"):
        rope(x, position_ids, inv_freq.double())
    with pytest.raises(RuntimeError, match="one entry per token, got 6 for 7"):
        rope(x, position_ids[1:], inv_freq)
    with pytest.raises(RuntimeError, match=r"rotates 2 \* 6 dims, but a head of x has 10"):
        rope(x, position_ids, torch.ones(6))
    with pytest.raises(RuntimeError, match="x must be float32, float16, bfloat16 or float64"):
        rope(x.int(), position_ids, inv_freq)
