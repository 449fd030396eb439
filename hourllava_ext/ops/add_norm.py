# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of ``x + residual`` in one pass, as post-norm blocks end each of their parts; differentiable.

    The sum is rounded to ``x.dtype``, as a sum of two tensors is; mean and variance of each row are computed in float32
    (float64 for float64), and the result is rounded once. Both summands get the same gradient. What rows add to the
    gradients of weight and bias is summed in an order that depends on the shape alone. Under autocast everything is
    computed in float32, as torch's LayerNorm is.

    Args:
        x: One summand. (M, C) float32, float16, bfloat16 or float64
        residual: The other. (M, C), dtype of ``x``
        weight: Scale of each normalised column. (C,), dtype of ``x``
        bias: Added to each scaled column. (C,), dtype of ``x``
        eps: Added to the variance.

    Returns:
        The normalised rows. (M, C), dtype of ``x``

    Raises:
        RuntimeError: A shape or dtype differs from the above.

    Source: Layer Normalization, https://arxiv.org/abs/1607.06450.
    """
    return torch.ops.hourllava_ext.add_norm(x, residual, weight, bias, eps)[0]


@register_fake("add_norm")
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[0], dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@register_fake("add_norm_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (weight.new_empty(weight.shape) for _ in range(2))
    return grad.new_empty(grad.shape), grad_weight, grad_bias


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, residual, weight, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, residual, weight, *output[1:])


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
    grad_sum, *parameters = torch.ops.hourllava_ext.add_norm_backward(grad, *ctx.saved_tensors)
    return grad_sum, grad_sum, *parameters, None


torch.library.register_autograd("hourllava_ext::add_norm", _backward, setup_context=_setup)
refuse_second_derivative("add_norm")
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("hourllava_ext::add_norm", _device, torch.float32)
