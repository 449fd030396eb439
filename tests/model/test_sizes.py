# SPDX-License-Identifier: Apache-2.0
"""The released shapes, on the meta device: every parameter is there, and none besides."""

import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig

from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration

TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
TOWER |= {"image_size": 384, "patch_size": 14}


def shape(vocabulary, hidden, intermediate, layers, heads, tied):
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize(
    ("decoder", "counts"),
    [
        (shape(151936, 2048, 11008, 36, (16, 2), True), (3_085_938_688, 52_460_544, 6_557_696, 3_700_088_352)),
        (shape(151936, 2048, 11008, 36, (16, 2), False), (3_397_103_616, 52_460_544, 6_557_696, 4_011_253_280)),
        (shape(152064, 3584, 18944, 28, (28, 4), False), (7_615_616_512, 161_536_512, 16_980_992, 8_676_494_880)),
    ],
    ids=["3B", "3B untied", "7B"],
)
def test_parameter_counts(decoder, counts):
    with torch.device("meta"):
        model = HourLlavaForConditionalGeneration(
            HourLlavaConfig(text_config=decoder, vision_config=SiglipVisionConfig(**TOWER))
        )

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
