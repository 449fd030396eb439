# SPDX-License-Identifier: Apache-2.0
"""The decoder apart from the rest: written as a Qwen2 that others serve, and left out where others serve it."""

import copy
import json

import pytest
import torch
from memories import make_frames
from tiny_model import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hourllava import load_model
from hourllava.cli import main
from hourllava.errors import ModelError
from hourllava.model import AskOptions, HourLlavaForConditionalGeneration, build_prompt, convert_decoder, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    # As a checkpoint of Qwen's comes with: its ways of sampling are not for these answers.
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "repetition_penalty": 1.05}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_is_a_qwen2(tmp_path, tied, dtype):
    ours = make_model()
    if tied:
        config = copy.deepcopy(ours.config)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        tokenizer, ours = ours.tokenizer, HourLlavaForConditionalGeneration(config).eval()
        ours.tokenizer = tokenizer
    ours.to(dtype).save_pretrained(tmp_path / "ours")
    ours = load_model(tmp_path / "ours")  # whose rotary frequencies are not rounded
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    files = convert_decoder(tmp_path / "ours", tmp_path / "decoder", shard=50_000)
    assert len(files) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    assert (type(theirs).__name__, theirs.dtype) == ("Qwen2ForCausalLM", dtype)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_the_decoder_s_answers_end_as_ours(folder, tmp_path, capsys):
    assert main(["convert", str(folder), "--decoder", "-o", str(tmp_path / "decoder")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'decoder'}: config.json and model.safetensors of a Qwen2\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").generation_config
    assert theirs.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (theirs.temperature, theirs.repetition_penalty) == (None, None)
    assert main(["convert", str(folder), "--decoder", "-o", str(tmp_path / "decoder")]) == 1
    assert "there is something already; name a new folder" in capsys.readouterr().err


def test_a_model_without_its_decoder_prepares_what_it_would(folder, tmp_path):
    whole, part = load_model(folder), load_model(folder, decoder=False)
    memory, same = whole.watch(make_frames(20), progress=False), part.watch(make_frames(20), progress=False)
    question = "Where does it fall?"
    prepared, expected = (prepare(*given, question, AskOptions()) for given in ((part, same), (whole, memory)))
    assert torch.equal(prepared.embeds, expected.embeds)
    assert torch.equal(prepared.mass, expected.mass)
    decoder = sum(p.numel() for p in (*whole.model.layers.parameters(), whole.lm_head.weight))
    assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in whole.parameters()) - decoder
    for use in (lambda: part.ask(same, question), lambda: part.save_pretrained(tmp_path / "part")):
        with pytest.raises(ModelError, match="loaded without its decoder; load it with decoder=True"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_decoder_s_angles(folder, dtype):
    """Frequencies of 16 bits are off by many turns after some thousand tokens."""
    loaded = HourLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    cast = load_model(folder).to(dtype)
    assert cast.dtype == dtype
    ids = torch.arange(4, 200)[None].repeat(1, 15)
    with torch.no_grad():
        assert torch.equal(cast(ids).logits, loaded(ids).logits)
    again = cast.float().model.rotary_emb.inv_freq
    assert torch.equal(again, load_model(folder).model.rotary_emb.inv_freq)
    assert cast.to("meta").model.rotary_emb.inv_freq.device.type == "meta"


def test_the_checkpoint_s_ways_of_sampling_change_no_answer():
    """Qwen's checkpoints come with a penalty for repeating, which `generate` takes up by itself."""
    model, question = make_model(), "Which colour was the circle?"
    frames = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    memory = model.watch(frames, progress=False)
    plain = model.ask(memory, question, max_new_tokens=24).text
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.7
    assert model.ask(memory, question, max_new_tokens=24).text == plain
    ids, query_mask, _ = build_prompt(model.tokenizer, question)
    options = {"max_new_tokens": 24, "do_sample": False, "query_mask": query_mask[None]}
    written = model.generate(ids[None], pixel_values=[frames], **options)
    assert model.tokenizer.decode(written[0], skip_special_tokens=True).strip() != plain  # the penalty is one
