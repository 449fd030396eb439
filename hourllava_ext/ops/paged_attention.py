# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import refuse_second_derivative, register_fake


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    scale: float | None = None,
    mass_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention of packed queries over the pages that their sample lists: non-causal, grouped heads, exact.

    Queries are rotated inside; keys were rotated when they were written. Query head ``h`` reads key head
    ``h // (Hq // Hkv)``. A page may be listed by several samples; its gradients add up. The order of a row of the table
    changes nothing, bit for bit, nor does the number of threads. Differentiable in ``query``, ``key_pages`` and
    ``value_pages``, through ``out`` and through ``lse``; gradients of unlisted pages and of free rows are zero. Free
    rows are never read.

    Args:
        query: Queries of all samples, one sample after the other. (M, Hq, D) float32, float16, bfloat16 or float64;
            D a multiple of 8 up to 256
        key_pages: Rotated keys. (P, Hkv, S, D), dtype of ``query``, Hq a multiple of Hkv
        value_pages: Values. (P, Hkv, S, D), dtype of ``query``
        page_table: Pages of each sample, -1 for a hole anywhere. (B, W) int32
        page_lengths: Filled rows of each page. (P,) int32, 0 to S
        position_ids: Place of each query in the memory. (M,) int64
        cu_seqlens: Sample ``b`` owns the queries ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. (B + 1,) int64
        inv_freq: Radians per position of the first 2F dims of a head. (F,) float32, 2F <= D
        scale: What scores are multiplied by; ``D ** -0.5`` if not given.
        mass_weight: If given, how much each query counts in ``mass``. (M,) float32 (float64 for float64)

    Returns:
        ``out`` (M, Hq, D) in the dtype of ``query``; ``lse`` (Hq, M) float32 (float64 for float64), the natural
        log-sum-exp of the scores; and, with ``mass_weight``, ``mass`` (B, W) in the dtype of ``lse``: the share of the
        sample's attention that fell on each listed page, averaged over heads and, by weight, over queries (zeros where
        the weights add up to zero). A query without any key gets ``out`` 0 and ``lse`` -inf.

    Raises:
        RuntimeError: A shape or dtype differs from the above, or on the CPU a page id, page length or ``cu_seqlens``
            is out of range.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, on the pages of https://arxiv.org/abs/2309.06180.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse, mass = torch.ops.hourllava_ext.paged_attention(
        query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq, scale, mass_weight
    )
    return (out, lse) if mass_weight is None else (out, lse, mass)


@register_fake("paged_attention")
def _fake(query, key_pages, value_pages, page_table, *_, mass_weight=None):  # type: ignore[no-untyped-def]
    mass_weight = _[5] if len(_) > 5 else mass_weight
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=wide)
    rows = 0 if mass_weight is None else page_table.shape[0]
    return query.new_empty(query.shape), lse, query.new_empty((rows, page_table.shape[1]), dtype=wide)


@register_fake("paged_attention_backward")
def _fake_backward(grad_out, grad_lse, query, key_pages, value_pages, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key_pages.new_empty(key_pages.shape), key_pages.new_empty(key_pages.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, _ = inputs
    out, lse, mass = output
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx, grad_out, grad_lse, _):  # type: ignore[no-untyped-def]
    grads = torch.ops.hourllava_ext.paged_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale)
    return *grads, *[None] * 7


torch.library.register_autograd("hourllava_ext::paged_attention", _backward, setup_context=_setup)
refuse_second_derivative("paged_attention")
