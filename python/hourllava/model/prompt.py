# SPDX-License-Identifier: Apache-2.0
"""ChatML prompts and training examples about one video, and which of their tokens are queries or targets (SPEC C.7)."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from hourllava.errors import ModelError

IMAGE = "<image>"
SYSTEM_MESSAGE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASSISTANT_HEADER = "<|im_start|>assistant\n"
# Tokens that are targets and never queries, whoever's turn they stand in.
TEMPLATE_TOKENS = ("\n", "<|im_start|>", "<|im_end|>")
_FAST, _SLOW = ("tokenizer.json",), ("vocab.json", "merges.txt")


def time_instruction(seconds: float, frames: int) -> str:
    """The sentence that tells the model a video's length, as it was worded in training."""
    return (
        f"The video lasts for {seconds:.2f} seconds, and {frames} frames are uniformly sampled from it. "
        "Please answer the following questions related to this video."
    )


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, instruction: str | None = None
) -> tuple[Tensor, Tensor]:
    """A question about a video, up to where the answer starts.

    Returns:
        ids (L,) int64 with one `<image>` token, and the query mask (L,) bool: tokens that join MemAug's queries, the
        same ones as in training, where template tokens and the assistant's turn never do.
    """
    asked = _encode(tokenizer, SYSTEM_MESSAGE + _user_message(_ask(question, instruction)))
    header = _encode(tokenizer, ASSISTANT_HEADER)
    hidden = {*_template_ids(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE)}
    return torch.tensor(asked + header), torch.tensor([i not in hidden for i in asked] + [False] * len(header))


def build_example(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], instruction: str | None = None
) -> tuple[Tensor, Tensor]:
    """A conversation about one video for training.

    Args:
        turns: questions with their answers, in order.
        instruction: put before the first question.

    Returns:
        ids (L,) int64 with one `<image>` token, and labels (L,) int64: the assistant's turns and every template token
        are targets; everything else is -100, and its text is what joins MemAug's queries.
    """
    (question, answer), *rest = turns
    return encode_turns(tokenizer, [(_ask(question, instruction), answer), *rest])


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """A conversation for training, whose questions hold an `<image>` mark for each thing to see.

    Returns:
        ids (L,) int64 and labels (L,) int64, as `build_example` gives.
    """
    targets = _template_ids(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for number, (question, answer) in enumerate(turns):
        asked = _encode(tokenizer, SYSTEM_MESSAGE * (number == 0) + _user_message(question))
        reply = _encode(tokenizer, f"{ASSISTANT_HEADER}{answer}<|im_end|>\n")
        ids += asked + reply
        labels += [token if token in targets else -100 for token in asked] + reply
    return torch.tensor(ids), torch.tensor(labels)


def tell_time(turns: Sequence[tuple[str, str]], instruction: str) -> list[tuple[str, str]]:
    """Put the `<image>` mark of a video and a time instruction in front of the first question."""
    asked = [(question.replace(IMAGE, "").removeprefix("\n"), answer) for question, answer in turns]
    return [(_ask(asked[0][0], instruction), asked[0][1]), *asked[1:]]


def _ask(question: str, instruction: str | None) -> str:
    return "\n".join(line for line in (IMAGE, instruction, question) if line is not None)


def _user_message(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {_encode(tokenizer, token)[0] for token in TEMPLATE_TOKENS}


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a tokenizer: ours, or the vocabulary and merges that the original's Qwen2 writes."""
    present = {name for name in (*_FAST, *_SLOW) if folder and (Path(folder) / name).is_file()}
    return present.issuperset(_FAST) or present.issuperset(_SLOW)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model's directory, with a token for `<image>`.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if not has_tokenizer(folder):
        raise ModelError(folder or "model", "it has no tokenizer", "load a directory with tokenizer.json, or set one")
    kind = PreTrainedTokenizerFast if (Path(folder) / _FAST[0]).is_file() else Qwen2Tokenizer
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        why = f"its tokenizer is damaged ({str(error).splitlines()[0]})"
        raise ModelError(folder, why, "download it again, all of its files") from error
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer
