# SPDX-License-Identifier: Apache-2.0
"""Samples in shards: what goes in comes out, in an order that can be gone on with exactly."""

import hashlib
import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from mds_by_hand import Evil, conversation, jpeg, numbers, texts, write_by_hand, write_index
from memories import SmallWriter, full_disk, make_frames
from PIL import Image
from rich.console import Console
from tiny_model import make_model

from hourllava.data.collator import Collator
from hourllava.data.dataset import ConversationDataset
from hourllava.data.failures import TRIES, FailureLog
from hourllava.data.samples import Media
from hourllava.data.shards import ShardDataset, ShardLoader, write_shards
from hourllava.errors import DataError
from hourllava.memory import Embedding, Repository, packed_features, unpack_features
from hourllava.model import FrameWriter


@pytest.fixture
def repository(tmp_path):
    held = Repository(tmp_path / "memories")
    for name, precision in (("film.mp4", "bfloat16"), ("small.mp4", "int8")):
        with Embedding(held, name, SmallWriter(), precision) as embedding:
            embedding.append(make_frames(20))
            embedding.commit()
    return held


def test_features_inside(tmp_path, repository):
    (tmp_path / "image.jpg").write_bytes(jpeg("red"))
    torch.save({"vid_feat": torch.ones(9, 16, 12), "duration": 9.4}, tmp_path / "old.pt")
    samples = [
        conversation(0, Media("features", repository.folder / "film.mp4", "film.mp4")),
        conversation(1, Media("features", repository.folder / "small.mp4", "small.mp4")),
        conversation(2),
        conversation(3, *[Media("image", tmp_path / "image.jpg")] * 2),
        conversation(4, Media("features", tmp_path / "old.pt")),
    ]
    assert write_shards(samples, tmp_path / "shards") == 5
    read = ShardDataset(tmp_path / "shards")
    assert len(read) == 5
    assert [found.sample for found in read] == samples
    (film,), (small,), nothing, images, (old,) = [read[number].held for number in range(5)]
    assert film.content.dtype == torch.bfloat16
    assert torch.equal(film.content, packed_features(repository, "film.mp4")["features"])
    assert torch.equal(small.content, unpack_features(packed_features(repository, "small.mp4")))
    assert nothing == ()
    assert [image.content.size for image in images] == [(8, 6), (8, 6)]
    assert torch.equal(old.content, torch.ones(9, 16, 12).bfloat16())
    assert (film.seconds, old.seconds) == (20.0, 9.4)


