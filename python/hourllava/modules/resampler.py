# SPDX-License-Identifier: Apache-2.0
"""The original's resampler, call for call: the same arguments, the same parameter names, our kernels inside."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

from hourllava.memory.pages import row_layout
from hourllava.model import memaug
from hourllava.model.stream import QueryStream

_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")


class MemAug(memaug.MemAug):
    """MemAug for one sample, as the original's model calls it.

    Args:
        config: anything with `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `memaug_depth`, and
            `rope_theta` or `rope_parameters`: the original's config is one.
    """

    def __init__(self, config: Any) -> None:
        theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        sizes = {name: getattr(config, name) for name in _SIZES}
        rotary = {"rope_type": "default", "rope_theta": theta}
        super().__init__(Qwen2Config(**sizes, rope_parameters=rotary), config.memaug_depth)

    def forward(  # type: ignore[override]
        self,
        x_q: Tensor,
        x_kv: Tensor,
        q_position_ids: Tensor | None = None,
        k_position_ids: Tensor | None = None,
    ) -> Tensor:
        """Augment queries by their memory.

        Args:
            x_q: (M, C) kept visual tokens and text.
            x_kv: (N, C) the memory.
            q_position_ids: (M,) int64; None counts from 0.
            k_position_ids: (N,) int64; None counts from 0.

        Returns:
            (M, C). Gradients flow to everything that is given.
        """
        ids = [
            torch.arange(len(rows), device=rows.device) if given is None else given.to(torch.int64)
            for rows, given in ((x_q, q_position_ids), (x_kv, k_position_ids))
        ]
        bounds = len(x_q) * torch.arange(2, device=x_q.device)
        stream = QueryStream(ids[0], bounds, [len(x_q)])
        return super().forward(x_q, stream, self.write(x_kv, row_layout(ids[1])))[0]
