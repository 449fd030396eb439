# SPDX-License-Identifier: Apache-2.0
"""MemAug: a video's kept tokens and the question's text look at each other, then at the whole memory (arXiv
2506.05332)."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import hourllava_ext as ext
from hourllava.memory.pages import PAGE_SIZE, MemoryPages, PageLayout
from hourllava.memory.sharding import gather_pages, own_pages, page_mass, sharded_attention

from .stream import QueryStream


@dataclass(frozen=True)
class PageBudget:
    """Which pages a block reads instead of all: those that `retrieve` chooses."""

    pages: int  # for each choice
    mode: str = "both"  # dims that score a page
    tile: int | None = None  # query rows that share a choice; None: all rows of a sample
    keep: Tensor | None = None  # (P,) bool, read whatever their score
    page_lengths: tuple[Tensor, ...] = ()  # of each process of a group; `keep` is then of all, in this order


@dataclass(frozen=True)
class MemoryUse:
    """How a forward pass reads the memory; the defaults are the paper's model."""

    use_memory: bool = True  # False drops the cross-attention term, keeping everything else
    budget: PageBudget | None = None  # None reads all
    mass_weight: Tensor | None = None  # (M,) weight of each query row in the returned attention mass
    group: dist.ProcessGroup | None = None  # processes that hold the other pages


def rotary_frequencies(config: PreTrainedConfig, device: torch.device) -> Tensor:
    """float32 (head_dim / 4,): only the first half of a MemAug head is rotated, with the decoder's base."""
    rotated = config.hidden_size // config.num_attention_heads // 2
    # A device's float32 powers are its own; rounded from float64, a memory's keys fit queries of another device.
    exponent = torch.arange(0, rotated, 2, dtype=torch.float64, device=device) / rotated
    return (config.rope_parameters["rope_theta"] ** -exponent).float()


class SelfAttention(nn.Module):
    """Non-causal attention among the queries of one sample, rotated at their own positions."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.Wqkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, stream: QueryStream, inv_freq: Tensor) -> Tensor:
        """Packed rows x (M, C) to (M, C)."""
        heads = self.Wqkv(x).view(len(x), -1, self.head_dim)
        turned, value = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        turned = ext.rope(turned, stream.position_ids, inv_freq)
        query, key = turned.split([self.heads, self.kv_heads], dim=1)
        out = _attend_within_samples(query, key, value, stream)
        return self.Wo(out.flatten(1))


class CrossAttention(nn.Module):
    """Attention of the queries to the pages of their sample's memory."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.Wq = nn.Linear(config.hidden_size, config.hidden_size)
        self.Wkv = nn.Linear(config.hidden_size, 2 * self.kv_heads * self.head_dim)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unrotated keys and values (rows, Hkv, D) of memory tokens (rows, C)."""
        key, value = self.Wkv(tokens).view(len(tokens), 2, self.kv_heads, self.head_dim).unbind(1)
        return key, value

    def write(self, tokens: Tensor, layout: PageLayout, inv_freq: Tensor) -> MemoryPages:
        """Pages of memory tokens (rows, C) that lie as `layout` says; differentiable."""
        key, value = self.keys_values(tokens)
        written = ext.page_write(key, value, layout.position_ids, layout.slots, inv_freq, layout.num_pages, PAGE_SIZE)
        return MemoryPages(*written, page_table=layout.page_table)

    def forward(
        self, x: Tensor, stream: QueryStream, inv_freq: Tensor, pages: MemoryPages, use: MemoryUse
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed rows x (M, C) to (M, C), the log-sum-exp of their scores (H, M), and each page's share of the weighted
        rows' attention (P,) if asked for.
        """
        query = self.Wq(x).view(len(x), -1, self.head_dim)
        weight, bounds, table = use.mass_weight, stream.cu_seqlens, pages.page_table
        if use.budget is not None:
            bounds, table = self._retrieve(query, stream, inv_freq, pages, use.budget, use.group)
        where = (stream.position_ids, bounds, inv_freq)
        if use.group is not None:
            chosen = replace(pages, page_table=table)
            out, lse = sharded_attention(query, chosen, *where, use.group)
            mass = None if weight is None else page_mass(query, lse, chosen, *where, weight)
        else:
            memory = (pages.key_pages, pages.value_pages, table, pages.page_lengths)
            out, lse, *masses = ext.paged_attention(query, *memory, *where, mass_weight=weight)
            mass = masses[0] if masses else None
        if weight is not None and mass is not None:
            mass = mass * _share_of_sample(weight, bounds, stream.cu_seqlens)[:, None]
            # Holes count towards a page behind the last; picking the others would make the host wait for their number.
            count = len(pages.page_lengths)
            page = torch.where(table >= 0, table, count).to(torch.int64)
            # A row for each tile: added to one place at once, a GPU would round them in an order of its own.
            mass = mass.new_zeros(len(page), count + 1).scatter_add(1, page, mass).sum(0)[:count]
        return self.Wo(out.flatten(1)), lse, mass

    def _retrieve(
        self,
        query: Tensor,
        stream: QueryStream,
        inv_freq: Tensor,
        pages: MemoryPages,
        budget: PageBudget,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """Bounds (tiles + 1,) of the rows that choose together, and the pages that they have chosen (tiles, pages).

        With a group, the choice is that of one process with all pages, and what it gives of them lies here.
        """
        every = pages if group is None else gather_pages(pages, budget.page_lengths, group)
        bounds, table = _tiles(stream, every.page_table, budget.tile)
        where = (bounds, inv_freq, every.key_summary, table, every.page_lengths)
        chosen = ext.retrieve(query, stream.position_ids, *where, budget.pages, budget.keep, budget.mode)
        return bounds, chosen if group is None else own_pages(chosen, pages, budget.page_lengths, group)


class ResidualLayerNorm(nn.LayerNorm):
    """LayerNorm of a residual sum, in one pass over it; by its name transformers knows how a new one begins."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise x (M, C), or x + residual (M, C)."""
        if residual is None:
            return super().forward(x)
        return ext.add_norm(x, residual, self.weight, self.bias, self.eps)


class Block(GradientCheckpointingLayer):
    """Self-attention, cross-attention and MLP, each followed by the norm of its residual sum."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (ResidualLayerNorm(width) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        stream: QueryStream,
        inv_freq: Tensor,
        pages: MemoryPages,
        use: MemoryUse,
    ) -> tuple[Tensor, Tensor | None]:
        """`key_pages` and `value_pages` are those of `pages`: what gradients flow through must be an argument itself,
        or reentrant checkpointing does not see it.
        """
        attended = page_mass = None
        x = self.norm1(x, self.self_attn(x, stream, inv_freq))
        if use.use_memory:
            pages = replace(pages, key_pages=key_pages, value_pages=value_pages)
            attended, _, page_mass = self.cross_attn(x, stream, inv_freq, pages, use)
        x = self.norm2(x, attended)
        return self.norm3(x, self.mlp(x)), page_mass


class MemAug(nn.Module):
    """The stack of blocks; every block reads the same tokens through its own keys and values."""

    def __init__(self, config: PreTrainedConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(depth))

    def write(self, tokens: Tensor, layout: PageLayout) -> list[MemoryPages]:
        """Every block's pages of memory tokens (rows, C)."""
        inv_freq = rotary_frequencies(self.config, tokens.device)
        return [block.cross_attn.write(tokens, layout, inv_freq) for block in self.blocks]

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.layers]

    def forward(
        self, x: Tensor, stream: QueryStream, pages: list[MemoryPages], use: MemoryUse = MemoryUse()
    ) -> tuple[Tensor, Tensor | None]:
        """Augment packed queries.

        Args:
            x: (M, C) queries of all samples end to end.
            stream: their positions and bounds.
            pages: one entry a block.
            use: how to read them.

        Returns:
            (M, C), and with `use.mass_weight` the share of attention that each page of the pool received in each block,
            averaged over heads and weighted rows: (blocks, P).
        """
        inv_freq = rotary_frequencies(self.config, x.device)
        masses = []
        for block, own in zip(self.blocks, pages, strict=True):
            x, page_mass = block(x, own.key_pages, own.value_pages, stream, inv_freq, own, use)
            masses.append(page_mass)
        return x, None if masses[0] is None else torch.stack(masses)


