# SPDX-License-Identifier: Apache-2.0
"""MemAug in plain torch, as the original computes it: what its kernels are held against, on every device."""

import torch

from hourllava.memory.pages import join_layouts, video_layout
from hourllava.model import tiny_config
from hourllava.model.memaug import MemAug, rotary_frequencies
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
    """The original's block in plain torch, one sample and one head at a time."""
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
