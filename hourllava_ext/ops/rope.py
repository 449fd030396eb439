# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import register_fake


def rope(x: Tensor, position_ids: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """Partial rotary embedding at arbitrary position ids (NeoX halves), differentiable in ``x``.

    Dim ``i`` and dim ``F + i`` of every head turn together by ``position_ids * inv_freq[i]``; dims from ``2F`` on are
    copied. The angle is a float32 product, its cosine and sine are rounded to ``x.dtype`` and the rotation itself is
    computed in float32 (float64 for float64), as MemAug's rotary layers were trained.

    Args:
        x: Queries or keys. (M, H, D) float32, float16, bfloat16 or float64; the last dim dense is fastest.
        position_ids: Place of each token in the whole memory, any order. (M,) int64
        inv_freq: Radians per position. (F,) float32, 2F <= D
        inverse: Turn back: ``rope(rope(x, p, f), p, f, inverse=True)`` is ``x`` up to rounding.

    Returns:
        The rotated tokens. (M, H, D), dtype of ``x``, contiguous

    Raises:
        RuntimeError: A shape or dtype differs from the above.

    Source: RoFormer, https://arxiv.org/abs/2104.09864.
    """
    return torch.ops.hourllava_ext.rope(x, position_ids, inv_freq, inverse)


@register_fake("rope")
def _fake(x: Tensor, position_ids: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, position_ids, inv_freq, ctx.inverse = inputs
    ctx.save_for_backward(position_ids, inv_freq)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
    # A rotation is orthogonal, so its transpose is the rotation back.
    position_ids, inv_freq = ctx.saved_tensors
    return rope(grad, position_ids, inv_freq, not ctx.inverse), None, None, None


torch.library.register_autograd("hourllava_ext::rope", _backward, setup_context=_setup)
