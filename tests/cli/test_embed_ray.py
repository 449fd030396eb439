# SPDX-License-Identifier: Apache-2.0
"""`hourllava embed --ray`: the same features, by the processes of a Ray cluster."""

import sys
from pathlib import Path

import pytest
import torch

from hourllava.cli import main
from hourllava.cli.cluster import Embedder
from hourllava.memory import Repository, packed_features


def embed(*arguments: object, capfd: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(["embed", *map(str, arguments)]) == code
    return "".join(capfd.readouterr())


@pytest.fixture
def films(clip: str, tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.mp4").write_bytes(Path(clip).read_bytes())
    (folder / "text.mkv").write_text("Dear diary.\n" * 100)
    return folder


def test_on_a_cluster(
    films: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="NOT TESTED: ray is not installed")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or whatever else the machine does comes first
    out, plain = tmp_path / "out", tmp_path / "plain"
    said = embed(films, "-o", out, "--model", model, "--ray", "--processes", 2, capfd=capfd, code=1)
    assert "2 embedded, 1 failed" in said
    assert any(line.startswith("text.mkv: failed: ") for line in said.splitlines())
    embed(films, "-o", plain, "--model", model, capfd=capfd, code=1)
    for name in ("a.mp4", "b.mp4"):
        ours, theirs = (packed_features(Repository(folder), name)["features"] for folder in (out, plain))
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)  # of other numbers of threads
    (films / "text.mkv").unlink()
    assert "2 there already" in embed(films, "-o", out, "--model", model, "--ray", capfd=capfd)
    said = embed(films, "-o", tmp_path / "more", "--ray", "auto", "--model", model, capfd=capfd, code=1)
    assert "no cluster answers there" in said.splitlines()[-1]


def test_what_a_process_of_the_cluster_does(films: Path, model: str, tmp_path: Path) -> None:
    embedder = Embedder(str(tmp_path / "out"), model, "int8", False)
    row = {"id": "a", "path": str(films / "a.mp4"), "names": ["a.mp4", "again.mp4"]}
    told = embedder(row)
    assert (told["state"], told["reason"], told["fault"]) == ("done", "", ["", "", ""])
    assert told["frames"] == Repository(tmp_path / "out").catalogue.video("again.mp4").frames > 0
    assert embedder(row)["state"] == "held"
    told = Embedder(str(tmp_path / "out"), str(tmp_path / "absent"), "int8", False)(row)
    assert told["fault"][:2] == [str(tmp_path / "absent"), "there is no such model"]


def test_ray_is_named_where_it_is_missing(
    films: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = embed(films, "-o", tmp_path / "out", "--model", model, "--ray", capfd=capfd, code=1)
    assert said == "hourllava: --ray: Ray is not installed; pip install 'hourllava[ray]'\n"
