# SPDX-License-Identifier: Apache-2.0
"""Run one of the paper's stages by its recipe: load, say what trains, train, and leave a model that `ask` can open."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import ProgressCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hourllava.data.collator import Collator
from hourllava.data.dataset import ConversationDataset
from hourllava.data.failures import FailureLog, failure_table
from hourllava.data.mds import INDEX
from hourllava.data.mixture import load_mixture
from hourllava.data.shards import ShardDataset
from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.checkpoint import own_report
from hourllava.model.parts import parts_table
from hourllava.model.watching import tower_fingerprint
from hourllava.train.groups import choose_parameters, learning_rates, merge_adapters
from hourllava.train.overrides import RECIPE_FILE, check_same, load_recipe, show
from hourllava.train.processes import deepspeed_config, join_processes, process_count, process_rank, shard
from hourllava.train.recipes import Training
from hourllava.train.report import Bar, Picture
from hourllava.train.resume import SaveBeforeEnd, checkpoints, clear, load_trained, on_sigterm
from hourllava.train.trainer import TRAINED, Conversations, VideoTrainer

Collate = Callable[[Sequence[Any]], dict[str, Any]]
_FINAL_PART, _SHARDS = ".model.part", "shards"


class StoppedError(RecipeError):
    """A run was asked to end, and has saved."""


def train(
    recipe: Training,
    out_dir: Path,
    data: Conversations | ShardDataset | None = None,
    collate: Collate | None = None,
) -> Path:
    """Train by a recipe into ``out_dir``; a run that was begun there goes on, one that is through is left as it is.

    Every process that a launcher such as torchrun has started calls it.

    Args:
        recipe: what to do.
        out_dir: holds the checkpoints, the log, a picture of the run and, in the end, the model.
        data, collate: instead of what `recipe.data` names.

    Raises:
        RecipeError: the recipe does not fit the processes or what ``out_dir`` holds, or a checkpoint cannot be written.
        StoppedError: SIGTERM came; the last step is saved.
        ModelError, DataError: the model or the data cannot be read.
    """
    join_processes()
    accumulation = recipe.accumulation(process_count())
    if (out_dir / RECIPE_FILE).exists():
        check_same(recipe, load_recipe(out_dir / RECIPE_FILE), out_dir)
        return out_dir
    _check_packages(recipe)
    begun = _prepare_folder(recipe, out_dir)
    model = load_model(recipe, begun)
    if data is None:
        data, collate = load_data(recipe, model, out_dir)
    args = training_arguments(recipe, out_dir, accumulation)
    if process_rank() == 0:
        print(parts_table(model, learning_rates(model, recipe)), file=sys.stderr)
    if recipe.parallel == "fsdp2" and process_count() > 1:
        shard(model, recipe, args.device)
    with on_sigterm() as asked:
        save_before_end = SaveBeforeEnd(asked)
        trainer = VideoTrainer(model, recipe, args, data, collate or _no_collate, (save_before_end, Picture()))
        if not args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Bar)
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    unset_hf_deepspeed_config()  # or a model that is loaded from now on is loaded in parts
    if save_before_end.stopped:
        last = checkpoints(out_dir)[-1].name
        raise StoppedError(out_dir, f"the run was asked to end; {last} is saved", "the same command goes on from it")
    if process_rank() == 0:
        export(recipe, out_dir)
        _tell_failures(out_dir)
    if process_count() > 1:
        dist.barrier()
    return out_dir


def load_model(recipe: Training, checkpoint: Path | None = None) -> HourLlavaForConditionalGeneration:
    """The model that a run starts with, or goes on with, in float32, with exactly its own parts trainable.

    Raises:
        ModelError: it is not whole.
    """
    whole = checkpoint is not None and not (checkpoint / TRAINED).exists()
    fields: dict[str, Any] = {
        "spatial_forgetting": recipe.spatial_forgetting,
        "image_grid": recipe.image_grid,
        "image_max_tiles": recipe.image_max_tiles,
        "min_frames": recipe.min_frames,
        "time_instruction": recipe.time_instruction,
    }
    source = checkpoint if whole else recipe.model
    torch.manual_seed(recipe.seed)  # draws MemAug where the model has none yet
    model = HourLlavaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, new_resampler=recipe.memaug_depth, **fields
    )
    decoder = model.config.text_config
    decoder.max_position_embeddings = min(decoder.max_position_embeddings, recipe.max_length)
    choose_parameters(model, recipe)
    if checkpoint is not None and not whole:
        load_trained(model, load_file(checkpoint / TRAINED))
    if recipe.gradient_checkpointing:
        # Of the two names, newer releases of transformers deprecate the second.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def load_data(
    recipe: Training, model: HourLlavaForConditionalGeneration, out_dir: Path
) -> tuple[ConversationDataset | ShardDataset, Collator]:
    """What `recipe.data` names, and how its samples become batches.

    Raises:
        RecipeError: it names nothing.
        DataError: a file cannot be read, or is not what it should be.
    """
    if not recipe.data:
        raise RecipeError("--data", "it names nothing to train on", "give a manifest (JSON, JSONL, parquet) or a YAML")
    if "://" in recipe.data or (Path(recipe.data) / INDEX).exists():
        return load_shards(recipe, model, out_dir)
    failures = _failure_log(recipe, out_dir)
    tower = feature_tower(recipe, model)
    samples = load_mixture(recipe.data, recipe.seed, failures)
    most = recipe.max_frames or None
    dataset = ConversationDataset(samples, model.tokenizer, model.config, failures, tower, most)
    return dataset, Collator(model.tokenizer)


def load_shards(
    recipe: Training, model: HourLlavaForConditionalGeneration, out_dir: Path
) -> tuple[ShardDataset, Collator]:
    """The shards in the folder, or at the address, that `recipe.data` names.

    Raises:
        DataError: there are none, or they are damaged.
        RecipeError: batches are to hold one stream each, which an index of shards does not know.
    """
    if recipe.batching == "per_stream":
        why = f"{recipe.data} are shards, whose index does not tell streams apart"
        raise RecipeError("--batching per_stream", why, "give --batching random, or train from the manifest")
    local, remote = (out_dir / _SHARDS, recipe.data) if "://" in recipe.data else (Path(recipe.data), None)
    limit = int(recipe.shard_cache * 2**30) or None
    failures, tower, most = _failure_log(recipe, out_dir), feature_tower(recipe, model), recipe.max_frames or None
    conversations = ConversationDataset([], model.tokenizer, model.config, failures, tower, most)
    shards = ShardDataset(local, remote, limit, recipe.seed, conversations=conversations)
    return shards, Collator(model.tokenizer)


def feature_tower(recipe: Training, model: HourLlavaForConditionalGeneration) -> str | None:
    """Fingerprint of the tower that features have to be of: the model's, or while that learns any, but one for all.

    The first process takes it, which may be the only one that holds the weights; every process has to call it.
    """
    tower = model.model.vision_tower
    if tower is None or "vision_tower" in recipe.trains:
        return None
    parts = [parameter for parameter in tower.parameters() if hasattr(parameter, "ds_id")]
    with contextlib.ExitStack() as whole:
        if parts:  # ZeRO-3 has spread them over the processes
            import deepspeed

            whole.enter_context(deepspeed.zero.GatheredParameters(parts))
        told = [tower_fingerprint(model) if process_rank() == 0 else None]
    if process_count() > 1:
        dist.broadcast_object_list(told)
    return told[0]


def _failure_log(recipe: Training, out_dir: Path) -> FailureLog:
    """A file for each process."""
    return FailureLog(out_dir / f"failures-{process_rank()}.jsonl", recipe.failure_limit)


def training_arguments(recipe: Training, out_dir: Path, accumulation: int) -> TrainingArguments:
    """The recipe in transformers' words."""
    with own_report():
        args = TrainingArguments(
            output_dir=str(out_dir),
            per_device_train_batch_size=recipe.batch_per_device,
            gradient_accumulation_steps=accumulation,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            adam_epsilon=recipe.adam_epsilon,
            max_grad_norm=recipe.clip,
            num_train_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup_ratio,
            bf16=recipe.bf16,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=recipe.save_steps,
            report_to=[] if recipe.report_to == "none" else recipe.report_to.split(","),
            run_name=recipe.name,
            seed=recipe.seed,
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            disable_tqdm=process_rank() > 0,
            deepspeed=deepspeed_config(recipe),
        )
    if args.device.type == "cuda":
        args._n_gpu = 1  # or a single process would copy the model to every GPU that it sees
    return args


