# SPDX-License-Identifier: Apache-2.0
"""`hourllava embed --ray`: the same features, by the processes of a Ray cluster."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
    row = {"id": "a", "path": str(films / "a.mp4"), "names": ["a.mp4", "again.mp4"], "fps": 1.0}
    told = embedder(row)
    assert (told["state"], told["reason"], told["fault"]) == ("done", "", ["", "", ""])
    assert told["frames"] == Repository(tmp_path / "out").catalogue.video("again.mp4").frames > 0
    assert embedder(row)["state"] == "held"
    told = Embedder(str(tmp_path / "out"), str(tmp_path / "absent"), "int8", False)(row)
    assert told["fault"][:2] == [str(tmp_path / "absent"), "there is no such model"]


class Cluster(ModuleType):
    """Stands for the package: what is asked of it is done here, by as many workers as were asked for."""

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self.data = ModuleType("ray.data")
        self.data.from_items = self.from_items
        self.data.ActorPoolStrategy = SimpleNamespace
        self.data.DataContext = SimpleNamespace(get_current=SimpleNamespace)
        self.gpus, self.addresses, self.open = gpus, [], False
        self.asked: dict[str, Any] = {}

    def init(self, address: str, **options: Any) -> None:
        self.addresses.append(address)
        if address == "nowhere":
            raise ConnectionError("nobody is there\nat all")
        self.open = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def from_items(self, rows: list[dict[str, Any]], override_num_blocks: int) -> "Cluster":
        assert override_num_blocks == len(rows)
        self.rows = rows
        return self

    def map(self, worker: type, fn_constructor_args: list[str], **asked: Any) -> "Cluster":
        self.asked = asked
        self.workers = [worker(*fn_constructor_args) for _ in range(asked["compute"].size)]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(json.loads(json.dumps(self.rows))):  # a row crosses to another machine
            yield json.loads(json.dumps(self.workers[number % len(self.workers)](row)))

    def shutdown(self) -> None:
        self.open = False


@pytest.mark.parametrize("gpus", [0, 2])
def test_what_is_asked_of_a_cluster(
    gpus: int,
    films: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster, out = Cluster(gpus), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setitem(sys.modules, "ray.data", cluster.data)
    said = embed(films, "-o", out, "--model", model, "--ray", "--processes", 2, capfd=capfd, code=1)
    assert "2 embedded, 1 failed" in said
    assert any(line.startswith("text.mkv: failed: ") for line in said.splitlines())
    assert sorted(video.name for video in Repository(out).videos()) == ["a.mp4", "b.mp4"]
    assert cluster.asked.pop("compute").size == 2
    assert cluster.asked == ({"num_gpus": 1} if gpus else {"num_cpus": 0.5})
    assert not cluster.open
    (films / "text.mkv").unlink()
    assert "2 there already" in embed(films, "-o", out, "--model", model, "--ray", "head:1", capfd=capfd)
    assert cluster.addresses == ["local", "head:1"]
    said = embed(films, "-o", out, "--model", model, "--ray", "nowhere", capfd=capfd, code=1)
    assert said.startswith("hourllava: --ray nowhere: no cluster answers there (nobody is there); start one with")
    assert said.count("\n") == 1


def test_a_fault_of_a_worker_ends_the_command(
    films: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setitem(sys.modules, "ray.data", cluster.data)
    fault = {"state": "", "frames": 0, "reason": "", "fault": ["/there", "there is no such model", "share it"]}
    monkeypatch.setattr(Embedder, "__call__", lambda self, row: {**row, **fault})
    said = embed(films, "-o", tmp_path / "out", "--model", model, "--ray", capfd=capfd, code=1)
    assert said == "hourllava: /there: there is no such model; share it\n"
    assert not cluster.open


def test_ray_is_named_where_it_is_missing(
    films: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = embed(films, "-o", tmp_path / "out", "--model", model, "--ray", capfd=capfd, code=1)
    assert said == "hourllava: --ray: Ray is not installed; pip install 'hourllava[ray]'\n"
