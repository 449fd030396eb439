# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as the original wrote them: every name of theirs at full depth, narrow, of random bits."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, KEYS, INNER, LAYERS, VOCAB = 32, 16, 48, 36, 300
TOWER, TOWER_INNER, TOWER_LAYERS, PATCH, IMAGE = 32, 40, 26, 14, 384
DEPTH = 4

FLAT = {
    "model_type": "hour_llava_qwen",
    "architectures": ["HourLlavaQwenForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "memaug_depth": DEPTH,
    "mm_hidden_size": TOWER,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "spatial_sampling_type": "random",
    "torch_dtype": "bfloat16",
    "image_grid_pinpoints": [[384, 384], [384, 768]],
    "text_config": {"model_type": "llama", "hidden_size": 4096},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16},
}


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (WIDTH,), f"{layer}.post_attention_layernorm.weight": (WIDTH,)}
        shapes |= _linear(f"{layer}.self_attn.q_proj", WIDTH, WIDTH)
        shapes |= _linear(f"{layer}.self_attn.k_proj", KEYS, WIDTH) | _linear(f"{layer}.self_attn.v_proj", KEYS, WIDTH)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
    return shapes | {"model.norm.weight": (WIDTH,)}


def memory_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.image_newline": (WIDTH,)}
    shapes |= _linear("model.mm_projector.0", WIDTH, TOWER) | _linear("model.mm_projector.2", WIDTH, WIDTH)
    for j in range(DEPTH):
        block = f"model.vision_resampler.layers.{j}"
        shapes |= _linear(f"{block}.self_attn.Wqkv", WIDTH + 2 * KEYS, WIDTH)
        shapes |= _linear(f"{block}.cross_attn.Wkv", 2 * KEYS, WIDTH)
        for name in ("self_attn.Wo", "cross_attn.Wq", "cross_attn.Wo"):
            shapes |= _linear(f"{block}.{name}", WIDTH, WIDTH)
        shapes |= _linear(f"{block}.mlp.0", 4 * WIDTH, WIDTH) | _linear(f"{block}.mlp.2", WIDTH, 4 * WIDTH)
        for n in (1, 2, 3):
            shapes |= _norm(f"{block}.norm{n}", WIDTH)
    return shapes


def tower_shapes(prefix: str, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        f"{prefix}embeddings.patch_embedding.bias": (TOWER,),
        f"{prefix}embeddings.position_embedding.weight": ((IMAGE // PATCH) ** 2, TOWER),
    }
    for m in range(layers):
        layer = f"{prefix}encoder.layers.{m}"
        for name in ("q", "k", "v", "out"):
            shapes |= _linear(f"{layer}.self_attn.{name}_proj", TOWER, TOWER)
        shapes |= _norm(f"{layer}.layer_norm1", TOWER) | _norm(f"{layer}.layer_norm2", TOWER)
        shapes |= _linear(f"{layer}.mlp.fc1", TOWER_INNER, TOWER) | _linear(f"{layer}.mlp.fc2", TOWER, TOWER_INNER)
    return shapes | _norm(f"{prefix}post_layernorm", TOWER)


def fill(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def original_tensors(head: bool = False, tower: bool = True) -> dict[str, Tensor]:
    shapes = decoder_shapes() | memory_shapes()
    if tower:
        shapes |= tower_shapes("model.vision_tower.vision_tower.vision_model.", TOWER_LAYERS)
    if head:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return fill(shapes)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int = 3) -> Path:
    """Write a folder with config.json, `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tower_repository(folder: Path, seed: int = 1) -> dict[str, Tensor]:
    """Write SigLIP's own repository: one layer more, a pooling head, a text model; return its tensors."""
    shapes = tower_shapes("vision_model.", TOWER_LAYERS + 1)
    shapes |= {"vision_model.head.probe": (1, 1, TOWER), "logit_scale": (1,)}
    shapes |= {"text_model.encoder.layers.0.layer_norm1.weight": (TOWER,)}
    tensors = fill(shapes, torch.float32, seed)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "siglip", "vision_config": {"hidden_size": TOWER, "num_attention_heads": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
