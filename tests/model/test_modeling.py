# SPDX-License-Identifier: Apache-2.0
"""The model as a transformers model: batches, files, generation, and the switches that evaluation uses."""

import pytest
import torch
from safetensors import safe_open

from hourllava.errors import InputError, ModelError
from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration, tiny_config

IMAGE = 3


def make_model(**changes):
    torch.manual_seed(0)
    return HourLlavaForConditionalGeneration(tiny_config(vocab_size=64, image_token_id=IMAGE, **changes)).eval()


@pytest.fixture
def model():
    return make_model()


def make_sample(seed, frames, before=5, after=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (before + 1 + after,), generator=generator)
    ids[before] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[-3:] = ids[-3:]
    return ids, labels, torch.randn(frames, 64, 64, generator=generator)


def pad(rows, fill):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


@pytest.mark.parametrize("changes", [{}, {"min_frames": 12}, {"spatial_forgetting": "random"}])
def test_batch_equals_single_samples(changes):
    model = make_model(**changes)
    samples = [make_sample(1, 9), make_sample(2, 30, after=4), make_sample(3, 1, before=2), make_sample(4, 30)]
    ids, labels, features = zip(*samples, strict=True)
    mask = pad([torch.ones_like(row) for row in ids], 0)
    batch = model(pad(ids, 0), attention_mask=mask, labels=pad(labels, -100), vision_features=list(features))
    losses = []
    for number, (row, label, feature) in enumerate(samples):
        single = model(row[None], labels=label[None], vision_features=[feature])
        length = single.logits.shape[1]
        torch.testing.assert_close(batch.logits[number, :length], single.logits[0], rtol=1e-4, atol=1e-5)
        losses.append(single.loss)
    # Every sample has three targets, so the batch's mean is the mean of means.
    torch.testing.assert_close(batch.loss, torch.stack(losses).mean())


def test_pixels_go_through_the_tower(model):
    ids, labels, _ = make_sample(1, 1)
    frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    features = model.model.vision_tower(frames)
    assert features.shape == (6, 64, 64)
    from_pixels = model(ids[None], labels=labels[None], pixel_values=[frames])
    from_features = model(ids[None], labels=labels[None], vision_features=[features])
    assert torch.equal(from_pixels.logits, from_features.logits)
    normalised = (frames / 255 - 0.5) / 0.5
    torch.testing.assert_close(model.model.vision_tower(normalised), features, rtol=1e-4, atol=1e-4)


def test_tower_output_is_the_state_before_the_last_norm(model):
    frames = torch.randn(2, 3, 64, 64)
    tower = model.model.vision_tower.vision_tower["vision_model"]
    hidden = tower(pixel_values=frames, output_hidden_states=True)
    torch.testing.assert_close(tower.post_layernorm(model.model.vision_tower(frames)), hidden.last_hidden_state)


def test_training_reaches_every_part():
    model = make_model().train()
    ids, labels, _ = make_sample(1, 1)
    model(ids[None], labels=labels[None], pixel_values=[torch.rand(6, 3, 64, 64)]).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    ]


def test_switches_change_what_reaches_the_decoder(model):
    ids, _, feature = make_sample(1, 40)
    arguments = {"input_ids": ids[None], "vision_features": [feature]}
    full, bypassed, forgotten = (
        model(**arguments, **switch).logits for switch in ({}, {"memaug": False}, {"use_memory": False})
    )
    assert full.shape == bypassed.shape == forgotten.shape
    assert not torch.allclose(full, bypassed, atol=1e-4)
    assert not torch.allclose(full, forgotten, atol=1e-4)
    # A frame that forgetting drops is seen with the memory only.
    changed = feature.clone()
    changed[1] += 1
    arguments["vision_features"] = [changed]
    assert not torch.equal(model(**arguments).logits, full)
    assert torch.equal(model(**arguments, memaug=False).logits, bypassed)
    assert torch.equal(model(**arguments, use_memory=False).logits, forgotten)


