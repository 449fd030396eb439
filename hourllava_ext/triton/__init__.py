# SPDX-License-Identifier: Apache-2.0
"""The operators as Triton kernels, for the GPUs that the library holds no C++ kernel for."""

from hourllava_ext.triton.add_norm import add_norm, add_norm_backward
from hourllava_ext.triton.forget import forget, forget_backward
from hourllava_ext.triton.keyframe_score import keyframe_score
from hourllava_ext.triton.merge_attention import merge_attention, merge_attention_backward
from hourllava_ext.triton.page_write import page_write, page_write_, page_write_backward
from hourllava_ext.triton.paged_attention import paged_attention
from hourllava_ext.triton.paged_attention_backward import paged_attention_backward
from hourllava_ext.triton.pool_grid import pool_grid, pool_grid_backward
from hourllava_ext.triton.retrieve import retrieve
from hourllava_ext.triton.rope import rope

__all__ = [
    "add_norm",
    "add_norm_backward",
    "forget",
    "forget_backward",
    "keyframe_score",
    "merge_attention",
    "merge_attention_backward",
    "page_write",
    "page_write_",
    "page_write_backward",
    "paged_attention",
    "paged_attention_backward",
    "pool_grid",
    "pool_grid_backward",
    "retrieve",
    "rope",
]
