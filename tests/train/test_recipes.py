# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe: the stages train what the original's stages train, and an interruption anywhere leaves no trace."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import full_disk
from safetensors.torch import load_file
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import hourllava
from hourllava.cli import main
from hourllava.data.tokenizer import build_tokenizer
from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train import RECIPES, Lesson, Recipe, engine, run
from hourllava.train.engine import TOWER, run_recipe
from hourllava.train.film_trainer import answer_questions
from hourllava.train.films import Examples, Lessons
from hourllava.train.groups import part_of
from hourllava.train.overrides import change, load_recipe, settings, shown
from hourllava.train.recipes import tiny
from hourllava.train.resume import checkpoints
from hourllava.train.runs import StoppedError

STAGES = ["base", "s1", "s2", "s3", "s2-files"]  # one of every kind
STEPS = 2  # of each, and of the tower
KILL = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from hourllava.train.engine import run_recipe
from hourllava.train.films import Lessons
from hourllava.train.overrides import load_recipe

read = Lessons.__getitem__

def deadly(lessons, step):
    if lessons.stage.name == "s2" and step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(lessons, step)

Lessons.__getitem__ = deadly
torch.set_num_threads(1)
run_recipe(replace(load_recipe(Path(sys.argv[1])), save_steps=1), Path(sys.argv[2]))
"""


def short_recipe() -> Recipe:
    """Some of the tiny recipe's stages, with two small steps each, saved at the end alone."""
    stages = [stage for stage in tiny().stages if stage.name in STAGES]
    small = tuple(replace(stage, lessons=(Lesson(4, 1, 2), Lesson(8, 1, 2)), warmup_steps=1) for stage in stages)
    return replace(tiny(), stages=small, tower_steps=STEPS, save_steps=100, report_to="none")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return run_recipe(short_recipe(), tmp_path_factory.mktemp("whole"))


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def assert_same_run(folder: Path, other: Path) -> None:
    """The same losses, rates and weights of every stage, to the last bit."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "right")
    for name in (TOWER, *STAGES):
        ours, theirs = ([[entry[key] for key in kept] for entry in history(f / name)] for f in (folder, other))
        assert ours == theirs, name
        assert len(ours) == STEPS
        weights = [load_file(f / name / "model.safetensors") for f in (folder, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), name
    last, end = (load_file(f / "model.safetensors") for f in (folder / STAGES[-1], folder))
    assert all(torch.equal(last[key], end[key]) for key in last)


def test_stages_train_the_parts_of_the_paper() -> None:
    stages = {stage.name: set(stage.trains) for stage in tiny().stages}
    assert stages["s1"] == {"vision_resampler"}
    assert stages["s2"] == {"vision_tower", "mm_projector", "vision_resampler", "language_model"}
    assert stages["s3"] == {"mm_projector", "vision_resampler", "language_model"}


def test_a_stage_changes_its_own_parts_and_nothing_else(whole: Path) -> None:
    models = [HourLlavaForConditionalGeneration.from_pretrained(whole / name) for name in (TOWER, *STAGES)]
    for before, after, stage in zip(models, models[1:], short_recipe().stages, strict=False):
        old = dict(before.named_parameters())
        changed = {part_of(name) for name, p in after.named_parameters() if not torch.equal(p, old[name])}
        assert changed == set(stage.trains), stage.name


@pytest.mark.parametrize("name", ["base", "s2", "s2-files"])
def test_a_stage_is_a_plain_loop(name: str, whole: Path) -> None:
    """Forward, backward, clip, AdamW and schedule written out: the Trainer adds nothing to them."""
    number = STAGES.index(name)
    stage = short_recipe().stages[number]
    start = whole / ([TOWER, *STAGES][number])
    model = HourLlavaForConditionalGeneration.from_pretrained(start).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(parameter_name) in stage.trains)
    slow, fast = (
        [p for n, p in model.named_parameters() if (part_of(n) == "vision_tower") is s] for s in (True, False)
    )
    groups = [{"params": slow, "lr": stage.learning_rate * stage.tower_rate}, {"params": fast}]
    optimizer = torch.optim.AdamW(groups, stage.learning_rate, weight_decay=0.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, stage.warmup_steps, stage.steps, min_lr_rate=0.05)
    assert stage.steps == STEPS
    examples = Examples(build_tokenizer(), 64, number, (number + 1) * 10**7, stage.event_weight, stage.film_size)
    losses = []
    for lesson in stage.lessons:
        for _ in range(lesson.steps):
            loss = answer_questions(model, examples.batch(lesson.seconds, lesson.batch), stage).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert losses == [entry["loss"] for entry in history(whole / name)]


def test_the_run_is_saved_told_and_drawn(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = short_recipe()
    assert load_recipe(whole / "recipe.json") == recipe
    for number, name in enumerate((TOWER, *STAGES)):
        for folder in (whole / name, *checkpoints(whole / name)):
            assert load_recipe(folder / "recipe.json") == recipe.until(number)
        assert (whole / name / "training.png").read_bytes().startswith(b"\x89PNG")
        assert not list((whole / name).glob(".*"))
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")
    model = HourLlavaForConditionalGeneration.from_pretrained(whole)
    assert len(model.tokenizer) == len(build_tokenizer())

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(engine, "FilmTrainer", fail)
    assert run_recipe(recipe, whole) == whole
    (whole / "recipe.json").rename(whole / "hidden.json")  # as if it had been killed before its end
    assert run_recipe(recipe, whole) == whole
    with pytest.raises(RecipeError, match=r"--s2\.grounding was 1\.0 and is 0\.5"):
        run_recipe(change(recipe, {"--s2.grounding": "0.5"}), whole)
    with pytest.raises(RecipeError, match="--seed was 0 and is 1"):
        run_recipe(replace(recipe, seed=1), whole)


def test_sigterm_at_any_step_of_any_stage(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is asked to end in every single step; each time, the same command goes on."""
    for data in (engine.LabelledFrames, Lessons):
        read = data.__getitem__

        def asked(batches, step, read=read):
            os.kill(os.getpid(), signal.SIGTERM)
            return read(batches, step)

        monkeypatch.setattr(data, "__getitem__", asked)
    said = []
    while not (tmp_path / "recipe.json").exists():
        try:
            run_recipe(short_recipe(), tmp_path)
        except StoppedError as stopped:
            said.append(str(stopped))
        assert len(said) <= STEPS * (1 + len(STAGES))
    assert len(said) == STEPS * (1 + len(STAGES))
    line = "{}: the run was asked to end; {} is saved; the same command goes on from it"
    assert line.format(tmp_path / "s1", "checkpoint-1") in said
    assert said[-1] == line.format(tmp_path, "stage s2-files")
    assert_same_run(tmp_path, whole)