def test_query_mask_defaults_to_the_labels(model):
    ids, labels, feature = make_sample(1, 8)
    arguments = {"input_ids": ids[None], "vision_features": [feature]}
    by_labels = model(**arguments, labels=labels[None]).logits
    assert torch.equal(model(**arguments, query_mask=labels[None] == -100).logits, by_labels)
    assert not torch.equal(model(**arguments).logits, by_labels)


def test_outputs_come_as_a_tuple_if_that_is_asked_for(model):
    ids, labels, feature = make_sample(1, 8)
    arguments = {"input_ids": ids[None], "labels": labels[None], "vision_features": [feature]}
    expected = model(**arguments)
    loss, logits, *_ = model(**arguments, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_videos_of_one_length_may_come_as_one_tensor(model):
    rows, _, features = zip(make_sample(1, 8), make_sample(2, 8), strict=True)
    ids = torch.stack(rows)
    expected = model(ids, vision_features=list(features)).logits
    assert torch.equal(model(ids, vision_features=torch.stack(features)).logits, expected)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_pixels_of_other_integers_are_refused(model, kind):
    ids, _, _ = make_sample(1, 1)
    with pytest.raises(InputError, match=f"it is {kind}; give pixels in uint8"):
        model(ids[None], pixel_values=[torch.ones(4, 3, 64, 64, dtype=kind)])
    with pytest.raises(InputError, match="features in floats"):
        model(ids[None], vision_features=[torch.ones(4, 64, 64, dtype=torch.uint8)])


def test_original_image_token_is_understood(model):
    ids, _, feature = make_sample(1, 8)
    theirs = ids.masked_fill(ids == IMAGE, -200)
    ours = model(ids[None], vision_features=[feature]).logits
    assert torch.equal(model(theirs[None], vision_features=[feature]).logits, ours)


def test_a_tied_head_is_stored_once(tmp_path):
    config = tiny_config(vocab_size=64, image_token_id=IMAGE)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = HourLlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}
    again = HourLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_save_and_load_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    again = HourLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.to_dict() | {"dtype": None, "_name_or_path": None} == again.config.to_dict() | {
        "dtype": None,
        "_name_or_path": None,
    }
    ids, _, _ = make_sample(1, 1)
    arguments = {"input_ids": ids[None], "pixel_values": [torch.rand(5, 3, 64, 64)]}
    assert torch.equal(again(**arguments).logits, model(**arguments).logits)


def test_keys_are_the_originals(model):
    keys = set(model.state_dict())
    assert {
        "model.image_newline",
        "model.mm_projector.2.bias",
        "model.vision_resampler.layers.1.self_attn.Wqkv.weight",
        "model.vision_resampler.layers.0.cross_attn.Wkv.bias",
        "model.vision_resampler.layers.0.mlp.2.weight",
        "model.vision_resampler.layers.0.norm3.weight",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
    } <= keys
    assert not any("head" in key for key in keys if key.startswith("model."))


def test_initial_weights():
    model = make_model()
    assert 0.05 < float(model.model.image_newline.detach().std()) < 0.2
    block = model.model.vision_resampler.layers[0]
    assert float(block.cross_attn.Wq.weight.detach().std()) == pytest.approx(
        model.config.text_config.initializer_range, rel=0.1
    )
    assert not block.cross_attn.Wq.bias.any()


def test_original_config_is_flat():
    flat = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "rope_theta": 5e5}
    flat |= {"num_attention_heads": 2, "num_key_value_heads": 1, "mm_hidden_size": 24, "memaug_depth": 3}
    config = HourLlavaConfig.from_original(flat)
    assert (config.vision_width, config.memaug_depth, config.vision_config) == (24, 3, None)
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert config.min_frames == 128


