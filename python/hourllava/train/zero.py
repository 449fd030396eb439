# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-2 and ZeRO-3: the configuration, and gradients that are reduced in one order on all processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import patch_environment
from torch import distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hourllava.errors import RecipeError
from hourllava.train.processes import process_count
from hourllava.train.recipes import Training

# What a forward pass meets first; the decoder comes after them. MemAug writes all its blocks' pages before the first
# block runs, so the gradients of `Wkv` come after those of all blocks.
_FORWARD = ("embed_tokens.", "image_newline", "vision_tower.", "mm_projector.", ".Wkv.", "vision_resampler.")

# What DeepSpeed's hooks call with a parameter whose gradient is there.
_HOOKS = {"zero2": "process_gradients", "zero3": "reduce_ready_partitions_and_remove_grads"}


def uses_zero(recipe: Training) -> bool:
    """Whether DeepSpeed shares the work: one process has nobody to share with."""
    return recipe.parallel in ("zero2", "zero3") and process_count() > 1


def deepspeed_config(recipe: Training) -> dict[str, Any] | None:
    """The paper's ZeRO-2, or ZeRO-3; None for other ways to share. Trainer fills in what is "auto"."""
    if not uses_zero(recipe):
        return None
    zero: dict[str, Any] = {"stage": 2, "overlap_comm": False, "contiguous_gradients": True}
    zero |= {"allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000}
    if recipe.parallel == "zero3":
        zero = {"stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1_000_000}
        zero |= {"reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 0}
        zero |= {"stage3_param_persistence_threshold": 10_000_000, "stage3_max_live_parameters": 1_000_000}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(names, "auto")}


def join_zero() -> None:
    """Let DeepSpeed take the processes as they have met, before it is asked to load a model in parts."""
    from deepspeed import comm

    comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)


@contextmanager
def only_this_run() -> Iterator[None]:
    """What is set up for DeepSpeed meanwhile is forgotten afterwards, or the process' next run would find it."""
    try:
        with patch_environment(accelerate_use_deepspeed="false"):  # accelerate changes it when it starts DeepSpeed
            yield
    finally:
        unset_hf_deepspeed_config()  # or a model that is loaded from now on is loaded in parts


class InOrder:
    """Passes gradients on to be reduced in the same order on every process, each as soon as it is its turn.

    DeepSpeed puts gradients into buckets as they come, and sums buckets over processes place by place. Where batches
    hold different things gradients come in different orders, and would be added to those of other parameters.

    Args:
        reduce: DeepSpeed's, called with a parameter whose gradient is there, and what else it takes.
        model: its parameters that learn get a gradient in every backward pass.
    """

    def __init__(self, reduce: Callable[..., None], model: nn.Module) -> None:
        self.reduce = reduce
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = sorted(parameters, key=_place)[::-1]
        self.order = [id(parameters[name]) for name in self.names]
        self.turn = 0
        self.came = False  # any gradient since the last check
        self.waiting: dict[int, tuple[Any, ...]] = {}

    def __call__(self, parameter: nn.Parameter, *rest: Any) -> None:
        self.came = True
        self.waiting[id(parameter)] = (parameter, *rest)
        while self.waiting and self.order[self.turn] in self.waiting:
            self.reduce(*self.waiting.pop(self.order[self.turn]))
            self.turn = (self.turn + 1) % len(self.order)

    def check(self) -> None:
        """After a step.

        Raises:
            RecipeError: no gradient came this way: another release of DeepSpeed, with other hooks.
            RuntimeError: some wait for one that did not come.
        """
        if not self.came:
            why = "this release of DeepSpeed reduces gradients in another way than is known"
            raise RecipeError("--parallel", why, "pip install 'hourllava[zero]', or choose another")
        if self.waiting:
            raise RuntimeError(f"{self.names[self.turn]} learns, and got no gradient in a backward pass")
        self.came = False


class ReduceInOrder(TrainerCallback):
    """Puts `InOrder` between DeepSpeed's hooks and its buckets when training begins."""

    def __init__(self, parallel: str) -> None:
        self.parallel = parallel
        self.in_order: InOrder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        zero = kwargs["optimizer"].optimizer
        name = _HOOKS[self.parallel]
        self.in_order = InOrder(getattr(zero, name), kwargs["model"])
        setattr(zero, name, self.in_order)
        if (
            self.parallel == "zero3"
        ):  # small weights are gathered where they are first looked at, which is not one place
            small = zero.persistent_parameters
            small[0].all_gather(small)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.in_order is not None  # training has begun
        self.in_order.check()


def _place(name: str) -> int:
    return next((place for place, mark in enumerate(_FORWARD) if mark in name), len(_FORWARD))