def test_kill_9_loses_nothing_that_was_saved(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL, str(whole / "recipe.json"), str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in checkpoints(tmp_path / "s2")] == ["checkpoint-1"]
    (tmp_path / "s2/.part/checkpoint-2").mkdir(parents=True)  # as if it had been saving
    run_recipe(short_recipe(), tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_full_disk_at_the_end_of_a_stage(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, install = short_recipe().until(0), engine.install

    def full(*given: Any) -> None:
        with full_disk(100_000):
            install(*given)

    monkeypatch.setattr(engine, "install", full)
    with pytest.raises(RecipeError, match=r"tower/model.safetensors: the disk is full; .* goes on from checkpoint-2"):
        run_recipe(recipe, tmp_path)
    assert sorted(path.name for path in (tmp_path / TOWER).iterdir()) == ["checkpoint-2", "training.png"]
    monkeypatch.setattr(engine, "install", install)
    run_recipe(recipe, tmp_path)
    ours, theirs = (load_file(folder / TOWER / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stages_run_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "process_count", lambda: 2)
    with pytest.raises(RecipeError, match="its stages run on one process; start it without torchrun"):
        run_recipe(short_recipe(), tmp_path)


def test_an_unknown_recipe_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose from: tiny"):
        run("huge", tmp_path)


def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        run("tiny", tmp_path / "file" / "below")


def test_every_field_of_every_stage_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny()
    values = {"int": "7", "float": "0.25", "str": "none"}
    for name, value in settings(recipe).items():
        kind = type(value).__name__
        text = values.get(kind) or {"bool": str(not value), "tuple": "vision_tower,mm_projector"}[kind]
        text = "3x2x5,1x4x6" if name.endswith(".lessons") else text
        changed = settings(change(recipe, {name: text}))
        assert {other for other in changed if changed[other] != settings(recipe)[other]} == {name}
        assert type(changed[name]) is type(value)
    assert change(recipe, {"s2_files.lessons": "3x2x5,1x4x6"}).stages[6].lessons == (Lesson(3, 2, 5), Lesson(1, 4, 6))
    assert main(["train", "tiny", "--s2-files.grounding", "0.5", "--print"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(asdict(recipe)))
    expected["stages"][6]["grounding"] = 0.5
    assert printed == expected
    assert main(["train", "tiny", "--help"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    column = 2 + max(map(len, settings(recipe))) + 2
    assert [line[2:column] for line in told] == [name.ljust(column - 2) for name in settings(recipe)]
    assert [line[column:] for line in told] == [shown(value) for value in settings(recipe).values()]
    assert {"3500", "1x1000x64"} <= {line[column:] for line in told}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--s2.groundng", "1"], "--s2.groundng: recipe tiny has no such field (did you mean --s2.grounding?)"),
        (["--s4.grounding", "1"], "did you mean --s3.grounding?"),
        (["--stages", "1"], "no such field"),
        (["--s2.name", "x"], "no such field"),
        (["--s2.lessons", "4x40"], "--s2.lessons: '4x40' does not fit; give SECONDSxSTEPSxBATCH"),
        (["--s2.lessons", "4x0x8"], "does not fit"),
        (["--s2.lessons="], "it names nothing"),
        (["--s2.trains", "tower"], "did you mean vision_tower?"),
        (["--s2.film-size", "0"], "none at all"),
        (["--tower-steps", "0"], "none at all"),
    ],
)
def test_what_cannot_be_changed_is_one_line(
    arguments: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-o", str(tmp_path), "tiny", *arguments]) == 1
    err = capfd.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_batches_repeat_and_ask_one_question_about_each_film() -> None:
    tokenizer = build_tokenizer()
    first, again = (Examples(tokenizer, 64, seed=1) for _ in range(2))
    for _ in range(3):
        batch, same = first.batch(16, 8), again.batch(16, 8)
        assert torch.equal(batch["input_ids"], same["input_ids"])
        assert all(torch.equal(a, b) for a, b in zip(batch["pixel_values"], same["pixel_values"], strict=True))
        assert all(tokenizer.decode(ids).count("assistant\n") == 1 for ids in batch["input_ids"])
        assert batch["pixel_values"][0].shape == (16, 3, 64, 64)
        assert batch["pixel_values"][0].abs().max() < 1.3
    assert not torch.equal(batch["pixel_values"][0], first.batch(16, 8)["pixel_values"][0])


def test_a_step_has_the_same_batch_wherever_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = replace(tiny().stages[2], lessons=(Lesson(1, 2, 3), Lesson(8, 2, 2), Lesson(4, 1, 2)))
    whole, parts = (Lessons(stage, build_tokenizer(), 64, seed=2) for _ in range(2))
    batches = [whole[step] for step in range(len(whole))]
    assert [batch["pixel_values"][0].shape[0] for batch in batches] == [1, 1, 8, 8, 4]
    drawn: list[object] = []
    pixels = Examples._pixels
    monkeypatch.setattr(Examples, "_pixels", lambda *given: drawn.append(given) or pixels(*given))
    for step in (3, 4, 1):
        batch = parts[step]
        assert torch.equal(batch["input_ids"], batches[step]["input_ids"])
        both = zip(batch["pixel_values"], batches[step]["pixel_values"], strict=True)
        assert all(torch.equal(a, b) for a, b in both)
        assert batch["answer_frames"] == batches[step]["answer_frames"]
    assert len(drawn) == 2 + 2 + 3  # nothing that is passed over is drawn


def test_the_shipped_model_was_trained_by_the_recipe_of_its_name() -> None:
    assert load_recipe(Path(hourllava.__file__).parent / "presets/tiny/recipe.json") == RECIPES["tiny"]()