def test_generate_continues_a_batch(model):
    samples = [make_sample(1, 9), make_sample(2, 30, after=4)]
    ids, _, features = zip(*samples, strict=True)
    mask = pad([torch.ones_like(row) for row in ids], 0)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    batch = model.generate(pad(ids, 0), attention_mask=mask, vision_features=list(features), **arguments)
    for number, (row, feature) in enumerate(zip(ids, features, strict=True)):
        single = model.generate(row[None], vision_features=[feature], **arguments)
        assert batch[number].tolist() == single[0].tolist()
        # Greedy decoding by hand, without a cache: the video is read anew for every token.
        written = row
        for token in single[0]:
            mask_row = torch.arange(len(written)) < len(row)
            logits = model(written[None], vision_features=[feature], query_mask=mask_row[None]).logits[0, -1]
            logits[IMAGE] = -torch.inf
            assert int(logits.argmax()) == int(token)
            written = torch.cat([written, token[None]])


@pytest.mark.parametrize(
    ("marks", "visuals", "why"),
    [
        ((1, 2), ["image"] * 2, r"sample 1 of 2 .*<image> stands in it 2 times, but .* left for it are 1"),
        ((1, 0), ["image"] * 2, r"2 images and videos are given, but <image> stands 1 \+ 0 times"),
        ((0, 0), ["video"], r"1 images and videos are given, but <image> stands 0 \+ 0 times"),
        ((0, 1), [], r"sample 1 of 2 .* left for it are 0"),
        ((2, 0), ["image", "video"], r"sample 0 of 2 .* not all that belongs there are images of one tile"),
    ],
)
def test_marks_and_visuals_that_do_not_match(model, marks, visuals, why):
    ids = torch.full((2, 6), 5)
    for row, count in zip(ids, marks, strict=True):
        row[:count] = IMAGE
    with pytest.raises(InputError, match=why):
        model(ids, vision_features=[torch.randn(1, 64, 64)] * len(visuals), modalities=visuals)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vision_features": [torch.randn(4, 64, 63)]}, r"video of sample 0 .* shape \(4, 64, 63\)"),
        ({"vision_features": [torch.randn(4, 63, 64)]}, r"shape \(4, 63, 64\)"),
        ({"vision_features": [torch.randn(0, 64, 64)]}, r"with n > 0"),
        ({"vision_features": None, "pixel_values": [torch.rand(2, 3, 64, 32)]}, r"give \(n, 3, 64, 64\)"),
        ({"pixel_values": [torch.rand(2, 3, 64, 64)]}, "both pixel_values and vision_features"),
        ({"modalities": ["audio"]}, "no modality 'audio'"),
        ({"modalities": ["video", "image"]}, "1 visual inputs, 2 modalities"),
        ({"modalities": ["image"]}, "it has tiles but no size"),
        ({"modalities": ["image"], "image_sizes": [(64, 128)]}, "image of sample 0 .* make 3 tiles, but it has 4"),
        ({"modalities": ["image"], "image_sizes": [(20, 30000)]}, "image of sample 0 .* too thin"),
        ({"temporal_forgetting": "all"}, "there is no rule 'all'; choose from uniform, random, keyframe, question"),
        ({"spatial_picks": [torch.zeros(3, 2)]}, r"give \(4, k\), a row for each of the memory's frames"),
        ({"labels": torch.full((1, 2), -100)}, "sample 0 of 1 .* all its labels are ignored"),
        ({"input_ids": None}, "no input_ids"),
    ],
)
def test_input_that_does_not_fit(model, changes, why):
    arguments = {"input_ids": torch.tensor([[5, IMAGE]]), "vision_features": [torch.randn(4, 64, 64)], **changes}
    with pytest.raises(InputError, match=why) as caught:
        model(**arguments)
    assert "\n" not in str(caught.value)


