# SPDX-License-Identifier: Apache-2.0
"""Grounding measures the share of attention on the answer's pages, and its gradient raises that share."""

import pytest
import torch

from hourllava.data.tokenizer import build_tokenizer
from hourllava.model import HourLlavaForConditionalGeneration, tiny_config
from hourllava.model.memaug import CrossAttention
from hourllava.train.films import Examples
from hourllava.train.grounding import Grounding
from hourllava_ext import reference


@pytest.fixture
def model() -> HourLlavaForConditionalGeneration:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return HourLlavaForConditionalGeneration(
        tiny_config(vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    )


def run(model: HourLlavaForConditionalGeneration, frames: list[list[int]]) -> torch.Tensor:
    batch = Examples(build_tokenizer(), 64, seed=0).batch(8, len(frames))
    with Grounding(model, frames) as grounding:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    return grounding.loss()


def test_all_pages_hold_all_the_attention(model: HourLlavaForConditionalGeneration) -> None:
    # Eight frames fill four visual pages; only the eight newline tokens are left out.
    assert 0 < run(model, [list(range(8))]).item() < 0.2


def test_it_is_the_mean_log_share_of_the_answers_page(model: HourLlavaForConditionalGeneration) -> None:
    expected = []

    def measure(attention: CrossAttention, inputs: tuple, _: object) -> None:
        x, stream, inv_freq, pages, _use = inputs
        query = attention.Wq(x).view(len(x), -1, attention.head_dim)
        where = (pages.page_lengths, stream.position_ids, stream.cu_seqlens, inv_freq)
        # Page 0 holds frames 0 and 1, page 1 the newlines, page 2 frames 2 and 3.
        everywhere, there = (
            reference.paged_attention(query, pages.key_pages, pages.value_pages, table, *where)[1]
            for table in (pages.page_table, torch.tensor([[2]]))
        )
        expected.append((everywhere - there).mean().item())

    for block in model.model.vision_resampler.blocks:
        block.cross_attn.register_forward_hook(measure)
    loss = run(model, [[2, 3]]).item()
    assert len(expected) == 2
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_samples_without_a_place_to_look_at_count_nothing(model: HourLlavaForConditionalGeneration) -> None:
    assert run(model, [[], []]).item() == 0
    assert run(model, [[0, 1], []]).item() > 0


def test_its_gradient_moves_attention_to_the_answer(model: HourLlavaForConditionalGeneration) -> None:
    optimizer = torch.optim.AdamW(model.model.vision_resampler.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = run(model, [[4, 5], [0, 1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
