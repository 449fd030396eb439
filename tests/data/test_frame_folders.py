# SPDX-License-Identifier: Apache-2.0
"""Videos that are folders of frames, wherever a manifest's videos are read."""

from pathlib import Path

import pytest
import torch
from conversations import talk, write_lines
from PIL import Image
from tiny_model import make_model

from hourllava.data.dataset import ConversationDataset
from hourllava.data.embedding import list_jobs, take_in
from hourllava.data.mixture import load_mixture
from hourllava.data.shards import ShardDataset, write_shards
from hourllava.errors import DataError
from hourllava.memory import Repository, packed_features
from hourllava.model import FrameWriter

SIDE = 64  # of the tiny model's pictures


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A video of seven frames, two a second."""
    folder = tmp_path / "frames" / "walks" / "one.d"
    folder.mkdir(parents=True)
    for number in range(7):
        Image.new("RGB", (SIDE, SIDE), (30 * number,) * 3).save(folder / f"{number}.jpg")
    write_lines(tmp_path / "m.jsonl", talk("<image>\nWho?", "She.", id="w", video="one.d", data_source="walks"))
    (tmp_path / "mix.yaml").write_text("datasets:\n- {json_path: m.jsonl, media_root: frames, fps: 2}\n")
    return tmp_path / "mix.yaml"


def test_training_sees_a_frame_a_second(mixture: Path) -> None:
    model = make_model(time_instruction=True)
    item = ConversationDataset(load_mixture(mixture), model.tokenizer, model.config)[0]
    (frames,) = item["pixel_values"]
    assert item["modalities"] == ["video"]
    assert [round(frame.float().mean().item() / 30) for frame in frames] == [0, 2, 4, 6]
    assert "lasts for 3.50 seconds, and 4 frames" in model.tokenizer.decode(item["input_ids"])
    (mixture.parent / "frames/walks/one.d/4.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"m\.jsonl:1 \(id w\): .*4\.jpg: it is no picture that can be read"):
        ConversationDataset(load_mixture(mixture), model.tokenizer, model.config)[0]


def test_shards_of_paths_remember_how_many_frames_make_a_second(mixture: Path, tmp_path: Path) -> None:
    samples = load_mixture(mixture)
    write_shards(samples, tmp_path / "shards", features="path")
    (found,) = ShardDataset(tmp_path / "shards")
    assert found.sample == samples[0]
    assert found.sample.media[0].fps == 2


def test_features_of_it_are_a_memory(mixture: Path, tmp_path: Path) -> None:
    model = make_model()
    writer, repository = FrameWriter(model), Repository(tmp_path / "memories")
    (job,) = list_jobs(mixture)
    assert job.names == ("walks%2Fone.d",)
    outcome = take_in(job, repository, writer, SIDE, "bfloat16")
    assert (outcome.state, outcome.frames) == ("done", 4)
    (frames,) = ConversationDataset(load_mixture(mixture), model.tokenizer, model.config)[0]["pixel_values"]
    with torch.no_grad():
        expected = writer.encode(frames).bfloat16()
    torch.testing.assert_close(packed_features(repository, job.names[0])["features"], expected, rtol=0.01, atol=0.01)
