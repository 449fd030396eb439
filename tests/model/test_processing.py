# SPDX-License-Identifier: Apache-2.0
"""The processor: chat messages and media become the model's inputs, with the same tokens as our own prompts."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from clips import number_on, write_clip
from PIL import Image
from tiny_model import make_model, make_tokenizer
from transformers import AutoProcessor

from hourllava.errors import InputError, VideoError
from hourllava.model import HourLlavaProcessor, build_example, build_prompt
from hourllava.model.prompt import time_instruction

SIDE = 64


@pytest.fixture(scope="module")
def processor():
    return HourLlavaProcessor(make_tokenizer(), tile_size=SIDE, patch_size=8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", list(range(60)), Fraction(1, 10))


def frames(count, height=SIDE, width=SIDE):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def video(source):
    return {"type": "video", "video": source}


def image(source):
    return {"type": "image", "image": source}


def tokens(processor, messages, **options):
    return processor.apply_chat_template([messages], tokenize=True, return_dict=True, **options)


def test_a_question_is_our_own_prompt(processor):
    inputs = tokens(processor, [user(video(frames(9)), text("What falls?"))], add_generation_prompt=True)
    ids, mask, _ = build_prompt(processor.tokenizer, "What falls?", time_instruction(9.0, 9))
    assert torch.equal(inputs["input_ids"], ids[None])
    assert torch.equal(inputs["query_mask"], mask[None])
    assert inputs["attention_mask"].all()
    assert inputs["modalities"] == ["video"]
    assert inputs["image_sizes"] == [None]


def test_a_conversation_is_our_own_example(processor):
    turns = [("What falls?", "A cup."), ("When?", "At noon.")]
    messages = [user(text("What falls?"), video(frames(9)))]
    messages += [{"role": "assistant", "content": "A cup."}, {"role": "user", "content": "When?"}]
    messages += [{"role": "assistant", "content": [text("At noon.")]}]
    inputs = tokens(processor, messages, return_labels=True)
    ids, labels = build_example(processor.tokenizer, turns, time_instruction(9.0, 9))
    assert torch.equal(inputs["input_ids"], ids[None])
    assert torch.equal(inputs["labels"], labels[None])


def test_text_of_the_template(processor):
    first = {"role": "system", "content": "Be brief."}
    messages = [first, user(text("Compare "), image("a.png"), text("and "), image("b.png"), text("Well?"))]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCompare <image>\nand <image>\nWell?<|im_end|>\n"
    )
    moved = [{"role": "user", "content": "Who is on <image> here?"}]
    assert processor.apply_chat_template(moved, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWho is on  here?<|im_end|>\n<|im_start|>assistant\n"
    )
    kept = [{"role": "user", "content": "<image>\nWho?"}]
    assert "user\n<image>\nWho?<|im_end|>" in processor.apply_chat_template(kept)
    assert processor.apply_chat_template([moved, kept]) == [processor.apply_chat_template(m) for m in (moved, kept)]


def test_text_then_call_is_the_same(processor):
    messages = [user(video(frames(5)), text("What falls?"))]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    called = processor(text=prompt, videos=messages[0]["content"][0]["video"])
    at_once = tokens(processor, messages, add_generation_prompt=True)
    assert torch.equal(called["input_ids"], at_once["input_ids"])
    assert torch.equal(called["pixel_values"][0], at_once["pixel_values"][0])


def test_a_file_is_read_at_a_frame_a_second(processor, clip):
    prompt = "<|im_start|>user\n<image>\nWho?<|im_end|>\n"
    inputs = processor(text=prompt, videos=str(clip))
    (seen,) = inputs["pixel_values"]
    assert seen.shape == (6, 3, SIDE, SIDE)
    assert seen.dtype == torch.uint8
    assert [number_on(frame) for frame in seen] == [0, 10, 20, 30, 40, 50]
    told = "The video lasts for 6.00 seconds, and 6 frames are uniformly sampled from it. "
    told += "Please answer the following questions related to this video."
    assert processor.decode(inputs["input_ids"][0]) == f"<|im_start|>user\n<image>\n{told}\nWho?<|im_end|>\n"
    by_url = tokens(processor, [user({"type": "video", "url": f"file://{clip}"}, text("Who?"))])
    openai = tokens(processor, [user({"type": "video_url", "video_url": {"url": str(clip)}}, text("Who?"))])
    assert torch.equal(by_url["pixel_values"][0], seen)
    assert torch.equal(openai["pixel_values"][0], seen)
    exact = processor(text=prompt, videos=clip, video_seconds=[90.5])
    assert "lasts for 90.50 seconds, and 6 frames" in processor.decode(exact["input_ids"][0])


@pytest.mark.parametrize("form", ["tensor", "array", "tensors", "pictures"])
def test_forms_of_a_video(processor, form):
    given = frames(3, 50, 80)
    array = given.permute(0, 2, 3, 1).numpy()
    forms = {"tensor": given, "array": array, "tensors": list(given), "pictures": [Image.fromarray(a) for a in array]}
    expected = processor(text="<image>", videos=given)["pixel_values"][0]
    assert expected.shape == (3, 3, SIDE, SIDE)
    for videos in (forms[form], [forms[form]], [[forms[form]]]):
        assert torch.equal(processor(text="<image>", videos=videos)["pixel_values"][0], expected)


def test_one_image_is_tiled_and_several_are_not(processor, tmp_path):
    picture(90, 150).save(tmp_path / "a.png")
    alone = tokens(processor, [user(image(str(tmp_path / "a.png")), text("Who?"))])
    assert len(alone["pixel_values"][0]) > 1
    assert alone["image_sizes"] == [(150, 90)]
    both = tokens(processor, [user(image(picture(90, 150)), image(frames(1)[0]), text("Who?"))])
    assert [tuple(tiles.shape) for tiles in both["pixel_values"]] == [(1, 3, SIDE, SIDE)] * 2
    assert both["image_sizes"] == [(150, 90), (SIDE, SIDE)]
    assert both["modalities"] == ["image", "image"]
    as_array = processor(text="<image>", images=np.asarray(picture(90, 150)))
    assert torch.equal(as_array["pixel_values"][0], alone["pixel_values"][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded(processor, side):
    long = [user(video(frames(4)), text("What is it that falls?"))]
    short = [user(text("Hello"))]
    images = [user(image(picture(70, 60)), image(picture(60, 70)), text("Both?"))]
    batch = processor.apply_chat_template(
        [long, short, images], tokenize=True, processor_kwargs={"padding_side": side, "return_labels": True}
    )
    singles = [tokens(processor, messages, return_labels=True) for messages in (long, short, images)]
    for row, single in enumerate(singles):
        valid = batch["attention_mask"][row].bool()
        assert valid[-1 if side == "left" else 0]
        for name in ("input_ids", "query_mask", "labels"):
            assert torch.equal(batch[name][row][valid], single[name][0])
        assert not batch["query_mask"][row][~valid].any()
        assert (batch["labels"][row][~valid] == -100).all()
    assert batch["modalities"] == ["video", "image", "image"]
    assert len(batch["pixel_values"]) == 3


def test_media_of_a_batch_in_a_row(processor):
    prompts = ["<image> a", "b", "<image><image> c"]
    given = [picture(64, 64), picture(60, 64), picture(64, 60)]
    sizes = [(64, 64), (64, 60), (60, 64)]
    assert processor(text=prompts, images=given)["image_sizes"] == sizes
    assert processor(text=prompts, images=[given[:1], [], given[1:]])["image_sizes"] == sizes
    mixed = processor(text=["<image> a", "<image> b"], images=[[given[0]], []], videos=[[], [frames(2)]])
    assert mixed["modalities"] == ["image", "video"]


def test_inputs_move_to_a_device(processor):
    inputs = processor(text="<image> Who?", videos=frames(3)).to("meta")
    assert inputs["pixel_values"][0].device.type == inputs["input_ids"].device.type == "meta"


def test_save_and_load(processor, tmp_path):
    changed = HourLlavaProcessor(
        processor.tokenizer, tile_size=SIDE, patch_size=8, image_grid=2, time_instruction=False, chat_template="{{ 1 }}"
    )
    changed.save_pretrained(tmp_path)
    for again in (HourLlavaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is HourLlavaProcessor
        assert again.to_dict() == changed.to_dict()
        assert again.chat_template == "{{ 1 }}"
        assert torch.equal(
            again(text="a <image>", videos=frames(2))["input_ids"],
            changed(text="a <image>", videos=frames(2))["input_ids"],
        )
    assert HourLlavaProcessor.from_pretrained(tmp_path, image_grid=3).image_grid == 3


def test_a_models_folder_has_its_processor(tmp_path):
    model = make_model(time_instruction=True)
    model.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    made = AutoProcessor.from_pretrained(tmp_path)
    for processor in (saved, made):
        assert (processor.tile_size, processor.patch_size, processor.time_instruction) == (64, 8, True)


BAD = {
    "too many marks": (lambda: {"text": "<image> <image>", "images": [picture(64, 64)]}, "2 <image> marks for 1"),
    "too few marks": (lambda: {"text": "Hello", "images": picture(64, 64)}, "left over"),
    "lists": (lambda: {"text": ["<image>"], "images": [[picture(64, 64)], []]}, "there are 1 for 2 lists"),
    "both": (lambda: {"text": "<image><image>", "images": picture(9, 9), "videos": frames(2)}, "images and videos"),
    "one pixel": (lambda: {"text": "<image>", "images": picture(1, 1)}, "image 0 of prompt 0"),
    "no picture": (lambda: {"text": "<image>", "images": __file__}, "no image that can be read"),
    "net": (lambda: {"text": "<image>", "videos": "https://example.com/a.mp4"}, "on the net"),
    "floats": (lambda: {"text": "<image>", "videos": torch.rand(2, 3, 8, 8)}, "float32"),
    "no text": (lambda: {"images": picture(64, 64)}, "text"),
    "half a character": (lambda: {"text": "a \ud83d"}, "prompt 0: it holds half of a character"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(processor, case):
    given, said = BAD[case]
    with pytest.raises(InputError, match=said) as caught:
        processor(**given())
    assert "\n" not in str(caught.value)


def test_bad_messages(processor, tmp_path):
    with pytest.raises(InputError, match="'audio'"):
        tokens(processor, [user({"type": "audio", "audio": "a.wav"})])
    with pytest.raises(InputError, match="'video'"):
        tokens(processor, [user({"type": "video"})])
    with pytest.raises(VideoError, match="no such file"):
        tokens(processor, [user(video(str(tmp_path / "absent.mp4")))])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: they are"),
        ("What is it?", "messages: they are 'W'"),
        ([{"content": "What?"}], "message 0: it has no role"),
        ([{"role": "user"}], "message 0: its content is neither text nor a list of parts"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "message 1: its content is neither"),
        ([{"role": "user", "content": ["What?"]}], "message 0: its content is neither"),
    ],
)
def test_what_are_no_messages(processor, messages, said):
    with pytest.raises(InputError, match=said):
        processor.apply_chat_template(messages)


def test_addresses_of_files(processor, tmp_path):
    path = write_clip(tmp_path / "a film %20 #1.mp4", range(3), Fraction(1))
    expected = tokens(processor, [user(video(str(path)))])["pixel_values"][0]
    for address in (f"file://{path}", path.as_uri()):
        assert torch.equal(tokens(processor, [user(video(address))])["pixel_values"][0], expected)


def test_a_photo_is_seen_upright(processor, tmp_path):
    """A camera that was held on its side writes so into the file, and its picture as it lay."""
    upright = picture(80, 120)
    note = Image.Exif()
    note[0x0112] = 6  # turn by a quarter, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=note)
    expected = processor(text="<image>", images=upright)
    with Image.open(tmp_path / "photo.png") as opened:
        for given in (tmp_path / "photo.png", opened):
            seen = processor(text="<image>", images=given)
            assert seen["image_sizes"] == expected["image_sizes"] == [(120, 80)]
            assert torch.equal(seen["pixel_values"][0], expected["pixel_values"][0])


@pytest.mark.parametrize("order", ["hourllava, transformers", "transformers, hourllava"])
def test_auto_classes_after_import(order):
    """Whichever is imported first; and importing hourllava alone stays light."""
    code = (
        f"import sys; import {order}\\n"
        "if 'transformers' not in sys.modules: assert 'torch' not in sys.modules\\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoModelForMultimodalLM\\n"
        "config = AutoConfig.for_model('hour_llava')\\n"
        "from hourllava import HourLlavaConfig, HourLlavaForConditionalGeneration, HourLlavaProcessor\\n"
        "assert type(config) is HourLlavaConfig\\n"
        "for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):\\n"
        "    assert auto._model_mapping[HourLlavaConfig] is HourLlavaForConditionalGeneration\\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\\n"
        "assert PROCESSOR_MAPPING[HourLlavaConfig] is HourLlavaProcessor\\n"
        "assert 'torchvision' not in sys.modules\\n"
    ).replace("\\n", "\n")
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