def export(recipe: Training, out_dir: Path) -> None:
    """Put the last checkpoint's model into ``out_dir``: adapters merged, bfloat16 with `bf16`, the recipe last."""
    part = out_dir / _FINAL_PART
    shutil.rmtree(part, ignore_errors=True)
    model = load_model(replace(recipe, gradient_checkpointing=False), checkpoints(out_dir)[-1])
    if recipe.lora_rank:
        merge_adapters(model)
    with own_report():
        model.to(dtype=torch.bfloat16 if recipe.bf16 else torch.float32)  # type: ignore[call-arg]
        model.save_pretrained(part)
    for path in sorted(part.iterdir()):
        os.replace(path, out_dir / path.name)
    part.rmdir()
    (out_dir / f".{RECIPE_FILE}").write_text(show(recipe) + "\n")
    os.replace(out_dir / f".{RECIPE_FILE}", out_dir / RECIPE_FILE)


def _prepare_folder(recipe: Training, out_dir: Path) -> Path | None:
    """The checkpoint to go on from, if there is one."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        found = checkpoints(out_dir)
    except OSError as error:
        raise RecipeError(f"output {out_dir}", f"it cannot be written ({error.strerror})", "give another -o") from error
    if process_count() > 1:
        dist.barrier()  # before the first process clears up, all have seen the same
    if process_rank() == 0:
        clear(out_dir)
    if found:
        check_same(recipe, load_recipe(found[-1] / RECIPE_FILE), found[-1])
    return found[-1] if found else None


def _check_packages(recipe: Training) -> None:
    needed = {name: name for name in recipe.report_to.split(",") if name != "none"}
    if recipe.parallel in ("zero2", "zero3") and process_count() > 1:
        needed["deepspeed"] = "deepspeed"
    for name in needed:
        if find_spec(name) is None:
            flag = "--parallel" if name == "deepspeed" else "--report-to"
            raise RecipeError(flag, f"{name} is not installed", f"pip install {name}, or choose another")


def _tell_failures(out_dir: Path) -> None:
    """Show which samples any process left out, if any were."""
    summary = failure_table(sorted(out_dir.glob("failures-*.jsonl")))
    if summary is not None:
        Console(stderr=True).print(summary)


def _no_collate(_: Sequence[Any]) -> dict[str, Any]:
    raise AssertionError("data of the caller's own come with their own collate")
