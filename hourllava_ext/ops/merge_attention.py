# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def merge_attention(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One attention from its parts over disjoint keys: splits, tiers of memory, devices. Differentiable in both.

    Each part's output weighs by the exponential of its log-sum-exp. A part with log-sum-exp -inf saw no key: it adds
    nothing and its output is not read. A query that no part saw a key for gets output 0, log-sum-exp -inf, gradients 0.

    Args:
        out: Outputs of the S parts. (S, M, H, D) float32, float16, bfloat16 or float64
        lse: Their log-sum-exps. (S, H, M) float32 (float64 for a float64 ``out``)

    Returns:
        The merged output (M, H, D), dtype of ``out``, and log-sum-exp (H, M), dtype of ``lse``.

    Raises:
        RuntimeError: A shape or dtype differs from the above.

    Source: online softmax, https://arxiv.org/abs/1805.02867; as a merge, https://arxiv.org/abs/2501.01005.
    """
    return torch.ops.hourllava_ext.merge_attention(out, lse)


@register_fake("merge_attention")
def _fake(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


@register_fake("merge_attention_backward")
def _fake_backward(grad_merged: Tensor, grad_merged_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_merged: Tensor, grad_merged_lse: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return torch.ops.hourllava_ext.merge_attention_backward(grad_merged, grad_merged_lse, *ctx.saved_tensors)


torch.library.register_autograd("hourllava_ext::merge_attention", _backward, setup_context=_setup)
refuse_second_derivative("merge_attention")
