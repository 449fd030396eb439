# SPDX-License-Identifier: Apache-2.0
"""Operators on the memory of a video: pooled, scored, forgotten, rotated, paged, retrieved, attended and merged."""

from hourllava_ext import library as library  # Loads the compiled operators, which the modules below register on.
from hourllava_ext.ops import (
    forget,
    keyframe_score,
    merge_attention,
    page_write,
    page_write_,
    paged_attention,
    pool_grid,
    retrieve,
    rope,
)

__all__ = [
    "forget",
    "keyframe_score",
    "merge_attention",
    "page_write",
    "page_write_",
    "paged_attention",
    "pool_grid",
    "retrieve",
    "rope",
]
