# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def page_write(
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    num_pages: int,
    page_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New pages that hold rotated keys, values, and a summary of each page; differentiable in ``key`` and ``value``.

    Args:
        key: Keys, not yet rotated. (M, Hkv, D) float32, float16, bfloat16 or float64; the last dim dense is fastest
        value: Values. (M, Hkv, D), dtype of ``key``
        position_ids: Place of each token in the memory. (M,) int64
        slots: ``page * page_size + row`` of each token, no two alike. (M,) int64
        inv_freq: Radians per position of the first 2F dims of a head. (F,) float32, 2F <= D
        num_pages: Pages to allocate, P; those without a token stay zero.
        page_size: Rows of a page, S.

    Returns:
        ``key_pages`` and ``value_pages`` (P, Hkv, S, D) in the dtype of ``key``, zeros in free rows; ``key_summary``
        (P, Hkv, 3, D) float32 (float64 for float64), the mean, minimum and maximum of each page's keys as stored, zeros
        for an empty page; ``page_lengths`` (P,) int32, one more than the last written row. Rows below a page's length
        that were never written count as zeros.

    Raises:
        RuntimeError: A shape or dtype differs from the above, or on the CPU a slot is out of range or given twice.

    Source: page summaries are those of Quest, https://arxiv.org/abs/2406.10774, with the mean added.
    """
    return torch.ops.hourllava_ext.page_write(key, value, position_ids, slots, inv_freq, num_pages, page_size)


def page_write_(
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_summary: Tensor,
    page_lengths: Tensor,
) -> None:
    """``page_write`` into pages that exist, in place and without gradient: what appending to a memory does.

    However the same rows are grouped into calls, the pages end up the same, bit for bit. A backward that needs the
    pages as they were before is an error. Rows may lie in the pages themselves: they are read before any is written.

    Args:
        key, value, position_ids, slots, inv_freq: As for ``page_write``.
        key_pages, value_pages: Written at ``slots`` only. (P, Hkv, S, D), dtype of ``key``, contiguous
        key_summary: Recomputed for the pages written to, from all their rows. (P, Hkv, 3, D) float32 (float64 for
            float64), contiguous
        page_lengths: Raised to one more than the last written row. (P,) int32, contiguous

    Raises:
        RuntimeError: A shape, dtype or layout differs from the above, ``key_pages`` and ``value_pages`` share memory,
            or on the CPU a slot or the length of a page written to is out of range, or a slot is given twice.
    """
    torch.ops.hourllava_ext.page_write_(
        key, value, position_ids, slots, inv_freq, key_pages, value_pages, key_summary, page_lengths
    )
    if not torch.compiler.is_compiling():
        # What has saved the pools for its backward must find out; a compiled graph says so by itself.
        pools = key_pages, value_pages, key_summary, page_lengths
        torch.autograd.graph.increment_version([pool for pool in pools if not pool.is_inference()])


@register_fake("page_write")
def _fake(key, value, position_ids, slots, inv_freq, num_pages, page_size=128):  # type: ignore[no-untyped-def]
    _, heads, width = key.shape
    pages = (num_pages, heads, page_size, width)
    wide = torch.promote_types(key.dtype, torch.float32)
    summary = key.new_empty((num_pages, heads, 3, width), dtype=wide)
    return key.new_empty(pages), key.new_empty(pages), summary, key.new_empty(num_pages, dtype=torch.int32)


@register_fake("page_write_")
def _fake_(key, value, position_ids, slots, inv_freq, *pools) -> None:  # type: ignore[no-untyped-def]
    return None


@register_fake("page_write_backward")
def _fake_backward(grad_key_pages, grad_value_pages, position_ids, slots, inv_freq):  # type: ignore[no-untyped-def]
    _, heads, _, width = grad_key_pages.shape
    shape = (slots.shape[0], heads, width)
    return grad_key_pages.new_empty(shape), grad_key_pages.new_empty(shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, position_ids, slots, inv_freq, _, _ = inputs
    # Retrieval chooses, it does not differentiate: no gradient flows through the summaries.
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(position_ids, slots, inv_freq)


def _backward(ctx, grad_key_pages, grad_value_pages, *_):  # type: ignore[no-untyped-def]
    grads = torch.ops.hourllava_ext.page_write_backward(grad_key_pages, grad_value_pages, *ctx.saved_tensors)
    return *grads, *[None] * 5


torch.library.register_autograd("hourllava_ext::page_write", _backward, setup_context=_setup)
refuse_second_derivative("page_write")