def test_nothing_is_cut(model):
    limit = model.config.text_config.max_position_embeddings
    features = [torch.randn(4, 64, 64)]
    ids = torch.full((2, limit - 16), 5)
    ids[1, 7] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    mask[1, -1] = 0
    # 16 tokens and a newline stand at the mark: 4096 + 1 are too many, and one less is not.
    assert model(ids[:, :-1], attention_mask=mask[:, :-1], vision_features=features).logits.shape[1] == limit - 1
    mask[1, -1] = 1
    ids = torch.cat([ids, ids[:, -1:]], 1)
    mask = torch.cat([mask, mask[:, -1:]], 1)
    with pytest.raises(InputError, match=rf"sample 1 of 2 .* {limit + 1} tokens, 17 of them visual, .* reads {limit}"):
        model(ids, attention_mask=mask, vision_features=features)


def test_pixels_without_a_tower(model):
    model.model.vision_tower = None
    with pytest.raises(ModelError, match="give vision_features"):
        model(torch.tensor([[5, IMAGE]]), pixel_values=[torch.rand(2, 3, 64, 64)])


def test_text_without_video(model):
    ids = torch.randint(4, 64, (2, 6))
    assert model(ids, labels=ids).logits.shape == (2, 6, 64)


def test_text_alone_keeps_every_parameter_in_step():
    model = make_model().train()
    ids = torch.randint(4, 64, (2, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert not any(p.grad.any() for p in model.model.vision_resampler.parameters())
    torch.testing.assert_close(loss, model.eval()(ids, labels=ids).loss)


def test_one_call_may_forget_otherwise(model):
    ids, _, feature = make_sample(1, 40)
    arguments = {"input_ids": ids[None], "vision_features": [feature]}
    plain = model(**arguments).logits
    for rule in ("random", "keyframe", "question"):
        named = model(**arguments, temporal_forgetting=rule).logits
        assert not torch.equal(named, plain)
        assert torch.equal(model(**arguments, temporal_forgetting=rule).logits, named)
    drawn = [model(**arguments, spatial_forgetting="random", forgetting_seed=seed).logits for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    frames = torch.arange(10) * 39 // 9
    assert torch.equal(model(**arguments, frame_picks=[frames]).logits, plain)
    assert not torch.equal(model(**arguments, frame_picks=[frames + (frames < 39)]).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = make_model().train()
    ids, labels, _ = make_sample(1, 1)
    arguments = {"labels": labels[None], "pixel_values": [torch.rand(6, 3, 64, 64)]}
    passes = []
    for block in model.model.vision_resampler.blocks:
        block.self_attn.register_forward_hook(lambda *_: passes.append("memaug"))
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append("decoder"))
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids[None], **arguments).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert (passes.count("memaug"), passes.count("decoder")) == (2 + 4, 1 + 2)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_float16_is_nearer_than_bfloat16():
    ids, labels, feature = make_sample(1, 40)
    logits, gradients = {}, {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = make_model().to(dtype)
        out = model(ids[None], labels=labels[None], vision_features=[feature.to(dtype)])
        out.loss.backward()
        assert out.logits.dtype == dtype
        logits[dtype] = out.logits.detach().float()
        gradients[dtype] = model.model.vision_resampler.blocks[0].cross_attn.Wkv.weight.grad.float()
    for values in (logits, gradients):
        near, far = ((values[d] - values[torch.float32]).norm() for d in (torch.float16, torch.bfloat16))
        # Three more bits: an eighth of the rounding.
        assert 0 < near < far / 4


def test_float16_generates():
    ids, _, feature = make_sample(1, 40)
    model = make_model()
    made = [
        m.generate(ids[None], vision_features=[feature.to(m.dtype)], max_new_tokens=8, do_sample=False)
        for m in (model, model.half())
    ]
    assert torch.equal(*made)


def test_training_under_autocast(model):
    ids, labels, _ = make_sample(1, 1)
    arguments = {"labels": labels[None], "pixel_values": [torch.rand(9, 3, 64, 64)]}
    exact = model(ids[None], **arguments).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids[None], **arguments).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
