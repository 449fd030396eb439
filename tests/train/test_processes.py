# SPDX-License-Identifier: Apache-2.0
"""Two processes train together: whatever their batches hold, they meet; they resume in step; they share a memory."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import shared_batch
from tools import assert_error_rule
from training_data import KINDS, Toy, collate, make_recipe

from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train import train
from hourllava.train.groups import part_of
from hourllava.train.resume import check_sharing, checkpoints
from hourllava.train.training import load_model
from hourllava.train.zero import InOrder

TESTS = Path(__file__).parents[1]
CASES = (
    *("ddp", "ddp-stopped", "ddp-accumulated", "ddp-shared", "ddp-unreadable"),
    *("fsdp2", "fsdp2-stopped", "fsdp2-accumulated"),
)
ZERO = ("zero2-stopped", "zero2-accumulated", "zero3-stopped", "zero3-accumulated")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
Found = Callable[[str], dict[str, Any]]


def launch(base: Path, out: Path, cases: tuple[str, ...]) -> None:
    """Two nodes of one process each, as torchrun starts them on machines that share a folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", port]
    work = [str(TESTS / "many_processes.py"), str(base), str(out), *cases]
    with (out / "nodes.log").open("w") as log:
        nodes = [
            subprocess.Popen([*command, "--node-rank", str(number), *work], stdout=log, stderr=log) for number in (0, 1)
        ]
        try:
            ends = [node.wait(timeout=1500) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert ends == [0, 0], (out / "nodes.log").read_text()[-4000:]


@pytest.fixture(scope="module")
def out(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, in one launch: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("many")
    launch(base, folder, (*CASES, *(ZERO if sys.platform == "linux" else ()), "mixed", "text"))
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


def test_one_process_that_fails_ends_both_with_a_line(found: Found) -> None:
    first, second = found("ddp-unreadable")["told"]
    assert first == "this step: another process cannot go on; see what it says"
    assert second == "film.mp4: there is no such file; get it"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_stop_of_one_process_stops_both_and_leaves_no_trace(parallel: str, found: Found) -> None:
    whole, stopped = found(parallel), found(f"{parallel}-stopped")
    assert stopped["stopped"] == "checkpoint-3"
    assert stopped["taken"] == whole["taken"]
    assert stopped["losses"] == whole["losses"]


@pytest.mark.parametrize(
    ("parallel", "rel"),
    [
        ("fsdp2", 1e-4),
        pytest.param("zero2", 1e-6, marks=on_linux),
        pytest.param("zero3", 1e-6, marks=on_linux),
    ],
)
@pytest.mark.parametrize("change", ["stopped", "accumulated"])
def test_shards_train_as_copies_do(change: str, parallel: str, rel: float, found: Found, out: Path) -> None:
    copies, shards = found(f"ddp-{change}"), found(f"{parallel}-{change}")
    assert shards["stopped"] == copies["stopped"] == ("checkpoint-3" if change == "stopped" else None)
    assert shards["taken"] == copies["taken"]
    assert shards["losses"] == pytest.approx(copies["losses"], rel=rel)
    ours, theirs = (
        HourLlavaForConditionalGeneration.from_pretrained(out / f"{way}-{change}").state_dict()
        for way in (parallel, "ddp")
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-3)


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


def test_gradients_are_reduced_in_one_order_whatever_order_they_come_in(base: Path) -> None:
    model = load_model(make_recipe(base))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    learned = [p for p in model.parameters() if p.requires_grad]
    orders = []
    for seed in range(3):
        reduced: list[tuple[str, int]] = []
        in_order = InOrder(lambda p, group, reduced=reduced: reduced.append((names[id(p)], group)), model)
        for _ in range(2):
            shuffled = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed)).tolist()
            for number in shuffled:
                in_order(learned[number], number)
            in_order.check()
        assert reduced[: len(learned)] == reduced[len(learned) :]
        assert all(learned[number] is model.get_parameter(name) for name, number in reduced)
        orders.append([name for name, _ in reduced[: len(learned)]])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(names.values())
    marks = [
        "lm_head",
        "model.layers.1.",
        "model.layers.0.",
        "vision_resampler",
        "mm_projector",
        "vision_tower",
        "embed",
    ]
    places = [next(place for place, name in enumerate(orders[0]) if mark in name) for mark in marks]
    assert places == sorted(places)  # from the loss back, or all would wait for the last


def test_a_parameter_without_a_gradient_is_named(base: Path) -> None:
    model = load_model(make_recipe(base))
    in_order = InOrder(lambda p: None, model)
    with pytest.raises(RecipeError, match="this release of DeepSpeed reduces gradients in another way"):
        in_order.check()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "model.norm.weight":
            in_order(parameter)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight learns, and got no gradient"):
        in_order.check()


@pytest.mark.parametrize(("parallel", "processes"), [("zero2", 4), ("zero3", 2), ("ddp", 2), ("zero2", 1)])
def test_a_checkpoint_of_processes_that_shared_otherwise(parallel: str, processes: int, out: Path) -> None:
    (last,) = checkpoints(out / "ddp-stopped")  # for what it tells of its processes
    check_sharing(last, "zero2", "zero2", 2)
    with pytest.raises(RecipeError, match=f"2 processes with --parallel zero2 saved it, {processes} with {parallel}"):
        check_sharing(last, parallel, "zero2", processes)


def test_one_process_goes_on_whatever_way_of_sharing_is_named(base: Path, tmp_path: Path) -> None:
    train(make_recipe(base, max_steps=1, parallel="zero2"), tmp_path, Toy(4), collate)
    (last,) = checkpoints(tmp_path)
    check_sharing(last, "fsdp2", "zero2", 1)
