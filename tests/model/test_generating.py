# SPDX-License-Identifier: Apache-2.0
"""What people do with a model of transformers': generate a batch, stream, train a part of it with PEFT."""

import pytest
import torch
from tiny_model import make_model
from transformers import DynamicCache, TextIteratorStreamer, TextStreamer

from hourllava.errors import InputError, ModelError
from hourllava.model import HourLlavaProcessor, parts_table


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def processor(model):
    return HourLlavaProcessor.for_config(model.tokenizer, model.config)


def question(count, words):
    generator = torch.Generator().manual_seed(count)
    frames = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": words}]}]


QUESTIONS = [question(9, "What?"), question(30, "Where did it go, and when?"), question(1, "Who was it?")]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_answered_as_its_questions_are(model, processor, side):
    options = {"tokenize": True, "add_generation_prompt": True, "padding_side": side}
    together = model.generate(**processor.apply_chat_template(QUESTIONS, **options), **GREEDY)
    assert together.shape == (3, 6)
    for row, messages in zip(together, QUESTIONS, strict=True):
        alone = model.generate(**processor.apply_chat_template(messages, **options), **GREEDY)
        assert row.tolist() == alone[0].tolist()


def test_the_processor_asks_what_ask_asks(model, processor):
    (messages,) = QUESTIONS[1:2]
    frames, words = (part[part["type"]] for part in messages[0]["content"])
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    written = model.generate(**inputs, **GREEDY | {"output_logits": True, "return_dict_in_generate": True})
    answer = model.ask(model.watch(frames, progress=False), words)
    probabilities = written.logits[0][0].softmax(-1).topk(5).values
    torch.testing.assert_close(probabilities, torch.tensor([p for _, p in answer.top_tokens]), rtol=1e-4, atol=1e-6)


def test_streaming(model, processor, capsys):
    inputs = processor.apply_chat_template(QUESTIONS[0], tokenize=True, add_generation_prompt=True)
    written = model.generate(**inputs, **GREEDY)
    expected = processor.decode(written[0])
    model.generate(**inputs, **GREEDY, streamer=TextStreamer(processor.tokenizer))
    assert capsys.readouterr().out.strip() == expected.strip()
    pieces = TextIteratorStreamer(processor.tokenizer, timeout=60)
    model.generate(**inputs, **GREEDY, streamer=pieces)
    assert "".join(pieces) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_learns_what_its_samples_do(model, processor, side):
    answers = ("A cup.", "To the left.", "Nobody.")
    answered = [[*q, {"role": "assistant", "content": a}] for q, a in zip(QUESTIONS, answers, strict=True)]
    options = {"tokenize": True, "return_labels": True, "padding_side": side}
    total = learnt = 0
    for messages in answered:
        inputs = processor.apply_chat_template(messages, **options)
        count = int((inputs["labels"][:, 1:] != -100).sum())
        total, learnt = total + model(**inputs).loss * count, learnt + count
    together = model(**processor.apply_chat_template(answered, **options))
    torch.testing.assert_close(together.loss, total / learnt)


def test_a_text_is_continued_from_a_cache_of_fixed_size(model, processor):
    words = [{"role": "user", "content": "Nothing to see, only words."}]
    inputs = processor.apply_chat_template(words, tokenize=True, add_generation_prompt=True)
    longer = processor.apply_chat_template(
        [words, [{"role": "user", "content": "And some more of them, in a longer question."}]],
        tokenize=True,
        add_generation_prompt=True,
        padding_side="left",
    )
    for given in (inputs, longer):
        expected = model.generate(**given, **GREEDY)
        assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), expected)


def test_a_model_that_trains_with_checkpointing_is_not_asked(model, processor):
    """The decoder then leaves its cache empty: every token but the first would see itself alone."""
    trained = make_model().train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    frames = QUESTIONS[1][0]["content"][0]["video"]
    memory = trained.watch(frames, progress=False)
    for messages in (QUESTIONS[1], [{"role": "user", "content": "Only words."}]):
        inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        with pytest.raises(ModelError, match=r"it trains with checkpointing.*; call model\.eval\(\) first"):
            trained.generate(**inputs, **GREEDY)
    with pytest.raises(ModelError, match=r"model\.eval"):
        trained.ask(memory, "What?")
    trained.eval()
    assert trained.ask(memory, "What?").text == model.ask(model.watch(frames, progress=False), "What?").text


def test_a_video_beside_a_cache_is_refused(model, processor):
    inputs = processor.apply_chat_template(QUESTIONS[0], tokenize=True, add_generation_prompt=True)
    cache = DynamicCache()
    model(inputs["input_ids"][:, :5], past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="beside a cache that holds a prompt"):
        model(**inputs, past_key_values=cache)
    # `generate` gives the whole prompt, of which the cache may hold the beginning.
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected)


def test_table_of_parts(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    table = parts_table(model)
    model.requires_grad_(True)
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()[1:]}
    assert set(rows) == {"vision tower", "projector", "newline", "MemAug", "embeddings", "head", "decoder", "all"}
    assert rows["projector"][0] == rows["projector"][1] != "0"
    assert rows["decoder"][1:] == ["0", "0.00%"]
    assert int(rows["all"][0].replace(",", "")) == sum(p.numel() for p in model.parameters())


def test_lora_of_some_parts():
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed")
    model = make_model()
    processor = HourLlavaProcessor.for_config(model.tokenizer, model.config)
    targets = r".*vision_resampler.*\.(Wq|Wkv|Wqkv|Wo)|model\.layers\.\d+\.self_attn\.[qv]_proj"
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", modules_to_save=["mm_projector"])
    tuned = peft.get_peft_model(model, config)
    rows = {line[:24].strip(): line[24:].split() for line in parts_table(tuned).splitlines()[1:]}
    assert rows["LoRA in MemAug"][0] == rows["LoRA in MemAug"][1]
    assert rows["LoRA in decoder"][2] == "100.00%"
    assert rows["vision tower"][1] == rows["decoder"][1] == rows["MemAug"][1] == "0"
    assert rows["projector"][1] != "0"
    assert "LoRA in vision tower" not in rows
    answered = [*QUESTIONS[0], {"role": "assistant", "content": "A cup."}]
    inputs = processor.apply_chat_template(answered, tokenize=True, return_labels=True)
    tuned(**inputs).loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for name, p in tuned.named_parameters() if name in trained)
    prompt = processor.apply_chat_template(QUESTIONS[0], tokenize=True, add_generation_prompt=True)
    assert tuned.generate(**prompt, **GREEDY).shape == (1, 6)
