# SPDX-License-Identifier: Apache-2.0
"""Prompts and examples: ChatML, one image, and the same query stream in training and in asking."""

import pytest
from tiny_model import make_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hourllava.errors import ModelError
from hourllava.model import build_example, build_prompt
from hourllava.model.prompt import encode_turns, load_tokenizer, tell_time, time_instruction


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_prompt_text(tokenizer):
    ids, mask, _ = build_prompt(tokenizer, "What falls?", time_instruction(90.5, 91))
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
    ids, mask, _ = build_prompt(tokenizer, "What falls?")
    example, labels = build_example(tokenizer, [("What falls?", "A cup.")])
    assert example[: len(ids)].equal(ids)
    assert ((labels == -100) & (example != image))[: len(ids)].equal(mask)
    assert int((ids == image).sum()) == 1


def test_history_is_read_as_in_training(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    instruction = time_instruction(9.0, 9)
    turns = [("What falls?", "A cup."), ("When?", "At noon."), ("Why?", "Nobody knows.")]
    for told in (1, 2):
        ids, mask, asks = build_prompt(tokenizer, turns[told][0], instruction, turns[:told])
        example, labels = build_example(tokenizer, turns[: told + 1], instruction)
        assert example[: len(ids)].equal(ids)
        assert ((labels == -100) & (example != image))[: len(ids)].equal(mask)
        assert tokenizer.decode(ids[asks]) == turns[told][0]


def test_question_mask_is_what_stands_behind_the_video(tokenizer):
    instruction = time_instruction(9.0, 9)
    ids, mask, asks = build_prompt(tokenizer, "What falls?", instruction)
    assert tokenizer.decode(ids[asks]) == f"{instruction}What falls?"
    assert not (asks & ~mask).any()


def test_system_message(tokenizer):
    ids, mask, _ = build_prompt(tokenizer, "What falls?", system="Be brief.")
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>")
    later, _, _ = build_prompt(tokenizer, "Why?", history=[("What falls?", "A cup.")], system="Be brief.")
    assert later[: len(ids)].equal(ids)
    assert tokenizer.decode(ids[mask]).startswith("systemBe brief.user")


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="it has no tokenizer"):
        load_tokenizer(tmp_path)


# Ids of Qwen's vocabulary that the original's prompts start with; the last four stand for any words.
QWEN = {
    "<|im_start|>": 151644, "system": 8948, "Ċ": 198, "You": 2610, "Ġare": 525, "Ġa": 264, "Ġhelpful": 10950,
    "Ġassistant": 17847, ".": 13, "<|im_end|>": 151645, "user": 872, "<image>": 151646,
    "assistant": 77091, "What": 1, "?": 2, "Here": 3, "ĊĊ": 4,
}  # fmt: skip
PREFIX = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]


def qwen_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(QWEN, unk_token="?"))
    words = pre_tokenizers.Split(Regex(r" ?\w+|\n+|[^\s\w]+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_ids_and_labels_of_the_original():
    """The system's and the user's words are no targets; template tokens are, wherever they stand, but not "\\n\\n"."""
    turns = [("<image>\nWhat?", "Here."), ("What\n\nHere?", "What\nHere.")]
    ids, labels = encode_turns(qwen_tokenizer(), turns)
    assert list(zip(ids.tolist(), labels.tolist(), strict=True)) == [
        (151644, 151644), (8948, -100), (198, 198), (2610, -100), (525, -100), (264, -100), (10950, -100),
        (17847, -100), (13, -100), (151645, 151645), (198, 198),
        (151644, 151644), (872, -100), (198, 198), (151646, -100), (198, 198), (1, -100), (2, -100),
        (151645, 151645), (198, 198),
        (151644, 151644), (77091, 77091), (198, 198), (3, 3), (13, 13), (151645, 151645), (198, 198),
        (151644, 151644), (872, -100), (198, 198), (1, -100), (4, -100), (3, -100), (2, -100), (151645, 151645),
        (198, 198),
        (151644, 151644), (77091, 77091), (198, 198), (1, 1), (198, 198), (3, 3), (13, 13), (151645, 151645),
        (198, 198),
    ]  # fmt: skip
    assert ids[:14].tolist() == PREFIX


def test_marks_stay_where_they_are(tokenizer):
    ids, labels = encode_turns(tokenizer, [("<image> or <image>?", "This."), ("And <image>?", "No.")])
    marks = ids == tokenizer.convert_tokens_to_ids("<image>")
    assert int(marks.sum()) == 3
    assert (labels[marks] == -100).all()
    assert "user\n<image> or <image>?<|im_end|>" in tokenizer.decode(ids)


def test_the_time_is_told_behind_the_mark():
    turns = [("<image>\nWhat?", "A cup."), ("When?", "Now.")]
    assert tell_time(turns, "It lasts.") == [("<image>\nIt lasts.\nWhat?", "A cup."), ("When?", "Now.")]
    assert tell_time([("What?", "A."), ("<image>\nWhen?", "B.")], "It lasts.") == [
        ("<image>\nIt lasts.\nWhat?", "A."),
        ("When?", "B."),
    ]
