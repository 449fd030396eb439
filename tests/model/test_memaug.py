# SPDX-License-Identifier: Apache-2.0
"""MemAug on its own: post-norm blocks, positions, evidence, compilation."""

from dataclasses import fields, replace
from decimal import Decimal

import pytest
import torch
from block_by_the_book import by_the_book, make_case
from tools import Called, assert_error_rule
from torch._subclasses.fake_tensor import FakeTensorMode

from hourllava.model import HourLlavaForConditionalGeneration, tiny_config
from hourllava.model.memaug import MemAug, MemoryUse, PageBudget, rotary_frequencies


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


@pytest.mark.parametrize(("heads", "base"), [(8, 1e6), (16, 1e4), (4, 5e5)])
def test_frequencies_are_the_same_on_every_device(heads, base):
    config = tiny_config().text_config
    config.hidden_size, config.num_attention_heads, config.rope_parameters["rope_theta"] = 1024, heads, base
    rotated = 1024 // heads // 2
    exact = [Decimal(base) ** (Decimal(-2 * i) / rotated) for i in range(rotated // 2)]
    # Rounded once: the float32 nearest to the exact value, which no device's pow of float32 promises.
    assert rotary_frequencies(config, torch.device("cpu")).tolist() == torch.tensor([float(f) for f in exact]).tolist()


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


@pytest.mark.parametrize("budget", [None, PageBudget(2), PageBudget(2, tile=3)])
@pytest.mark.parametrize("evidence", [False, True])
def test_nothing_waits_for_the_device(budget, evidence):
    """Tensors without data go through: what would make the host read one, or a shape depend on one, is an error."""
    memaug, queries, stream, tokens, layout = make_case((7, 4), (5, 3))
    pages = memaug.write(tokens, layout)
    use = MemoryUse(budget=budget, mass_weight=torch.rand(len(queries)) if evidence else None)
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
        out.sum().backward()
    assert out.shape == expected[0].shape
    assert mass is None if not evidence else mass.shape == expected[1].shape
    with Called() as called:
        memaug(queries, stream, pages, use)
    assert "aten::lift_fresh" not in called.names  # a tensor of numbers of the host: to copy them, it would wait


@pytest.mark.parametrize("budget", [None, 2])
def test_a_block_runs_on_the_operators(budget):
    """Rotary is one operator for queries and keys together, and each residual sum is normalised in one pass."""
    memaug, queries, stream, tokens, layout = make_case((30,), (60,))
    pages = memaug.write(tokens, layout)
    use = MemoryUse(budget=PageBudget(budget) if budget else None)
    with Called() as called:
        out, _ = memaug(queries, stream, pages, use)
    chosen = ["retrieve"] if budget else []
    block = ["rope", "add_norm", *chosen, "paged_attention", "add_norm", "add_norm"]
    ours = [name.split("::")[1] for name in called.names if name.startswith("hourllava_ext::")]
    assert ours == block * len(memaug.layers)
    assert not {"aten::cos", "aten::sin", "aten::native_layer_norm"} & set(called.names)
    with Called() as called:
        out.sum().backward()
    ours = [name.split("::")[1] for name in called.names if name.startswith("hourllava_ext::")]
    back = ["add_norm_backward", "add_norm_backward", "paged_attention_backward", "add_norm_backward", "rope"]
    assert [name for name in ours if name != "page_write_backward"] == back * len(memaug.layers)
    assert "aten::native_layer_norm_backward" not in called.names


def test_without_memory_a_norm_has_nothing_to_add():
    memaug, queries, stream, tokens, layout = make_case((5,), (3,))
    out, _ = memaug(queries, stream, memaug.write(tokens, layout), MemoryUse(use_memory=False))
    for block in memaug.layers:
        x = block.norm1(queries + block.self_attn(queries, stream, rotary_frequencies(memaug.config, queries.device)))
        queries = block.norm3(block.norm2(x) + block.mlp(block.norm2(x)))
    torch.testing.assert_close(out, queries)


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


def test_a_new_block_is_initialised_as_transformers_does():
    """A norm begins as the identity, whatever was in its memory."""
    model = HourLlavaForConditionalGeneration(tiny_config())
    norms = [m for block in model.model.vision_resampler.layers for m in (block.norm1, block.norm2, block.norm3)]
    for norm in norms:
        with torch.no_grad():
            norm.weight.fill_(torch.nan)
            norm.bias.fill_(torch.nan)
        model._init_weights(norm)
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any() for norm in norms)
