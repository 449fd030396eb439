# SPDX-License-Identifier: Apache-2.0
"""Samples as the model's inputs, in batches of every kind; and what happens where one cannot be loaded."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from clips import cut, number_on
from conversations import talk, write_image, write_lines, write_video
from PIL import Image
from rich.console import Console
from tiny_model import make_model
from torch.utils.data import DataLoader

from hourllava.data.collator import Collator
from hourllava.data.dataset import ConversationDataset
from hourllava.data.failures import TRIES, FailureLog
from hourllava.data.mixture import load_mixture
from hourllava.errors import DataError
from hourllava.memory import Repository
from hourllava.model import FrameWriter

SIDE = 64  # of the tiny model's tiles


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media for all tests of this file, which only read them."""
    path = tmp_path_factory.mktemp("media")
    write_image(path / "wide.png", 150, 70)
    write_image(path / "small.jpg", 50, 60, seed=1)
    write_video(path / "film.mp4", 6)
    write_video(path / "short.mp4", 3)
    return path


def dataset_of(model, folder, *entries, config=None, **options):
    path = write_lines(folder / "m.jsonl", *entries)
    return ConversationDataset(load_mixture(path), model.tokenizer, config or model.config, **options)


TEXT = talk("Hello", "Hi.", "Why?", "So.", id="text")
TILES = talk("<image>\nWhat?", "A cup.", id="tiles", image="wide.png")
IMAGES = talk("<image> or\n<image>?", "This.", id="images", image=["wide.png", "small.jpg"])
FILM = talk("<image>\nWhen?", "At noon.", id="film", video="film.mp4")
SHORT = talk("<image>\nWho?", "She.", id="short", video="short.mp4")


def test_text(model, folder):
    item = dataset_of(model, folder, TEXT)[0]
    assert model.tokenizer.decode(item["input_ids"]).endswith("Hello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n")  # fmt: skip
    assert (item["pixel_values"], item["modalities"], item["image_sizes"]) == ([], [], [])


def test_an_image_comes_in_tiles(model, folder):
    item = dataset_of(model, folder, TILES)[0]
    assert item["modalities"] == ["image"]
    assert item["image_sizes"] == [(70, 150)]
    tiles = item["pixel_values"][0]
    assert tiles.dtype == torch.uint8
    assert tiles.shape[1:] == (3, SIDE, SIDE)
    base = Image.open(folder / "wide.png").resize((SIDE, SIDE))
    assert torch.equal(tiles[0], torch.from_numpy(np.array(base)).permute(2, 0, 1))


def test_several_images_have_one_tile_each(model, folder):
    item = dataset_of(model, folder, IMAGES)[0]
    assert item["modalities"] == ["image", "image"]
    assert [tuple(tile.shape) for tile in item["pixel_values"]] == [(1, 3, SIDE, SIDE)] * 2
    assert item["image_sizes"] == [(70, 150), (60, 50)]


def test_a_video_is_a_frame_a_second(model, folder):
    item = dataset_of(model, folder, FILM)[0]
    assert item["modalities"] == ["video"]
    assert item["image_sizes"] == [None]
    assert [number_on(frame) for frame in item["pixel_values"][0]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("most", "numbers"), [(1, [0]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5]), (9, range(6))])
def test_at_most_so_many_frames(model, folder, most, numbers):
    item = dataset_of(model, folder, FILM, max_frames=most)[0]
    assert [number_on(frame) for frame in item["pixel_values"][0]] == list(numbers)


def test_the_time_is_told(folder):
    model = make_model(time_instruction=True)
    later = talk("Hello", "Hi.", "When <image>?", "Now.", video="film.mp4")
    dataset = dataset_of(model, folder, FILM, TILES, later, max_frames=4)
    told = (
        "<|im_start|>user\n<image>\nThe video lasts for 6.00 seconds, and 4 frames are uniformly sampled from it. "
        "Please answer the following questions related to this video.\n"
    )
    film, tiles, moved = (model.tokenizer.decode(dataset[i]["input_ids"]) for i in range(3))
    assert f"{told}When?<|im_end|>\n" in film
    assert "The video lasts" not in tiles
    assert f"{told}Hello<|im_end|>\n" in moved
    assert moved.count("<image>") == 1


def test_lengths_and_modalities_need_no_file(model, tmp_path):
    dataset = dataset_of(model, tmp_path, TEXT, TILES, IMAGES, FILM, talk("a b c", "d", features="f.pt"))
    assert dataset.modalities == ["text", "image", "images", "video", "video"]
    assert dataset.lengths == [4, 132, 260, 132, 133]
    assert dataset.streams == [""] * 5
    assert len(dataset) == 5


