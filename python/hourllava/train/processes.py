# SPDX-License-Identifier: Apache-2.0
"""Processes that train together: how they share data, gradients, weights and memories."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train.recipes import Training

_OPTIMIZER = "optimizer"


def join_processes() -> None:
    """Meet the processes that torchrun, or another launcher, has started beside this one, if any."""
    PartialState(cpu=not torch.cuda.is_available())


def leave_processes() -> None:
    """Part from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def over_all(value: float, device: torch.device, operation: Any = dist.ReduceOp.SUM) -> float:
    """The sum, or another reduction, of a number over all processes."""
    if process_count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return float(total)


def memory_group(recipe: Training) -> dist.ProcessGroup | None:
    """The processes that share this one's videos; every process has to call it."""
    size, mine = recipe.memory_parallel, None
    if size == 1:
        return None
    for first in range(0, process_count(), size):
        group = dist.new_group(list(range(first, first + size)))
        mine = group if first <= process_rank() < first + size else mine
    return mine


class Sharded(nn.Module):
    """A model whose weights, gradients and optimizer states lie in shards on all processes (FSDP2).

    The decoder's layers are gathered one by one. All else is gathered once a step, because the tower and MemAug's parts
    run a varying number of times. In the shape of DistributedDataParallel, so that a Trainer takes it for wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Meanwhile gradients are added up where they arise, and shared by the first backward pass afterwards."""
        _set_sync(self.module, False)
        try:
            yield
        finally:
            _set_sync(self.module, True)


def shard(model: HourLlavaForConditionalGeneration, recipe: Training, device: torch.device) -> None:
    """Spread the first process' model over all, in place; with `bf16` it computes in bfloat16, and sums in float32.

    Args:
        model: of the same parameters on every process; what the others' hold does not matter.
    """
    weights = model.state_dict() if process_rank() == 0 else {}
    mesh = init_device_mesh(device.type, (process_count(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if recipe.bf16 else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of a sharded model on the CPU of the first process, nothing on others; every process calls it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_sharded(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write each process' share of the optimizer's state into one folder."""
    dcp.save({_OPTIMIZER: get_optimizer_state_dict(model, optimizer)}, checkpoint_id=Path(folder) / _OPTIMIZER)


def load_sharded(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read back what `save_sharded` wrote."""
    state = {_OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=Path(folder) / _OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, state[_OPTIMIZER])


def _set_sync(model: nn.Module, sync: bool) -> None:
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(sync)
