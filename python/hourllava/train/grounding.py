# SPDX-License-Identifier: Apache-2.0
"""A second training signal: MemAug should look where the answer is. Rendered films know when that was."""

import torch
from torch import Tensor, nn

from hourllava.memory.pages import PAGE_SIZE, MemoryPages, visual_slots
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.memaug import CrossAttention, MemoryUse
from hourllava.model.stream import QueryStream
from hourllava_ext import paged_attention


class Grounding:
    """Measures, while a model runs forward, how little of MemAug's attention falls on the pages that hold the answers.

    Use it as a context around `forward`; `loss` is then the mean over blocks, heads and query rows of minus the
    logarithm of the attention's share on those pages: the difference of two log-sum-exps.
    """

    def __init__(self, model: HourLlavaForConditionalGeneration, frames: list[list[int]]) -> None:
        """``frames``: of each sample, the numbers of the frames that show the answer; none leaves the sample out."""
        self.per_frame = model.config.video_grid**2
        self.frames = frames
        self.terms: list[Tensor] = []
        self._blocks = model.model.vision_resampler.blocks

    def __enter__(self) -> "Grounding":
        self._hooks = [block.cross_attn.register_forward_hook(self._measure) for block in self._blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self) -> Tensor:
        """The mean of all measurements, zero if no sample has a place to look at."""
        return torch.stack(self.terms).mean() if self.terms else torch.zeros(())

    def _measure(
        self,
        attention: nn.Module,
        inputs: tuple[Tensor, QueryStream, Tensor, MemoryPages, MemoryUse],
        output: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        x, stream, inv_freq, pages, _ = inputs
        assert isinstance(attention, CrossAttention)
        targets = self._target_pages(pages.page_table)
        wanted = (targets >= 0).any(1).repeat_interleave(torch.tensor(stream.lengths, device=targets.device))
        if not bool(wanted.any()):
            return
        query = attention.Wq(x).view(len(x), -1, attention.head_dim)
        where = (pages.page_lengths, stream.position_ids, stream.cu_seqlens, inv_freq)
        everywhere = output[1]
        there = paged_attention(query, pages.key_pages, pages.value_pages, targets, *where)[1]
        self.terms.append((everywhere - there)[:, wanted].mean())

    def _target_pages(self, page_table: Tensor) -> Tensor:
        """Pages (B, W) int32 of each sample's frames, -1 in unused places."""
        columns = [
            (visual_slots(torch.tensor(f, dtype=torch.int64), self.per_frame) // PAGE_SIZE).unique()
            for f in self.frames
        ]
        padded = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1).to(page_table.device)
        return torch.where(padded < 0, -1, page_table.gather(1, padded.clamp(min=0))).to(torch.int32)
