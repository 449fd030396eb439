# SPDX-License-Identifier: Apache-2.0
"""What torchrun starts for the training tests: runs the named cases one after the other and saves what happened.

python -m torch.distributed.run --standalone --nproc-per-node 2 many_processes.py BASE OUT CASE...
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from training_data import Toy, collate, make_recipe

from hourllava.errors import DataError
from hourllava.model.sharing import Share
from hourllava.train import Training, train, training, zero
from hourllava.train.processes import join_processes
from hourllava.train.resume import checkpoints
from hourllava.train.runs import StoppedError
from hourllava.train.training import load_model


class Recorded(Toy):
    """Keeps the numbers that were asked for; ends the last process by SIGTERM when its number `end` is taken, or fails
    when its number `unreadable` is.
    """

    def __init__(self, count: int, end: int = 0, unreadable: int = 0) -> None:
        super().__init__(count, long=True)
        self.taken: list[int] = []
        self.end, self.unreadable = end, unreadable

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.taken.append(number)
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if len(self.taken) == self.end and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(self.taken) == self.unreadable and is_last:
            raise DataError("film.mp4", "there is no such file", "get it")
        return super().__getitem__(number)


def fail(recipe: Training, out: Path) -> dict[str, Any]:
    """Train on data of which the last process cannot read its second sample; what each process tells of it."""
    data = Recorded(24, unreadable=2)
    told: list[Any] = [None] * dist.get_world_size()
    try:
        train(recipe, out, data, collate)
    except DataError as error:
        dist.all_gather_object(told, str(error))
    return {"told": told}


def run(recipe: Training, out: Path, end: int = 0) -> dict[str, Any]:
    """Train, again if it was asked to end; what each process took, and the losses."""
    data = Recorded(24, end)
    stopped = None
    try:
        train(recipe, out, data, collate)
    except StoppedError:
        dist.barrier()
        stopped = checkpoints(out)[-1].name
        data.end = 0
        train(recipe, out, data, collate)
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, data.taken)
    state = json.loads((checkpoints(out)[-1] / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return {"taken": taken, "losses": losses, "stopped": stopped}


def gradients_of_a_shared_memory(base: Path, kind: str) -> dict[str, Any]:
    """Loss and the mean of the processes' gradients of one batch whose videos they share."""
    model = load_model(make_recipe(base, gradient_checkpointing=True)).train()
    batch = shared_batch(kind)
    output = model(**batch, memory_group=dist.group.WORLD, use_cache=False)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(total)
            gradients[name] = total / dist.get_world_size()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), "gradients": gradients}


def shared_batch(kind: str) -> dict[str, Any]:
    """One batch: a text, videos that processes have unequal parts of, one too short for that, and an image."""
    toy = Toy(8)
    numbers = {"mixed": [4, 1, 2, 3, 0], "text": [1]}[kind]
    return {**collate([toy[n] for n in numbers]), "forgetting_seed": 5, "spatial_forgetting": "random"}


def let_deepspeed_share_little_things() -> None:
    """Buckets and limits as small for the toy as DeepSpeed's are for a model of billions; everything over gloo."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # shared memory between CPUs, which it would compile
    whole = zero.deepspeed_config

    def little(recipe: Training) -> dict[str, Any] | None:
        config = whole(recipe)
        if config is not None:
            limits = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), 20_000)
            if recipe.parallel == "zero3":
                limits = {"reduce_bucket_size": 20_000, "stage3_max_live_parameters": 1000}
                limits |= {"stage3_param_persistence_threshold": 1000}
            config["zero_optimization"] |= limits
        return config

    training.deepspeed_config = little


def main(base: Path, out: Path, cases: list[str]) -> None:
    if any(case.startswith("zero") for case in cases):
        let_deepspeed_share_little_things()
    join_processes()
    recipe = make_recipe(base, group_by_modality=False, max_steps=5, save_steps=2)
    for case in cases:
        if case in ("mixed", "text"):
            assert Share.of(dist.group.WORLD).ranks == 2
            torch.save(gradients_of_a_shared_memory(base, case), out / f"{case}-{dist.get_rank()}.pt")
            continue
        parallel, _, change = case.partition("-")
        told = replace(recipe, parallel=parallel)
        if change == "shared":
            told = replace(told, memory_parallel=2, batch_size=1)
        if change == "accumulated":
            told = replace(told, batch_size=4, max_steps=2, gradient_checkpointing=True)
        where = out / case
        found = fail(told, where) if change == "unreadable" else run(told, where, end=3 if change == "stopped" else 0)
        if dist.get_rank() == 0:
            (out / f"{case}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
