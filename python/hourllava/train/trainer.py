# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for this model: rates by part, any modality on any process, whole checkpoints."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hourllava.data.sampler import GroupedSampler
from hourllava.data.shards import ShardDataset
from hourllava.errors import DataError, HourLlavaError, RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.checkpoint import own_report
from hourllava.model.vision import count_passes
from hourllava.train.groups import optimizer_groups
from hourllava.train.overrides import RECIPE_FILE, show
from hourllava.train.processes import (
    Sharded,
    load_sharded,
    memory_group,
    over_all,
    process_count,
    process_rank,
    save_sharded,
    whole_weights,
)
from hourllava.train.recipes import Recipe, Training
from hourllava.train.report import Meter
from hourllava.train.resume import PART, checkpoints, commit, failed_save
from hourllava.train.streams import ShardSampler
from hourllava.train.zero import ReduceInOrder, uses_zero

TRAINED = "trained.safetensors"  # what learns, where that is all of a checkpoint: with LoRA, adapters and other parts
_SEEDS = 1 << 40  # forgetting seeds of a run, one for each batch of each process


class Conversations(Protocol):
    """Samples by number, and what batches are made of them by; see `hourllava.data.dataset`."""

    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def modalities(self) -> Sequence[str]: ...
    @property
    def streams(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


class _Told(Dataset):
    """Samples, or the error that one of them is: raised in a loading process it would lose what it says."""

    def __init__(self, data: Conversations | ShardDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.data[number]
        except HourLlavaError as error:
            return error


def _collate(collate: Callable[[Sequence[Any]], dict[str, Any]], items: Sequence[Any]) -> dict[str, Any]:
    errors = [item for item in items if isinstance(item, HourLlavaError)]
    return {"error": errors[0]} if errors else collate(items)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Epochs(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, sampler: GroupedSampler | ShardSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class VideoTrainer(Trainer):
    """Trains a model that `choose_parameters` has prepared, and `shard` with FSDP2.

    The loss is the mean over the targets of each process' batch, averaged over batches and processes, as the original's
    is. Which tokens random forgetting keeps is drawn anew for every batch, from the seed and the batch's number.
    """

    def __init__(
        self,
        model: HourLlavaForConditionalGeneration,
        recipe: Training,
        args: TrainingArguments,
        data: Conversations | ShardDataset,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.recipe, self.network, self.samples = recipe, model, data
        self.told: Recipe | Training = recipe  # beside every checkpoint
        self.saves_part = bool(recipe.lora_rank)  # checkpoints hold what learns, and nothing of the rest
        self.memory_group = memory_group(recipe)
        self.taken = (0, 0)  # optimizer steps that are done, and batches that this process has taken since
        self.meter = Meter(args.device, 1 / recipe.memory_parallel)
        self._rates: dict[str, float] = {}
        self._folder: str | None = None
        callbacks = [*callbacks, ReduceInOrder(recipe.parallel)] if uses_zero(recipe) else list(callbacks)
        super().__init__(model, args, collate, data, callbacks=callbacks)  # type: ignore[arg-type]
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch and not over a step's tokens

    def get_train_dataloader(self) -> DataLoader:
        """This process' batches, in an order that every process can tell from the seed and the epoch."""
        recipe, data = self.recipe, self.samples
        groups, group = (n // recipe.memory_parallel for n in (process_count(), process_rank()))
        sampler: GroupedSampler | ShardSampler
        if isinstance(data, ShardDataset):
            sampler = ShardSampler(data, recipe.batch_per_device, groups, group)
        else:
            sampler = GroupedSampler(
                data.lengths,
                data.modalities if recipe.group_by_modality else None,
                recipe.batch_per_device,
                groups,
                group,
                recipe.seed,
                data.streams,
                recipe.batching,  # type: ignore[arg-type]
            )
        self.add_callback(Epochs(sampler))
        return DataLoader(
            _Told(data),
            batch_sampler=BatchSampler(sampler, recipe.batch_per_device, drop_last=True),
            collate_fn=partial(_collate, self.data_collator),  # type: ignore[arg-type]
            num_workers=min(recipe.workers, _cores()),  # torch warns of more; their number changes no batch
            pin_memory=self.args.device.type == "cuda",
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; every process runs the tower as often as the one with the most to see."""
        content = inputs.get("pixel_values") or inputs.get("vision_features") or []
        modalities = inputs.get("modalities") or ["video"] * len(content)
        needed = count_passes(content, modalities) if content else 1  # a text runs on a blank picture
        passes = over_all(math.inf if "error" in inputs else needed, self.args.device, dist.ReduceOp.MAX)
        if passes == math.inf:  # told to all, or the others would wait for the one that fails
            raise inputs.get("error") or DataError("this step", "another process cannot go on", "see what it says")
        passes = int(passes)
        if "vision_tower" in self.recipe.trains:
            passes = max(passes, 1)  # it may not be left out of a step, even if all have features
        options: dict[str, Any] = {"forgetting_seed": self._draw_seed(), "tower_passes": passes, "use_cache": False}
        if self.memory_group is not None:
            options["memory_group"] = self.memory_group
        output = model(**inputs, **options)
        frames = sum(len(one) for one, modality in zip(content, modalities, strict=True) if modality == "video")
        self.meter.add(output.logits.shape[0] * output.logits.shape[1], frames)
        return (output.loss, output) if return_outputs else output.loss

    def _draw_seed(self) -> int:
        """A seed of its own for every batch of every process, the same in a run that goes on."""
        done = self.state.global_step
        batch = self.taken[1] if self.taken[0] == done else 0
        self.taken = (done, batch + 1)
        groups, group = (n // self.recipe.memory_parallel for n in (process_count(), process_rank()))
        number = done * self.args.gradient_accumulation_steps + batch
        return self.recipe.seed * _SEEDS + number * groups + group

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a rate for each part."""
        if self.optimizer is None:
            args = self.args
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                optimizer_groups(self.network, self.recipe), betas=betas, eps=args.adam_epsilon
            )
            self._group_names = [group["name"] for group in self.optimizer.param_groups]
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with each part's rate and what was got through.

        Raises:
            RecipeError: the loss or the norm of the gradients is no number: the weights are none from here on, and must
                not take the place of the last checkpoint.
        """
        if "loss" in logs:
            odd = [f"{name} is {logs[name]}" for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0))]
            if odd:
                last = [f"{path.name} is as it was; " for path in checkpoints(Path(str(self.args.output_dir)))[-1:]]
                todo = f"{''.join(last)}look at what this step was given, or start in another folder with lower rates"
                raise RecipeError(f"step {self.state.global_step}", f"its {' and its '.join(odd)}", todo)
            logs = {**logs, **self._rates, **self.meter.rates()}
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        assert self.lr_scheduler is not None  # made before the first step
        names = dict(zip(self._group_names, self.lr_scheduler.get_last_lr(), strict=True))
        self._rates = {f"rate/{name}": rate for name, rate in names.items()}
        return max(names.values())

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self.recipe.parallel == "fsdp2" and process_count() > 1:
            return model if isinstance(model, Sharded) else Sharded(model)
        return super()._wrap_model(model, *args, **kwargs)

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.model_wrapped, Sharded)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written under another name and renamed when it is whole; an error on any process is one on all."""
        folder = Path(self.args.output_dir)  # type: ignore[arg-type]
        name = f"checkpoint-{self.state.global_step}"
        if (folder / name).exists():
            return  # saved by the run that this one goes on from
        error = None
        self._folder = str(folder / PART)
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (folder / PART / name / RECIPE_FILE).write_text(show(self.told) + "\n")
        except (OSError, RuntimeError, SafetensorError) as failure:
            error = failure
        finally:
            self._folder = None
        if not over_all(error is not None, self.args.device) and self.args.should_save:
            try:
                commit(folder / PART / name, folder, self.recipe.keep)
            except OSError as failure:
                error = failure
        if over_all(error is not None, self.args.device):
            shutil.rmtree(folder / PART, ignore_errors=True)
            raise failed_save(error or OSError("another process could not write"), folder, name) from error

    def _get_output_dir(self, trial: Any) -> str:
        return self._folder or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, and the whole weights of a sharded model."""
        if self._is_sharded:
            self._save(output_dir, whole_weights(self.network))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if not self.saves_part:
            with own_report():
                self.network.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
            return
        weights = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        chosen: dict[str, Tensor] = {
            name: (state_dict[name] if state_dict else weight.detach()).contiguous().cpu()
            for name, weight in weights.items()
        }
        save_file(chosen, folder / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_sharded:
            save_sharded(output_dir, self.network, self._plain_optimizer)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_sharded:
            load_sharded(checkpoint, self.network, self._plain_optimizer)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model was loaded from the checkpoint."""

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]
