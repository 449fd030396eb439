# SPDX-License-Identifier: Apache-2.0
"""ChatML prompts and training examples about one video, and which of their tokens are queries or targets."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from hourllava.errors import ModelError, QuestionError

IMAGE = "<image>"
SYSTEM = "You are a helpful assistant."
USER_HEADER = "<|im_start|>user\n"
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


class Prompt(NamedTuple):
    """A question about a video, up to where the answer starts."""

    ids: Tensor  # (L,) int64 with one `<image>` token
    # (L,) bool: tokens that join MemAug's queries, the same ones as in training, where template tokens and the
    # assistant's turns never do
    query_mask: Tensor
    question_mask: Tensor  # (L,) bool: those of them that ask, the last question's, behind the video


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    instruction: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> Prompt:
    """A question about a video.

    Args:
        instruction: put before the first question.
        history: earlier questions about the video and their answers, in order.
        system: the system message; None is the one that the model was trained with.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    past, queries = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    if history:
        (first, answer), *later = history
        past, labels = encode_turns(tokenizer, [(_ask(first, instruction), answer), *later], system)
        queries = (labels == -100) & (past != image)
    text = _user_message(question if history else _ask(question, instruction))
    asked = torch.tensor(_encode(tokenizer, text if history else _system_message(system) + text))
    header = torch.tensor(_encode(tokenizer, ASSISTANT_HEADER))
    asks = ~torch.isin(asked, torch.tensor([*_template_ids(tokenizer), image]))
    nothing = torch.zeros(len(header), dtype=torch.bool)
    start = len(_encode(tokenizer, USER_HEADER)) if history else asked.tolist().index(image)
    behind = torch.arange(len(asked)) >= start
    return Prompt(
        torch.cat([past, asked, header]),
        torch.cat([queries, asks, nothing]),
        torch.cat([torch.zeros_like(queries), asks & behind, nothing]),
    )


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


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], system: str | None = None
) -> tuple[Tensor, Tensor]:
    """A conversation for training, whose questions hold an `<image>` mark for each thing to see.

    Args:
        system: the system message; None is the original's.

    Returns:
        ids (L,) int64 and labels (L,) int64, as `build_example` gives.
    """
    targets = _template_ids(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for number, (question, answer) in enumerate(turns):
        asked = _encode(tokenizer, _system_message(system) * (number == 0) + _user_message(question))
        reply = _encode(tokenizer, f"{ASSISTANT_HEADER}{answer}<|im_end|>\n")
        ids += asked + reply
        labels += [token if token in targets else -100 for token in asked] + reply
    return torch.tensor(ids), torch.tensor(labels)


def tell_time(turns: Sequence[tuple[str, str]], instruction: str) -> list[tuple[str, str]]:
    """Put the `<image>` mark of a video and a time instruction in front of the first question."""
    asked = [(question.replace(IMAGE, "").removeprefix("\n"), answer) for question, answer in turns]
    return [(_ask(asked[0][0], instruction), asked[0][1]), *asked[1:]]


def is_whole(text: str) -> bool:
    """Whether a text holds no half of a character: what is left of one that was cut, or of bytes that are no UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_text(text: str) -> None:
    """Raise QuestionError if a text that a person gives holds tokens that only prompts may, or is no Unicode."""
    if not is_whole(text):
        raise QuestionError("question", "it holds half of a character (a lone surrogate)", "give it in UTF-8")
    held = [token for token in (*TEMPLATE_TOKENS, IMAGE) if token.strip() and token in text]
    if held:
        raise QuestionError("question", f"it holds {held[0]}, which the model reads as a mark", "leave that out")


def _ask(question: str, instruction: str | None) -> str:
    return "\n".join(line for line in (IMAGE, instruction, question) if line is not None)


def _system_message(content: str | None) -> str:
    return f"<|im_start|>system\n{SYSTEM if content is None else content}<|im_end|>\n"


def _user_message(content: str) -> str:
    return f"{USER_HEADER}{content}<|im_end|>\n"


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
