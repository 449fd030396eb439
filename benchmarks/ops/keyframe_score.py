# SPDX-License-Identifier: Apache-2.0
"""Scores of an hour at one frame a second, beside the T x T formula: `pytest benchmarks/ops/keyframe_score.py`."""

from collections.abc import Callable

import pytest
import torch

from hourllava_ext import keyframe_score, reference

WAYS = {"hourllava": keyframe_score, "torch": reference.keyframe_score}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_keyframe_score(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    features = torch.randn(3600, 1152, dtype=dtype)
    torch.testing.assert_close(keyframe_score(features), reference.keyframe_score(features))
    benchmark(WAYS[way], features)
