# SPDX-License-Identifier: Apache-2.0
"""One video's memory on several processes: each encodes, projects and keeps some of its frames.

Text, kept tokens, MemAug's own layers and the decoder are the same on all of them, and so is the loss. In training each
has one run of a video's frames, in a `ShardedMemory`, which grows, many. Processes that train are expected to average
gradients, as they do of different samples: what is computed of a process' own frames alone gets its gradients times the
number of processes, so that the mean is the sum.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import hourllava_ext as ext
from hourllava.errors import InputError
from hourllava.memory import MemoryPrefix
from hourllava.memory.pages import MemoryPages, video_layout

from .configuration import HourLlavaConfig
from .forgetting import kept_frames, remembered_frames, spatial_picks, spread_frames
from .inputs import Visual
from .remembering import Choice, Kept, Remembered


@dataclass(frozen=True)
class Share:
    """The part of every video that a process of a group takes."""

    group: dist.ProcessGroup
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Share":
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def bounds(self, frames: int) -> list[int]:
        """Rank r has the frames from number bounds[r] up to bounds[r + 1] of a memory's."""
        return [rank * frames // self.ranks for rank in range(self.ranks + 1)]

    def frames(self, config: HourLlavaConfig, frames: int) -> Tensor:
        """Of a video of `frames` frames, the number of each frame in this process' part of the memory: int64 (n,)."""
        memory = remembered_frames(config, frames)
        first, last = self.bounds(memory)[self.rank : self.rank + 2]
        return spread_frames(frames, memory)[first:last]

    def cut(self, config: HourLlavaConfig, visual: Visual) -> Visual:
        """What this process has to encode: a video's own frames, one at least; an image as it is."""
        if visual.modality != "video":
            return visual
        frames = self.frames(config, len(visual.content))
        first, last = (int(frames[0]), int(frames[-1]) + 1) if len(frames) else (0, 1)
        return replace(visual, content=visual.content[first:last])

    def remember_video(
        self, config: HourLlavaConfig, frames: int, tokens: Tensor, newline: Tensor, choice: Choice
    ) -> Remembered:
        """This process' part of a video's memory; what `remembering.remember_video` gives on one process.

        Args:
            frames: of the whole video.
            tokens: (n, N, C) of what `cut` left of it.

        Raises:
            InputError: the rule of forgetting looks at all frames together.
        """
        per_frame, device = tokens.shape[1], tokens.device
        own = self.frames(config, frames)
        tokens = tokens[(own - own[0]).to(device)] if len(own) else tokens[:0]
        bounds = self.bounds(remembered_frames(config, frames))
        first = bounds[self.rank]
        owner = torch.arange(self.ranks).repeat_interleave(torch.tensor(bounds).diff())
        kept = self.keep(config, tokens, owner, newline, choice)
        rows = torch.cat([tokens.flatten(0, 1), newline.expand(len(tokens), -1)])
        layout = None
        if len(own):
            layout = video_layout(len(own), per_frame, device)
            layout = replace(layout, position_ids=layout.position_ids + first * (per_frame + 1))
        return Remembered(rows, layout, [kept])

    def keep(self, config: HourLlavaConfig, tokens: Tensor, owner: Tensor, newline: Tensor, choice: Choice) -> Kept:
        """This process' part of what is kept of a video; what `remembering.keep_of_video` gives on one process.

        Args:
            tokens: (n, N, C) of this process' frames of the memory, in order.
            owner: (T,) int64, the process that has each frame of the memory.

        Raises:
            InputError: the rule of forgetting looks at all frames together.
        """
        if choice.frames is None and choice.forgetting.temporal in ("keyframe", "question"):
            why = f"{choice.forgetting.temporal} forgetting compares frames that lie on different processes"
            raise InputError("temporal_forgetting", why, "choose uniform or random")
        per_frame, device = tokens.shape[1], tokens.device
        owner = owner.to(device)
        chosen = choice.frames if choice.frames is not None else kept_frames(config, len(owner), choice.forgetting)
        chosen = chosen.to(device, torch.int64)
        if choice.patches is None:
            side = round(per_frame**0.5)
            patches = spatial_picks(config, chosen, (side, side), choice.forgetting)
        else:
            patches = choice.patches.to(device, torch.int64)[chosen]
        line = torch.full_like(chosen, per_frame)[:, None]
        position_ids = chosen[:, None] * (per_frame + 1) + torch.cat([patches, line], 1)
        mine = owner[chosen] == self.rank
        place = (owner == self.rank).cumsum(0) - 1
        kept = newline[None][:0]
        if bool(mine.any()):
            kept = ext.forget(tokens, place[chosen[mine]], patches[mine].contiguous(), newline)[0].flatten(0, 1)
        shares = owner[chosen].bincount(minlength=self.ranks) * position_ids.shape[1]
        return Kept(kept, position_ids.flatten(), len(owner) * (per_frame + 1), tuple(shares.tolist()))

    def own(self, remembered: Remembered, number: int) -> Remembered:
        """Of the memory of sample `number`, images that every process has seen whole: all on one process, none else."""
        owner = number % self.ranks
        kept = []
        for one in remembered.kept:
            tokens = one.tokens if self.rank == owner else one.tokens[:0]
            shares = tuple(len(one.position_ids) * (rank == owner) for rank in range(self.ranks))
            kept.append(replace(one, tokens=tokens, shares=shares))
        if self.rank == owner:
            return replace(remembered, kept=kept)
        return Remembered(remembered.tokens[:0], None, kept)

    def gather(self, kept: list[Kept]) -> Tensor:
        """The kept tokens (V, C) of all marks, from all processes, mark after mark and frame after frame."""
        own = torch.cat([one.tokens for one in kept])
        counts = [sum(one.shares[rank] for one in kept) for rank in range(self.ranks)]
        padded = torch.cat([own, own.new_zeros(max(counts) - len(own), own.shape[1])])
        parts = []
        shares = [[one.shares[rank] for one in kept] for rank in range(self.ranks)]
        everyone = [
            rows[: sum(s)].split(s) for rows, s in zip(_Gathered.apply(padded, self.group), shares, strict=True)
        ]
        for number in range(len(kept)):
            parts += [rows[number] for rows in everyone]
        return torch.cat(parts)

    def scale(self, pages: list[MemoryPages]) -> list[MemoryPages]:
        """The same pages, whose gradients come out times the number of processes."""
        return [
            replace(
                p,
                key_pages=_Scaled.apply(p.key_pages, self.ranks),
                value_pages=_Scaled.apply(p.value_pages, self.ranks),
            )
            for p in pages
        ]


def keep_of_shards(config: HourLlavaConfig, memory: MemoryPrefix, newline: Tensor, choice: Choice) -> Kept:
    """`remembering.keep_of_video` of a memory that lies on many processes, whole on each of them."""
    assert memory.shard is not None
    share, owner = Share.of(memory.shard.group), memory.shard.owner
    kept = share.keep(config, memory.tokens, owner, newline, choice)
    frame = kept.position_ids // (memory.tokens.shape[1] + 1)
    return replace(kept, tokens=_in_order(share.gather([kept]), owner.to(frame.device)[frame]))


def whole_memory(memory: MemoryPrefix) -> MemoryPrefix:
    """A short memory's tokens from all processes, on each of them; its pages stay where they are."""
    assert memory.shard is not None
    share, per_frame = Share.of(memory.shard.group), memory.tokens.shape[1]
    owner = memory.shard.owner.repeat_interleave(per_frame)
    own = Kept(memory.tokens.flatten(0, 1), owner, 0, tuple(owner.bincount(minlength=share.ranks).tolist()))
    return MemoryPrefix(memory.frames, _in_order(share.gather([own]), owner).unflatten(0, (-1, per_frame)), [])


def _in_order(rows: Tensor, owner: Tensor) -> Tensor:
    """Rows (n, C) that stand process after process, as they stood before they were shared out to `owner` (n,)."""
    return rows[owner.argsort(stable=True).argsort().to(rows.device)]


class _Gathered(torch.autograd.Function):
    """Every process' rows (ranks, n, C); a process' gradient is its own part's, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.ranks = dist.get_rank(group), dist.get_world_size(group)
        everyone = [torch.empty_like(x) for _ in range(ctx.ranks)]
        dist.all_gather(everyone, x.contiguous(), group)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad[ctx.rank] * ctx.ranks, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None
