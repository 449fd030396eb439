# SPDX-License-Identifier: Apache-2.0
"""Answers that are written side by side: one pass of the decoder gives each of them its next token."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration

ROOM = 64  # tokens that are written before keys and values are copied to a larger place


class RoomyLayer(DynamicLayer):
    """A layer's keys and values (B, heads, L, d), with room behind them: a token does not copy those before it."""

    def __init__(self) -> None:
        super().__init__()
        self._places: tuple[Tensor, Tensor] | None = None  # (B, heads, L + room, d) that keys and values lie in

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if self._places is None or self._places[0].shape[2] < end:
            batch, heads, _, _ = key_states.shape
            fresh = [x.new_empty(batch, heads, end + ROOM, x.shape[3]) for x in (key_states, value_states)]
            if self.keys is not None and self.values is not None and begin:
                fresh[0][:, :, :begin], fresh[1][:, :, :begin] = self.keys, self.values
            self._places = fresh[0], fresh[1]
        keys, values = self._places
        keys[:, :, begin:end], values[:, :, begin:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these instead."""
        self.keys, self.values, self._places = keys, values, None


class DecodingBatch:
    """The decoder's keys and values of B prompts that come and go, padded at the left to the longest of them."""

    def __init__(self, model: "HourLlavaForConditionalGeneration") -> None:
        self._model = model
        self._layers = self._empty()
        self._lengths: list[int] = []  # rows of each prompt and what was written after it

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, embeds: Tensor) -> Tensor:
        """Read a prompt (1, M, C), which becomes the last of the batch; the logits (V,) of its first token."""
        fresh = self._empty()
        states = self._read(fresh, inputs_embeds=embeds)
        length, longest = embeds.shape[1], max([embeds.shape[1], *self._lengths])
        if self._lengths:
            for ours, theirs in zip(self._layers, fresh, strict=True):
                ours.replace(
                    torch.cat([_widened(ours.keys, longest), _widened(theirs.keys, longest)]),
                    torch.cat([_widened(ours.values, longest), _widened(theirs.values, longest)]),
                )
        else:
            self._layers = fresh
        self._lengths.append(length)
        return self._model.lm_head(states[0, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Read the token (B,) int64 that each answer goes on with; the logits (B, V) of the one behind it."""
        lengths = torch.tensor(self._lengths, device=tokens.device)
        columns = torch.arange(max(self._lengths) + 1, device=tokens.device)
        mask = (columns >= columns[-1] - lengths[:, None]).to(torch.int64)
        states = self._read(self._layers, input_ids=tokens[:, None], attention_mask=mask, position_ids=lengths[:, None])
        self._lengths = [length + 1 for length in self._lengths]
        return self._model.lm_head(states[:, -1])

    def keep(self, rows: list[int]) -> None:
        """Go on with these answers only, in this order."""
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._layers = self._empty()
            return
        longest = max(self._lengths)
        for layer in self._layers:
            chosen = torch.tensor(rows, device=layer.keys.device)
            layer.replace(layer.keys[chosen, :, -longest:], layer.values[chosen, :, -longest:])

    def _empty(self) -> list[Any]:
        return [RoomyLayer() for _ in range(self._model.config.text_config.num_hidden_layers)]

    def _read(self, layers: list[Any], **inputs: Tensor) -> Tensor:
        """The decoder's last states (B, L, C), its keys and values kept in these layers."""
        return self._model.model(**inputs, past_key_values=Cache(layers=layers), use_cache=True).last_hidden_state


def _widened(x: Tensor, length: int) -> Tensor:
    """Keys or values (B, heads, L, d) with zeros in front of them up to this length."""
    return pad(x, (0, 0, length - x.shape[2], 0))
