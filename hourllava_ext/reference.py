# SPDX-License-Identifier: Apache-2.0
"""The nine operators in plain torch: the mathematics that every kernel must agree with.

Each function has the signature of the operator of the same name in ``hourllava_ext``; the docstrings there give shapes,
units and errors. Gradients come from autograd. Written to be read, not to be fast.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rotation(position_ids: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (M, R/2) of fp32 angles, rounded to ``dtype`` as the original rounds its tables."""
    angle = position_ids.to(torch.float32)[:, None] * inv_freq.to(torch.float32)
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what sums and rotations are computed in."""
    return torch.promote_types(dtype, torch.float32)


def pool_grid(patches: Tensor, grid: int) -> Tensor:
    frames, count, width = patches.shape
    side = round(count**0.5)
    image = patches.to(accumulate_dtype(patches.dtype)).view(frames, side, side, width).permute(0, 3, 1, 2)
    pooled = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False, antialias=False)
    return pooled.permute(0, 2, 3, 1).reshape(frames, grid * grid, width).to(patches.dtype)


def keyframe_score(features: Tensor, window: int = 9) -> Tensor:
    frames = features.shape[0]
    unit = F.normalize(features.to(accumulate_dtype(features.dtype)), dim=-1)
    width = min(window, frames)
    if width < 2:
        return unit.new_zeros(frames)
    # The window slides inside the video: at both ends it still holds the nearest `width - 1` neighbours.
    each = torch.arange(frames, device=unit.device)
    start = (each - window // 2).clamp(0, frames - width)
    cosine = unit @ unit.T
    inside = each - start[:, None]
    inside = (inside >= 0) & (inside < width)
    inside.fill_diagonal_(False)
    return (cosine * inside).sum(-1) / (width - 1)


def forget(tokens: Tensor, frames: Tensor, patches: Tensor, newline: Tensor) -> tuple[Tensor, Tensor]:
    per_frame = tokens.shape[1]
    kept = tokens[frames[:, None], patches]
    kept = torch.cat([kept, newline.expand(len(frames), 1, -1)], dim=1)
    inside = torch.cat([patches, torch.full_like(frames[:, None], per_frame)], dim=1)
    return kept, frames[:, None] * (per_frame + 1) + inside


def rope(x: Tensor, position_ids: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    cos, sin = (t.to(accumulate_dtype(x.dtype))[:, None] for t in rotation(position_ids, inv_freq, x.dtype))
    sin = -sin if inverse else sin
    half = inv_freq.numel()
    first, second, rest = x.to(accumulate_dtype(x.dtype)).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    total, weight, bias = (t.to(accumulate_dtype(x.dtype)) for t in (x + residual, weight, bias))
    return F.layer_norm(total, weight.shape, weight, bias, eps).to(x.dtype)


def page_write(
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    num_pages: int,
    page_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, width = key.shape[1:]
    rows = num_pages * page_size

    def to_pages(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows, heads, width).index_copy(0, slots, x)
        return flat.view(num_pages, page_size, heads, width).transpose(1, 2).contiguous()

    key_pages, value_pages = to_pages(rope(key, position_ids, inv_freq)), to_pages(value)
    page_lengths = slots.new_zeros(num_pages, dtype=torch.int32)
    page_lengths.scatter_reduce_(0, slots // page_size, (slots % page_size + 1).to(torch.int32), "amax")
    return key_pages, value_pages, summarize(key_pages, page_lengths), page_lengths


def summarize(key_pages: Tensor, page_lengths: Tensor) -> Tensor:
    """Mean, minimum and maximum key of every page: (P, Hkv, 3, D), in the dtype of sums; zeros for an empty page."""
    keys = key_pages.detach().to(accumulate_dtype(key_pages.dtype))
    valid = (torch.arange(keys.shape[2], device=keys.device) < page_lengths[:, None])[:, None, :, None]
    filled = page_lengths.clamp(min=1)[:, None, None]
    mean = keys.masked_fill(~valid, 0).sum(2) / filled
    low, high = keys.masked_fill(~valid, torch.inf).amin(2), keys.masked_fill(~valid, -torch.inf).amax(2)
    summary = torch.stack([mean, low, high], dim=2)
    return summary.masked_fill((page_lengths == 0)[:, None, None, None], 0)


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
    page_size = key_pages.shape[2]
    page, row = slots // page_size, slots % page_size
    key_pages[page, :, row] = rope(key, position_ids, inv_freq)
    value_pages[page, :, row] = value
    page_lengths.scatter_reduce_(0, page, (row + 1).to(torch.int32), "amax")
    touched = page.unique()
    key_summary[touched] = summarize(key_pages[touched], page_lengths[touched])


def retrieve(
    query: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    key_summary: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    budget: int,
    keep: Tensor | None = None,
    mode: str = "both",
) -> Tensor:
    batch, listed = page_table.shape
    group = query.shape[1] // key_summary.shape[1]
    rotated = 2 * inv_freq.numel()
    dims = {"both": slice(0, None), "rotated": slice(0, rotated), "content": slice(rotated, None)}[mode]
    accumulate = accumulate_dtype(query.dtype)
    turned = rope(query, position_ids, inv_freq).to(accumulate)[..., dims]
    shorter = page_table.new_full((batch, min(budget, listed)), -1)
    for b in range(batch):
        pages = page_table[b][page_table[b] >= 0].long()
        pages = pages[page_lengths[pages] > 0]
        rows = turned[cu_seqlens[b] : cu_seqlens[b + 1]]
        summary = key_summary[pages].to(accumulate).repeat_interleave(group, 1)[..., dims]
        # The largest product that any key inside the page's box of minima and maxima can have with the query.
        bound = torch.einsum("mhd,phd->mhp", rows.clamp(min=0), summary[:, :, 2])
        bound = bound + torch.einsum("mhd,phd->mhp", rows.clamp(max=0), summary[:, :, 1])
        weight = bound * query.shape[-1] ** -0.5 + page_lengths[pages].to(accumulate).log()
        score = weight.softmax(-1).sum((0, 1))
        if keep is not None:
            score = score.masked_fill(keep[pages], torch.inf)
        # Stable order on ascending pages: of equal scores the lower page wins.
        pages, order = pages.sort()
        best = score[order].sort(descending=True, stable=True).indices[: shorter.shape[1]]
        chosen = pages[best].sort().values
        shorter[b, : len(chosen)] = chosen.to(torch.int32)
    return shorter


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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key_pages.shape[1]
    accumulate = accumulate_dtype(query.dtype)
    turned = rope(query, position_ids, inv_freq).to(accumulate)
    # A batch without samples has nothing to join but the empty start.
    outs, lses = [turned[:0]], [turned.new_zeros(query.shape[1], 0)]
    mass = turned.new_zeros(page_table.shape)
    for b in range(page_table.shape[0]):
        begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        listed = (page_table[b] >= 0).nonzero()[:, 0]
        pages = page_table[b][listed].long()
        row = torch.arange(key_pages.shape[2], device=key_pages.device)
        valid = (row < page_lengths[pages][:, None]).flatten()
        keys, values = (
            p[pages].transpose(1, 2).flatten(0, 1)[valid].to(accumulate).repeat_interleave(group, 1)
            for p in (key_pages, value_pages)
        )
        scores = torch.einsum("mhd,khd->hmk", turned[begin:end], keys) * scale
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp() if len(keys) else scores
        outs.append(torch.einsum("hmk,khd->mhd", weights, values))
        lses.append(lse)
        if mass_weight is not None and len(keys):
            row_weight = mass_weight[begin:end].to(accumulate)
            total = row_weight.sum() * query.shape[1]
            # Nothing weighs anything: no page has a share.
            per_key = torch.einsum("hmk,m->k", weights.detach(), row_weight) / total.masked_fill(total == 0, 1)
            owner = listed.repeat_interleave(page_lengths[pages].long())
            mass[b].index_add_(0, owner, per_key)
    out, lse = torch.cat(outs).to(query.dtype), torch.cat(lses, dim=1)
    return (out, lse) if mass_weight is None else (out, lse, mass)


def merge_attention(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = accumulate_dtype(out.dtype)
    total = lse.logsumexp(0)
    # A query that no part saw any key for has lse -inf everywhere: its output is zero, not NaN.
    weight = (lse - total.masked_fill(total == -torch.inf, 0)).exp()
    merged = torch.einsum("shm,smhd->mhd", weight.to(accumulate), out.to(accumulate))
    return merged.to(out.dtype), total
