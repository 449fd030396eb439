# SPDX-License-Identifier: Apache-2.0
"""Features are read whole while a writer appends to them, gathers their segments and removes the old files."""

import itertools
from pathlib import Path

import pytest
import torch
from memories import SmallWriter, make_frames

from hourllava.data.encoded import read_features
from hourllava.errors import MemoryFileError
from hourllava.memory import Repository, packed_features, unpack_features
from hourllava.model import tiny_config

SECONDS = 27


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("way", ["training", "shards"])
def test_while_segments_are_gathered(way: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer appends before each file that is opened: what was there when reading began is what is read."""
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter(), precision)
    for second in range(SECONDS):
        memory.append(make_frames(1, second))
    expected = unpack_features(packed_features(repository, "camera"))
    assert len(expected) == SECONDS
    read, more = Repository.packed, itertools.chain([1, 1, 3], itertools.repeat(0))
    opened = []

    def packed(self, video, segment):
        for _ in range(next(more)):
            memory.append(make_frames(1, memory.frames))
        opened.append((self.folder / video.name / segment.file).exists())
        return read(self, video, segment)

    monkeypatch.setattr(Repository, "packed", packed)
    if way == "training":
        config = tiny_config()
        config.video_grid, config.vision_width = 4, SmallWriter().feature_width
        features, seconds = read_features(tmp_path / "camera", config, None)
        assert seconds == SECONDS
        assert features.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
    else:
        features = unpack_features(packed_features(repository, "camera"))
    assert False in opened  # a file was gone when its turn came
    assert memory.frames == SECONDS + 5
    assert torch.equal(features.float(), expected)


def test_what_is_really_missing_is_told(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    memory = repository.add("camera", SmallWriter())
    memory.append(make_frames(5))
    (segment,) = repository.catalogue.segments("camera")
    (tmp_path / "camera" / segment.file).unlink()
    with pytest.raises(MemoryFileError, match="memory repair"):
        packed_features(repository, "camera")
