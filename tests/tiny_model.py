# SPDX-License-Identifier: Apache-2.0
"""A model of random weights with a byte-level tokenizer: small enough to be made in every test."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hourllava.model import HourLlavaForConditionalGeneration, tiny_config

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])


def make_model(seed: int = 0, **changes: object) -> HourLlavaForConditionalGeneration:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = HourLlavaForConditionalGeneration(tiny_config(len(tokenizer), image_token_id=image_token_id, **changes))
    model.tokenizer = tokenizer
    return model.eval()
