# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tools import DTYPES, assert_compiles_fullgraph, assert_matches_reference, assert_repeatable

from hourllava_ext import keyframe_score, reference

# Frames, width, window: even and odd windows, wider than the video, alone, nothing.
CASES = [
    (63, 33, 9),
    (1000, 16, 9),
    (10, 48, 4),
    (9, 7, 9),
    (5, 17, 9),
    (5, 17, 2**62),
    (2, 5, 9),
    (1, 5, 9),
    (6, 5, 1),
    (0, 5, 9),
    (4, 0, 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reference(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    frames, width, window = case
    # A common part, as in a real film: cosines of about a half rather than around zero.
    features = (torch.randn(frames, width) + torch.randn(width)).to(dtype)
    assert_matches_reference(keyframe_score, reference.keyframe_score, features, window)


def test_the_cut_scores_lowest() -> None:
    before, after = torch.randn(2, 32)
    features = torch.cat([before.expand(20, -1), after.expand(20, -1)])
    score = keyframe_score(features)
    torch.testing.assert_close(score[:15], torch.ones(15))
    assert set(score.topk(2, largest=False).indices.tolist()) == {19, 20}


def test_zero_frames_have_cosine_zero() -> None:
    features = torch.randn(12, 8)
    features[5] = 0
    assert keyframe_score(features)[5] == 0
    assert_matches_reference(keyframe_score, reference.keyframe_score, features)


def test_no_gradient() -> None:
    assert not keyframe_score(torch.randn(5, 3, requires_grad=True)).requires_grad


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.hourllava_ext.keyframe_score.default, (torch.randn(12, 5), 9))
    torch.library.opcheck(torch.ops.hourllava_ext.keyframe_score.default, (torch.randn(12, 5).bfloat16(), 4))


def test_compile_fullgraph() -> None:
    assert_compiles_fullgraph(keyframe_score, torch.randn(12, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(keyframe_score, torch.randn(1000, 77).to(dtype))


def test_bad_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"features must be \(T, C\), got shape \(2, 3, 4\)"):
        keyframe_score(torch.randn(2, 3, 4))
    with pytest.raises(RuntimeError, match="window must be at least 1 frame, got 0"):
        keyframe_score(torch.randn(2, 3), window=0)
    with pytest.raises(RuntimeError, match="features must be float32, float16, bfloat16 or float64"):
        keyframe_score(torch.randn(2, 3).int())
