# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_error_rule,
    assert_matches_reference,
    assert_repeatable,
    count_compilations,
    cpu_tier,
)
from torch import Tensor

from hourllava_ext import page_write, page_write_, reference


@dataclass
class Shape:
    tokens: int = 37
    heads: int = 2
    width: int = 10
    frequencies: int = 3
    pages: int = 5
    page_size: int = 16


SHAPES = [
    Shape(),
    Shape(tokens=1000, heads=1, width=48, frequencies=12, pages=9, page_size=128),
    Shape(tokens=63, heads=3, width=128, frequencies=32, pages=70, page_size=1),
    Shape(tokens=1, width=7, frequencies=0, pages=1, page_size=63),
    Shape(tokens=0),
    Shape(tokens=0, pages=0),
    Shape(tokens=3, heads=0),
]


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of `page_write`; the slots are drawn without order, so pages fill with gaps."""
    key, value = (
        torch.randn(shape.tokens, shape.heads, shape.width, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    slots = torch.randperm(shape.pages * shape.page_size)[: shape.tokens]
    inv_freq = 10000.0 ** -(torch.arange(shape.frequencies) / max(shape.frequencies, 1))
    position_ids = torch.randint(0, 5_600_000, (shape.tokens,))
    return [key, value, position_ids, slots, inv_freq, shape.pages, shape.page_size]


def empty_pools(shape: Shape, dtype: torch.dtype, fill: float = 0.0) -> list[Tensor]:
    pages = (shape.pages, shape.heads, shape.page_size, shape.width)
    wide = torch.promote_types(dtype, torch.float32)
    summary = torch.zeros(shape.pages, shape.heads, 3, shape.width, dtype=wide)
    lengths = torch.zeros(shape.pages, dtype=torch.int32)
    return [torch.full(pages, fill, dtype=dtype), torch.full(pages, fill, dtype=dtype), summary, lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_matches_reference(page_write, reference.page_write, *make(shape, dtype))


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier(dtype: torch.dtype, tier: str) -> None:
    shape = Shape(tokens=300, heads=2, width=83, frequencies=19, pages=9, page_size=64)
    with cpu_tier(tier):
        assert_matches_reference(page_write, reference.page_write, *make(shape, dtype))


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_more_values_than_a_cache_holds(tier: str) -> None:
    """They go past the caches, but no line of them gets lost, and no other is touched."""
    shape = Shape(tokens=2**15, heads=2, width=256, frequencies=16, pages=260, page_size=128)
    *rows, _, _ = make(shape, torch.bfloat16)
    pools = empty_pools(shape, torch.bfloat16, fill=torch.nan)
    with cpu_tier(tier), torch.no_grad():
        page_write_(*rows, *pools)
    values = pools[1].transpose(1, 2).flatten(0, 1)
    assert torch.equal(values[rows[3]], rows[1])
    assert values.isnan().sum() == (260 * 128 - shape.tokens) * shape.heads * shape.width


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_reference(dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    *rows, _, _ = make(shape, dtype)
    results = []
    for function, working in (
        (page_write_, dtype),
        (reference.page_write_, dtype),
        (reference.page_write_, torch.float64),
    ):
        given = [r.detach().to(working) if r.requires_grad else r for r in rows]
        pools = empty_pools(shape, working)
        with torch.no_grad():
            # Two calls: the second adds to pages that hold rows.
            for part in (slice(0, 400), slice(400, None)):
                function(*(g[part] for g in given[:4]), given[4], *pools)
        results.append(pools)
    for what, *values in zip(("keys", "values", "summary", "lengths"), *results, strict=True):
        assert_error_rule(*values, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouping_changes_nothing(dtype: torch.dtype) -> None:
    shape = Shape(tokens=300, heads=2, width=16, frequencies=4, pages=4, page_size=128)
    *rows, _, _ = make(shape, dtype)
    # Rows fill up in order, as a memory grows.
    rows = [r.detach() for r in rows]
    rows[3] = torch.arange(300)
    whole = page_write(*rows, shape.pages, shape.page_size)
    for step in (1, 7, 128, 299):
        pools = empty_pools(shape, dtype)
        for begin in range(0, 300, step):
            page_write_(*(r[begin : begin + step] for r in rows[:4]), rows[4], *pools)
        for ours, other in zip(pools, whole, strict=True):
            assert torch.equal(ours, other)


def test_in_place_leaves_the_rest_alone() -> None:
    shape = Shape(tokens=5)
    *rows, _, _ = make(shape)
    rows[3] = torch.tensor([16, 17, 18, 32, 33])
    pools = empty_pools(shape, torch.float32, fill=torch.nan)
    with torch.no_grad():
        page_write_(*rows, *pools)
    keys, values, summary, lengths = pools
    assert lengths.tolist() == [0, 3, 2, 0, 0]
    assert summary.isfinite().all()
    for pool in (keys, values):
        written = pool.isfinite().all(-1).all(1)
        assert written.nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]


def test_pool_beyond_32_bits() -> None:
    """A pool of more than 2^31 elements, written at both ends (untouched pages take no memory)."""
    width, page_size, count = 128, 128, 2**17 + 3
    keys, values = (torch.empty(count, 1, page_size, width, dtype=torch.bfloat16) for _ in range(2))
    assert keys.numel() > 2**31
    summary, lengths = torch.zeros(count, 1, 3, width), torch.zeros(count, dtype=torch.int32)
    rows, inv_freq = torch.randn(4, 1, width, dtype=torch.bfloat16), torch.ones(16)
    slots = torch.tensor([0, 2**16 * page_size + 1, (count - 1) * page_size, count * page_size - 1])
    for page in slots // page_size:
        keys[page] = 0
    page_write_(rows, rows, torch.zeros(4, dtype=torch.int64), slots, inv_freq, keys, values, summary, lengths)
    assert torch.equal(keys.flatten(0, 2)[slots], rows[:, 0])
    assert torch.equal(values.flatten(0, 2)[slots], rows[:, 0])
    assert lengths[slots // page_size].tolist() == [1, 2, 128, 128]
    assert torch.equal(summary[0, 0], rows[0].float().expand(3, width))


def test_heads_of_one_projection() -> None:
    shape = Shape()
    _, _, *rest = make(shape)
    both = torch.randn(shape.tokens, 2, shape.heads, shape.width)
    transposed = torch.randn(shape.tokens, shape.width, shape.heads).transpose(1, 2)
    for key, value in ((both[:, 0], both[:, 1]), (transposed, both[:, 0])):
        ours = page_write(key, value, *rest)
        for mine, plain in zip(ours, page_write(key.contiguous(), value.contiguous(), *rest), strict=True):
            assert torch.equal(mine, plain)


def test_gradcheck() -> None:
    args = make(Shape(tokens=6, pages=2, page_size=5), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: page_write(*a)[:2], args)


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    shape = Shape()
    args = make(shape)
    torch.library.opcheck(ops.page_write.default, args)
    rows = [a.detach() for a in args[:5]]
    torch.library.opcheck(ops.page_write_.default, (*rows, *empty_pools(shape, torch.float32)))
    torch.library.opcheck(ops.page_write_backward.default, (*empty_pools(shape, torch.float32)[:2], *rows[2:]))


def test_fullgraph() -> None:
    assert_compiles_fullgraph(page_write, *make(Shape()))


def test_another_length_is_not_compiled_anew() -> None:
    memories = [make(Shape(tokens=n, pages=n // 4)) for n in (100, 200, 300, 400)]
    assert count_compilations(page_write, memories) == 2  # once for the first length, once for all


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(page_write, *make(SHAPES[1], dtype))


def test_bad_rows() -> None:
    good = dict(zip(inspect.signature(page_write).parameters, make(Shape()), strict=True))
    key, value, position_ids, slots, inv_freq, *_ = good.values()

    def error(message: str, **changed: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            page_write(**(good | changed))

    error(r"key must be \(M, Hkv, D\), got shape \(37, 2\)", key=key[..., 0])
    error("value must have the shape of key", value=value[1:])
    error("value must have the dtype of key", value=value.bfloat16())
    error("key must be float32, float16, bfloat16 or float64", key=key.int(), value=value.int())
    error(r"position_ids must be \(M,\)", position_ids=position_ids[None])
    error(r"slots must be \(M,\)", slots=slots[None])
    error(r"inv_freq must be \(F,\)", inv_freq=inv_freq[None])
    error("position_ids must be int64", position_ids=position_ids.int())
    error("slots must be int64", slots=slots.int())
    error("inv_freq must be float32", inv_freq=inv_freq.double())
    error("slots must have one entry per token, got 36 for 37", slots=slots[1:])
    error("position_ids must have one entry per token, got 36 for 37", position_ids=position_ids[1:], slots=slots[1:])
    error(r"rotates 2 \* 6 dims, but a head has 10", inv_freq=torch.ones(6))
    error("num_pages must be at least 0 and page_size at least 1, got 5 and 0", page_size=0)
    error("num_pages must be at least 0 and page_size at least 1, got -1 and 16", num_pages=-1)
    for slot in (-1, 80):
        wrong = slots.clone()
        wrong[3] = slot
        error(rf"slots\[3\] is {slot}, but 5 pages of 16 rows have slots 0 to 79", slots=wrong)
    twice = slots.clone()
    twice[1] = twice[0]
    error(rf"slots\[1\] is {twice[0]} for a second time", slots=twice)


def test_bad_pools() -> None:
    shape = Shape()
    rows = [a.detach() for a in make(shape)[:5]]
    keys, values, summary, lengths = empty_pools(shape, torch.float32)

    def error(message: str, **changed: Tensor) -> None:
        pools = {"key_pages": keys, "value_pages": values, "key_summary": summary, "page_lengths": lengths}
        with pytest.raises(RuntimeError, match=message):
            page_write_(*rows, **(pools | changed))

    error(r"key_pages must be \(P, Hkv, S, D\)", key_pages=keys[0])
    error("value_pages must have the shape of key_pages", value_pages=values[1:])
    error("heads and the head size of key", key_pages=keys[..., 1:], value_pages=values[..., 1:])
    error(r"key_summary must be \(P, Hkv, 3, D\), got", key_summary=summary[0])
    error(r"key_summary must be \(P, Hkv, 3, D\) for the pages", key_summary=summary[:, :, :2])
    error(r"page_lengths must be \(P,\)", page_lengths=lengths[None])
    error("page_lengths must have one entry per page, got 4 for 5", page_lengths=lengths[1:])
    error("key_pages must have the dtype of key", key_pages=keys.double())
    error("value_pages must have the dtype of key", value_pages=values.double())
    error("page_lengths must be int32", page_lengths=lengths.long())
    error("key_summary must be float32", key_summary=summary.double())
    apart = values.transpose(2, 3).contiguous().transpose(2, 3)
    error("pools are written in place and must be contiguous", value_pages=apart)


def test_bad_gradients() -> None:
    shape = Shape()
    *_, position_ids, slots, inv_freq, _, _ = make(shape)
    keys, values, *_ = empty_pools(shape, torch.float32)
    backward = torch.ops.hourllava_ext.page_write_backward
    with pytest.raises(RuntimeError, match=r"grad_key_pages must be \(P, Hkv, S, D\)"):
        backward(keys[0], values, position_ids, slots, inv_freq)
    with pytest.raises(RuntimeError, match="grad_value_pages must have the shape of grad_key_pages"):
        backward(keys, values[1:], position_ids, slots, inv_freq)
    with pytest.raises(RuntimeError, match="grad_value_pages must have the dtype of grad_key_pages"):
        backward(keys, values.double(), position_ids, slots, inv_freq)