def embed(model, folder, precision="bfloat16", name="film.mp4", frames=6):
    """A repository that holds a video; returns its frames."""
    pixels = torch.randint(0, 256, (frames, 3, SIDE, SIDE), dtype=torch.uint8)
    repository = Repository(folder / "memories")
    memory = repository.add(name, FrameWriter(model), precision)
    memory.append(pixels[: frames // 2])
    memory.append(pixels[frames // 2 :])
    return pixels


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.float32)])
def test_features_of_a_repository(model, tmp_path, precision, dtype):
    pixels = embed(model, tmp_path, precision)
    item = dataset_of(model, tmp_path, talk("When?", "Now.", features="memories/film.mp4"))[0]
    features = item["pixel_values"][0]
    assert item["modalities"] == ["video"]
    assert (features.shape, features.dtype) == ((6, 64, model.config.vision_width), dtype)
    with torch.no_grad():
        expected = FrameWriter(model).encode(pixels)
    if precision == "bfloat16":
        assert torch.equal(features, expected.bfloat16())
    else:
        assert (features - expected).abs().max() <= expected.abs().amax() / 127


@pytest.mark.parametrize("shape", [(8, 8), (64,)])
def test_features_of_the_original(model, tmp_path, shape):
    """A short video's frames were repeated to 128; as many are taken as it lasts seconds."""
    features = torch.randn(128, *shape, model.config.vision_width)
    torch.save({"vid_feat": features, "duration": 50.37}, tmp_path / "film.pt")
    entry = talk("<image>\nWhen?", "Now.", features="film.pt")
    told = make_model(time_instruction=True)
    item = dataset_of(told, tmp_path, entry)[0]
    kept = np.linspace(0, 127, 50, dtype=int)
    assert torch.equal(item["pixel_values"][0], features.flatten(1, -2)[kept])
    assert "lasts for 50.37 seconds, and 50 frames" in told.tokenizer.decode(item["input_ids"])
    assert len(dataset_of(told, tmp_path, entry, max_frames=7)[0]["pixel_values"][0]) == 7


def test_features_of_another_tower(model, tmp_path):
    embed(model, tmp_path)
    entry = talk("When?", "Now.", id="q", features="memories/film.mp4")
    mine = FrameWriter(model).tower_fingerprint()
    assert dataset_of(model, tmp_path, entry).tower == mine
    dataset_of(model, tmp_path, entry, tower=mine)[0]
    other = FrameWriter(make_model(seed=1)).tower_fingerprint()
    with pytest.raises(DataError, match=r"m\.jsonl:2 \(id q\): .*film\.mp4: another tower made these features; make"):
        dataset_of(model, tmp_path, TEXT, entry, tower=other)  # before one is loaded
    copies = [make_model().to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert {FrameWriter(copy).tower_fingerprint() for copy in copies} == {mine}
    copies[1].load_state_dict(copies[0].state_dict())  # what was rounded is a copy still
    assert FrameWriter(copies[1]).tower_fingerprint() == mine


def test_features_of_two_towers(model, tmp_path):
    embed(model, tmp_path)
    embed(make_model(seed=1), tmp_path, name="other.mp4")
    entries = [talk("a", "b", features=f"memories/{name}.mp4") for name in ("film", "other")]
    with pytest.raises(DataError, match=r"m\.jsonl:2: .*other\.mp4: another tower made these features"):
        dataset_of(model, tmp_path, *entries)


class Evil:
    def __reduce__(self):
        return sys.exit, ("unpickled",)


def bad_features(path, case, width):
    good = {"vid_feat": torch.zeros(3, 64, width), "duration": 3.0}
    held = {
        "another width": {**good, "vid_feat": torch.zeros(3, 64, width + 1)},
        "another grid": {**good, "vid_feat": torch.zeros(3, 49, width)},
        "no frame": {**good, "vid_feat": torch.zeros(0, 64, width)},
        "no tensor": {**good, "vid_feat": [1, 2]},
        "no duration": {"vid_feat": good["vid_feat"]},
        "an odd duration": {**good, "duration": float("nan")},
        "NaN": {**good, "vid_feat": torch.full((3, 64, width), float("nan"))},
        "code": {**good, "more": Evil()},
        "no dictionary": 3,
    }
    if case == "noise":
        path.write_bytes(b"noise" * 100)
    elif case != "missing":
        torch.save(held[case], path)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("missing", "it cannot be read"),
        ("noise", "it holds no features that are safe to read"),
        ("code", "it holds no features that are safe to read"),
        ("no duration", "it holds no features"),
        ("no dictionary", "it holds no features"),
        ("no frame", "its vid_feat holds no frames"),
        ("no tensor", "its vid_feat holds no frames"),
        ("an odd duration", "its vid_feat holds no frames, or its duration is no number"),
        ("NaN", "it holds values that are no numbers"),
        ("another width", "another tower made these features: 64 tokens of 65 channels .* makes 64 of 64; make them"),
        ("another grid", "another tower made these features: 49 tokens of 64 channels"),
    ],
)
def test_bad_features(model, tmp_path, case, why):
    bad_features(tmp_path / "f.pt", case, model.config.vision_width)
    with pytest.raises(DataError, match=rf"m\.jsonl:1: .*f\.pt: {why}"):
        dataset_of(model, tmp_path, talk("a", "b", features="f.pt"))[0]


