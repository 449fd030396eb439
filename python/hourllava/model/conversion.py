# SPDX-License-Identifier: Apache-2.0
"""The way back: a checkpoint of ours in the original's layout, the same tensors under the same names, bit for bit."""

import json
import os
import shutil
from math import prod
from pathlib import Path

from safetensors.torch import save_file

from hourllava.errors import ModelError

from .checkpoint import EMBEDDING, HEAD, INDEX, WEIGHTS, Stored, open_checkpoint, read_config
from .modeling import HourLlavaForConditionalGeneration
from .original import original_of_config

SHARD = 1 << 30  # elements of a file's tensors at most, if there is more than one
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def convert_to_original(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    shard: int = SHARD,
) -> list[str]:
    """Write a checkpoint as the original's code reads it: flat config.json, safetensors, tokenizer.

    Shards are copied one at a time. A head that the checkpoint came with is written even where it is the embedding.
    config.json comes last, so that what was interrupted is not taken for a model.

    Args:
        source: a directory that `save_pretrained` wrote (or one of the original's, whose tower is then put in).
        target: a directory that is made, or is empty.
        vision_tower: as in `from_pretrained`.
        shard: elements of a file at most.

    Returns:
        the names of the files with weights.

    Raises:
        ModelError: the checkpoint is not whole, or the target holds something already.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(target, "there is something already", "name a new folder")
    opened = open_checkpoint(source, HourLlavaForConditionalGeneration, read_config(source), vision_tower)
    config, tensors = opened.config, opened.tensors | opened.from_elsewhere
    if config.head_is_stored and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    target.mkdir(parents=True, exist_ok=True)
    groups = _shards(tensors, shard)
    files = [WEIGHTS] if len(groups) == 1 else [_shard_name(number, len(groups)) for number in range(len(groups))]
    total = 0
    for file, names in zip(files, groups, strict=True):
        weights = {name: tensors[name].read() for name in names}
        save_file(weights, target / file, metadata={"format": "pt"})
        total += sum(weight.nbytes for weight in weights.values())
    if len(files) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write_json(target / "config.json", original_of_config(config))
    return files


def _shards(tensors: dict[str, Stored], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` elements or one tensor."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, stored in tensors.items():
        size = prod(stored.shape)
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