def _tiles(stream: QueryStream, table: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Bounds (tiles + 1,) of tiles of at most `size` rows of one sample, and each tile's row of the table."""
    if size is None:
        return stream.cu_seqlens, table
    # The host knows how many there are; where they begin, the device finds without it.
    total = sum(-(-length // size) for length in stream.lengths)
    starts, counts = stream.cu_seqlens[:-1], -(-stream.cu_seqlens.diff() // size)
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    number = torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[owner]
    return torch.cat([starts[owner] + number * size, stream.cu_seqlens[-1:]]), table[owner]


def _share_of_sample(weight: Tensor, bounds: Tensor, samples: Tensor) -> Tensor:
    """How much of its sample's weight of rows each tile has, (tiles,): what a mean over its rows counts."""
    total = torch.cat([weight.new_zeros(1, dtype=torch.float64), weight.double().cumsum(0)])
    of_tile = total[bounds[1:]] - total[bounds[:-1]]
    of_sample = total[samples[1:]] - total[samples[:-1]]
    owner = torch.searchsorted(samples[1:-1].contiguous(), bounds[:-1].contiguous(), right=True)
    return torch.where(of_tile > 0, of_tile / of_sample[owner], 0).to(weight.dtype)


def _attend_within_samples(query: Tensor, key: Tensor, value: Tensor, stream: QueryStream) -> Tensor:
    """Attention of packed rows (M, H, D) within each sample; no sample is padded to the length of another."""
    grouped = query.shape[1] != key.shape[1]
    lengths = [length for length in stream.lengths if length]
    alike = len(set(lengths)) == 1
    shape = (len(lengths), lengths[0]) if alike else (1, len(query))

    def to_batch(x: Tensor) -> Tensor:
        return x.view(*shape, *x.shape[1:]).transpose(1, 2)

    queries, keys, values = ([to_batch(x)] if alike else to_batch(x).split(lengths, 2) for x in (query, key, value))
    out = [
        F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat([o.transpose(1, 2).flatten(0, 1) for o in out])