def test_no_such_memory(model, tmp_path):
    with pytest.raises(DataError, match="there is no repository of memories; make one: hourllava embed"):
        dataset_of(model, tmp_path, talk("a", "b", features="memories/film.mp4"))[0]
    embed(model, tmp_path)
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such video in .*memories"):
        dataset_of(model, tmp_path, talk("a", "b", features="memories/gone.mp4"))[0]
    Repository(tmp_path / "memories").add("empty.mp4", FrameWriter(model))
    with pytest.raises(DataError, match=r"empty\.mp4: not one frame of it is there"):
        dataset_of(model, tmp_path, talk("a", "b", features="memories/empty.mp4"))[0]


def test_a_mixed_batch_is_its_samples(model, tmp_path, folder):
    """Text, tiles, images, two videos and features in one batch: the loss is that of each sample alone."""
    embed(model, tmp_path)
    absolute = talk("Who?", "He.", features=str(tmp_path / "memories/film.mp4"))
    entries = [IMAGES, TEXT, FILM, absolute, TILES, SHORT]
    dataset = dataset_of(model, folder, *entries)
    collate = Collator(model.tokenizer)
    items = [dataset[i] for i in range(len(entries))]
    batch = collate(items)
    assert batch["modalities"] == ["image", "image", "video", "video", "image", "video"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == model.tokenizer.pad_token_id).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(item["input_ids"]) for item in items]
    with torch.no_grad():
        together = model(**batch).loss
        alone = torch.stack([model(**collate([item])).loss for item in items])
    targets = torch.tensor([int((item["labels"][1:] != -100).sum()) for item in items])
    torch.testing.assert_close(together, (alone * targets).sum() / targets.sum(), rtol=1e-5, atol=1e-5)


def test_a_batch_of_text_holds_nothing_to_see(model, folder):
    dataset = dataset_of(model, folder, TEXT, TEXT)
    assert set(Collator(model.tokenizer)([dataset[0], dataset[1]])) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("rule", ["uniform", "random"])
@pytest.mark.parametrize("entry", [TEXT, TILES, IMAGES, FILM])
def test_what_the_decoder_does_not_read_is_told_before(folder, entry, rule):
    """The sample is named where the limit is below its length, and goes through the model where it is not."""
    model = make_model(spatial_forgetting=rule)
    config = copy.deepcopy(model.config)
    item = dataset_of(model, folder, entry)[0]
    with torch.no_grad():
        length = model(**Collator(model.tokenizer)([item])).logits.shape[1]
    config.text_config.max_position_embeddings = length - 1
    with pytest.raises(DataError, match=r"m\.jsonl:1 \(id \w+\): its conversation: it comes to \d+ tokens, .* reads"):
        dataset_of(model, folder, entry, config=config)[0]
    config.text_config.max_position_embeddings = length
    assert dataset_of(model, folder, entry, config=config)[0]["input_ids"].equal(item["input_ids"])


GONE = talk("<image>\nWhat?", "A cup.", id="gone", video="gone.mp4")


def test_a_missing_video_is_named(model, folder):
    with pytest.raises(DataError, match=r"m\.jsonl:2 \(id gone\): .*gone\.mp4: there is no such file; check the path"):
        dataset_of(model, folder, FILM, GONE)[1]


