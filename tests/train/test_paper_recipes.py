# SPDX-License-Identifier: Apache-2.0
"""The paper's recipes value by value, and what the command line can change in them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hourllava.cli import main
from hourllava.errors import RecipeError
from hourllava.train import RECIPES, Training
from hourllava.train.overrides import change, check_same, load_recipe, show, split_arguments

COMMON = {
    "epochs": 1.0,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "schedule": "cosine",
    "max_length": 32768,
    "bf16": True,
    "gradient_checkpointing": True,
    "workers": 4,
    "keep": 1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "clip": 1.0,
    "memaug_depth": 4,
    "spatial_forgetting": "random",
    "image_grid": 6,
    "image_max_tiles": 9,
    "parallel": "zero2",
    "group_by_modality": True,
    "lora_rank": 0,
    "memory_parallel": 1,
    "max_steps": 0,
}
RESAMPLER = ("vision_resampler",)
ALL = ("vision_tower", "mm_projector", "vision_resampler", "language_model")
LAST = ("mm_projector", "vision_resampler", "language_model")
# start, parts, rate, samples a step, at a time on each of 64 devices, accumulated, batching, frames, saved every
STAGES = {
    "s1-3b": ("jylins/llava-onevision-qwen25-3b-si", RESAMPLER, 1e-4, 128, 1, 2, "random", 32, 100),
    "s1-7b": ("lmms-lab/llava-onevision-qwen2-7b-si", RESAMPLER, 1e-4, 128, 2, 1, "random", 32, 100),
    "s2-3b": ("jylins/hourllava-qwen25-3b-s1", ALL, 2e-5, 128, 1, 2, "random", 0, 100),
    "s2-7b": ("jylins/hourllava-qwen2-7b-s1", ALL, 1e-5, 128, 2, 1, "random", 0, 100),
    "s3-3b": ("jylins/hourllava-qwen25-3b-s2", LAST, 2e-5, 128, 1, 2, "per_stream", 0, 1000),
    "s3-7b": ("jylins/hourllava-qwen2-7b-s2", LAST, 2e-5, 256, 4, 1, "per_stream", 0, 1000),
}
PAPER_DEVICES = 64


@pytest.mark.parametrize("name", STAGES)
def test_recipes_are_the_papers(name: str) -> None:
    recipe = RECIPES[name]()
    assert isinstance(recipe, Training)
    told = (recipe.model, recipe.trains, recipe.learning_rate, recipe.batch_size, recipe.batch_per_device)
    more = (recipe.accumulation(PAPER_DEVICES), recipe.batching, recipe.max_frames, recipe.save_steps)
    assert told + more == STAGES[name]
    assert recipe.name == name
    assert {field: getattr(recipe, field) for field in COMMON} == COMMON
    rates = {
        "vision_resampler": (recipe.resampler_rate, 1e-4),
        "mm_projector": (recipe.projector_rate, 1e-4),
        "vision_tower": (recipe.tower_rate, 5e-6),
    }
    assert all(rate == paper for part, (rate, paper) in rates.items() if part in recipe.trains)
    assert (recipe.min_frames, recipe.time_instruction) == (128, not name.startswith("s1"))


def test_the_7b_model_starts_from_a_7b_model() -> None:
    starts = {name: recipe().model for name, recipe in RECIPES.items() if name != "tiny"}  # type: ignore[union-attr]
    assert all(name[-2:] in start for name, start in starts.items())


def test_a_batch_is_made_of_any_number_of_processes() -> None:
    recipe = RECIPES["s2-3b"]()
    assert [recipe.accumulation(n) for n in (1, 2, 64)] == [128, 64, 2]  # type: ignore[union-attr]
    assert replace(recipe, memory_parallel=2).accumulation(4) == 64  # type: ignore[union-attr, call-arg]
    with pytest.raises(RecipeError, match="no multiple of 3 x 1"):
        recipe.accumulation(3)  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="groups of 2"):
        replace(recipe, memory_parallel=2).accumulation(3)  # type: ignore[union-attr, call-arg]


def test_every_field_can_be_changed() -> None:
    recipe = RECIPES["s2-3b"]()
    values = {"int": "7", "float": "0.25", "str": "x", "bool": "false", "tuple": "mm_projector,vision_resampler"}
    special = {"batching": "per_stream", "parallel": "fsdp2", "spatial_forgetting": "uniform", "schedule": "linear"}
    special["report_to"] = "tensorboard,wandb"
    for field, value in asdict(recipe).items():
        if field == "name":
            continue
        text = special.get(field, values[type(value).__name__])
        changed = getattr(change(recipe, {"--" + field.replace("_", "-"): text}), field)
        assert changed != value, field
        assert type(changed) is type(getattr(recipe, field))
    tiny = RECIPES["tiny"]()
    assert change(tiny, {"--seed": "3"}).seed == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lerning-rate", "1"], r"did you mean --learning-rate\?"),
        (["--stages", "1"], "no such field"),
        (["--learning-rate", "fast"], "'fast' does not fit; give a number"),
        (["--workers", "1.5"], "give a whole number"),
        (["--bf16", "maybe"], "give true or false"),
        (["--batch-size", "0"], "none at all"),
        (["--epochs", "-1"], "below zero"),
        (["--learning-rate", "nan"], "no number to count with"),
        (["--epochs", "inf"], "no number to count with"),
        (["--epochs", "0"], "none at all"),
        (["--lora-rank", "-1"], "--lora-rank: -1 is below zero"),
        (["--lora-alpha", "0"], "none at all"),
        (["--max-length", "0"], "none at all"),
        (["--image-grid", "0"], "none at all"),
        (["--adam-beta2", "1"], r"1\.0 is too large; give a number below 1"),
        (["--warmup-ratio", "3"], r"3\.0 is too large; give a number below 1"),
        (["--seed", "4294967296"], "is too large; give a number below 4294967296"),
        (
            ["--report-to", "wandbb"],
            r"there is no 'wandbb' \(did you mean wandb\?\); choose from tensorboard, wandb, none",
        ),
        (["--report-to", "tensorboard,mlflow"], "there is no 'mlflow'"),
        (["--report-to="], "there is no ''"),
        (["--parallel", "zero2,ddp"], "there is no 'zero2,ddp'"),
        (["--parallel", "zero4"], r"did you mean zero[23]\?"),
        (["--trains", "mm_projektor"], r"did you mean mm_projector\?"),
        (["1e-5"], "belongs to no field"),
        (["--seed", "1", "--seed=2"], "given twice"),
    ],
)
def test_what_cannot_be_changed(arguments: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        change(RECIPES["s2-3b"](), split_arguments(arguments))


def test_the_command_shows_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--learning-rate", "1e-5", "--data=mix.yaml", "--gradient-checkpointing", "no"]
    assert main(["train", "s2-3b", *changes, "--print"]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = asdict(RECIPES["s2-3b"]()) | {
        "learning_rate": 1e-5,
        "data": "mix.yaml",
        "gradient_checkpointing": False,
        "trains": list(ALL),
    }
    assert shown == expected
    assert main(["train", "s2-3b", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines if line.startswith("  --mo"))
    assert told == {"--model": "jylins/hourllava-qwen25-3b-s1"}
    fields = lines[3:]  # below each flag stands what it means
    assert [line.startswith("  --") for line in fields] == [True, False] * (len(asdict(RECIPES["s2-3b"]())) - 1)
    assert "      how processes share the work; one alone needs none of it (ddp, zero2, zero3, fsdp2)" in fields
    assert main(["train", "tiny", "--print"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["s2-3b", "--learning-rat", "1"], "did you mean --learning-rate?"),
        (["s2-3"], "did you mean s2-3b?"),
        (["s2-3b", "-o"], "names no folder"),
        (["s2-3b", "--report-to", "none", "--model", "nowhere/at/all"], "there is no such model"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-o", str(tmp_path), *arguments] if "-o" not in arguments else ["train", *arguments]) == 1
    err = capfd.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_a_recipe_is_all_that_a_command_needs(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = change(RECIPES["s3-7b"](), {"--seed": "5"})
    path = tmp_path / "recipe.json"
    path.write_text(show(recipe))
    assert load_recipe(path) == recipe
    check_same(replace(recipe, workers=0), recipe, path)  # type: ignore[type-var, arg-type]
    with pytest.raises(RecipeError, match="--seed was 5 and is 6"):
        check_same(replace(recipe, seed=6), recipe, path)  # type: ignore[type-var, arg-type]
    for damaged in ("{", "[]", '{"name": "s3-7b"}', show(recipe).replace('"seed"', '"sead"')):
        path.write_text(damaged)
        with pytest.raises(RecipeError, match=r"recipe\.json"):
            load_recipe(path)
