# SPDX-License-Identifier: Apache-2.0
"""Operators on the memory of a video: pooled, scored, forgotten, rotated, paged, retrieved, attended and merged.

Shapes and dtypes are those of each function's docstring. A GPU takes no float64 and does not check indices in memory:
the host would have to wait for it.
"""

from hourllava_ext import library as library  # Loads the compiled operators, which the modules below register on.
from hourllava_ext.ops import (
    add_norm,
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

from hourllava_ext import gpu as gpu  # isort: skip  # Needs the operators' schemas.

__all__ = [
    "add_norm",
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
