# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_matches_reference,
    assert_repeatable,
    cpu_tier,
    run,
)
from torch import Tensor

from hourllava_ext import paged_attention, reference


@dataclass
class Shape:
    """One packed batch: `tokens` and `pages` per sample; every sample lists its own pages."""

    tokens: tuple[int, ...] = (5, 9)
    pages: tuple[int, ...] = (2, 3)
    heads: tuple[int, int] = (2, 1)
    width: int = 16
    frequencies: int = 4
    page_size: int = 128
    free_pages: int = 1
    holes: int = 1


ODD = [
    Shape(),
    Shape(tokens=(63,), pages=(8,), heads=(2, 1), width=48, frequencies=12),
    Shape(tokens=(7, 0, 70), pages=(3, 2, 5), heads=(7, 1), width=24, frequencies=5, page_size=19),
    Shape(tokens=(33, 5), pages=(0, 40), heads=(8, 2), width=64, frequencies=32, page_size=1),
    Shape(tokens=(130,), pages=(2,), heads=(4, 4), width=128, frequencies=32, page_size=200),
    Shape(tokens=(10, 4, 9), pages=(6, 1, 2), heads=(8, 1), width=8, frequencies=0, page_size=65, holes=4),
    Shape(tokens=(3,), pages=(40,), heads=(1, 1), width=256, frequencies=128, page_size=16),
    Shape(tokens=(4,), pages=(0,), heads=(2, 1)),
    Shape(tokens=(0,), pages=(3,), heads=(2, 1)),
]


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Arguments up to `inv_freq`. Pages are shuffled, holes are strewn about; free rows and free pages hold NaN."""
    count, (query_heads, key_heads) = sum(shape.pages) + shape.free_pages, shape.heads
    lengths = torch.randint(0, shape.page_size + 1, (count,), dtype=torch.int32)
    lengths[torch.rand(count) < 0.5] = shape.page_size
    free = torch.arange(shape.page_size) >= lengths[:, None]
    order = torch.randperm(count).tolist()
    free[order[sum(shape.pages) :]] = True
    pool = (count, key_heads, shape.page_size, shape.width)
    key, value = (torch.randn(pool, dtype=dtype).masked_fill(free[:, None, :, None], torch.nan) for _ in range(2))
    listed = max(shape.pages, default=0) + shape.holes
    table = torch.full((len(shape.pages), listed), -1, dtype=torch.int32)
    for row, pages in enumerate(shape.pages):
        mine, order = order[:pages], order[pages:]
        table[row, torch.randperm(listed)[:pages]] = torch.tensor(mine, dtype=torch.int32)
    tokens = sum(shape.tokens)
    query = torch.randn(tokens, query_heads, shape.width, dtype=dtype)
    cu_seqlens = torch.tensor([0, *shape.tokens]).cumsum(0)
    inv_freq = 10000.0 ** -(torch.arange(shape.frequencies) / max(shape.frequencies, 1))
    for leaf in (query, key, value):
        leaf.requires_grad_()
    return [query, key, value, table, lengths, torch.randint(0, 5_600_000, (tokens,)), cu_seqlens, inv_freq]


def results(args: list[Any]) -> list[Tensor]:
    """Outputs, then gradients."""
    outputs, gradients = run(paged_attention, args)
    return outputs + gradients


def clean(args: list[Any]) -> list[Any]:
    """The same arguments with zeros instead of NaN, for the reference, whose gradients would turn NaN."""
    return [a.detach().nan_to_num(0).requires_grad_() if a.requires_grad else a for a in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD, ids=repr)
def test_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_matches_reference(paged_attention, reference.paged_attention, *clean(make(shape, dtype)))


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ODD[:7], ids=repr)
def test_every_tier(shape: Shape, dtype: torch.dtype, tier: str) -> None:
    """The lesser machines' kernels; the other tests run the best that this one has."""
    with cpu_tier(tier):
        args = clean(make(shape, dtype))
        assert_matches_reference(paged_attention, reference.paged_attention, *args)
        assert_repeatable(paged_attention, *args)


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
def test_every_float16_value(tier: str) -> None:
    """A query that sees one key gets its value, whatever its bits."""
    value = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(256, 1, 1, 256)
    each = torch.arange(256, dtype=torch.int32)
    zeros = torch.zeros(256, 1, 256, dtype=torch.float16)
    where = [each[:, None], torch.ones_like(each), each.long(), torch.arange(257), torch.ones(4)]
    with cpu_tier(tier):
        out, _ = paged_attention(zeros, zeros[:, :, None], value, *where)
    torch.testing.assert_close(out, value[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("group", [8, 7, 1])
def test_groups_and_widths(group: int, width: int) -> None:
    """Head widths in steps of 16 with the groups of the released models, in the type they run in."""
    shape = Shape(tokens=(9,), pages=(3,), heads=(2 * group, 2), width=width, frequencies=width // 4)
    assert_matches_reference(paged_attention, reference.paged_attention, *clean(make(shape, torch.bfloat16)))


@pytest.mark.parametrize("scale", [0.0, -0.2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale(dtype: torch.dtype, scale: float) -> None:
    args = clean(make(Shape(), dtype))
    ours, plain = (partial(f, scale=scale) for f in (paged_attention, reference.paged_attention))
    assert_matches_reference(ours, plain, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD, ids=repr)
def test_page_mass(shape: Shape, dtype: torch.dtype) -> None:
    args = clean(make(shape, dtype))
    weight = torch.rand(sum(shape.tokens), dtype=torch.promote_types(dtype, torch.float32))
    ours, plain = (partial(f, scale=0.1, mass_weight=weight) for f in (paged_attention, reference.paged_attention))
    exact = partial(reference.paged_attention, scale=0.1, mass_weight=weight.double())
    assert_matches_reference(ours, lambda *a: [plain, exact][a[0].dtype == torch.float64](*a), *args)


@pytest.mark.parametrize("weighing", [[0], [299], [150, 151], []])
def test_page_mass_of_few_rows(weighing: list[int]) -> None:
    """Of many rows those of a question weigh something: their mass alone, also where whole tiles weigh nothing."""
    args = clean(make(Shape(tokens=(300,), pages=(5,), heads=(4, 2))))
    weight = torch.zeros(300)
    weight[weighing] = torch.rand(len(weighing))
    ours, plain = (partial(f, scale=0.1, mass_weight=weight) for f in (paged_attention, reference.paged_attention))
    exact = partial(reference.paged_attention, scale=0.1, mass_weight=weight.double())
    assert_matches_reference(ours, lambda *a: [plain, exact][a[0].dtype == torch.float64](*a), *args)


def test_batch_without_samples() -> None:
    args = clean(make(Shape(tokens=(), pages=())))
    for function in (paged_attention, reference.paged_attention):
        shapes = [tuple(result.shape) for result in function(*args, mass_weight=torch.zeros(0))]
        assert shapes == [(0, 2, 16), (2, 0), (0, 1)]


def test_mass_adds_up() -> None:
    shape = Shape(tokens=(7, 3, 2), pages=(3, 5, 0), heads=(4, 2))
    args = make(shape)
    *_, mass = paged_attention(*args, mass_weight=torch.rand(12))
    torch.testing.assert_close(mass.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert not mass[args[3] < 0].any()
    assert not mass.requires_grad
    *_, mass = paged_attention(*args, mass_weight=torch.zeros(12))
    assert not mass.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_free_rows_are_not_read(dtype: torch.dtype) -> None:
    """The NaN of free rows and free pages changes no bit, and gradients are exact zeros there."""
    for shape in ODD[:6]:
        args = make(shape, dtype)
        poisoned = results(args)
        for mine, other in zip(poisoned, results(clean(args)), strict=True):
            assert torch.equal(mine, other)
        for pages, gradient in zip(args[1:3], poisoned[3:], strict=True):
            assert not gradient[pages.isnan()].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_order_changes_nothing(dtype: torch.dtype) -> None:
    query, key, value, table, *rest = make(Shape(tokens=(33, 60), pages=(9, 20), heads=(2, 1)), dtype)
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in table])
    ordered = results([query, key, value, table, *rest])
    for mine, other in zip(ordered, results([query, key, value, shuffled, *rest]), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_page_ids_mean_nothing(dtype: torch.dtype) -> None:
    """The same memory in other pages: equal up to the order of sums."""
    query, key, value, table, lengths, *rest = clean(make(Shape(tokens=(33, 60), pages=(9, 20)), dtype))
    order = torch.randperm(len(lengths))
    moved = torch.where(table < 0, table, order.argsort().to(torch.int32)[table.long()])
    outputs, gradients = run(paged_attention, [query, key, value, table, lengths, *rest])
    pools = [p.detach()[order].requires_grad_() for p in (key, value)]
    others = run(paged_attention, [query, *pools, moved, lengths[order], *rest])
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for mine, other in zip(outputs, others[0], strict=True):
        torch.testing.assert_close(other, mine, **tolerance)
    for mine, other in zip([gradients[0], *(g[order] for g in gradients[1:])], others[1], strict=True):
        torch.testing.assert_close(other, mine, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_pages(dtype: torch.dtype) -> None:
    """Pages that several samples read, and one that a sample lists twice: gradients add up."""
    shape = Shape(tokens=(5, 70, 9), pages=(4, 4, 4), heads=(2, 1), holes=3)
    args = clean(make(shape, dtype))
    table = args[3]
    table[1] = table[0].flip(0)
    table[2, table[2] < 0] = table[0, table[0] >= 0][:3]
    table[0, (table[0] < 0).nonzero()[0]] = table[0].max()
    assert_matches_reference(paged_attention, reference.paged_attention, *args)


def test_batch_of_nothing() -> None:
    query, key, value, table, lengths, positions, _, inv_freq = make(Shape(tokens=(0,)))
    cu_seqlens = torch.zeros(1, dtype=torch.int64)
    outputs, gradients = run(paged_attention, [query, key, value, table[:0], lengths, positions, cu_seqlens, inv_freq])
    assert [tuple(o.shape) for o in outputs] == [(0, 2, 16), (2, 0)]
    assert not any(g.any() for g in gradients)


def test_no_key() -> None:
    args = make(Shape(tokens=(4, 3), pages=(0, 2)))
    (out, lse), gradients = run(paged_attention, args)
    assert not out[:4].any()
    assert (lse[:, :4] == -torch.inf).all()
    assert not gradients[0][:4].any()
    args[4] = torch.zeros_like(args[4])
    (out, lse), gradients = run(paged_attention, args)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in gradients)


def test_strided_arguments() -> None:
    args = make(Shape())
    apart = [a.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for a in args[:3]]
    for mine, other in zip(results([*apart, *args[3:]]), results(args), strict=True):
        assert torch.equal(mine, other)


def test_long_memory() -> None:
    """More pages than one pass holds, and scores so far apart that most weights vanish."""
    args = clean(make(Shape(tokens=(40,), pages=(150,), heads=(2, 1), width=48, frequencies=12, page_size=128)))
    assert_matches_reference(partial(paged_attention, scale=3.0), partial(reference.paged_attention, scale=3.0), *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [Shape((600, 110), (10, 3)), Shape((2600, 60), (40, 4), page_size=3)], ids=repr)
def test_many_rows(few: Shape, dtype: torch.dtype) -> None:
    """Rows whose shares of gradients take megabytes, in waves that are the larger the more threads there are; samples
    of which each reads other pages of the same chunks.
    """
    shape = replace(few, heads=(8, 1), width=64, frequencies=16)
    args = clean(make(shape, dtype))
    pages = args[3][0, args[3][0] >= 0]
    args[3][1, (args[3][1] < 0).nonzero()[:5, 0]] = pages[::2][:5]
    assert_matches_reference(paged_attention, reference.paged_attention, *args)
    assert_repeatable(paged_attention, *args)


def test_pool_beyond_32_bits() -> None:
    """A pool of more than 2^31 elements, of which a few pages are touched (untouched pages take no memory)."""
    width, page_size, count = 128, 128, 2**17 + 3
    pools = [torch.empty(count, 1, page_size, width, dtype=torch.bfloat16) for _ in range(2)]
    assert pools[0].numel() > 2**31
    pages = torch.tensor([1, 2**16 + 1, 2**17 + 2])
    for pool in pools:
        pool[pages] = torch.randn(3, 1, page_size, width, dtype=torch.bfloat16)
    lengths = torch.zeros(count, dtype=torch.int32)
    lengths[pages] = page_size
    query, cu_seqlens = torch.randn(5, 2, width, dtype=torch.bfloat16), torch.tensor([0, 5])
    rest = (torch.arange(5), cu_seqlens, torch.ones(16))
    large = paged_attention(query, *pools, pages[None].int(), lengths, *rest)
    small = [p[pages] for p in pools]
    few = paged_attention(query, *small, torch.arange(3, dtype=torch.int32)[None], lengths[pages], *rest)
    for mine, other in zip(large, few, strict=True):
        assert torch.equal(mine, other)


def test_gradcheck() -> None:
    args = clean(make(Shape(tokens=(2, 3), pages=(2, 1), heads=(2, 1), width=8, page_size=3), torch.float64))
    args[3][1, args[3][1] < 0] = args[3][0].max()
    assert torch.autograd.gradcheck(paged_attention, args)


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    args = clean(make(Shape()))
    for weight in (None, torch.rand(14)):
        torch.library.opcheck(ops.paged_attention.default, (*args, 0.25, weight))
    args = [a.detach() for a in args]
    out, lse, _ = ops.paged_attention(*args, 0.25)
    torch.library.opcheck(ops.paged_attention_backward.default, (out, lse, *args, out, lse, 0.25))


def test_fullgraph() -> None:
    args = clean(make(Shape()))
    assert_compiles_fullgraph(paged_attention, *args)
    assert_compiles_fullgraph(partial(paged_attention, scale=0.5, mass_weight=torch.rand(14)), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [ODD[1], ODD[2]], ids=repr)
def test_repeatable(shape: Shape, dtype: torch.dtype) -> None:
    weight = torch.rand(sum(shape.tokens), dtype=torch.promote_types(dtype, torch.float32))
    assert_repeatable(partial(paged_attention, mass_weight=weight), *make(shape, dtype))


NAMES = ["query", "key_pages", "value_pages", "page_table", "page_lengths", "position_ids", "cu_seqlens", "inv_freq"]


def test_bad_arguments() -> None:
    good = dict(zip(NAMES, make(Shape()), strict=True))
    query, key, value, table, lengths, positions, cu_seqlens, inv_freq = good.values()

    def error(message: str, **changed: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            paged_attention(**(good | changed))

    error(r"query must be \(M, Hq, D\), got shape \(14, 2\)", query=query[..., 0])
    error(r"key_pages must be \(P, Hkv, S, D\)", key_pages=key[0])
    error("value_pages must have the shape of key_pages", value_pages=value[1:])
    error(r"page_table must be \(B, W\)", page_table=table[0])
    error(r"page_lengths must be \(P,\)", page_lengths=lengths[None])
    error(r"position_ids must be \(M,\)", position_ids=positions[None])
    error(r"cu_seqlens must be \(B \+ 1,\)", cu_seqlens=cu_seqlens[None])
    error(r"inv_freq must be \(F,\)", inv_freq=inv_freq[None])
    error("page_table must be int32", page_table=table.long())
    error("page_lengths must be int32", page_lengths=lengths.long())
    error("position_ids must be int64", position_ids=positions.int())
    error("cu_seqlens must be int64", cu_seqlens=cu_seqlens.int())
    error("inv_freq must be float32", inv_freq=inv_freq.double())
    error("key_pages must have the dtype of query", key_pages=key.double())
    error("value_pages must have the dtype of query", value_pages=value.bfloat16())
    error(
        "query must be float32, float16, bfloat16 or float64",
        query=query.int(),
        key_pages=key.int(),
        value_pages=value.int(),
    )
    error("position_ids must have one entry per query, got 13 for 14", position_ids=positions[1:])
    error("page_lengths must have one entry per page, got 5 for 6", page_lengths=lengths[1:])
    error(
        "cu_seqlens must have one entry more than page_table has rows, got 4 for 2",
        cu_seqlens=torch.tensor([0, 1, 2, 14]),
    )
    error(r"rotates 2 \* 9 dims, but a head of query has 16", inv_freq=torch.ones(9))
    error("multiple of key heads, got 2 and 3", key_pages=key.repeat(1, 3, 1, 1), value_pages=value.repeat(1, 3, 1, 1))
    error("same head size, got 8 and 16", query=query[..., :8])
    error(
        "multiple of 8 up to 256, got 12", query=query[..., :12], key_pages=key[..., :12], value_pages=value[..., :12]
    )
    error(
        "multiple of 8 up to 256, got 264",
        **{n: good[n].repeat(1, *[1] * (good[n].dim() - 2), 17)[..., :264] for n in NAMES[:3]},
    )
    error(r"mass_weight must be \(M,\)", mass_weight=torch.rand(1, 14))
    error("mass_weight must have one entry per query, got 13 for 14", mass_weight=torch.rand(13))
    error("mass_weight must be float32", mass_weight=torch.rand(14).double())


def test_bad_ranges() -> None:
    good = dict(zip(NAMES, make(Shape()), strict=True))

    def error(message: str, name: str, place: tuple[int, ...], value: int) -> None:
        wrong = good[name].clone()
        wrong[place] = value
        with pytest.raises(RuntimeError, match=message):
            paged_attention(**(good | {name: wrong}))

    error(r"page_table\[1, 2\] is 6, but page ids go from 0 to 5", "page_table", (1, 2), 6)
    error(r"page_table\[0, 1\] is -2, but page ids go from 0 to 5", "page_table", (0, 1), -2)
    error(r"page_lengths\[3\] is 129, but a page has 128 rows", "page_lengths", (3,), 129)
    error(r"page_lengths\[3\] is -1, but an empty page has 0 rows", "page_lengths", (3,), -1)
    error("cu_seqlens must go from 0 to the number of queries 14, got 1 to 14", "cu_seqlens", (0,), 1)
    error("cu_seqlens must go from 0 to the number of queries 14, got 0 to 13", "cu_seqlens", (2,), 13)
    error("cu_seqlens must not decrease, got 15 then 14", "cu_seqlens", (1,), 15)


def test_bad_gradients() -> None:
    args = [a.detach() for a in make(Shape())]
    out, lse, _ = torch.ops.hourllava_ext.paged_attention(*args, 0.25)

    def error(message: str, grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor] = (out, lse)) -> None:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hourllava_ext.paged_attention_backward(*grads, *args, *saved, 0.25)

    error("grad_out and out must have the shape of query", (out[1:], lse))
    error(r"grad_lse and lse must be \(Hq, M\)", (out, lse.T))
    error("grad_out must have the dtype of query", (out.double(), lse))
    error("out must have the dtype of query", (out, lse), (out.double(), lse))
    error("grad_lse and lse must be float32", (out, lse.double()))
