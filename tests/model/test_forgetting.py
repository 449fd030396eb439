# SPDX-License-Identifier: Apache-2.0
"""Forgetting: the original's frames, and picks that never depend on how a video was taken in."""

import numpy as np
import pytest
import torch

from hourllava.errors import InputError
from hourllava.model import tiny_config
from hourllava.model.forgetting import Forgetting, kept_frames, rank_frames, spatial_picks, spread_frames


def test_frames_are_numpys_linspace():
    for frames in [*range(1, 700), 3600, 7200, 19_999]:
        for count in {1, 2, 32, 128, max(1, frames // 4), 512}:
            expected = np.linspace(0, frames - 1, count, dtype=int)
            assert spread_frames(frames, count).tolist() == expected.tolist(), (frames, count)


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (7, 1), (8, 2), (128, 32), (600, 150), (3600, 512)])
def test_number_of_kept_frames(frames, kept):
    assert len(kept_frames(tiny_config(max_kept_frames=512), frames)) == kept


def test_uniform_picks_are_every_second_row_and_column():
    picks = spatial_picks(tiny_config(), torch.arange(3), (8, 8))
    rows, columns = np.meshgrid(range(0, 8, 2), range(0, 8, 2), indexing="ij")
    assert picks.tolist() == [(rows * 8 + columns).ravel().tolist()] * 3


def test_random_picks_depend_on_seed_frame_and_grid_only():
    config = tiny_config(spatial_forgetting="random")
    picks = spatial_picks(config, torch.arange(1000), (8, 8))
    assert picks.shape == (1000, 16)
    assert bool((picks.diff(dim=1) > 0).all())
    chosen = torch.tensor([999, 3, 500])
    assert torch.equal(spatial_picks(config, chosen, (8, 8)), picks[chosen])
    other = spatial_picks(tiny_config(spatial_forgetting="random", forgetting_seed=1), torch.arange(1000), (8, 8))
    assert float((other == picks).float().mean()) < 0.2
    # Every patch is picked about a quarter of the time: 250 times, give or take four deviations of 13.7.
    counts = torch.bincount(picks.flatten(), minlength=64)
    assert 195 < int(counts.min()) <= int(counts.max()) < 305
    # Neighbouring frames share a quarter of their picks, as independent draws do.
    shared = (picks[1:, :, None] == picks[:-1, None]).any(-1).float().mean()
    assert float(shared) == pytest.approx(0.25, abs=0.02)


def test_random_count_is_rounded_up():
    assert spatial_picks(tiny_config(spatial_forgetting="random"), torch.arange(2), (27, 27)).shape == (2, 183)


def test_random_frames():
    config = tiny_config(temporal_forgetting="random", max_kept_frames=50)
    kept = kept_frames(config, 1000)
    assert len(kept) == 50
    assert bool((kept.diff() > 0).all())
    assert torch.equal(kept_frames(config, 1000), kept)
    other = kept_frames(config, 1000, Forgetting.of(config, seed=1))
    assert len(set(kept.tolist()) & set(other.tolist())) < 15
    # Over many seeds, early and late frames are kept alike: 500 of 1000 draws, give or take four deviations of 16.
    late = sum(int(kept_frames(config, 4, Forgetting.of(config, seed=seed))[0]) >= 2 for seed in range(1000))
    assert 436 < late < 564


def test_keyframes_are_least_like_their_neighbours():
    config = tiny_config(temporal_forgetting="keyframe", max_kept_frames=50)
    features = torch.randn(40, 9, 12) + 2
    rule = Forgetting.of(config)
    kept = kept_frames(config, 40, rule, rank_frames(rule, features, features, features[0]))
    unit = torch.nn.functional.normalize(features.mean(1), dim=-1)
    scores = []
    for frame in range(40):
        first = min(max(frame - 4, 0), 31)
        near = [n for n in range(first, first + 9) if n != frame]
        scores.append(float((unit[near] @ unit[frame]).mean()))
    assert kept.tolist() == sorted(sorted(range(40), key=scores.__getitem__)[:10])


def test_question_guided_frames_are_most_like_the_words():
    config = tiny_config(temporal_forgetting="question")
    tokens, words = torch.randn(24, 4, 8), torch.randn(5, 8)
    rule = Forgetting.of(config)
    kept = kept_frames(config, 24, rule, rank_frames(rule, None, tokens, words))
    likeness = torch.cosine_similarity(tokens.mean(1), words.mean(0)[None])
    assert kept.tolist() == sorted(likeness.topk(6).indices.tolist())


def test_rules_that_miss_what_they_compare():
    tokens = torch.randn(24, 4, 8)
    with pytest.raises(InputError, match="a memory does not keep the tower's features"):
        rank_frames(Forgetting("keyframe", "uniform", 0), None, tokens, tokens[0])
    with pytest.raises(InputError, match="no text joins the queries"):
        rank_frames(Forgetting("question", "uniform", 0), None, tokens, tokens[0, :0])


def test_unknown_rule():
    with pytest.raises(ValueError, match="must be one of uniform, random"):
        tiny_config(spatial_forgetting="none")
