# SPDX-License-Identifier: Apache-2.0
"""Conversations without a memory: about images, or about nothing to see."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hourllava.model import HourLlavaProcessor, Prepared
from hourllava.model.inputs import read_visuals
from hourllava.model.prompt import check_text

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration


@torch.no_grad()
def prepare_pictures(model: "HourLlavaForConditionalGeneration", messages: Sequence[dict[str, Any]]) -> Prepared:
    """The decoder's input for chat messages, the last of them the user's, whose parts are texts and images.

    Args:
        messages: as `HourLlavaProcessor.apply_chat_template` takes them.

    Raises:
        QuestionError: a text holds tokens that only prompts may.
        InputError: an image cannot be seen, or the conversation is longer than the decoder reads.
    """
    for message in messages:
        content = message["content"]
        for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            check_text(text)
    processor = HourLlavaProcessor.for_config(model.tokenizer, model.config)
    inputs = dict(processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True))
    pixels = [tiles.to(model.device) for tiles in inputs.get("pixel_values", ())]
    visuals = read_visuals(pixels, None, inputs.get("modalities"), inputs.get("image_sizes"))
    mask = inputs["query_mask"].to(model.device)
    rows, _ = model.embed(inputs["input_ids"].to(model.device), None, None, visuals, {"query_mask": mask})
    return Prepared(rows[None], None)
