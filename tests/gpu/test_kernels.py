# SPDX-License-Identifier: Apache-2.0
"""Every operator through its GPU kernels, against the reference: values and every gradient, by the error rule."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from tools import assert_error_rule, assert_matches_reference, run
from torch import Tensor

import hourllava_ext
from hourllava_ext import reference

# Triton's interpreter gets bfloat16 wrong; compiled kernels are tested in it on a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of CPU tensors that computes on a device."""

    def move(value: Any, to: str) -> Any:
        return value.to(to) if isinstance(value, Tensor) else value

    def moved(*args: Any) -> Any:
        out = function(*(move(a, device) for a in args))
        return tuple(move(o, "cpu") for o in out) if isinstance(out, tuple) else move(out, "cpu")

    return moved


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def frequencies(count: int) -> Tensor:
    return 10000.0 ** -(torch.arange(count) / max(count, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(6, 9, 33, 5, 3), (5, 7, 3, 20, 7), (3, 4, 5, 0, 2), (3, 4, 5, 2, 0), (3, 4, 0, 2, 1)]
)
def test_forget(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    total, per_frame, width, n, k = shape
    args = leaf(total, per_frame, width, dtype=dtype), torch.randint(total, (n,)), torch.randint(per_frame, (n, k))
    assert_matches_reference(on(device, hourllava_ext.forget), reference.forget, *args, leaf(width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 3, 5), (1, 6, 4, 33), (2, 2, 5, 3), (3, 1, 2, 4), (2, 4, 1, 3), (0, 3, 2, 4)])
def test_pool_grid(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames, side, grid, width = shape
    patches = leaf(frames, side * side, width, dtype=dtype)
    assert_matches_reference(on(device, hourllava_ext.pool_grid), reference.pool_grid, patches, grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(23, 65, 9), (5, 7, 9), (8, 3, 2), (6, 4, 1), (1, 5, 9), (0, 5, 9)])
def test_keyframe_score(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames, width, window = shape
    features = torch.randn(frames, width, dtype=dtype)
    features[frames // 2 : frames // 2 + 1] = 0
    assert_matches_reference(on(device, hourllava_ext.keyframe_score), reference.keyframe_score, features, window)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1), (19, 3, 10, 2), (33, 2, 128, 32), (5, 2, 6, 0), (0, 2, 8, 2), (4, 0, 8, 2)]
)
def test_rope(device: str, shape: tuple[int, ...], dtype: torch.dtype, inverse: bool) -> None:
    tokens, heads, width, count = shape
    # 5.6 million: the last position of a 24 hour memory.
    args = leaf(tokens, heads, width, dtype=dtype), torch.randint(0, 5_600_000, (tokens,)), frequencies(count)
    assert_matches_reference(on(device, hourllava_ext.rope), reference.rope, *args, inverse)


def test_rope_copies_what_does_not_turn(device: str) -> None:
    x = torch.randn(3, 2, 2, 12)[:, 0]
    x[..., 8:] = torch.tensor([torch.inf, -torch.inf, 0.5, torch.nan])
    turned = on(device, hourllava_ext.rope)(x, torch.arange(3), frequencies(4))
    torch.testing.assert_close(turned[..., 8:], x[..., 8:], rtol=0, atol=0, equal_nan=True)
    assert turned[..., :8].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 2, 33), (1, 20, 3, 8), (2, 1, 1, 1), (0, 4, 2, 3), (2, 0, 2, 3)])
