# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def pool_grid(patches: Tensor, grid: int) -> Tensor:
    """Resize each frame's square of ViT patches to ``grid`` x ``grid`` cells, bilinear; differentiable.

    Cells and patches are squares over the same image, values sit at their centres (``align_corners=False``), and each
    cell reads the four patches nearest its centre whatever the ratio (no antialiasing), as the model was trained.

    Args:
        patches: Vision features, row by row. (T, S * S, C) float32, float16, bfloat16 or float64
        grid: Cells along one side, at least 1.

    Returns:
        The cells, row by row. (T, grid * grid, C), dtype of ``patches``

    Raises:
        RuntimeError: The patches are not square, or a shape, dtype or number differs from the above.

    Source: LLaVA-Video's 2D pooling, https://arxiv.org/abs/2410.02713.
    """
    return torch.ops.hourllava_ext.pool_grid(patches, grid)


@register_fake("pool_grid")
def _fake(patches: Tensor, grid: int) -> Tensor:
    return patches.new_empty(patches.shape[0], grid * grid, patches.shape[2])


@register_fake("pool_grid_backward")
def _fake_backward(grad: Tensor, grid: int, count: int) -> Tensor:
    return grad.new_empty(grad.shape[0], count, grad.shape[2])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    patches, ctx.grid = inputs
    ctx.count = patches.shape[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
    return torch.ops.hourllava_ext.pool_grid_backward(grad, ctx.grid, ctx.count), None


torch.library.register_autograd("hourllava_ext::pool_grid", _backward, setup_context=_setup)
refuse_second_derivative("pool_grid")
