# SPDX-License-Identifier: Apache-2.0
"""Paged attention through its GPU kernels, against the reference: values and every gradient, by the error rule."""

from functools import partial
from importlib import import_module

import pytest
import torch
from tools import assert_error_rule, assert_matches_reference, frequencies, leaf, on, run
from torch import Tensor

import hourllava_ext
from hourllava_ext import reference

HAS_CUDA_KERNELS = False  # Triton's serve every GPU.

# Tokens and pages of each sample, (Hq, Hkv), D, F, page size, holes.
ATTENTION = [
    ((5, 9), (2, 3), (2, 1), 16, 4, 128, 1),
    ((7, 0, 20), (3, 2, 5), (7, 1), 24, 5, 19, 2),
    ((13, 5), (0, 20), (8, 2), 64, 32, 1, 1),
    ((40,), (2,), (4, 4), 128, 32, 200, 0),
    ((33,), (9,), (1, 1), 256, 128, 16, 1),
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


def test_table_order_changes_nothing(device: str, dtype: torch.dtype) -> None:
    (query, key, value, table, *rest), _ = attention(((12, 20), (5, 9), (2, 1), 16, 4, 16, 2), dtype)
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in table])
    ours = on(device, hourllava_ext.paged_attention)
    results = [run(ours, [query, key, value, t, *rest]) for t in (table, table, shuffled)]
    for other in results[1:]:
        for mine, theirs in zip(results[0][0] + results[0][1], other[0] + other[1], strict=True):
            assert torch.equal(mine, theirs)


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
