# SPDX-License-Identifier: Apache-2.0
"""Prompts and examples: ChatML, one image, and the same query stream in training and in asking."""

import pytest
from tiny_model import make_tokenizer

from hourllava.errors import ModelError
from hourllava.model import build_example, build_prompt
from hourllava.model.prompt import load_tokenizer, time_instruction


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_prompt_text(tokenizer):
    ids, mask = build_prompt(tokenizer, "What falls?", time_instruction(90.5, 91))
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\n"
        "The video lasts for 90.50 seconds, and 91 frames are uniformly sampled from it. "
        "Please answer the following questions related to this video.\n"
        "What falls?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.shape == mask.shape
    assert tokenizer.decode(ids[mask]) == (
        "systemYou are a helpful assistant.user"
        "The video lasts for 90.50 seconds, and 91 frames are uniformly sampled from it. "
        "Please answer the following questions related to this video.What falls?"
    )


def test_example_text_and_targets(tokenizer):
    ids, labels = build_example(tokenizer, [("What falls?", "A cup."), ("When?", "At noon.")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat falls?<|im_end|>\n"
        "<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n"
        "<|im_start|>assistant\nAt noon.<|im_end|>\n"
    )
    target = labels != -100
    assert labels[target].equal(ids[target])
    # One stream for all turns: later questions are seen while earlier ones are answered, as in the original.
    assert tokenizer.decode(ids[~target]) == "systemYou are a helpful assistant.user<image>What falls?userWhen?"
    assert tokenizer.decode(ids[target]) == (
        "<|im_start|>\n<|im_end|>\n<|im_start|>\n\n<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n"
        "<|im_start|>\n<|im_end|>\n<|im_start|>assistant\nAt noon.<|im_end|>\n"
    )


def test_asking_and_training_see_the_same_queries(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids, mask = build_prompt(tokenizer, "What falls?")
    example, labels = build_example(tokenizer, [("What falls?", "A cup.")])
    assert example[: len(ids)].equal(ids)
    assert ((labels == -100) & (example != image))[: len(ids)].equal(mask)
    assert int((ids == image).sum()) == 1


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="it has no tokenizer"):
        load_tokenizer(tmp_path)
