# SPDX-License-Identifier: Apache-2.0
"""Run one of the paper's stages by its recipe: load, say what trains, train, and leave a model that `ask` can open."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import TrainingArguments

from hourllava.data.collator import Collator
from hourllava.data.dataset import ConversationDataset
from hourllava.data.failures import FailureLog, failure_table
from hourllava.data.mds import INDEX
from hourllava.data.mixture import load_mixture
from hourllava.data.shards import ShardDataset
from hourllava.errors import HourLlavaError, RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.checkpoint import copy_tensors, own_report
from hourllava.model.parts import parts_table
from hourllava.model.watching import tower_fingerprint
from hourllava.train.groups import choose_parameters, learning_rates, merge_adapters
from hourllava.train.processes import join_processes, process_count, process_rank, shard
from hourllava.train.recipes import Training
from hourllava.train.report import Picture
from hourllava.train.resume import SaveBeforeEnd, checkpoints, on_sigterm
from hourllava.train.runs import check_packages, go, install, is_done, prepare_folder
from hourllava.train.trainer import TRAINED, Conversations, VideoTrainer
from hourllava.train.zero import deepspeed_config, join_zero, only_this_run, uses_zero

Collate = Callable[[Sequence[Any]], dict[str, Any]]
_SHARDS = "shards"


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
    if is_done(recipe, out_dir):
        return out_dir
    check_packages(recipe)
    begun = prepare_folder(recipe, out_dir)
    with only_this_run():
        _train(recipe, out_dir, begun, training_arguments(recipe, out_dir, accumulation), data, collate)
    if process_rank() == 0:
        export(recipe, out_dir)
        _tell_failures(out_dir)
    if process_count() > 1:
        dist.barrier()
    return out_dir


def _train(
    recipe: Training,
    out_dir: Path,
    begun: Path | None,
    args: TrainingArguments,
    data: Conversations | ShardDataset | None,
    collate: Collate | None,
) -> None:
    """Train from the checkpoint `begun` on, or from the start.

    `args` are made before the model is loaded: with ZeRO-3 it is loaded in parts.
    """
    if uses_zero(recipe):
        join_zero()
    in_shards = recipe.parallel == "fsdp2" and process_count() > 1
    model = (load_for_shards if in_shards else load_model)(recipe, begun)
    if data is None:
        data, collate = load_data(recipe, model, out_dir)
    if process_rank() == 0:
        print(parts_table(model, learning_rates(model, recipe)), file=sys.stderr)
    if in_shards:
        shard(model, recipe, args.device)
    with on_sigterm() as asked:
        callbacks = (SaveBeforeEnd(asked), Picture())
        go(VideoTrainer(model, recipe, args, data, collate or _no_collate, callbacks), out_dir, begun)


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
    torch.manual_seed(recipe.seed)  # draws adapters, on all processes alike
    _set_up(model, recipe)
    if checkpoint is not None and not whole:
        copy_tensors(load_file(checkpoint / TRAINED), model)
    return model


def load_for_shards(recipe: Training, checkpoint: Path | None = None) -> HourLlavaForConditionalGeneration:
    """`load_model` on the first process; on the others the same parameters, in memory that nothing has touched.

    `shard` fills them: the weights are held whole once, and not on every process.

    Raises:
        ModelError: it is not whole; every process raises it.
    """
    told: list[Any] = [None]
    model = None
    if process_rank() == 0:
        try:
            model = load_model(recipe, checkpoint)
            told = [(model.config, model.tokenizer)]
        except HourLlavaError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], HourLlavaError):
        raise told[0]
    if model is None:
        config, tokenizer = told[0]
        with torch.device("meta"):
            model = HourLlavaForConditionalGeneration(config)
        model.to_empty(device="cpu")
        model.tie_weights()  # which `to_empty` has undone
        model.tokenizer = tokenizer
        _set_up(model, recipe)
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
            report_to=[one for one in recipe.report_to.split(",") if one != "none"],
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
    """Put the last checkpoint's model into ``out_dir``: adapters merged, bfloat16 with `bf16`."""
    model = load_model(replace(recipe, gradient_checkpointing=False), checkpoints(out_dir)[-1])
    if recipe.lora_rank:
        merge_adapters(model)
    with own_report():
        model.to(dtype=torch.bfloat16 if recipe.bf16 else torch.float32)  # type: ignore[call-arg]
    install(model, recipe, out_dir)


def _set_up(model: HourLlavaForConditionalGeneration, recipe: Training) -> None:
    """Longest input, what learns, and gradient checkpointing."""
    decoder = model.config.text_config
    decoder.max_position_embeddings = min(decoder.max_position_embeddings, recipe.max_length)
    choose_parameters(model, recipe)
    if recipe.gradient_checkpointing:
        # Of the two names, newer releases of transformers deprecate the second.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _tell_failures(out_dir: Path) -> None:
    """Show which samples any process left out, if any were."""
    summary = failure_table(sorted(out_dir.glob("failures-*.jsonl")))
    if summary is not None:
        Console(stderr=True).print(summary)


def _no_collate(_: Sequence[Any]) -> dict[str, Any]:
    raise AssertionError("data of the caller's own come with their own collate")