def test_paths(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = [conversation(0, Media("features", Path("memories/film.mp4"), "film.mp4"))]
    samples.append(conversation(1, Media("video", Path("/films/absent.mp4"))))
    write_shards(samples, "shards", features="path")
    found = ShardDataset("shards")[0]
    assert found.held == (None,)
    assert found.sample.media == (Media("features", tmp_path / "memories" / "film.mp4", "film.mp4"),)
    assert ShardDataset("shards")[1].sample.media == samples[1].media
    assert (tmp_path / "shards" / "shard.00000.mds").stat().st_size < 2000


def test_what_cannot_be_written(tmp_path, repository):
    out = tmp_path / "shards"
    bad = {
        "there are no features of it": Media("video", tmp_path / "film.mp4"),
        "no repository": Media("features", tmp_path / "film.mp4"),
        "no such video": Media("features", repository.folder / "absent.mp4"),
        "cannot be read": Media("image", tmp_path / "absent.jpg"),
    }
    for why, medium in bad.items():
        with pytest.raises(DataError, match=rf"^data.json:1 \(id id 1\): .*{why}"):
            write_shards([conversation(0), conversation(1, medium)], out)
        assert not (out / "index.json").exists()
    with pytest.raises(DataError, match=r"there is no index\.json"):
        ShardDataset(out)
    write_shards(texts(3), out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="holds shards already"):
        write_shards(texts(5), out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_full_disk(tmp_path):
    out = tmp_path / "shards"
    with full_disk(1000), pytest.raises(DataError, match=r"cannot be written.*free some space"):
        write_shards(texts(100), out, size_limit=2000)
    assert not list(out.iterdir())
    write_shards(texts(100), out, size_limit=500)
    with pytest.raises(DataError, match="there is no index"):
        ShardDataset(tmp_path)
    (out / "index.json").unlink()
    with pytest.raises(DataError, match="not written to the end"):
        ShardDataset(out)


def test_the_original_s_three_kinds(tmp_path):
    """The original's rows: an image, several images, or the path of a video; a 1 x 1 image stands for none."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    many = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No."}]

    def text(**annotation):
        return json.dumps({"conversations": turns, "source": "ov"} | annotation).encode()

    singles = [
        {"image": jpeg("red"), "text": text(id="one", image="a/one.jpg")},
        {"image": jpeg("red", (1, 1)), "text": text(id=2)},
    ]
    several = [
        {"image": pickle.dumps([jpeg("red"), jpeg("blue", (4, 4))]), "text": text(conversations=many, image=["a", "b"])}
    ]
    videos = [
        {"video": b"videos/youcook2/film.mp4", "text": text(video="film.mp4", data_source="youcook2")},
        {"video": b"/data/features/youcook2/film.pt", "text": text(video="film.mp4", data_source="youcook2")},
    ]
    kinds = {
        "single": (singles, "jpeg", "image"),
        "several": (several, "jpeg_list", "image"),
        "video": (videos, "str", "video"),
    }
    for name, (rows, encoding, column) in kinds.items():
        folder = tmp_path / name
        columns = [(column, encoding, None), ("text", "json", None)]
        # One subfolder a process, as its merged index has it.
        write_index(folder, write_by_hand(folder, columns, rows, f"{name}_0/shard.00000.mds"))
    one, none = ShardDataset(tmp_path / "single")
    assert (one.sample.id, one.sample.turns) == ("one", (("<image>\nWhat?", "That."),))
    assert one.held[0].content.size == (8, 6)
    assert (none.sample.id, none.sample.turns, none.sample.media, none.held) == ("2", (("What?", "That."),), (), ())
    (both,) = ShardDataset(tmp_path / "several")
    assert [image.content.size for image in both.held] == [(8, 6), (4, 4)]
    assert [medium.kind for medium in both.sample.media] == ["image", "image"]
    raw, features = ShardDataset(tmp_path / "video")
    assert raw.sample.media == (Media("video", Path("videos/youcook2/film.mp4"), "youcook2%2Ffilm.mp4"),)
    assert features.sample.media[0].kind == "features"
    assert features.sample.media[0].path == Path("/data/features/youcook2/film.pt")
    assert features.held == (None,)

    bad = [{"image": pickle.dumps(Evil(tmp_path / "ran")), "text": text()}]
    columns = [("image", "jpeg_list", None), ("text", "json", None)]
    write_index(tmp_path / "several", write_by_hand(tmp_path / "several", columns, bad))
    with pytest.raises(DataError, match=r"shard.00000.mds sample 0 image: its jpeg_list value is damaged"):
        ShardDataset(tmp_path / "several")[0]
    assert not (tmp_path / "ran").exists()


def test_rows_that_are_no_samples(tmp_path):
    for number, (columns, row, why) in enumerate(
        [
            ([("x", "str", None)], {"x": b"1"}, "it has columns x"),
            ([("text", "json", None)], {"text": b"{}"}, "no list of conversations"),
            ([("media", "bytes", None), ("sample", "json", None)], {"media": b"", "sample": b"{}"}, "damaged"),
            ([("media", "bytes", None), ("sample", "json", None)], {"media": b"zzz", "sample": b"[]"}, "damaged"),
        ]
    ):
        write_index(tmp_path / str(number), write_by_hand(tmp_path / str(number), columns, [row]))
        with pytest.raises(DataError, match=why):
            ShardDataset(tmp_path / str(number))[0]


@pytest.fixture(scope="module")
def model():
    return make_model()


def conversations_of(model, **options):
    return ConversationDataset([], model.tokenizer, model.config, **options)


def embed(model, folder, name="film.mp4"):
    """A repository that holds 40 s of a video."""
    writer, repository = FrameWriter(model), Repository(folder)
    with Embedding(repository, name, writer) as embedding:
        embedding.append_features(torch.randn(40, writer.shape.per_frame, writer.feature_width))
        embedding.commit()
    return Media("features", folder / name, name)


@pytest.mark.parametrize("features", ["inside", "path"])
def test_features_of_another_tower(tmp_path, model, features):
    write_shards([conversation(7, embed(model, tmp_path / "memories")), conversation(8)], tmp_path / "shards", features)
    mine, other = (FrameWriter(one).tower_fingerprint() for one in (model, make_model(seed=1)))
    same = ShardDataset(tmp_path / "shards", conversations=conversations_of(model, tower=mine))
    assert [len(item["pixel_values"]) for item in same] == [1, 0]
    read = ShardDataset(tmp_path / "shards", conversations=conversations_of(model, tower=other))
    assert not read[1]["pixel_values"]
    why = r"^data.json:7 \(id id 7\): .*film.mp4: another tower made these features; make them with this model's tower"
    with pytest.raises(DataError, match=why):
        read[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_fail_are_told_and_replaced(tmp_path, model, workers):
    """Four of forty fail: three that show what is not there, and one in a shard that has lost it."""
    samples = texts(40)
    for number in (3, 4, 39):
        samples[number] = conversation(number, Media("features", tmp_path / f"{number}.pt"))
    write_shards(samples, tmp_path / "shards", "path", size_limit=1200)
    dataset = ShardDataset(tmp_path / "shards")
    lost = int(dataset._ends[2]) - 1
    damage_the_last(tmp_path / "shards", 2)
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.13)  # 5 of 40, whichever process is ahead
    dataset = ShardDataset(tmp_path / "shards", batch_size=8, conversations=conversations_of(model, failures=failures))
    given = [model.tokenizer.decode(item["input_ids"]) for batch in ShardLoader(dataset, workers) for item in batch]
    stand_ins = {3: 5, 4: 5, 39: 0, lost: lost + 1}
    assert len(given) == 40
    for number, text in enumerate(given):
        assert f"Ä {stand_ins.get(number, number)}<" in text
    assert (failures.tried, failures.failed) == (45, 5)  # 4 fails in place of 3, and again for itself
    entries = sorted((entry["id"], entry["why"]) for entry in failures.entries())
    place = f"{tmp_path / 'shards' / 'shard.00002.mds'} sample {lost - int(dataset._ends[1])}"
    assert [identity for identity, _ in entries] == sorted(["id 3", "id 39", "id 4", "id 4", place])
    assert all("it cannot be read" in why or "it is damaged" in why for _, why in entries)
    shown = io.StringIO()
    Console(file=shown, width=200).print(failures.summary())
    assert all(word in shown.getvalue() for word in ("4 samples were left out", "data.json:3 (id id 3)", "sample"))
    failures.limit = 0.05
    with pytest.raises(DataError, match=r"samples could not be loaded, more than 5\.0%") as caught:
        list(ShardLoader(dataset, workers))
    assert "\n" not in str(caught.value)


def damage_the_last(folder, shard):
    """Make the last sample of a shard say that it holds more than it does, and let the index know the shard so."""
    index = json.loads((folder / "index.json").read_text())
    raw = index["shards"][shard]["raw_data"]
    path = folder / raw["basename"]
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4 * index["shards"][shard]["samples"])
    data[start : start + 4] = struct.pack("<I", 1 << 20)
    path.write_bytes(data)
    raw["hashes"] = {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))


def test_a_shard_that_is_gone(tmp_path, model):
    """Its samples have a cause in common, which is told instead of going on."""
    write_shards(texts(60), tmp_path / "shards", size_limit=3000)
    failures = FailureLog(tmp_path / "failures.jsonl", limit=1.0)
    dataset = ShardDataset(tmp_path / "shards", conversations=conversations_of(model, failures=failures))
    gone = tmp_path / "shards" / "shard.00001.mds"
    gone.unlink()
    assert int(dataset._ends[1] - dataset._ends[0]) >= TRIES
    with pytest.raises(DataError, match=f"{gone}: there is no such file, .*; so do the {TRIES - 1} samples after it"):
        dataset[int(dataset._ends[0])]
    assert [entry["what"] for entry in failures.entries()] == [str(gone)] * TRIES
    assert dataset[0]["input_ids"].numel()
    with pytest.raises(IndexError):
        dataset[60]


def test_order(shards):
    plain = ShardDataset(shards)
    assert numbers(plain) == list(range(100))
    one, again, other = (ShardDataset(shards, shuffle_seed=seed) for seed in (1, 1, 2))
    first = numbers(one)
    assert sorted(first) == list(range(100)) != first
    assert numbers(again) == first != numbers(other)
    second = numbers(one)  # the next epoch
    assert one.epoch == 1
    assert sorted(second) == list(range(100))
    assert second != first
    with pytest.raises(IndexError):
        one[100]


def test_exact_resume(shards):
    whole = numbers(ShardDataset(shards, shuffle_seed=3)) + numbers_of_epoch(shards, 1)
    for stop in (0, 1, 37, 99, 100, 101, 150):
        dataset = ShardDataset(shards, shuffle_seed=3)
        taken = []
        while len(taken) < stop:
            for found in dataset:
                taken += numbers([found])
                if len(taken) == stop:
                    break
        state = json.loads(json.dumps(dataset.state_dict()))
        resumed = ShardDataset(shards, shuffle_seed=3)
        resumed.load_state_dict(state)
        taken += numbers(resumed)
        assert taken == whole[: len(taken)]
        assert len(taken) in (100, 200)


def numbers_of_epoch(shards, epoch):
    dataset = ShardDataset(shards, shuffle_seed=3)
    dataset.epoch = epoch
    return numbers(dataset)


def test_ranks_share_an_epoch(shards):
    whole = numbers(ShardDataset(shards, shuffle_seed=3))
    parts = [ShardDataset(shards, shuffle_seed=3, rank=rank, world=3) for rank in range(3)]
    taken = [numbers(part) for part in parts]
    assert [len(part) for part in parts] == [len(part) for part in taken] == [33] * 3
    assert [number for together in zip(*taken, strict=True) for number in together] == whole[:99]
    # Three ranks stop after 10 samples each, and four go on.
    part = ShardDataset(shards, shuffle_seed=3, rank=1, world=3)
    iterator = iter(part)
    for _ in range(10):
        next(iterator)
    rest = []
    for rank in range(4):
        resumed = ShardDataset(shards, shuffle_seed=3, rank=rank, world=4)
        resumed.load_state_dict(part.state_dict())
        rest.append(numbers(resumed))
    assert [number for together in zip(*rest, strict=True) for number in together] == whole[30:98]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader(shards, workers):
    def loader():
        return ShardLoader(ShardDataset(shards, shuffle_seed=5, batch_size=7), workers)

    plain = ShardDataset(shards, shuffle_seed=5)
    whole = [numbers(plain), numbers(plain)]
    given = loader()
    assert [numbers(batch) for batch in given] == [whole[0][place : place + 7] for place in range(0, 100, 7)]
    assert [number for batch in given for number in numbers(batch)] == whole[1]
    given, taken = loader(), []
    for batch in given:
        taken += numbers(batch)
        if len(taken) == 35:
            break
    resumed = loader()
    resumed.load_state_dict(given.state_dict())
    assert taken + [number for batch in resumed for number in numbers(batch)] == whole[0]
    assert resumed.state_dict()["taken"] == 100
    last = loader()
    last.load_state_dict(resumed.state_dict())
    assert [number for batch in last for number in numbers(batch)] == whole[1]


def test_state_of_other_shards(shards, tmp_path):
    state = ShardDataset(shards, shuffle_seed=3).state_dict()
    write_shards(texts(7), tmp_path / "others")
    for other in (ShardDataset(shards, shuffle_seed=4), ShardDataset(tmp_path / "others", shuffle_seed=3)):
        with pytest.raises(DataError, match="the state is of other shards"):
            other.load_state_dict(state)
    for options in ({"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}):
        with pytest.raises(DataError, match="cannot be divided"):
            ShardDataset(shards, **options)
    with pytest.raises(DataError, match="7 samples for 8 ranks"):
        ShardDataset(tmp_path / "others", world=8)


def test_an_image_that_is_none(tmp_path):
    (tmp_path / "image.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="it is no image"):
        write_shards([conversation(0, Media("image", tmp_path / "image.jpg"))], tmp_path / "shards")


def test_batches_are_those_of_the_files(tmp_path, model):
    """Training from shards sees what training from the files sees."""
    film, tower = embed(model, tmp_path / "memories"), FrameWriter(model).tower_fingerprint()
    Image.new("RGB", (90, 60), "red").save(tmp_path / "image.jpg")
    image = Media("image", tmp_path / "image.jpg")
    samples = [conversation(0, film), conversation(1, image), conversation(2), conversation(3, image, image)]
    write_shards(samples, tmp_path / "inside")
    write_shards(samples, tmp_path / "paths", features="path")
    conversations = ConversationDataset(samples, model.tokenizer, model.config)
    collate = Collator(model.tokenizer)
    expected = collate([conversations[number] for number in range(4)])
    for folder in ("inside", "paths"):
        shards = ShardDataset(tmp_path / folder, batch_size=4, conversations=conversations_of(model, tower=tower))
        (batch,) = ShardLoader(shards, 1, collate)
        assert batch.keys() == expected.keys()
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[key], expected[key])
        for key in ("modalities", "image_sizes"):
            assert batch[key] == expected[key]
        for ours, theirs in zip(batch["pixel_values"], expected["pixel_values"], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_an_error_in_a_worker_is_one_line(shards):
    path = shards / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes, and") as caught:
        list(ShardLoader(ShardDataset(shards), 1))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
