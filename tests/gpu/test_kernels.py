# SPDX-License-Identifier: Apache-2.0
"""Every operator through its GPU kernels, against the reference: values and every gradient, by the error rule."""

from typing import Any

import pytest
import torch
from tools import assert_matches_reference, frequencies, leaf, on, run
from torch import Tensor

import hourllava_ext
from hourllava_ext import reference


@pytest.mark.parametrize(
    "shape",
    [(6, 9, 33, 5, 3), (5, 7, 3, 20, 7), (4, 70, 48, 40, 34), (3, 4, 5, 0, 2), (3, 4, 5, 2, 0), (3, 4, 0, 2, 1)],
)
def test_forget(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    total, per_frame, width, n, k = shape
    args = leaf(total, per_frame, width, dtype=dtype), torch.randint(total, (n,)), torch.randint(per_frame, (n, k))
    assert_matches_reference(on(device, hourllava_ext.forget), reference.forget, *args, leaf(width, dtype=dtype))


# T, S, G, C.
GRIDS = [
    (2, 7, 3, 5),
    (1, 6, 4, 33),
    (2, 9, 4, 48),
    (2, 2, 5, 3),
    (3, 1, 2, 4),
    (2, 4, 1, 3),
    (1, 2, 3, 300),
    (0, 3, 2, 4),
]


@pytest.mark.parametrize("shape", GRIDS)
def test_pool_grid(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames, side, grid, width = shape
    patches = leaf(frames, side * side, width, dtype=dtype)
    assert_matches_reference(on(device, hourllava_ext.pool_grid), reference.pool_grid, patches, grid)


@pytest.mark.parametrize("shape", [(23, 65, 9), (11, 2064, 4), (5, 7, 9), (8, 3, 2), (6, 4, 1), (1, 5, 9), (0, 5, 9)])
def test_keyframe_score(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    frames, width, window = shape
    features = torch.randn(frames, width, dtype=dtype)
    features[frames // 2 : frames // 2 + 1] = 0
    assert_matches_reference(on(device, hourllava_ext.keyframe_score), reference.keyframe_score, features, window)


# M, C: vectors and single columns, in registers and beyond them, a last chunk of three rows, nothing.
ROWS = [(9, 48), (3, 33), (2, 4104), (2, 1031), (19, 8), (0, 8), (3, 0)]


@pytest.mark.parametrize("shape", ROWS)
def test_add_norm(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = [leaf(*size, dtype=dtype) for size in (shape, shape, shape[1:], shape[1:])]
    assert_matches_reference(on(device, hourllava_ext.add_norm), reference.add_norm, *args)


def test_add_norm_far_from_zero(device: str) -> None:
    x, residual, weight, bias = (leaf(*shape, dtype=torch.float32) for shape in ((2, 257), (2, 257), (257,), (257,)))
    with torch.no_grad():
        x[0] += 1000
        x[1], residual[1] = 3, -1
    args = x, residual, weight, bias
    assert_matches_reference(on(device, hourllava_ext.add_norm), reference.add_norm, *args)
    assert torch.equal(on(device, hourllava_ext.add_norm)(*args)[1], bias)


# M, H, D, F.
HEADS = [
    (1, 1, 2, 1),
    (19, 3, 10, 2),
    (33, 2, 128, 32),
    (3, 9, 48, 8),
    (2, 1, 601, 150),
    (5, 2, 6, 0),
    (0, 2, 8, 2),
    (4, 0, 8, 2),
]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", HEADS)
def test_rope(device: str, shape: tuple[int, ...], dtype: torch.dtype, inverse: bool) -> None:
    tokens, heads, width, count = shape
    # 5.6 million: the last position of a 24 hour memory.
    args = leaf(tokens, heads, width, dtype=dtype), torch.randint(0, 5_600_000, (tokens,)), frequencies(count)
    assert_matches_reference(on(device, hourllava_ext.rope), reference.rope, *args, inverse)


def test_rope_of_rows_that_are_not_aligned(device: str, dtype: torch.dtype) -> None:
    """What can be read sixteen bytes at a time and what cannot is turned alike."""
    rows, where = torch.randn(5, 3, 48, dtype=dtype), torch.randint(0, 5_600_000, (5,))
    aligned = on(device, hourllava_ext.rope)(rows, where, frequencies(8))
    shifted = torch.empty(rows.numel() + 1, dtype=dtype, device=device)[1:].view(rows.shape).copy_(rows)
    turned = hourllava_ext.rope(shifted, where.to(device), frequencies(8).to(device))
    assert torch.equal(turned.cpu(), aligned)


def test_rope_copies_what_does_not_turn(device: str) -> None:
    x = torch.randn(3, 2, 2, 12)[:, 0]
    x[..., 8:] = torch.tensor([torch.inf, -torch.inf, 0.5, torch.nan])
    turned = on(device, hourllava_ext.rope)(x, torch.arange(3), frequencies(4))
    torch.testing.assert_close(turned[..., 8:], x[..., 8:], rtol=0, atol=0, equal_nan=True)
    assert turned[..., :8].isfinite().all()


# S, M, H, D.
PARTS = [
    (3, 5, 2, 33),
    (1, 20, 3, 8),
    (2, 3, 2, 304),
    (2, 1, 1, 1),
    (0, 4, 2, 3),
    (2, 0, 2, 3),
]


@pytest.mark.parametrize("shape", PARTS)
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


# M, Hkv, D, F, P, S.
WRITES = [
    (37, 2, 10, 3, 5, 16),
    (63, 1, 48, 12, 2, 128),
    (9, 3, 128, 32, 12, 1),
    (20, 6, 208, 16, 2, 19),
    (1, 2, 7, 0, 1, 63),
    (0, 2, 8, 2, 3, 4),
]


@pytest.mark.parametrize("shape", WRITES)
def test_page_write(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = page_rows(shape, dtype)
    assert_matches_reference(on(device, hourllava_ext.page_write), reference.page_write, *args)


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


def test_rows_of_the_pages_themselves(device: str, dtype: torch.dtype) -> None:
    """Moved by one row, they are taken as they were before any was written."""
    args = [a.detach().to(device) if isinstance(a, Tensor) else a for a in page_rows((40, 2, 16, 0, 3, 16), dtype)]
    moved, copied = ([*hourllava_ext.page_write(*args)] for _ in range(2))
    slots, where = torch.arange(17, 32, device=device), args[2][:15]
    for pools, taken in ((moved, lambda rows: rows), (copied, torch.clone)):
        rows = [taken(p[1, :, :15].transpose(0, 1)) for p in pools[:2]]
        hourllava_ext.page_write_(*rows, where, slots, args[4], *pools)
    for ours, theirs in zip(moved, copied, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="key_pages and value_pages are written in place and must not share memory"):
        hourllava_ext.page_write_(*args[:5], moved[0], moved[0], *moved[2:])


def test_page_write_splits(device: str, dtype: torch.dtype) -> None:
    """Keys and values as one product gives them, heads of both side by side."""
    key, value, *rest = page_rows((21, 3, 32, 8, 3, 16), dtype)
    fused = torch.stack([key.detach(), value.detach()], dim=1).to(device)
    rest = [a.to(device) if isinstance(a, Tensor) else a for a in rest]
    apart = hourllava_ext.page_write(key.detach().to(device), value.detach().to(device), *rest)
    for ours, other in zip(hourllava_ext.page_write(*fused.unbind(1), *rest), apart, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("mode", ["both", "rotated", "content"])
@pytest.mark.parametrize("shape", ["pages apart", "wide group", "wide heads", "many pages", "no pages"])
def test_retrieve(device: str, shape: str, dtype: torch.dtype, mode: str) -> None:
    tokens, pages, heads, width, count, page_size = {
        "pages apart": ((5, 9), (12, 7), (2, 1), 16, 4, 128),
        "wide group": ((3, 0, 21), (5, 4, 33), (7, 1), 10, 2, 7),
        "wide heads": ((3, 7), (21, 5), (4, 2), 200, 32, 16),
        "many pages": ((2, 20), (300, 66), (8, 2), 20, 4, 16),
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
    query, *args, summary, table, lengths = retrieval((5, 9), (12, 7), (2, 1), 16, 4, 8, torch.float32)
    # A query of zeros weighs all pages alike, to the bit, in whatever order a product is summed.
    nothing = torch.zeros_like(query)
    shorter = on(device, hourllava_ext.retrieve)(nothing, *args, summary, table, torch.full_like(lengths, 7), 3)
    for row, best in zip(table, shorter, strict=True):
        assert best.tolist() == row[row >= 0].sort().values[:3].tolist()


def test_retrieve_whatever_the_order_of_the_table(device: str) -> None:
    *args, table, lengths = retrieval((5, 9), (12, 70), (2, 1), 16, 4, 8, torch.float32)
    # A page that a sample lists twice is two entries.
    table[0, (table[0] < 0).nonzero()[0]] = table[0].max()
    expected = reference.retrieve(*args, table, lengths, 7)
    for order in (torch.arange(table.shape[1]), torch.randperm(table.shape[1])):
        assert torch.equal(on(device, hourllava_ext.retrieve)(*args, table[:, order], lengths, 7), expected)


def test_unsupported_is_an_error(device: str) -> None:
    tokens, newline = torch.randn(3, 4, 5), torch.randn(4)
    picks = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="newline must"):
        on(device, hourllava_ext.forget)(tokens, *picks, newline)
    with pytest.raises(RuntimeError, match="newline must have the dtype of tokens"):
        on(device, hourllava_ext.forget)(tokens, *picks, torch.randn(5).half())
    with pytest.raises(RuntimeError, match="forget: on a GPU tokens must be float32"):
        on(device, hourllava_ext.forget)(tokens.double(), *picks, torch.randn(5).double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: tensors on two devices are NOT TESTED")
def test_tensors_apart_are_an_error(device: str) -> None:
    x, where = torch.randn(2, 1, 4, device=device), torch.arange(2)
    with pytest.raises(RuntimeError, match="rope: position_ids must be on the device of x"):
        hourllava_ext.rope(x, where, frequencies(1).to(device))
