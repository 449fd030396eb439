# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules: the code of their README runs, and gives what plain torch and our own model give."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools import Called
from torch import nn
from torch.nn import functional as F

import hourllava.modules
from hourllava.errors import InputError
from hourllava.modules import Forgetting, FrameMemory, MemAug

CONFIG = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, memaug_depth=2)
PIECES = re.findall(r"```python\n(.*?)```", (Path(hourllava.modules.__file__).parent / "README.md").read_text(), re.S)


def rotate(x, ids):
    """Half of each head of x (rows, heads, D), as halves."""
    rotated = x.shape[-1] // 2
    frequency = CONFIG.rope_theta ** (-torch.arange(0, rotated, 2).float() / rotated)
    angle = torch.outer(ids.float(), frequency)[:, None]
    a, b, rest = x.split([rotated // 2, rotated // 2, rotated], dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


def attend(query, key, value):
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


class Resampler(nn.Module):
    """MemAug as the original computes it, in plain torch; holds the weights of a `MemAug`."""

    def __init__(self):
        super().__init__()
        self.layers = MemAug(CONFIG).layers

    def forward(self, x, memory, ids, memory_ids):
        heads, kv, dim = 4, 2, 16
        for block in self.layers:
            q, k, v = block.self_attn.Wqkv(x).view(-1, heads + 2 * kv, dim).split([heads, kv, kv], 1)
            x = block.norm1(x + block.self_attn.Wo(attend(rotate(q, ids), rotate(k, ids), v)))
            q = block.cross_attn.Wq(x).view(-1, heads, dim)
            k, v = block.cross_attn.Wkv(memory).view(-1, 2, kv, dim).unbind(1)
            x = block.norm2(x + block.cross_attn.Wo(attend(rotate(q, ids), rotate(k, memory_ids), v)))
            x = block.norm3(x + block.mlp(x))
        return x


def test_memaug_copies_nothing_from_the_host():
    """Not even the number of its rows: a GPU's host would wait, and no CUDA graph could hold it."""
    memaug = MemAug(CONFIG)
    with Called() as called:
        memaug(torch.randn(5, 64), torch.randn(300, 64))
    assert "hourllava_ext::paged_attention" in called.names
    assert "aten::lift_fresh" not in called.names


def test_readme_replaces_the_originals_resampler():
    inner = SimpleNamespace(vision_resampler=Resampler(), image_newline=torch.zeros(64))
    model = SimpleNamespace(config=CONFIG, model=inner)
    original = inner.vision_resampler
    exec(PIECES[0], {"model": model})
    assert type(inner.vision_resampler) is MemAug
    assert set(inner.vision_resampler.state_dict()) == set(original.state_dict())
    given = [torch.randn(300, 64), torch.randn(700, 64), torch.randint(0, 900, (300,)), torch.arange(700)]
    ours, theirs = inner.vision_resampler(*given), original(*given)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 2e-5


def test_readme_model_of_ones_own():
    frames, question = torch.randn(40, 64, 64, requires_grad=True), torch.randn(7, 64)
    names = {"config": CONFIG, "frames": frames, "question": question, "torch": torch}
    exec(PIECES[1], names)
    assert names["memory"].shape == (40 * 65, 64)
    assert names["augmented"].shape == (10 * 17, 64)
    # Every kept token is the memory's row of its id.
    kept = names["query_ids"][: 10 * 17]
    assert torch.equal(names["queries"][: 10 * 17], names["memory"][kept])
    names["augmented"].sum().backward()
    assert frames.grad.abs().sum() > 0
    assert names["remember"].image_newline.grad is not None


def test_gradients_are_those_of_plain_torch():
    original = Resampler()
    ours = MemAug(CONFIG)
    ours.load_state_dict(original.state_dict())
    gradients = []
    query, memory = torch.randn(30, 64), torch.randn(140, 64)
    for module in (ours, original):
        q, m = query.clone().requires_grad_(), memory.clone().requires_grad_()
        (module(q, m, torch.arange(30), torch.arange(140)) ** 3).sum().backward()
        gradients.append([q.grad, m.grad, *(p.grad for _, p in sorted(module.named_parameters()))])
    for mine, theirs in zip(*gradients, strict=True):
        assert float((mine - theirs).norm()) < 1e-4 * float(theirs.norm()) + 1e-6


def test_positions_count_from_zero_by_default():
    module = MemAug(CONFIG)
    query, memory = torch.randn(5, 64), torch.randn(9, 64)
    counted = module(query, memory, torch.arange(5), torch.arange(9))
    assert torch.equal(module(query, memory), counted)


def test_newlines_stand_behind_frames():
    module = FrameMemory(8)
    frames = torch.randn(3, 4, 8)
    rows, ids = module(frames)
    assert torch.equal(rows.view(3, 5, 8)[:, :4], frames)
    assert (rows.view(3, 5, 8)[:, 4] == module.image_newline).all()
    assert torch.equal(ids, torch.arange(15))
    assert list(module.state_dict()) == ["image_newline"]


def test_rules_of_forgetting():
    frames, newline = torch.randn(24, 16, 8), torch.randn(8)
    uniform = Forgetting()(frames, newline)[1]
    assert torch.equal(uniform, Forgetting()(frames, newline)[1])
    drawn = [Forgetting(spatial="random", seed=seed)(frames, newline)[1] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # The question is the mean of frame 13.
    chosen = Forgetting(temporal="question", temporal_ratio=24)(frames, newline, question=frames[13])[1]
    assert (chosen // 17 == 13).all()
    with pytest.raises(InputError, match="question"):
        Forgetting(temporal="question")(frames, newline)
    with pytest.raises(InputError, match="keyframe"):
        Forgetting(temporal="keyframe")(frames, newline)
