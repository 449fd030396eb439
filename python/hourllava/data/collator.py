# SPDX-License-Identifier: Apache-2.0
"""Items of any modalities as one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .dataset import Item


class Collator:
    """Puts items together for the model's `forward`, padded at the right.

    Only text is padded: visual tokens of different numbers are packed by the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id
        self.pad = 0 if pad is None else int(pad)  # what stands there is masked out

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, L) int64; unless the whole batch is text, `pixel_values`,
            `modalities` and `image_sizes` with an entry for each `<image>` mark of the batch, in order.
        """
        ids = [item["input_ids"] for item in items]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
        }
        if any(item["pixel_values"] for item in items):
            batch["pixel_values"] = [content for item in items for content in item["pixel_values"]]
            batch["modalities"] = [modality for item in items for modality in item["modalities"]]
            batch["image_sizes"] = [size for item in items for size in item["image_sizes"]]
        return batch
