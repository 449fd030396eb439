# SPDX-License-Identifier: Apache-2.0
"""The original's feature files: what is in them, and nothing that they might do."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hourllava.data.original import check_frames, read_original_features
from hourllava.errors import DataError


def write(path, **contents):
    torch.save(contents, path)
    return path


@pytest.mark.parametrize(
    ("frames", "seconds"), [(300, 300.7), (128, 50.2), (128, 0.4), (128, 127), (5, 900.0), (128, 2)]
)
@pytest.mark.parametrize("flat", [True, False])
def test_one_frame_a_second(tmp_path, frames, seconds, flat):
    features = torch.randn(frames, 4, 4, 6)
    held = features.flatten(1, 2) if flat else features
    read, duration = read_original_features(write(tmp_path / "film.pt", vid_feat=held, duration=seconds))
    wanted = np.linspace(0, frames - 1, min(frames, max(1, int(seconds))), dtype=int)
    assert torch.equal(read, features.flatten(1, 2)[wanted])
    assert duration == seconds


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


UNSAFE, NO_FRAMES = "no features that are safe to read", "holds no frames, or its duration is no number"
BAD = {
    "missing": (None, r"cannot be read \(No such file"),
    "text": (b"Dear diary", UNSAFE),
    "empty": (b"", UNSAFE),
    "list": ([1, 2], UNSAFE),
    "no tensor": ({"vid_feat": [1.0], "duration": 3.0}, NO_FRAMES),
    "no frames": ({"vid_feat": torch.empty(0, 4, 6), "duration": 3.0}, NO_FRAMES),
    "flat": ({"vid_feat": torch.randn(4, 6), "duration": 3.0}, NO_FRAMES),
    "integers": ({"vid_feat": torch.ones(4, 4, 6, dtype=torch.int32), "duration": 3.0}, NO_FRAMES),
    "sparse": ({"vid_feat": torch.ones(4, 4, 4).to_sparse(), "duration": 3.0}, NO_FRAMES),
    "swollen": ({"vid_feat": torch.zeros(1, 1, 1).expand(1 << 20, 16, 6), "duration": 9e9}, "more than the file does"),
    "no duration": ({"vid_feat": torch.randn(4, 4, 6)}, UNSAFE),
    "a word": ({"vid_feat": torch.randn(4, 4, 6), "duration": "long"}, UNSAFE),
    "endless": ({"vid_feat": torch.randn(4, 4, 6), "duration": float("inf")}, NO_FRAMES),
    "negative": ({"vid_feat": torch.randn(4, 4, 6), "duration": -1.0}, NO_FRAMES),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    path = tmp_path / "film.pt"
    contents, why = BAD[name]
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(DataError, match=why) as caught:
        read_original_features(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "film.pt"
    contents = {"vid_feat": torch.randn(4, 4, 6), "duration": 4.0, "more": Evil()}
    torch.save(contents, path) if zipped else path.write_bytes(pickle.dumps({"more": Evil()}))
    with pytest.raises(DataError, match=UNSAFE):
        read_original_features(path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut_short(tmp_path, share):
    path = write(tmp_path / "film.pt", vid_feat=torch.randn(40, 4, 6), duration=40.0)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=UNSAFE):
        read_original_features(path)


def test_checks(tmp_path):
    features = torch.randn(3, 4, 6)
    check_frames(tmp_path, features, 4, 6)
    with pytest.raises(DataError, match=r"another tower.*4 tokens of 6.*8 of 6"):
        check_frames(tmp_path, features, 8, 6)
    features[1, 2, 3] = float("inf")
    with pytest.raises(DataError, match="no numbers"):
        read_original_features(write(tmp_path / "film.pt", vid_feat=features, duration=3.0))
