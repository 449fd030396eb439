# SPDX-License-Identifier: Apache-2.0
import inspect
from typing import Any

import pytest
import torch
from tools import DTYPES, assert_compiles_fullgraph, assert_compiles_once
from torch import Tensor

from hourllava_ext import page_write, reference, retrieve

MODES = ["both", "rotated", "content"]
# Tokens and pages of each sample, (Hq, Hkv), D, F, page size.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], int, int, int]] = [
    ((5, 9), (12, 7), (2, 1), 16, 4, 128),
    ((70,), (100,), (8, 1), 48, 12, 16),
    ((3, 0, 63), (5, 4, 33), (7, 1), 10, 2, 7),
    ((20, 6), (0, 40), (8, 4), 128, 32, 128),
    ((4,), (1,), (2, 2), 24, 0, 1),
]


def make(shape: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of `retrieve` up to the lengths: summaries of written pages, shuffled, with holes and an empty page."""
    tokens, pages, (query_heads, key_heads), width, frequencies, page_size = shape
    count = sum(pages) + 2
    inv_freq = 100.0 ** -(torch.arange(frequencies) / max(frequencies, 1))
    rows = torch.randint(1, page_size + 1, (count,))
    rows[-1] = 0
    slots = torch.cat([page * page_size + torch.arange(n) for page, n in enumerate(rows.tolist())])
    # Pages differ in their mean, as scenes do.
    key = torch.randn(len(slots), key_heads, width) + 2 * torch.randn(count, key_heads, width)[slots // page_size]
    key = key.to(dtype)
    positions = torch.randint(0, 5_600_000, (len(slots),))
    *_, summary, lengths = page_write(key, key, positions, slots, inv_freq, count, page_size)
    order = torch.randperm(count - 1).tolist()
    listed = max(pages) + 3
    table = torch.full((len(pages), listed), -1, dtype=torch.int32)
    for row, n in enumerate(pages):
        mine, order = [*order[:n], count - 1], order[n:]
        table[row, torch.randperm(listed)[: n + 1]] = torch.tensor(mine, dtype=torch.int32)
    query = torch.randn(sum(tokens), query_heads, width).to(dtype)
    where = torch.randint(0, 5_600_000, (len(query),))
    return [query, where, torch.tensor([0, *tokens]).cumsum(0), inv_freq, summary, table, lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_reference(shape: Any, mode: str, dtype: torch.dtype) -> None:
    args = make(shape, dtype)
    keep = torch.rand(len(args[-1])) < 0.1
    for budget in (1, 4, 1000):
        for kept in (None, keep):
            ours = retrieve(*args, budget, kept, mode)
            plain = reference.retrieve(*args, budget, kept, mode)
            assert ours.dtype == plain.dtype
            assert torch.equal(ours, plain)


def test_everything_fits() -> None:
    """With a budget for all, the table that comes back lists the same pages in order."""
    args = make(SHAPES[0])
    table, lengths = args[-2:]
    for row, all_of_them in zip(table, retrieve(*args, 1000), strict=True):
        pages = row[row >= 0].sort().values
        pages = pages[lengths[pages] > 0]
        assert all_of_them.tolist() == pages.tolist() + [-1] * (len(row) - len(pages))


def test_ties_go_to_the_lower_page() -> None:
    query, where, cu_seqlens, inv_freq, summary, table, lengths = make(SHAPES[0])
    summary = summary[:1].expand_as(summary)
    lengths = torch.full_like(lengths, 7)
    shorter = retrieve(query, where, cu_seqlens, inv_freq, summary, table, lengths, 3)
    for row, best in zip(table, shorter, strict=True):
        assert best.tolist() == row[row >= 0].sort().values[:3].tolist()


def test_table_order_changes_nothing() -> None:
    *args, table, lengths = make(SHAPES[1])
    flipped = retrieve(*args, table.flip(1), lengths, 9)
    assert torch.equal(flipped, retrieve(*args, table, lengths, 9))


def test_keep_wins_over_score() -> None:
    args = make(SHAPES[1])
    table, lengths = args[-2:]
    best = retrieve(*args, 1)
    others = table[(table >= 0) & (table != best) & (lengths[table] > 0)][:4]
    keep = torch.zeros(len(lengths), dtype=torch.bool)
    keep[others] = True
    assert retrieve(*args, 4, keep)[0].tolist() == sorted(others.tolist())
    assert retrieve(*args, 5, keep)[0].tolist() == sorted([*others.tolist(), best.item()])


def test_summaries_of_nothing() -> None:
    query, where, cu_seqlens, inv_freq, summary, table, lengths = make(SHAPES[0])
    # The summary of a page without rows is not read, nor one of a page that is not listed.
    summary[lengths == 0] = torch.nan
    shorter = retrieve(query, where, cu_seqlens, inv_freq, summary, table, lengths, 4)
    assert torch.equal(shorter, retrieve(query, where, cu_seqlens, inv_freq, summary.nan_to_num(0), table, lengths, 4))
    assert retrieve(query, where, cu_seqlens, inv_freq, summary, table, torch.zeros_like(lengths), 4).eq(-1).all()
    nobody = retrieve(query[:0], where[:0], cu_seqlens[:1], inv_freq, summary, table[:0], lengths, 4)
    assert nobody.shape == (0, 4)


def test_repeatable() -> None:
    args = make(SHAPES[1])
    before = torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            tables.append(retrieve(*args, 20))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(t, tables[0]) for t in tables)


def test_opcheck() -> None:
    args = make(SHAPES[0])
    torch.library.opcheck(torch.ops.hourllava_ext.retrieve.default, (*args, 4))
    keep = torch.rand(len(args[-1])) < 0.5
    torch.library.opcheck(torch.ops.hourllava_ext.retrieve.default, (*args, 4, keep, "content"))


def test_fullgraph() -> None:
    assert_compiles_fullgraph(retrieve, *make(SHAPES[0]), 4)


def test_compiles_once_for_tables_of_any_length() -> None:
    def quarter(*args: Tensor) -> Tensor:
        return retrieve(*args, args[5].shape[1] // 4 + 1)

    *args, table, lengths = make(SHAPES[0])
    assert_compiles_once(quarter, *([*args, table[:, :n], lengths] for n in (5, 8, 12)))


def test_export_asks_nothing_of_the_tables_length() -> None:
    class Few(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return retrieve(*args, 4)

    *args, table, lengths = make(SHAPES[0])
    width = {1: torch.export.Dim.AUTO}
    sizes = ((*[None] * len(args), width, None),)
    exported = torch.export.export(Few(), (*args, table, lengths), dynamic_shapes=sizes, strict=True)
    for n in (3, 9):
        short = (*args, table[:, :n], lengths)
        assert torch.equal(exported.module()(*short), retrieve(*short, 4))


def test_bad_arguments() -> None:
    good = dict(zip(inspect.signature(retrieve).parameters, [*make(SHAPES[0]), 4], strict=False))
    query, where, cu_seqlens, inv_freq, summary, table, lengths, _ = good.values()

    def error(message: str, **changed: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            retrieve(**(good | changed))

    error(r"query must be \(M, Hq, D\), got shape \(14, 2\)", query=query[..., 0])
    error("query must be float32, float16, bfloat16 or float64", query=query.int())
    error("position_ids must be int64", position_ids=where.int())
    error("position_ids must have one entry per query, got 13 for 14", position_ids=where[1:])
    error("inv_freq must be float32", inv_freq=inv_freq.double())
    error(r"rotates 2 \* 9 dims, but a head of query has 16", inv_freq=torch.ones(9))
    error(r"key_summary must be \(P, Hkv, 3, D\), got", key_summary=summary[0])
    error("with the head size of query", key_summary=summary[..., 1:])
    error("key_summary must be float32", key_summary=summary.double())
    error("multiple of key heads, got 2 and 3", key_summary=summary.repeat(1, 3, 1, 1))
    error(r"page_table must be \(B, W\)", page_table=table[0])
    error("page_table must be int32", page_table=table.long())
    error("page_lengths must have one entry per page, got 20 for 21", page_lengths=lengths[1:])
    error("cu_seqlens must have one entry more", cu_seqlens=cu_seqlens[1:])
    error("budget must be at least 1 page, got 0", budget=0)
    error('mode must be "both", "rotated" or "content", got "all"', mode="all")
    error(r"keep must be \(P,\)", keep=torch.zeros(1, 21, dtype=torch.bool))
    error("keep must be bool", keep=torch.zeros(21))
    error("keep must have one entry per page, got 20 for 21", keep=torch.zeros(20, dtype=torch.bool))


def test_bad_ranges() -> None:
    *args, table, lengths = make(SHAPES[0])

    def changed(tensor: Tensor, value: int) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    with pytest.raises(RuntimeError, match=r"page_table\[0, 0\] is 21, but page ids go from 0 to 20"):
        retrieve(*args, changed(table, 21), lengths, 4)
    with pytest.raises(RuntimeError, match=r"page_lengths\[0\] is -1"):
        retrieve(*args, table, changed(lengths, -1), 4)
    with pytest.raises(RuntimeError, match="cu_seqlens must go from 0"):
        retrieve(*args[:2], changed(args[2], 1), *args[3:], table, lengths, 4)
