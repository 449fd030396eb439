# SPDX-License-Identifier: Apache-2.0
"""What a run tells others of itself: Weights & Biases, and a bar that leaves the line to what comes after it."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from training_data import Toy, collate, make_recipe

from hourllava.errors import DataError, RecipeError
from hourllava.train import train
from hourllava.train.report import MEMORY, SECONDS, TOKENS, draw
from hourllava.train.runs import check_packages


class Wandb(ModuleType):
    """Stands for the package, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="wandb")
        self.run: Any = None
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.config: dict[str, Any] = type("Config", (dict,), {"update": lambda self, told, **_: None})()

    def init(self, **options: Any) -> None:
        self.begun.append(options)
        self.run = SimpleNamespace(summary={}, _label=lambda **_: None)

    def log(self, told: dict[str, Any]) -> None:
        self.logged.append(told)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    package = Wandb()
    parts = ["wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"]
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in parts:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[parts[-1]].ConfigError = ValueError  # type: ignore[attr-defined]
    return package


@pytest.mark.parametrize("report_to", ["wandb", "none,wandb"])
def test_weights_and_biases_are_told_every_step(report_to: str, wandb: Wandb, base: Path, tmp_path: Path) -> None:
    train(make_recipe(base, max_steps=2, report_to=report_to), tmp_path, Toy(4), collate)
    assert [options["name"] for options in wandb.begun] == ["toy"]
    steps = [told for told in wandb.logged if "train/loss" in told]
    assert [told["train/global_step"] for told in steps] == [1, 2]
    names = {f"train/{name}" for name in ("learning_rate", "rate/vision_tower", TOKENS, SECONDS, MEMORY)}
    assert all(names <= told.keys() for told in steps)


def test_a_folder_of_that_name_is_no_package(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as the package leaves behind where it has logged
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match="--report-to: wandb is not installed; pip install wandb, or choose another"):
        check_packages(make_recipe(base, report_to="tensorboard,wandb"))


def test_the_picture_shows_all_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    told = {
        "loss": [3.0, 2.0],
        "learning_rate": [0.1, 0.2],
        TOKENS: [40.0, 50.0],
        SECONDS: [6.0, 7.0],
        MEMORY: [1.0, 1.5],
    }
    history = [{"step": n + 1} | {name: values[n] for name, values in told.items()} for n in range(2)]
    draw([*history, {"step": 2, "train_runtime": 9.0}], tmp_path / "training.png")
    (figure,) = drawn
    titles = ["loss", "learning rate", "tokens / s", "seconds of video / s", "peak memory (GiB)"]
    assert [axes.get_ylabel() for axes in figure.axes] == titles
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == list(told.values())
    assert all(list(axes.lines[0].get_xdata()) == [1, 2] for axes in figure.axes)


def test_an_error_begins_a_line(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Toy):
        def __getitem__(self, number: int) -> dict[str, Any]:
            raise DataError("film.mp4", "there is no such file", "get it")

    with pytest.raises(DataError):
        train(make_recipe(base), tmp_path, Broken(4), collate)
    told = capfd.readouterr().err
    assert "toy:   0%" in told
    assert told.endswith("\n")
