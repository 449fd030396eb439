# SPDX-License-Identifier: Apache-2.0
"""MemAug on its own: post-norm blocks, positions, evidence, compilation."""

from dataclasses import fields, replace

import pytest
import torch
from tools import assert_error_rule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hourllava.memory.pages import join_layouts, video_layout
from hourllava.model import tiny_config
from hourllava.model.memaug import MemAug, MemoryUse, PageBudget, rotary_frequencies
from hourllava.model.stream import QueryStream


def make_case(lengths=(7, 4), frames=(5, 3), dtype=torch.float32):
    config = tiny_config().text_config
    memaug = MemAug(config, 2).to(dtype)
    cpu = torch.device("cpu")
    layout = join_layouts([video_layout(count, 16, cpu) for count in frames], cpu)
    tokens = torch.randn(sum(frames) * 17, config.hidden_size, dtype=dtype)
    queries = torch.randn(sum(lengths), config.hidden_size, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    stream = QueryStream(torch.arange(sum(lengths)) * 3, bounds, list(lengths))
    return memaug, queries, stream, tokens, layout


def by_the_book(memaug, queries, stream, tokens, layout):
    """The block of SPEC A.5 in plain torch, one sample and one head at a time."""
    config = memaug.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    frequencies = rotary_frequencies(config, queries.device)

    def turn(x, positions):
        angle = (positions[:, None].float() * frequencies).to(torch.promote_types(x.dtype, torch.float32))
        cos, sin, half = angle.cos().to(x.dtype), angle.sin().to(x.dtype), len(frequencies)
        return torch.cat(
            [
                x[:, :half] * cos - x[:, half : 2 * half] * sin,
                x[:, half : 2 * half] * cos + x[:, :half] * sin,
                x[:, 2 * half :],
            ],
            dim=1,
        )

    def attend(query, key, value, at, key_at):
        out = []
        for head in range(heads):
            q = turn(query[:, head * width : (head + 1) * width], at)
            shared = head // (heads // kv_heads)
            own = slice(shared * width, (shared + 1) * width)
            weights = (q @ turn(key[:, own], key_at).T / width**0.5).softmax(-1)
            out.append(weights @ value[:, own])
        return torch.cat(out, dim=1)

    results = []
    owner = torch.repeat_interleave(torch.arange(len(stream.lengths)), torch.tensor(stream.lengths))
    for sample in range(len(stream.lengths)):
        x, at = queries[owner == sample], stream.position_ids[owner == sample]
        pages = layout.page_table[sample]
        mine = torch.isin(layout.slots // 128, pages[pages >= 0])
        memory, memory_at = tokens[mine], layout.position_ids[mine]
        for block in memaug.layers:
            q, k, v = block.self_attn.Wqkv(x).split([heads * width, kv_heads * width, kv_heads * width], dim=1)
            x = block.norm1(x + block.self_attn.Wo(attend(q, k, v, at, at)))
            k, v = block.cross_attn.Wkv(memory).split([kv_heads * width, kv_heads * width], dim=1)
            x = block.norm2(x + block.cross_attn.Wo(attend(block.cross_attn.Wq(x), k, v, at, memory_at)))
            x = block.norm3(x + block.mlp(x))
        results.append(x)
    return torch.cat(results)


@pytest.mark.parametrize("lengths", [(7, 4), (5, 5), (9,)])
def test_block_by_the_book(lengths):
    memaug, queries, stream, tokens, layout = make_case(lengths, (5, 3)[: len(lengths)], torch.float64)
    out, mass = memaug(queries, stream, memaug.write(tokens, layout))
    assert mass is None
    torch.testing.assert_close(out, by_the_book(memaug, queries, stream, tokens, layout), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_rule(dtype):
    memaug, queries, stream, tokens, layout = make_case((40, 23), (50, 9), dtype)
    ours, _ = memaug(queries, stream, memaug.write(tokens, layout))
    plain = by_the_book(memaug, queries, stream, tokens, layout)
    exact = by_the_book(memaug.double(), queries.double(), stream, tokens.double(), layout)
    assert_error_rule(ours, plain, exact)


def test_bfloat16_is_near_float32():
    memaug, queries, stream, tokens, layout = make_case()
    exact, _ = memaug(queries, stream, memaug.write(tokens, layout))
    memaug, queries, tokens = memaug.bfloat16(), queries.bfloat16(), tokens.bfloat16()
    rounded, _ = memaug(queries, stream, memaug.write(tokens, layout))
    assert rounded.dtype == torch.bfloat16
    assert float(((rounded.float() - exact).norm() / exact.norm()).detach()) < 0.02


def test_mass_is_the_share_of_attention():
    memaug, queries, stream, tokens, layout = make_case(lengths=(6,), frames=(40,))
    pages = memaug.write(tokens, layout)
    weight = torch.tensor([0, 0, 1.0, 0, 2, 0])
    out, mass = memaug(queries, stream, pages, MemoryUse(mass_weight=weight))
    assert mass.shape == (2, layout.num_pages)
    assert mass.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    plain, _ = memaug(queries, stream, pages)
    assert torch.equal(out, plain)
    # A page whose keys are far along the queries' direction takes all the attention.
    block = memaug.layers[0].cross_attn
    with torch.no_grad():
        block.Wq.weight.zero_()
        block.Wq.bias.fill_(1.0)
    frequencies = rotary_frequencies(memaug.config, queries.device)
    unrotated = pages[0].key_pages.data[..., 2 * len(frequencies) :]
    unrotated[:] = 0
    unrotated[3] = 100
    memaug.layers = memaug.layers[:1]
    _, mass = memaug(queries, stream, pages[:1], MemoryUse(mass_weight=weight))
    assert float(mass[0, 3]) > 0.999


def test_fullgraph_compile():
    memaug, queries, stream, tokens, layout = make_case()

    def run(queries, tokens):
        return memaug(queries, stream, memaug.write(tokens, layout))[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, tokens), run(queries, tokens))
    for function in (compiled, run):
        memaug.zero_grad()
        function(queries, tokens).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in memaug.parameters()]
        if function is compiled:
            expected = gradients
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("evidence", [False, True])
def test_nothing_waits_for_the_device(budget, evidence):
    """Tensors without data go through: what would make the host read one, or a shape depend on one, is an error."""
    memaug, queries, stream, tokens, layout = make_case((7, 4), (5, 3))
    pages = memaug.write(tokens, layout)
    pages_read = PageBudget(budget) if budget else None
    use = MemoryUse(budget=pages_read, mass_weight=torch.rand(len(queries)) if evidence else None)
    expected = memaug(queries, stream, pages, use)
    mode = FakeTensorMode()

    def without_data(value):
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value.detach())
        return value

    def each_without_data(data):
        return replace(data, **{f.name: without_data(getattr(data, f.name)) for f in fields(data)})

    args = (
        without_data(queries),
        each_without_data(stream),
        [each_without_data(own) for own in pages],
        each_without_data(use),
    )
    with mode:
        out, mass = MemAug(memaug.config, 2)(*args)
    assert out.shape == expected[0].shape
    assert mass is None if not evidence else mass.shape == expected[1].shape


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_backward_computes_no_attention_again():
    """It reads the output and the log-sum-exp that the forward kept; no score was kept, and none is made twice."""
    memaug, queries, stream, tokens, layout = make_case((30,), (60,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out, _ = memaug(queries, stream, memaug.write(tokens, layout))
    memory = len(tokens) * memaug.config.hidden_size  # the tokens themselves, which the key and value weights need
    assert max(kept) <= max(memory, max(p.numel() for p in memaug.parameters()))
    with Called() as called:
        out.sum().backward()
    attention = [name for name in called.names if "attention" in name]
    assert attention.count("hourllava_ext::paged_attention_backward") == len(memaug.layers)
    assert len(attention) == 2 * len(memaug.layers)
    assert all("backward" in name for name in attention), attention
