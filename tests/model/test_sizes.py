# SPDX-License-Identifier: Apache-2.0
"""The released shapes, on the meta device: every parameter is there, and none besides."""

import pytest
import torch

from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.released import released_config


@pytest.mark.parametrize(
    ("name", "changes", "counts"),
    [
        ("3b", {}, (3_085_938_688, 52_460_544, 6_557_696, 3_700_088_352)),
        ("3b", {"tie_word_embeddings": False}, (3_397_103_616, 52_460_544, 6_557_696, 4_011_253_280)),
        ("7b", {}, (7_615_616_512, 161_536_512, 16_980_992, 8_676_494_880)),
    ],
    ids=["3B", "3B untied", "7B"],
)
def test_parameter_counts(name, changes, counts):
    config = released_config(name)
    config.text_config.update(changes)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    with torch.device("meta"):
        model = HourLlavaForConditionalGeneration(config)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    inner = model.model
    blocks = inner.vision_resampler.blocks
    besides = count(inner.vision_resampler) + count(inner.mm_projector) + count(inner.vision_tower)
    besides += inner.image_newline.numel()
    llm, block, projector, total = counts
    assert count(model) == total
    assert count(model) - besides == llm
    assert [count(b) for b in blocks] == [block] * 4
    assert count(inner.mm_projector) == projector
    assert count(inner.vision_tower) == 397_747_744
    assert (model.config.tile_size, model.config.patches_per_side, model.config.vision_width) == (384, 27, 1152)
