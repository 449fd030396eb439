# SPDX-License-Identifier: Apache-2.0
"""Random conversations of every modality against the model written out literally: alone, in batches, with gradients."""

import pytest
import torch
from oracle import Entry, Oracle, best_grid
from torch.nn import functional as F
from transformers import Qwen2Config

from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration
from hourllava.model.forgetting import remembered_frames

IMAGE = 3
KINDS = ("video", "unpooled", "tiles", "images", "tile", "text")


def make_model(**changes):
    torch.manual_seed(0)
    decoder = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    # Tiles of 4 x 4 patches, and a cap that most videos reach.
    fields = {"memaug_depth": 2, "vision_width": 12, "tile_size": 56, "image_grid": 3, "image_max_tiles": 2}
    fields |= {"min_frames": 16, "max_kept_frames": 5, "image_token_id": IMAGE, **changes}
    model = HourLlavaForConditionalGeneration(HourLlavaConfig(text_config=decoder, **fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter.data, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.train()


def draw_picks(generator, rows, count, uniform):
    """(rows, k): a random quarter of `count` cells, or every second row and column of a grid of `count` = (h, w)."""
    cells = count[0] * count[1]
    if uniform:
        picks = torch.arange(cells).view(count)[::2, ::2].flatten()
        return picks.expand(rows, -1)
    return torch.rand(rows, cells, generator=generator).topk(-(-cells // 4), 1).indices.sort(1).values


def draw_entry(model, generator, kind, uniform):
    def features(n, patches):
        return torch.randn(n, patches, 12, generator=generator)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    if kind in ("video", "unpooled"):
        frames = number(1, 40)
        remembered = remembered_frames(model.config, frames)
        picks = draw_picks(generator, remembered, (8, 8), uniform)
        return Entry("video", features(frames, 64 if kind == "video" else 121), None, [picks])
    base = draw_picks(generator, 1, (4, 4), uniform)[0]
    if kind != "tiles":
        return Entry("image", features(1, 16), None, [base])
    size = number(20, 200), number(20, 200)
    rows, columns = best_grid(*size, 56, 3)
    entry = Entry("image", features(1 + rows * columns, 16), size, [base])
    grid = Oracle(model).unpadded(entry.features[1:].view(-1, 4, 4, 12), size)
    entry.picks.append(draw_picks(generator, 1, grid.shape[:2], uniform)[0])
    return entry


def draw_sample(model, seed, kind, uniform):
    """Ids, labels and entries of a conversation of one to three turns."""
    generator = torch.Generator().manual_seed(seed)
    count = {"text": 0, "images": 2 + seed % 3}.get(kind, 1)
    entries = [draw_entry(model, generator, kind, uniform) for _ in range(count)]
    length = 12 + int(torch.randint(30, (1,), generator=generator))
    ids = torch.randint(4, 64, (length,), generator=generator)
    labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.6, -100)
    # The first token is always a query, as the system prompt is; marks may stand side by side.
    marks = 1 + torch.randperm(length - 4, generator=generator)[:count].sort().values
    labels[0], labels[-1] = -100, ids[-1]
    ids[marks], labels[marks] = IMAGE, -100
    return ids, labels, entries


def forward_arguments(samples, left):
    def pad(rows, fill):
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=fill, padding_side="left" if left else "right"
        )

    ids, labels, groups = zip(*samples, strict=True)
    entries = [entry for group in groups for entry in group]
    picks = []
    for entry in entries:
        offset = entry.features.shape[1]
        picks.append(torch.cat([entry.picks[0], offset + entry.picks[1]]) if entry.size else entry.picks[0])
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad(labels, -100),
        "vision_features": [entry.features for entry in entries],
        "modalities": [entry.modality for entry in entries],
        "image_sizes": [entry.size for entry in entries],
        "spatial_picks": picks,
    }


def expected(model, samples):
    """Position ids, logits and labels of each sample, and the loss over all of them."""
    results, losses = [], []
    for ids, labels, entries in samples:
        embeds, positions, memory_ids, targets = Oracle(model).run(ids, labels, entries, IMAGE)
        hidden = model.model(inputs_embeds=embeds[None], position_ids=torch.arange(len(embeds))[None])
        logits = model.lm_head(hidden.last_hidden_state[0])
        losses.append(F.cross_entropy(logits[:-1], targets[1:], reduction="none")[targets[1:] != -100])
        results.append((positions, memory_ids, logits))
    return results, torch.cat(losses).mean()


def relative_error(ours, theirs):
    return float(((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).detach())


def compare(model, samples, left=False, given=True):
    seen = {}
    write = type(model.model.vision_resampler).write

    def record_write(tokens, layout):
        seen["layout"] = layout
        return write(model.model.vision_resampler, tokens, layout)

    model.model.vision_resampler.write = record_write
    handle = model.model.vision_resampler.register_forward_pre_hook(lambda _, a: seen.update(stream=a[1]))
    arguments = forward_arguments(samples, left)
    if not given:
        del arguments["spatial_picks"]
    result = model(**arguments)
    handle.remove()
    model.zero_grad()
    result.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    theirs, loss = expected(model, samples)
    loss.backward()

    assert abs(float(result.loss.detach()) - float(loss.detach())) < 1e-6
    for number, (positions, memory_ids, logits) in enumerate(theirs):
        rows = slice(-len(logits), None) if left else slice(len(logits))
        assert relative_error(result.logits[number, rows], logits) < 2e-5
        if positions is None:
            continue
        at = seen["stream"].cu_seqlens[number : number + 2].tolist()
        assert torch.equal(seen["stream"].position_ids[slice(*at)], positions)
        mine = torch.isin(seen["layout"].slots // 128, seen["layout"].page_table[number].long())
        assert torch.equal(seen["layout"].position_ids[mine].sort().values, memory_ids.sort().values)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(ours[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_one_conversation(kind, seed):
    model = make_model()
    compare(model, [draw_sample(model, seed, kind, uniform=False)])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_uniform_picks_are_our_own(kind):
    model = make_model(spatial_forgetting="uniform")
    compare(model, [draw_sample(model, 11, kind, uniform=True)], given=False)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_batch(left, seed):
    model = make_model()
    order = torch.randperm(len(KINDS), generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = [KINDS[i] for i in order] + ["video"]
    compare(model, [draw_sample(model, 100 * seed + i, kind, False) for i, kind in enumerate(kinds)], left)


@pytest.mark.parametrize("frames", [1, 2, 3, 127, 128, 129])
def test_frames_as_released(frames):
    model = make_model(min_frames=128, max_kept_frames=512)
    ids, labels, _ = draw_sample(model, frames, "video", False)
    generator = torch.Generator().manual_seed(frames)
    picks = draw_picks(generator, max(frames, 128), (8, 8), False)
    compare(model, [(ids, labels, [Entry("video", torch.randn(frames, 64, 12, generator=generator), None, [picks])])])


@torch.no_grad()
def test_inference_leaves_no_token_out():
    model = make_model()
    ids, _, entries = draw_sample(model, 5, "images", False)
    arguments = forward_arguments([(ids, ids, entries)], False)
    del arguments["labels"]
    embeds, *_ = Oracle(model).run(ids, None, entries, IMAGE)
    logits = model.lm_head(model.model(inputs_embeds=embeds[None]).last_hidden_state)
    assert relative_error(model(**arguments).logits, logits) < 2e-5
