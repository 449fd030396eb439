# SPDX-License-Identifier: Apache-2.0
"""Attention of other libraries on a GPU: turned queries (1, Hq, M, D), gathered rows (1, Hkv, N, D) to (1, Hq, M, D).

Who is not installed, or does not run on the GPU at hand, is left out of the table.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_with(backend: SDPBackend) -> Attention:
    """Torch's attention, with one of its kernels and no other."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return attend


def flash_attention(module: str) -> Attention:
    """FlashAttention 2 (`flash_attn`) or 3 (`flash_attn_interface`), which want heads behind tokens."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention without a mask, compiled."""
    return _compiled_flex()(query, key, value, enable_gqa=True)


GPU_PEERS: dict[str, Attention] = {
    "cuDNN": torch_with(SDPBackend.CUDNN_ATTENTION),
    "torch flash": torch_with(SDPBackend.FLASH_ATTENTION),
    "flex": flex_attention,
    "flash 2": flash_attention("flash_attn"),
    "flash 3": flash_attention("flash_attn_interface"),
}
