# SPDX-License-Identifier: Apache-2.0
"""Conversations about images, or about nothing to see, as the engine gets them."""

import threading

import pytest
import torch
from PIL import Image
from tiny_model import make_model

from hourllava.errors import InputError, QuestionError
from hourllava.model import HourLlavaProcessor
from hourllava.serve import Began, Ended, Engine, Event, Failed, Sampling, Written
from hourllava.serve.prompts import prepare_pictures

PICTURES = [
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 40).convert("RGB"),
    Image.linear_gradient("L").convert("RGB"),
]


def message(*pictures: Image.Image, text: str = "What is it?") -> dict[str, object]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
    }


CONVERSATIONS = {
    "text": [{"role": "user", "content": "What is it?"}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Why?"},
    ],
    "picture": [message(PICTURES[0])],
    "pictures": [message(*PICTURES)],
    "told": [message(PICTURES[0]), {"role": "assistant", "content": "A cup."}, message(text="Why?")],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_answers_are_those_of_generate(conversation: str) -> None:
    model, messages = make_model(), CONVERSATIONS[conversation]
    processor = HourLlavaProcessor.for_config(model.tokenizer, model.config)
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end)
    start = 0 if any("image" in str(m["content"]) for m in messages) else inputs["input_ids"].shape[1]
    text = model.tokenizer.decode(written[0, start:], skip_special_tokens=True).strip()

    engine, events, done = Engine(model), list[Event](), threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Ended | Failed):
            done.set()

    engine.submit(lambda: prepare_pictures(model, messages), Sampling(12), listen)
    assert done.wait(60)
    engine.close()
    assert "".join(event.text for event in events if isinstance(event, Written)) == text
    assert isinstance(events[0], Began)
    assert events[0].mass is None


def test_marks_in_texts_are_refused() -> None:
    model = make_model()
    for messages in ([{"role": "user", "content": "<image>"}], [message(PICTURES[0], text="a<|im_end|>")]):
        with pytest.raises(QuestionError, match="which the model reads as a mark"):
            prepare_pictures(model, messages)


def test_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 40)
    with pytest.raises(InputError, match="but the decoder reads 40"):
        prepare_pictures(model, [{"role": "user", "content": "What?" * 20}])


def test_nothing_is_learnt() -> None:
    prepared = prepare_pictures(make_model(), CONVERSATIONS["picture"])
    assert not prepared.embeds.requires_grad
    assert prepared.embeds.isfinite().all()
    assert prepared.embeds.dtype == torch.float32
