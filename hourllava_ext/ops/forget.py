# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def forget(tokens: Tensor, frames: Tensor, patches: Tensor, newline: Tensor) -> tuple[Tensor, Tensor]:
    """Keep some patches of some frames, a newline token after each frame; differentiable in tokens and newline.

    Reads only what it keeps. Position ids count the whole memory in order, newlines included: patch ``p`` of frame
    ``t`` is ``t * (N + 1) + p`` and the frame's newline is ``t * (N + 1) + N``. A frame or patch may be kept twice; its
    gradients then add up, in a fixed order.

    Args:
        tokens: The memory's visual tokens. (T, N, C) float32, float16, bfloat16 or float64
        frames: Kept frames, any order. (n,) int64 in [0, T)
        patches: Kept patches of each kept frame. (n, k) int64 in [0, N)
        newline: The newline token. (C,), dtype of ``tokens``

    Returns:
        The kept tokens (n, k + 1, C), dtype of ``tokens``, and their position ids (n, k + 1) int64.

    Raises:
        RuntimeError: A shape or dtype differs from the above, or on the CPU an index is out of range.

    Source: spatial and temporal forgetting of Hour-LLaVA, https://arxiv.org/abs/2506.05332.
    """
    return torch.ops.hourllava_ext.forget(tokens, frames, patches, newline)


@register_fake("forget")
def _fake(tokens: Tensor, frames: Tensor, patches: Tensor, newline: Tensor) -> tuple[Tensor, Tensor]:
    kept = patches.shape[0], patches.shape[1] + 1
    return tokens.new_empty(*kept, tokens.shape[2]), frames.new_empty(kept)


@register_fake("forget_backward")
def _fake_backward(grad: Tensor, frames: Tensor, patches: Tensor, total: int, per_frame: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(total, per_frame, grad.shape[2]), grad.new_empty(grad.shape[2])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, frames, patches, _ = inputs
    ctx.save_for_backward(frames, patches)
    ctx.total, ctx.per_frame = tokens.shape[:2]


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, Tensor]:  # type: ignore[no-untyped-def]
    backward = torch.ops.hourllava_ext.forget_backward
    grad_tokens, grad_newline = backward(grad, *ctx.saved_tensors, ctx.total, ctx.per_frame)
    return grad_tokens, None, None, grad_newline


torch.library.register_autograd("hourllava_ext::forget", _backward, setup_context=_setup)
refuse_second_derivative("forget")
