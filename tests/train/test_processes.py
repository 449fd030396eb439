# SPDX-License-Identifier: Apache-2.0
"""Two processes train together: whatever their batches hold, they meet; they resume in step; they share a memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import shared_batch
from tools import assert_error_rule
from training_data import KINDS, Toy, collate, make_recipe

from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train import train
from hourllava.train.groups import part_of
from hourllava.train.resume import checkpoints
from hourllava.train.training import load_model

TESTS = Path(__file__).parents[1]
CASES = ("ddp", "ddp-stopped", "ddp-accumulated", "ddp-shared", "fsdp2", "fsdp2-stopped", "fsdp2-accumulated")
Found = Callable[[str], dict[str, Any]]


def launch(base: Path, out: Path, cases: tuple[str, ...], switches: tuple[str, ...] = ()) -> None:
    command = ["env", *switches, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "many_processes.py"), str(base), str(out), *cases]
    done = subprocess.run(command, capture_output=True, timeout=1500, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def out(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, in one launch: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("many")
    launch(base, folder, (*CASES, "mixed", "text"))
    return folder


@pytest.fixture
def found(out: Path) -> Found:
    return lambda case: json.loads((out / f"{case}.json").read_text())


def test_batches_are_as_unlike_as_they_get(found: Found) -> None:
    first, second = ([KINDS[n % 4] for n in numbers] for numbers in found("ddp")["taken"])
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == 5
    assert sum(a != b for a, b in pairs) >= 3
    assert any("text" in pair and set(pair) & {"video", "image"} for pair in pairs)
    assert any("features" in pair and set(pair) & {"video", "image"} for pair in pairs)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_stop_of_one_process_stops_both_and_leaves_no_trace(parallel: str, found: Found) -> None:
    whole, stopped = found(parallel), found(f"{parallel}-stopped")
    assert stopped["stopped"] == "checkpoint-3"
    assert stopped["taken"] == whole["taken"]
    assert stopped["losses"] == whole["losses"]


def test_shards_train_as_copies_do(found: Found, out: Path) -> None:
    for change in ("", "-accumulated"):
        copies, shards = found(f"ddp{change}"), found(f"fsdp2{change}")
        assert shards["taken"] == copies["taken"]
        assert shards["losses"] == pytest.approx(copies["losses"], rel=1e-4)
        models = [
            HourLlavaForConditionalGeneration.from_pretrained(out / f"{parallel}{change}").state_dict()
            for parallel in ("ddp", "fsdp2")
        ]
        for name, weight in models[0].items():
            torch.testing.assert_close(models[1][name], weight, rtol=0, atol=2e-3)


def test_processes_that_share_memories_are_one(base: Path, found: Found, tmp_path: Path) -> None:
    recipe = make_recipe(base, group_by_modality=False, max_steps=5, batch_size=1)
    alone = train(recipe, tmp_path, Toy(24, long=True), collate)
    state = json.loads((checkpoints(alone)[-1] / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    shared = found("ddp-shared")
    assert shared["taken"][0] == shared["taken"][1]
    assert shared["losses"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixed", "text"])
def test_gradients_of_a_shared_memory(kind: str, base: Path, out: Path) -> None:
    """By the error rule, part by part."""
    got = [torch.load(out / f"{kind}-{rank}.pt") for rank in range(2)]
    assert torch.equal(got[0]["loss"], got[1]["loss"])
    results = []
    for dtype in (torch.float32, torch.float64):
        model = load_model(make_recipe(base)).to(dtype).train()
        output = model(**shared_batch(kind), use_cache=False)
        output.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), output.loss.detach(), gradients))
    (plain_logits, plain_loss, plain), (exact_logits, _, exact) = results
    assert_error_rule(got[0]["logits"], plain_logits, exact_logits, "logits")
    torch.testing.assert_close(got[0]["loss"], plain_loss, rtol=1e-6, atol=0)
    assert got[0]["gradients"].keys() == plain.keys()
    for part in {part_of(name) for name in plain}:
        names = [name for name in plain if part_of(name) == part]
        ours, theirs, truth = (torch.cat([g[n].flatten() for n in names]) for g in (got[0]["gradients"], plain, exact))
        assert truth.abs().max() > 0 or kind == "text"
        assert_error_rule(ours, theirs, truth, part)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="NO DEEPSPEED: ZeRO is NOT CHECKED; pip install deepspeed")
def test_zero_takes_any_batch_on_any_process(base: Path, found: Found, tmp_path: Path) -> None:
    switches = ("ACCELERATE_USE_DEEPSPEED=true", "DS_ACCELERATOR=cpu")
    launch(base, tmp_path, ("zero2",), switches)  # accelerate starts DeepSpeed once a process
    ran = json.loads((tmp_path / "zero2.json").read_text())
    assert ran["taken"] == found("ddp")["taken"]
    # The first two come before any weight has moved; DeepSpeed's own steps are not compared.
    assert ran["losses"][:2] == pytest.approx(found("ddp")["losses"][:2], rel=1e-6)
    assert ran["losses"][-1] < ran["losses"][0]
