# SPDX-License-Identifier: Apache-2.0
"""Which parameters learn, and how fast: a group of the optimizer for each part, with LoRA's adapters among them."""

from typing import Any

from torch import nn

from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train.recipes import PARTS, Training

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = ".lora_"
_UNUSED = ".post_layernorm."  # of the tower: in every checkpoint, and never run


def part_of(name: str) -> str:
    """The part, a name of PARTS, that a parameter belongs to."""
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def choose_parameters(model: HourLlavaForConditionalGeneration, recipe: Training) -> None:
    """Make trainable exactly what the recipe trains; with `lora_rank`, adapters stand for the decoder's own weights.

    The model keeps its class: adapters are put into its decoder, and nothing is wrapped around it.

    Raises:
        RecipeError: LoRA is asked for and the decoder does not train, or peft is not installed.
    """
    if recipe.lora_rank:
        _add_adapters(model, recipe)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in recipe.trains and _UNUSED not in name
        if recipe.lora_rank and part == "language_model":
            trains = trains and (_ADAPTER in name or "image_newline" in name)
        parameter.requires_grad_(trains)


def learning_rates(model: nn.Module, recipe: Training) -> dict[str, float]:
    """The learning rate of every parameter that learns, by name."""
    rates = {
        "vision_tower": recipe.tower_rate,
        "mm_projector": recipe.projector_rate,
        "vision_resampler": recipe.resampler_rate,
        "language_model": recipe.learning_rate,
    }
    return {name: rates[part_of(name)] for name, p in model.named_parameters() if p.requires_grad}


def optimizer_groups(model: nn.Module, recipe: Training) -> list[dict[str, Any]]:
    """Groups for AdamW, two a part at most: what decays, and biases and norms, which never do."""
    rates = learning_rates(model, recipe)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in rates:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves each process a part of it
        key = part_of(name), len(shape) > 1 and "norm" not in name
        decay = recipe.weight_decay if key[1] else 0.0
        empty = {"params": [], "lr": rates[name], "weight_decay": decay, "name": key[0]}
        groups.setdefault(key, empty)["params"].append(parameter)
    return list(groups.values())


def merge_adapters(model: HourLlavaForConditionalGeneration) -> None:
    """Add what LoRA's adapters say to the weights they stand beside, and take them out."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _add_adapters(model: HourLlavaForConditionalGeneration, recipe: Training) -> None:
    if "language_model" not in recipe.trains:
        raise RecipeError("--lora-rank", "the decoder does not train", "add language_model to --trains, or give 0")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RecipeError("--lora-rank", "peft is not installed", "pip install 'hourllava[train]'") from error
    pattern = rf"model\.layers\.\d+\..*({'|'.join(LORA_TARGETS)})"
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=pattern)
    inject_adapter_in_model(config, model)
