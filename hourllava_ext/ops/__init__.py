# SPDX-License-Identifier: Apache-2.0
"""The public operators, one file each."""

from hourllava_ext.ops.add_norm import add_norm
from hourllava_ext.ops.forget import forget
from hourllava_ext.ops.keyframe_score import keyframe_score
from hourllava_ext.ops.merge_attention import merge_attention
from hourllava_ext.ops.page_write import page_write, page_write_
from hourllava_ext.ops.paged_attention import paged_attention
from hourllava_ext.ops.pool_grid import pool_grid
from hourllava_ext.ops.retrieve import retrieve
from hourllava_ext.ops.rope import rope

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
