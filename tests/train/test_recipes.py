# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe: the stages train what the original's stages train, and training is repeatable."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import hourllava
from hourllava.data.tokenizer import build_tokenizer
from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train import RECIPES, Lesson, Recipe, Stage, engine, run
from hourllava.train.examples import Examples
from hourllava.train.recipes import PARTS, tiny


def short_recipe() -> Recipe:
    """The tiny recipe's stages with a step or two each."""
    stages = tuple(replace(stage, lessons=(Lesson(4, 2, 2),), warmup_steps=1) for stage in tiny().stages)
    return replace(tiny(), stages=stages, tower_steps=1)


def test_stages_train_the_parts_of_the_paper() -> None:
    stages = {stage.name: set(stage.trains) for stage in tiny().stages}
    assert stages["s1"] == {"vision_resampler"}
    assert stages["s2"] == {"vision_tower", "mm_projector", "vision_resampler", "language_model"}
    assert stages["s3"] == {"mm_projector", "vision_resampler", "language_model"}


@pytest.mark.parametrize("stage", tiny().stages, ids=lambda stage: stage.name)
def test_a_stage_changes_its_own_parts_and_nothing_else(stage: Stage, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = engine._new_model(short_recipe(), tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.train_stage(model, tokenizer, replace(stage, lessons=(Lesson(4, 2, 2),), warmup_steps=1), seed=3)
    changed = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            changed.add(next(part for part, prefix in PARTS.items() if name.startswith(prefix)))
    assert changed == set(stage.trains)


def test_two_runs_give_the_same_model_and_a_finished_stage_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "short", short_recipe)
    weights = []
    for number in range(2):
        out = run("short", tmp_path / str(number))
        weights.append(HourLlavaForConditionalGeneration.from_pretrained(out).state_dict())
        assert json.loads((out / "recipe.json").read_text())["name"] == "tiny"
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr(engine, "train_stage", fail)
    run("short", tmp_path / "0")


def test_an_unknown_recipe_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose from: tiny"):
        run("huge", tmp_path)


def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        run("tiny", tmp_path / "file" / "below")


def test_batches_repeat_and_ask_one_question_about_each_film() -> None:
    tokenizer = build_tokenizer()
    first, again = (Examples(tokenizer, 64, seed=1) for _ in range(2))
    for _ in range(3):
        batch, same = first.batch(16, 8), again.batch(16, 8)
        assert torch.equal(batch.input_ids, same.input_ids)
        assert all(torch.equal(a, b) for a, b in zip(batch.pixels, same.pixels, strict=True))
        assert all(tokenizer.decode(ids).count("assistant\n") == 1 for ids in batch.input_ids)
        assert batch.pixels[0].shape == (16, 3, 64, 64)
        assert batch.pixels[0].abs().max() < 1.3
    assert not torch.equal(batch.pixels[0], first.batch(16, 8).pixels[0])


def test_the_shipped_model_was_trained_by_the_recipe_of_its_name() -> None:
    shipped = json.loads((Path(hourllava.__file__).parent / "presets/tiny/recipe.json").read_text())
    assert shipped == json.loads(json.dumps(asdict(RECIPES["tiny"]())))
