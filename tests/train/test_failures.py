# SPDX-License-Identifier: Apache-2.0
"""Training by recipe on data of which a part cannot be used: it is told, counted and replaced, or stops the run."""

import json
from pathlib import Path

import pytest
import torch
from memories import full_disk
from tiny_model import make_model
from torch import distributed as dist
from torch import multiprocessing
from training_data import make_recipe

from hourllava.data.failures import FailureLog
from hourllava.data.samples import Media, Sample
from hourllava.data.shards import write_shards
from hourllava.errors import DataError
from hourllava.memory import Embedding, Repository
from hourllava.model import FrameWriter
from hourllava.train import train
from hourllava.train.resume import checkpoints
from hourllava.train.training import feature_tower

FROZEN = ("mm_projector", "language_model")


def text(number: int, *media: Media) -> Sample:
    marks = "<image>\n" * len(media)
    return Sample(f"s{number}", ((f"{marks}Is it {number}?", "Yes."),), media, f"data.json:{number}")


def manifest(folder: Path, samples: list[Sample]) -> Path:
    """The samples as JSON lines, as they would have been written by hand."""
    entries = []
    for sample in samples:
        talk = [{"from": "human", "value": sample.turns[0][0]}, {"from": "gpt", "value": sample.turns[0][1]}]
        entries.append({"id": sample.id, "conversations": talk} | {m.kind: str(m.path) for m in sample.media})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def place(folder: Path, samples: list[Sample], kind: str) -> str:
    """Where the samples are, as shards or as a manifest."""
    if kind == "manifest":
        return str(manifest(folder, samples))
    write_shards(samples, folder / "shards", "path" if kind == "paths" else "inside")
    return str(folder / "shards")


@pytest.mark.parametrize("kind", ["manifest", "paths"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_is_told_at_the_end(
    kind: str, workers: int, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = text(3, Media("features", tmp_path / "gone.pt"))
    torch.save({"vid_feat": torch.randn(4, 64, 64), "duration": 4.0}, tmp_path / "there.pt")
    there = text(4, Media("features", tmp_path / "there.pt"))
    data = place(tmp_path, [text(0), text(1), text(2), gone, there, text(5)], kind)
    recipe = make_recipe(base, data=data, max_steps=3, workers=workers, failure_limit=0.2, trains=FROZEN)
    out = train(recipe, tmp_path / "out")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    (entry,) = [json.loads(line) for line in (out / "failures-0.jsonl").read_text().splitlines()]
    assert entry["id"] == "s3"
    assert "gone.pt: it cannot be read" in entry["why"]
    told = " ".join(capfd.readouterr().err.split())
    assert "1 samples were left out" in told
    with pytest.raises(DataError, match=r"1 of \d samples could not be loaded, more than 10\.0%.*--failure-limit"):
        train(make_recipe(base, data=data, workers=workers, failure_limit=0.1), tmp_path / "strict")


def test_a_list_that_finds_no_room_on_the_disk(tmp_path: Path) -> None:
    failures = FailureLog(tmp_path / "failures.jsonl", limit=1.0)
    errors = [DataError(f"m.jsonl:{number}", "it is gone", "get it") for number in range(2)]
    failures.record("first", errors[0])
    line = r"failures\.jsonl: it cannot be written \(File too large\); free some space, and run the same command again"
    with full_disk(failures.path.stat().st_size + 10), pytest.raises(DataError, match=line):
        failures.record("second", errors[1])
    assert [entry["id"] for entry in failures.entries()] == ["first"]
    assert "1 samples were left out" in str(failures.summary().title)


def embed(model, folder: Path) -> Media:
    writer = FrameWriter(model)
    with Embedding(Repository(folder), "film.mp4", writer) as embedding:
        embedding.append_features(torch.randn(6, writer.shape.per_frame, writer.feature_width))
        embedding.commit()
    return Media("features", folder / "film.mp4", "film.mp4")


@pytest.mark.parametrize("kind", ["manifest", "paths", "inside"])
def test_features_have_to_be_of_the_model_s_tower(kind: str, base: Path, tmp_path: Path) -> None:
    film = embed(make_model(seed=1, min_frames=1), tmp_path / "memories")
    samples = [text(n, film) for n in range(2)]
    recipe = make_recipe(base, data=place(tmp_path, samples, kind), max_steps=1, trains=FROZEN)
    where = r"data\.jsonl:1 \(id s0\)" if kind == "manifest" else r"data\.json:\d \(id s\d\)"
    with pytest.raises(DataError, match=rf"{where}: .*film\.mp4: another tower made these features"):
        train(recipe, tmp_path / "out")
    assert not checkpoints(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_in_another_precision_has_the_same_tower(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    film = embed(make_model(min_frames=1).to(dtype), tmp_path / "memories")
    recipe = make_recipe(base, data=place(tmp_path, [text(n, film) for n in range(2)], "inside"), max_steps=1)
    train(make_recipe(base, data=recipe.data, max_steps=1, trains=FROZEN), tmp_path / "out")
    assert not (tmp_path / "out" / "failures-0.jsonl").read_text()
    train(recipe, tmp_path / "tower")  # while it learns, no features are of it


def _tell_tower(rank: int, base: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = make_model(seed=rank, min_frames=1)  # the second's weights are not those that it will have
    told = feature_tower(make_recipe(base, trains=FROZEN), model)
    (folder / str(rank)).write_text(str(told))
    dist.destroy_process_group()


def test_all_processes_ask_for_the_tower_of_the_first(base: Path, tmp_path: Path) -> None:
    multiprocessing.spawn(_tell_tower, (base, tmp_path), nprocs=2)
    expected = FrameWriter(make_model(min_frames=1)).tower_fingerprint()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [expected] * 2
