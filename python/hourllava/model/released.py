# SPDX-License-Identifier: Apache-2.0
"""The sizes of the released models, known without their checkpoints."""

from transformers import Qwen2Config, SiglipVisionConfig

from .configuration import HourLlavaConfig

# Vocabulary, hidden, intermediate, layers, query heads, key heads, tied head: Qwen2.5-3B and Qwen2-7B.
_DECODERS = {
    "3b": (151936, 2048, 11008, 36, 16, 2, True),
    "7b": (152064, 3584, 18944, 28, 28, 4, False),
}
RELEASED = tuple(_DECODERS)


def released_config(name: str) -> HourLlavaConfig:
    """The configuration of a released model, "3b" or "7b": a Qwen decoder behind SigLIP so400m without its last layer.

    Source: the paper, section 4, and the configurations of the models it starts from.
    """
    vocabulary, hidden, intermediate, layers, heads, key_heads, tied = _DECODERS[name]
    decoder = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return HourLlavaConfig(text_config=decoder, vision_config=tower, dtype="bfloat16")
