# SPDX-License-Identifier: Apache-2.0
"""The tiny tokenizer: any text survives it, and the template's tokens are single."""

from hourllava.data import vocabulary
from hourllava.data.tokenizer import SPECIAL_TOKENS, build_tokenizer


def test_any_text_comes_back() -> None:
    tokenizer = build_tokenizer()
    for text in (
        "Which colour was the star?",
        "Überraschung! 猫 42\n\ttab",
        "<|im_start|>user\n<image>\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_of_the_rendered_world_and_template_tokens_are_single() -> None:
    tokenizer = build_tokenizer()
    for token in (*SPECIAL_TOKENS, "\n"):
        assert len(tokenizer.encode(token)) == 1
    words = {word for line in vocabulary() for word in line.replace("?", "").split()}
    assert all(len(tokenizer.encode(" " + word)) == 1 or len(tokenizer.encode(word)) == 1 for word in words)


def test_training_it_again_gives_the_same_vocabulary() -> None:
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()
