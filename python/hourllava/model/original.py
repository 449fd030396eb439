# SPDX-License-Identifier: Apache-2.0
"""The original's config.json: flat, the decoder's fields at the top level, under any `model_type`."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hourllava.errors import ModelError

if TYPE_CHECKING:
    from .configuration import HourLlavaConfig

TOWER_REPOSITORY = "google/siglip-so400m-patch14-384"
# What is run of it: the last of its 27 layers and the pooling head are dropped.
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DECODER_FIELDS = (
    *_NEEDED,
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What the original's code has as constants.
_CONSTANTS = (
    "min_frames",
    "max_kept_frames",
    "temporal_ratio",
    "spatial_ratio",
    "temporal_forgetting",
    "forgetting_seed",
    "image_grid",
    "image_max_tiles",
    "memory_budget",
)
# What the original's own code looks up in its config besides the sizes.
_FIXED = {
    "architectures": ["HourLlavaQwenForCausalLM"],
    "model_type": "hour_llava_qwen",
    "mm_vision_tower": TOWER_REPOSITORY,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": "memaug",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "grid",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "anyres_max_9",
    "rope_scaling": None,
    "tokenizer_padding_side": "right",
    "use_cache": True,
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original's: ours keeps no decoder's field at the top level."""
    return "hidden_size" in config


def fields_of_original(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `HourLlavaConfig` that say what the original's config.json says.

    A `text_config` or `vision_config` that stands in it may describe another model and is not read.

    Raises:
        ModelError: a size of the decoder is missing.
    """
    theta = flat.get("rope_theta") or (flat.get("rope_parameters") or {}).get("rope_theta")
    missing = [name for name in _NEEDED if name not in flat] + ["rope_theta"] * (theta is None)
    if missing:
        raise ModelError("config.json", f"{', '.join(missing)} is missing", "get the checkpoint's own config.json")
    decoder = {name: flat[name] for name in _DECODER_FIELDS if name in flat}
    decoder["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return {
        "text_config": decoder,
        "vision_config": dict(SO400M) if flat.get("mm_vision_tower") else None,
        "vision_width": flat.get("mm_hidden_size", SO400M["hidden_size"]),
        "memaug_depth": flat.get("memaug_depth", 4),
        "video_grid": flat.get("video_grid", 8),
        "spatial_forgetting": flat.get("spatial_sampling_type", "random"),
        "time_instruction": flat.get("add_time_instruction", True),
        "dtype": flat.get("dtype", flat.get("torch_dtype")),
        "original": dict(flat),
    }


def original_of_config(config: "HourLlavaConfig") -> dict[str, Any]:
    """The original's config.json for a model: the one that it came from, where its fields were not changed since.

    Of a model that never was the original's, only what the original can express is told.
    """
    now = _flat_fields(config)
    if config.original is not None:
        before = _flat_fields(type(config).from_original(config.original))
        flat = config.original | {name: value for name, value in now.items() if value != before[name]}
    else:
        sides = [config.tile_size * count for count in range(1, config.image_grid + 1)]
        flat = _FIXED | now
        flat["image_grid_pinpoints"] = [[width, height] for width in sides for height in sides]
        flat["tokenizer_model_max_length"] = config.text_config.max_position_embeddings
    tower = config.vision_config
    if tower is not None:
        sizes = {name: getattr(tower, name) for name in SO400M}
        side, told = tower.image_size // tower.patch_size, flat.get("vision_config") or {}
        if _untold(tower.hidden_size, side, tower.patch_size, told).items() - sizes.items():
            flat["vision_config"] = sizes
    return flat


def untold_fields(config: "HourLlavaConfig") -> dict[str, tuple[Any, Any]]:
    """What is lost on the way: fields that the original's config.json cannot say, with what they are and become."""
    back = type(config).from_original(original_of_config(config))
    values = {name: (getattr(config, name), getattr(back, name)) for name in _CONSTANTS}
    return {name: (now, then) for name, (now, then) in values.items() if now != then}


def _flat_fields(config: "HourLlavaConfig") -> dict[str, Any]:
    decoder = config.text_config
    return {name: getattr(decoder, name) for name in _DECODER_FIELDS} | {
        "rope_theta": decoder.rope_parameters["rope_theta"],
        "memaug_depth": config.memaug_depth,
        "video_grid": config.video_grid,
        "add_time_instruction": config.time_instruction,
        "mm_hidden_size": config.vision_width,
        "spatial_sampling_type": config.spatial_forgetting,
        "torch_dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    }


def tower_config(shapes: Mapping[str, tuple[int, ...]], prefix: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a SigLIP tower, read off its tensors.

    Args:
        shapes: of all tensors, by name.
        prefix: what stands before `embeddings.` and `encoder.` in the tower's names.
        told: a vision config that holds what no shape tells (heads, and pixels beyond the last whole patch), if its
            width is the tower's; so400m's are taken else.

    Raises:
        ModelError: a tensor that tells a size is missing.
    """
    try:
        width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
        positions = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
        inner = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise ModelError("vision tower", f"{error} is missing or no SigLIP tower's", "download it again") from error
    start = f"{prefix}encoder.layers."
    layers = {int(name[len(start) :].split(".")[0]) for name in shapes if name.startswith(start)}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": max(layers) + 1,
        "patch_size": patch,
        **_untold(width, math.isqrt(positions), patch, told),
    }


def _untold(width: int, side: int, patch: int, told: Mapping[str, Any]) -> dict[str, int]:
    """What the shapes of a tower of side x side patches do not tell."""
    known = told if told.get("hidden_size") == width else {}
    pixels = (source.get("image_size") for source in (known, SO400M))
    return {
        "num_attention_heads": known.get("num_attention_heads", SO400M["num_attention_heads"]),
        "image_size": next((size for size in pixels if size and size // patch == side), side * patch),
    }