def test_merge_attention(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts, tokens, heads, _ = shape
    lse = (10 * torch.randn(parts, heads, tokens)).requires_grad_()
    args = leaf(*shape, dtype=dtype), lse
    assert_matches_reference(on(device, hourllava_ext.merge_attention), reference.merge_attention, *args)


def test_merge_of_parts_that_saw_nothing(device: str) -> None:
    out, lse = torch.randn(3, 2, 1, 4), torch.tensor([[[0.0, -torch.inf]], [[-torch.inf] * 2], [[1.0, -torch.inf]]])
    out[1] = out[:, 1] = torch.nan
    args = out.requires_grad_(), lse.requires_grad_()
    (merged, joint), gradients = run(on(device, hourllava_ext.merge_attention), args)
    torch.testing.assert_close(joint, lse.detach().logsumexp(0))
    assert not merged[1].any()
    assert all(g.isfinite().all() for g in gradients)
    assert not any(g[1].any() for g in gradients)


def page_rows(shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Arguments of `page_write`; the slots are drawn without order, so pages fill with gaps."""
    tokens, heads, width, count, pages, page_size = shape
    rows = [leaf(tokens, heads, width, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(pages * page_size)[:tokens]
    return [*rows, torch.randint(0, 5_600_000, (tokens,)), slots, frequencies(count), pages, page_size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(37, 2, 10, 3, 5, 16), (63, 1, 48, 12, 2, 128), (9, 3, 128, 32, 12, 1), (1, 2, 7, 0, 1, 63), (0, 2, 8, 2, 3, 4)],
)
def test_page_write(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = page_rows(shape, dtype)
    assert_matches_reference(on(device, hourllava_ext.page_write), reference.page_write, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouping_of_page_writes_changes_nothing(device: str, dtype: torch.dtype) -> None:
    key, value, positions, _, inv_freq, *_ = (
        a.detach().to(device) if isinstance(a, Tensor) else a for a in page_rows((40, 2, 16, 4, 3, 16), dtype)
    )
    slots = torch.arange(40, device=device)
    whole = hourllava_ext.page_write(key, value, positions, slots, inv_freq, 3, 16)
    pools = [torch.full_like(p, torch.nan) for p in whole[:2]] + [torch.zeros_like(p) for p in whole[2:]]
    for part in (slice(0, 1), slice(1, 18), slice(18, 40)):
        hourllava_ext.page_write_(key[part], value[part], positions[part], slots[part], inv_freq, *pools)
    assert pools[0][2, :, 8:].isnan().all()
    for ours, other in zip(pools, whole, strict=True):
        assert torch.equal(ours.nan_to_num(0), other)


@pytest.mark.parametrize("mode", ["both", "rotated", "content"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["pages apart", "wide group", "no pages"])
def test_retrieve(device: str, shape: str, dtype: torch.dtype, mode: str) -> None:
    tokens, pages, heads, width, count, page_size = {
        "pages apart": ((5, 9), (12, 7), (2, 1), 16, 4, 128),
        "wide group": ((3, 0, 21), (5, 4, 33), (7, 1), 10, 2, 7),
        "no pages": ((4, 6), (0, 40), (4, 2), 128, 32, 16),
    }[shape]
    args = retrieval(tokens, pages, heads, width, count, page_size, dtype)
    keep = torch.rand(len(args[-1])) < 0.1
    for budget, kept in ((1, None), (4, keep), (1000, keep)):
        ours = on(device, hourllava_ext.retrieve)(*args, budget, kept, mode)
        assert torch.equal(ours, reference.retrieve(*args, budget, kept, mode))


def retrieval(tokens, pages, heads, width, count, page_size, dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Arguments of `retrieve`: summaries of pages that differ as scenes do, in tables with holes and an empty page."""
    total = sum(pages) + 1
    lengths = torch.randint(1, page_size + 1, (total,), dtype=torch.int32)
    lengths[-1] = 0
    middle, spread = 3 * torch.randn(total, heads[1], 1, width), torch.rand(total, heads[1], 1, width)
    summary = torch.cat([middle, middle - spread, middle + spread], 2)
    summary[-1] = torch.nan
    listed = max(pages) + 3
    table = torch.full((len(pages), listed), -1, dtype=torch.int32)
    order = torch.randperm(total - 1).tolist()
    for row, n in enumerate(pages):
        mine, order = [*order[:n], total - 1], order[n:]
        table[row, torch.randperm(listed)[: n + 1]] = torch.tensor(mine, dtype=torch.int32)
    query = torch.randn(sum(tokens), heads[0], width).to(dtype)
    cu_seqlens = torch.tensor([0, *tokens]).cumsum(0)
    where = torch.randint(0, 5_600_000, (len(query),))
    return [query, where, cu_seqlens, frequencies(count), summary, table, lengths]


def test_retrieve_ties_go_to_the_lower_page(device: str) -> None:
    *args, summary, table, lengths = retrieval((5, 9), (12, 7), (2, 1), 16, 4, 8, torch.float32)
    same = summary[:1].expand_as(summary)
    shorter = on(device, hourllava_ext.retrieve)(*args, same, table, torch.full_like(lengths, 7), 3)
    for row, best in zip(table, shorter, strict=True):
        assert best.tolist() == row[row >= 0].sort().values[:3].tolist()


# Tokens and pages of each sample, (Hq, Hkv), D, F, page size, holes.
ATTENTION = [
    ((5, 9), (2, 3), (2, 1), 16, 4, 128, 1),
    ((7, 0, 20), (3, 2, 5), (7, 1), 24, 5, 19, 2),
    ((13, 5), (0, 20), (8, 2), 64, 32, 1, 1),
    ((40,), (2,), (4, 4), 128, 32, 200, 0),
    ((3,), (9,), (1, 1), 256, 128, 16, 1),
    ((4,), (0,), (2, 1), 16, 4, 128, 1),
    ((0,), (3,), (2, 1), 16, 4, 16, 0),
]


def attention(case: tuple, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Arguments of `paged_attention`, and which rows of the pools are free (P, S)."""
    tokens, pages, (query_heads, key_heads), width, count, page_size, holes = case
    total = sum(pages) + 1
    lengths = torch.randint(0, page_size + 1, (total,), dtype=torch.int32)
    lengths[torch.rand(total) < 0.5] = page_size
    order = torch.randperm(total).tolist()
    free = torch.arange(page_size) >= lengths[:, None]
    free[order[-1]] = True
    listed = max(pages) + holes
    table = torch.full((len(pages), listed), -1, dtype=torch.int32)
    for row, n in enumerate(pages):
        mine, order = order[:n], order[n:]
        table[row, torch.randperm(listed)[:n]] = torch.tensor(mine, dtype=torch.int32)
    query = leaf(sum(tokens), query_heads, width, dtype=dtype)
    pools = [torch.randn(total, key_heads, page_size, width, dtype=dtype) for _ in range(2)]
    pools = [p.masked_fill(free[:, None, :, None], 0).requires_grad_() for p in pools]
    cu_seqlens = torch.tensor([0, *tokens]).cumsum(0)
    where = torch.randint(0, 5_600_000, (len(query),))
    return [query, *pools, table, lengths, where, cu_seqlens, frequencies(count)], free


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION, ids=repr)
def test_paged_attention(device: str, case: tuple, dtype: torch.dtype) -> None:
    args, free = attention(case, dtype)
    ours = on(device, hourllava_ext.paged_attention)
    assert_matches_reference(ours, reference.paged_attention, *args)
    # The NaN of free rows and free pages changes no bit, and gradients are exact zeros there.
    poisoned = [p.detach().masked_fill(free[:, None, :, None], torch.nan).requires_grad_() for p in args[1:3]]
    results = [run(ours, [args[0], *pools, *args[3:]]) for pools in (args[1:3], poisoned)]
    for clean, other in zip(*(outputs + gradients for outputs, gradients in results), strict=True):
        assert torch.equal(clean, other)
    for gradient in results[1][1][1:]:
        assert not gradient.masked_select(free[:, None, :, None]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_pages(device: str, dtype: torch.dtype) -> None:
    """Pages that several samples read, and one that a sample lists twice: gradients add up."""
    args, _ = attention(((5, 12, 9), (4, 4, 4), (2, 1), 16, 4, 20, 3), dtype)
    table = args[3]
    table[1] = table[0].flip(0)
    table[2, table[2] < 0] = table[0, table[0] >= 0][:3]
    table[0, (table[0] < 0).nonzero()[0]] = table[0].max()
    assert_matches_reference(on(device, hourllava_ext.paged_attention), reference.paged_attention, *args)


def test_split_pages(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries on many pages: each sample's pages are split, and the parts merged."""
    module = import_module("hourllava_ext.triton.paged_attention")
    monkeypatch.setattr(module, "splits_of", lambda shape, device: 3)
    args, _ = attention(((3, 2), (17, 2), (2, 1), 16, 4, 16, 1), torch.float16)
    assert_matches_reference(on(device, hourllava_ext.paged_attention), reference.paged_attention, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_order_changes_nothing(device: str, dtype: torch.dtype) -> None:
    (query, key, value, table, *rest), _ = attention(((12, 20), (5, 9), (2, 1), 16, 4, 16, 2), dtype)
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in table])
    ours = on(device, hourllava_ext.paged_attention)
    results = [run(ours, [query, key, value, t, *rest]) for t in (table, table, shuffled)]
    for other in results[1:]:
        for mine, theirs in zip(results[0][0] + results[0][1], other[0] + other[1], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in ATTENTION if 0 not in c[0]], ids=repr)
@pytest.mark.parametrize("few", [False, True])
def test_page_mass(device: str, case: tuple, dtype: torch.dtype, few: bool) -> None:
    args = [a.detach() for a in attention(case, dtype)[0]]
    weight = torch.rand(len(args[0]))
    if few:  # as the words of a question among its queries
        weight[: len(weight) * 2 // 3] = 0
    calls = [
        partial(on(device, hourllava_ext.paged_attention), *args, 0.1, weight),
        partial(reference.paged_attention, *args, 0.1, weight),
        partial(reference.paged_attention, *(a.double() if a.is_floating_point() else a for a in args), 0.1, weight),
    ]
    for what, *values in zip(("out", "lse", "mass"), *(call() for call in calls), strict=True):
        assert_error_rule(*values, what)
    *_, mass = on(device, hourllava_ext.paged_attention)(*args, 0.1, torch.zeros_like(weight))
    assert not mass.any()


def test_unsupported_is_an_error(device: str) -> None:
    args, _ = attention(ATTENTION[0], torch.float64)
    with pytest.raises(RuntimeError, match="query must be float32 or bfloat16 or float16"):
        on(device, hourllava_ext.paged_attention)(*args)
    tokens, newline = torch.randn(3, 4, 5), torch.randn(4)
    picks = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="newline must"):
        on(device, hourllava_ext.forget)(tokens, *picks, newline)
    with pytest.raises(RuntimeError, match="newline must have the dtype of tokens"):
        on(device, hourllava_ext.forget)(tokens, *picks, torch.randn(5).half())
