# SPDX-License-Identifier: Apache-2.0
"""Answers that are written side by side: one pass of the decoder gives each of them its next token."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration


class DecodingBatch:
    """The decoder's keys and values of B prompts that come and go, padded at the left to the longest of them."""

    def __init__(self, model: "HourLlavaForConditionalGeneration") -> None:
        self._model = model
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []  # rows of each prompt and what was written after it

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, embeds: Tensor) -> Tensor:
        """Read a prompt (1, M, C), which becomes the last of the batch; the logits (V,) of its first token."""
        fresh = DynamicCache(config=self._model.config.text_config)
        states = self._model.model(inputs_embeds=embeds, past_key_values=fresh, use_cache=True).last_hidden_state
        length, longest = embeds.shape[1], max([embeds.shape[1], *self._lengths])
        if self._cache is None:
            self._cache = fresh
        else:
            layers: Any = zip(self._cache.layers, fresh.layers, strict=True)
            for ours, theirs in layers:
                ours.keys = torch.cat([_widened(ours.keys, longest), _widened(theirs.keys, longest)])
                ours.values = torch.cat([_widened(ours.values, longest), _widened(theirs.values, longest)])
        self._lengths.append(length)
        return self._model.lm_head(states[0, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Read the token (B,) int64 that each answer goes on with; the logits (B, V) of the one behind it."""
        lengths = torch.tensor(self._lengths, device=tokens.device)
        columns = torch.arange(max(self._lengths) + 1, device=tokens.device)
        states = self._model.model(
            input_ids=tokens[:, None],
            attention_mask=(columns >= columns[-1] - lengths[:, None]).to(torch.int64),
            position_ids=lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._lengths = [length + 1 for length in self._lengths]
        return self._model.lm_head(states[:, -1])

    def keep(self, rows: list[int]) -> None:
        """Go on with these answers only, in this order."""
        self._lengths = [self._lengths[row] for row in rows]
        if not rows or self._cache is None:
            self._cache = None
            return
        longest = max(self._lengths)
        layers: Any = self._cache.layers
        for layer in layers:
            chosen = torch.tensor(rows, device=layer.keys.device)
            layer.keys = layer.keys[chosen, :, -longest:]
            layer.values = layer.values[chosen, :, -longest:]


def _widened(x: Tensor, length: int) -> Tensor:
    """Keys or values (B, heads, L, d) with zeros in front of them up to this length."""
    return pad(x, (0, 0, length - x.shape[2], 0))
