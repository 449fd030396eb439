# SPDX-License-Identifier: Apache-2.0
"""One process trains: what learns and how fast, and that an interruption at any step leaves no trace in the outcome."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import full_disk
from PIL import Image
from safetensors.torch import load_file
from tiny_model import make_model
from training_data import Toy, collate, make_recipe
from transformers import TrainerCallback

from hourllava.cli import main
from hourllava.data.samples import Sample
from hourllava.data.shards import ShardDataset, write_shards
from hourllava.errors import DataError, RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train import Training, runs, train
from hourllava.train import training as training_module
from hourllava.train.groups import choose_parameters, learning_rates, merge_adapters, optimizer_groups
from hourllava.train.report import MEMORY, SECONDS, TOKENS
from hourllava.train.resume import checkpoints
from hourllava.train.runs import StoppedError
from hourllava.train.streams import ShardSampler
from hourllava.train.training import load_model

STEPS = 5
KILL = """
import os, signal, sys
from pathlib import Path
import torch
from training_data import Toy, collate, make_recipe
from hourllava.train import train

class Deadly(Toy):
    def __getitem__(self, number):
        if (out / "checkpoint-2").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)

base, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
train(make_recipe(base, save_steps=1), out, Deadly(12), collate)
"""


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps that nothing interrupts."""
    return train(make_recipe(base), tmp_path_factory.mktemp("whole"), Toy(12), collate)


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def assert_same_run(folder: Path, other: Path) -> None:
    """The same losses, rates and weights, to the last bit."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    ours, theirs = ([[entry[name] for name in kept] for entry in history(f)] for f in (folder, other))
    assert ours == theirs
    assert len(ours) == STEPS
    last = [load_file(checkpoints(f)[-1] / "model.safetensors") for f in (folder, other)]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_groups_have_the_rates_of_their_parts(base: Path) -> None:
    recipe = make_recipe(base, weight_decay=0.1)
    model = load_model(recipe)
    groups = optimizer_groups(model, recipe)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision_tower": 1e-3, "mm_projector": 2e-3, "vision_resampler": 3e-3, "language_model": 4e-3}
    names = {id(p): name for name, p in model.named_parameters()}
    learned = [names[id(p)] for group in groups for p in group["params"]]
    assert len(learned) == len(set(learned))
    assert set(names.values()) - set(learned) == {n for n in names.values() if ".post_layernorm." in n}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 and "norm" not in name else 0), name


@pytest.mark.parametrize("trains", [("vision_resampler",), ("mm_projector", "language_model")])
def test_only_the_named_parts_change(trains: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, trains=trains, max_steps=2)
    out = train(recipe, tmp_path, Toy(4), collate)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    marks = {"mm_projector": "mm_projector.", "vision_resampler": "vision_resampler.", "vision_tower": "vision_tower."}
    for name in before:
        part = next((part for part, mark in marks.items() if mark in name), "language_model")
        if part not in trains:
            assert torch.equal(before[name], after[name]), name
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert all(any(mark in n for n in changed) for part, mark in marks.items() if part in trains)


def test_a_model_without_memaug_gets_a_new_one(base: Path, tmp_path: Path) -> None:
    model = HourLlavaForConditionalGeneration.from_pretrained(base)
    weights = {n: w for n, w in model.state_dict().items() if "vision_resampler" not in n}
    model.save_pretrained(tmp_path, state_dict=weights)
    recipe = make_recipe(tmp_path, memaug_depth=3)
    made, again = load_model(recipe), load_model(recipe)
    assert len(made.model.vision_resampler.layers) == made.config.memaug_depth == 3
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), again.parameters(), strict=True))
    assert made.model.vision_resampler.layers[2].cross_attn.Wkv.weight.any()
    assert len(load_model(make_recipe(base, memaug_depth=3)).model.vision_resampler.layers) == 2


def test_the_run_is_saved_told_and_drawn(base: Path, whole: Path) -> None:
    told = json.loads((whole / "recipe.json").read_text())
    assert told == json.loads((checkpoints(whole)[-1] / "recipe.json").read_text())
    assert Training(**{**told, "trains": tuple(told["trains"])}) == make_recipe(base)
    entries = history(whole)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert all(entry[name] > 0 for entry in entries for name in (TOKENS, MEMORY))
    assert any(entry[SECONDS] > 0 for entry in entries)
    assert {name for name in entries[0] if name.startswith("rate/")} == {f"rate/{p}" for p in make_recipe(base).trains}
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoints(whole)] == [f"checkpoint-{STEPS}"]
    assert not list(whole.glob(".*"))
    model = HourLlavaForConditionalGeneration.from_pretrained(whole)
    assert model.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert train(make_recipe(base), whole, Toy(12), collate) == whole  # it is through: nothing is done again
    with pytest.raises(RecipeError, match="--seed was 42 and is 1"):
        train(make_recipe(base, seed=1), whole, Toy(12), collate)


def test_gradient_checkpointing_changes_nothing(base: Path, whole: Path, tmp_path: Path) -> None:
    train(make_recipe(base, gradient_checkpointing=True), tmp_path, Toy(12), collate)
    ours, plain = ([entry["loss"] for entry in history(folder)] for folder in (tmp_path, whole))
    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_saves_and_the_run_goes_on(step: int, base: Path, whole: Path, tmp_path: Path) -> None:
    class Ended(Toy):
        taken = 0

        def __getitem__(self, number: int) -> dict:
            Ended.taken += 1
            if Ended.taken == 2 * step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(number)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=f"checkpoint-{step} is saved"):
        train(make_recipe(base, save_steps=100), tmp_path, Ended(12), collate)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    train(make_recipe(base, save_steps=100), tmp_path, Toy(12), collate)
    assert_same_run(tmp_path, whole)


def test_kill_9_loses_nothing_that_was_saved(base: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL, str(base), str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    (tmp_path / ".part/checkpoint-3").mkdir(parents=True)  # as if it had been saving
    (tmp_path / ".checkpoint-1.old").mkdir()  # and removing
    train(make_recipe(base, save_steps=1), tmp_path, Toy(12), collate)
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Filling(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.limit = full_disk(100_000)
                self.limit.__enter__()

        def on_train_begin(self, args, state, control, **kwargs):
            self.limit = full_disk(2**40)

    filling = Filling()
    real = training_module.VideoTrainer
    monkeypatch.setattr(training_module, "VideoTrainer", lambda *a: real(*a[:-1], (*a[-1], filling)))
    recipe = make_recipe(base, save_steps=1)
    try:
        with pytest.raises(RecipeError, match=r"checkpoint-3: the disk is full; .* goes on from checkpoint-2"):
            train(recipe, tmp_path, Toy(12), collate)
    finally:
        filling.limit.__exit__(None, None, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / ".part").exists()
    monkeypatch.setattr(training_module, "VideoTrainer", real)
    train(recipe, tmp_path, Toy(12), collate)
    assert_same_run(tmp_path, whole)


def test_lora_trains_adapters_and_the_other_parts_and_resumes(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, lora_rank=4, trains=("mm_projector", "language_model"), save_steps=2)
    model = load_model(recipe)
    names = set(learning_rates(model, recipe))
    assert all(".lora_" in n or "mm_projector" in n or "image_newline" in n for n in names)
    assert sum(".lora_A" in n for n in names) == 7 * len(model.model.layers)
    uninterrupted = train(recipe, tmp_path / "a", Toy(12), collate)
    assert {p.name for p in checkpoints(uninterrupted)[-1].glob("*.safetensors")} == {"trained.safetensors"}
    assert load_file(checkpoints(uninterrupted)[-1] / "trained.safetensors").keys() == names
    (tmp_path / "b").mkdir()
    other = replace(recipe, max_steps=3)
    train(other, tmp_path / "b", Toy(12), collate)
    last = checkpoints(tmp_path / "b")[-1]
    resumed = load_model(recipe, last)
    stored = load_file(last / "trained.safetensors")
    assert all(torch.equal(p, stored[n]) for n, p in resumed.named_parameters() if p.requires_grad)
    merged = HourLlavaForConditionalGeneration.from_pretrained(uninterrupted)
    assert not any(".lora_" in name for name in merged.state_dict())
    tuned = load_model(recipe, checkpoints(uninterrupted)[-1]).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(merged.eval()(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)
    before = HourLlavaForConditionalGeneration.from_pretrained(base).eval()(ids).logits
    assert not torch.allclose(merged(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_lora_of_a_decoder_that_rests(base: Path) -> None:
    with pytest.raises(RecipeError, match="the decoder does not train"):
        load_model(make_recipe(base, lora_rank=4, trains=("mm_projector",)))


def test_adapters_merge_into_the_weights_they_stand_beside() -> None:
    recipe = make_recipe(Path(), lora_rank=2)
    model = make_model()
    choose_parameters(model, recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    ids = torch.tensor([[5, 6, 7]])
    tuned = model(ids).logits
    merge_adapters(model)
    torch.testing.assert_close(model(ids).logits, tuned, rtol=1e-4, atol=1e-3)


def test_bfloat16_trains(base: Path, tmp_path: Path) -> None:
    out = train(make_recipe(base, bf16=True, max_steps=2), tmp_path, Toy(8), collate)
    assert all(entry["loss"] > 0 for entry in history(out))
    model = HourLlavaForConditionalGeneration.from_pretrained(out)
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_keeps_its_words(workers: int, base: Path, tmp_path: Path) -> None:
    class Broken(Toy):
        def __getitem__(self, number: int) -> dict:
            raise DataError("film.mp4", "there is no such file", "get it")

    with pytest.raises(DataError, match=r"^film\.mp4: there is no such file; get it$"):
        train(make_recipe(base, workers=workers), tmp_path, Broken(4), collate)


def test_the_command_trains_on_a_manifest(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def turns(question: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]

    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    manifest = [{"id": str(n), "conversations": turns(f"Is it {n}?")} for n in range(3)]
    manifest += [{"id": "seen", "image": "red.png", "conversations": turns("<image>\nIs it red?")}]
    (tmp_path / "data.json").write_text(json.dumps(manifest))
    changes = {"model": base, "data": tmp_path / "data.json", "batch_size": 2, "memaug_depth": 2, "workers": 0}
    changes |= {"bf16": "no", "report_to": "none", "parallel": "ddp", "batching": "random", "group_by_modality": "no"}
    command = ["train", "s3-3b", "-o", str(tmp_path / "out")]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    assert main(command) == 0
    told = capfd.readouterr()
    assert told.out.strip().endswith(str(tmp_path / "out"))
    assert "MemAug" in told.err
    assert [entry["step"] for entry in history(tmp_path / "out")] == [1, 2]
    HourLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_tensorboard_gets_what_the_picture_shows(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="NOT TESTED: tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(make_recipe(base, max_steps=2, report_to="tensorboard"), tmp_path, Toy(4), collate)
    (events,) = out.rglob("events.out.*")
    log = EventAccumulator(str(events)).Reload()
    names = ["loss", "learning_rate", "rate/vision_tower", TOKENS, SECONDS, MEMORY]
    assert [name for name in names if not any(tag.endswith(name) for tag in log.Tags()["scalars"])] == []
    (tag,) = [tag for tag in log.Tags()["scalars"] if tag.endswith("/loss")]
    assert [event.step for event in log.Scalars(tag)] == [1, 2]


def test_epochs_differ_and_a_run_goes_on_in_the_middle_of_one(base: Path, tmp_path: Path) -> None:
    class Noted(Toy):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            self.taken: list[int] = []
            self.end = 0

        def __getitem__(self, number: int) -> dict:
            self.taken.append(number)
            if len(self.taken) == self.end:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(number)

    # Five samples make three steps of two an epoch, the last of one.
    recipe = make_recipe(base, group_by_modality=False, max_steps=7, save_steps=5)
    whole, parts = Noted(5), (Noted(5), Noted(5))
    train(recipe, tmp_path / "a", whole, collate)
    assert len(whole.taken) == 5 + 5 + 2
    assert sorted(whole.taken[:5]) == sorted(whole.taken[5:10]) == list(range(5))
    assert whole.taken[:5] != whole.taken[5:10]
    parts[0].end = 9  # in the fifth step, the second of the second epoch
    with pytest.raises(StoppedError, match="checkpoint-5 is saved"):
        train(recipe, tmp_path / "b", parts[0], collate)
    train(recipe, tmp_path / "b", parts[1], collate)
    assert parts[0].taken + parts[1].taken == whole.taken
    ours, theirs = ([entry["loss"] for entry in history(tmp_path / name)] for name in ("a", "b"))
    assert ours == theirs


def test_shards_train_and_go_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample(str(n), ((f"Is it {n}?", "Yes."),), (), f"test:{n}") for n in range(6)]
    write_shards(samples, tmp_path / "shards", size_limit=600)
    recipe = make_recipe(base, data=str(tmp_path / "shards"), max_steps=4)
    train(recipe, tmp_path / "whole")
    taken: list[int] = []
    read = ShardDataset.__getitem__

    def end_at_the_third(self: ShardDataset, number: int) -> Any:
        taken.append(number)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, number)

    monkeypatch.setattr(ShardDataset, "__getitem__", end_at_the_third)
    with pytest.raises(StoppedError, match="checkpoint-2 is saved"):
        train(recipe, tmp_path / "parts")
    assert len(set(taken)) == 4
    train(recipe, tmp_path / "parts")
    assert sorted(taken[:6]) == list(range(6))  # an epoch, then the next, and nothing read that is not used
    assert len(taken) == 8
    ours, theirs = ([entry["loss"] for entry in history(tmp_path / name)] for name in ("whole", "parts"))
    assert ours == theirs


@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_a_recipe_for_many_cores_runs_on_few(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    train(make_recipe(base, workers=4, max_steps=1), tmp_path, Toy(12), collate)


def test_processes_share_shards(base: Path, tmp_path: Path) -> None:
    samples = [Sample(str(n), ((f"Is it {n}?", "Yes."),), (), f"test:{n}") for n in range(7)]
    write_shards(samples, tmp_path, size_limit=600)
    shards = ShardDataset(tmp_path, shuffle_seed=3)
    epochs = []
    for epoch in range(2):
        ranks = [ShardSampler(shards, 1, 2, rank) for rank in range(2)]
        ranks[0].set_epoch(epoch)
        first, second = (list(rank) for rank in ranks)
        assert [len(rank) for rank in ranks] == [3, 3]
        assert len({*first, *second}) == 6
        assert [n for pair in zip(first, second, strict=True) for n in pair] == shards.order()[:6].tolist()
        epochs.append(first)
    assert epochs[0] != epochs[1]


def test_shards_know_no_streams(base: Path, tmp_path: Path) -> None:
    write_shards([Sample("0", (("Is it?", "Yes."),), (), "test:0")], tmp_path / "shards")
    with pytest.raises(RecipeError, match=r"--batching per_stream: .*shards, whose index does not tell streams apart"):
        train(make_recipe(base, data=str(tmp_path / "shards"), batching="per_stream"), tmp_path / "out")


def test_data_has_to_be_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--data: it names nothing"):
        train(make_recipe(base), tmp_path)


def test_a_package_that_is_not_installed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="wandb is not installed; pip install wandb"):
        train(make_recipe(base, report_to="wandb"), tmp_path, Toy(4), collate)
    monkeypatch.setattr(runs, "uses_zero", lambda recipe: True)
    with pytest.raises(RecipeError, match=r"deepspeed is not installed; pip install 'hourllava\[zero\]'"):
        train(make_recipe(base, parallel="zero2"), tmp_path, Toy(4), collate)