@pytest.mark.parametrize("damage", ["cut", "noise", "text"])
def test_a_damaged_image_is_named(model, folder, tmp_path, damage):
    data = (folder / "wide.png").read_bytes()
    if damage == "cut":
        cut(folder / "wide.png", tmp_path / "bad.png", 0.5)
    elif damage == "noise":
        (tmp_path / "bad.png").write_bytes(data[:100] + b"\xff" * 40 + data[140:])
    else:
        (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(DataError, match=r"m\.jsonl:1: .*bad\.png: it is no image that can be read"):
        dataset_of(model, tmp_path, talk("What?", "A cup.", image="bad.png"))[0]


def test_the_next_of_its_kind_takes_its_place(model, folder, tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.5)
    dataset = dataset_of(model, folder, GONE, TEXT, FILM, TEXT, GONE, SHORT, failures=failures)
    shown = [[len(frames) for frames in dataset[i]["pixel_values"]] for i in range(6)]
    assert shown == [[6], [], [6], [], [3], [3]]
    assert (failures.tried, failures.failed) == (8, 2)
    entries = failures.entries()
    assert [(entry["id"], entry["what"]) for entry in entries] == [
        ("gone", f"{folder / 'm.jsonl'}:1 (id gone)"),
        ("gone", f"{folder / 'm.jsonl'}:5 (id gone)"),
    ]
    assert "there is no such file" in entries[0]["why"]


def test_around_the_end(model, folder, tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.5)
    dataset = dataset_of(model, folder, SHORT, TEXT, GONE, failures=failures)
    assert len(dataset[2]["pixel_values"][0]) == 3


def test_too_many_failures_stop_the_run(model, folder, tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.3)
    entries = [*[FILM] * 7, *[GONE] * 3, talk("<image>\nWhat?", "A cup.", id="last", video="gone.mp4")]
    dataset = dataset_of(model, folder, *entries, failures=failures)
    dataset[0]
    assert failures.failed == 0
    with pytest.raises(DataError) as caught:
        dataset[7]
    assert failures.failed == 4
    message = str(caught.value)
    assert message.startswith(f"{folder / 'm.jsonl'}:11 (id last): ")
    assert f"4 of 5 samples could not be loaded, more than 30.0% ({failures.path} lists them)" in message
    assert "\n" not in message


def test_a_common_cause_is_told(model, folder, tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=1.0)
    dataset = dataset_of(model, folder, *[GONE] * 30, failures=failures)
    with pytest.raises(DataError, match=rf"m\.jsonl:4 .*no such file; so do the {TRIES - 1} samples after it fail"):
        dataset[3]
    assert failures.failed == TRIES


def test_the_share_is_of_a_thousand_at_first(tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.01)
    failures.expect(5_000_000)
    for _ in range(10):
        failures.record("x", DataError("a", "b", "c"))
    with pytest.raises(DataError, match="11 of 11 samples"):
        failures.record("x", DataError("a", "b", "c"))
    failures = FailureLog(tmp_path / "more.jsonl", limit=0.01)
    failures.expect(5_000_000)
    for _ in range(4000):
        failures.loaded()
    for _ in range(40):
        failures.record("x", DataError("a", "b", "c"))
    with pytest.raises(DataError, match="41 of 4041 samples"):
        failures.record("x", DataError("a", "b", "c"))


def test_summary(tmp_path):
    failures = FailureLog(tmp_path / "failures.jsonl", limit=1.0)
    assert failures.summary() is None
    for i in range(30):
        failures.record(f"s{i}", DataError(f"m.jsonl:{i}", "it is gone", "get it"))
    failures.record("s1", DataError("m.jsonl:1", "it is gone", "get it"))
    text = io.StringIO()
    Console(file=text, width=200).print(failures.summary())
    shown = text.getvalue()
    assert "30 samples were left out" in " ".join(shown.split())
    assert f"and 10 more │ in {failures.path}" in shown
    assert [f"m.jsonl:{i} " in shown for i in range(30)] == [True] * 20 + [False] * 10
    assert "it is gone" in shown
    again = FailureLog(failures.path, limit=1.0)  # a run that goes on
    assert len(again.entries()) == 31
    assert again.failed == 0


def test_workers_share_the_log(model, folder, tmp_path):
    """What workers count and write is seen by the process that trains, and their error ends it as one line."""
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.4)
    dataset = dataset_of(model, folder, GONE, SHORT, TEXT, TEXT, failures=failures)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=Collator(model.tokenizer))
    assert [batch["input_ids"].shape[0] for batch in loader] == [2, 2]
    assert (failures.tried, failures.failed) == (5, 1)
    assert [entry["id"] for entry in failures.entries()] == ["gone"]
    failures.limit = 0.0
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=Collator(model.tokenizer)))
    assert str(caught.value).startswith(f"{folder / 'm.jsonl'}:1 (id gone): ")
    assert str(caught.value).endswith("; correct them, or allow for more (--failure-limit)")
    with pytest.raises(DataError, match=r"2 of \d+ samples could not be loaded"):
        failures.check()


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="it cannot be written"):
        FailureLog(tmp_path / "file" / "failures.jsonl")
