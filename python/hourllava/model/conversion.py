# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of ours in other layouts, bit for bit: the original's, and the decoder's alone, which is a Qwen2."""

import json
import os
import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path

from safetensors.torch import save_file

from hourllava.errors import ModelError

from .checkpoint import EMBEDDING, HEAD, INDEX, WEIGHTS, Stored, open_checkpoint, read_config
from .modeling import HourLlavaForConditionalGeneration
from .original import original_of_config
from .prompt import load_tokenizer

SHARD = 1 << 30  # elements of a file's tensors at most, if there is more than one
_DECODER = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
GENERATION = "generation_config.json"


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
    source, target = Path(source), _new_folder(target)
    opened = open_checkpoint(source, HourLlavaForConditionalGeneration, read_config(source), vision_tower)
    config, tensors = opened.config, opened.tensors | opened.from_elsewhere
    if config.head_is_stored and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    target.mkdir(parents=True, exist_ok=True)
    files = _write_weights(target, tensors, shard)
    _copy_beside(source, target, (*_TOKENIZER, GENERATION))
    _write_json(target / "config.json", original_of_config(config))
    return files


def convert_decoder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    shard: int = SHARD,
) -> list[str]:
    """Write a checkpoint's decoder alone, as transformers' `Qwen2ForCausalLM`, which vLLM and others serve.

    Answers end with `<|im_end|>`, and are written greedily unless a request says otherwise, whatever generation_config
    the checkpoint came with. config.json comes last.

    Args, Returns, Raises: as in `convert_to_original`.
    """
    source, target = Path(source), _new_folder(target)
    opened = open_checkpoint(source, HourLlavaForConditionalGeneration, read_config(source), vision_tower)
    tied = opened.config.tie_word_embeddings
    tensors = {name: stored for name, stored in opened.tensors.items() if name.startswith(_DECODER)}
    if tied:
        tensors.pop(HEAD, None)
    target.mkdir(parents=True, exist_ok=True)
    files = _write_weights(target, tensors, shard)
    _copy_beside(source, target, _TOKENIZER)
    end = load_tokenizer(source).convert_tokens_to_ids("<|im_end|>")
    _write_json(target / GENERATION, {"eos_token_id": end, "pad_token_id": end})
    dtype = str(tensors[EMBEDDING].read().dtype).removeprefix("torch.")
    told = {"architectures": ["Qwen2ForCausalLM"], "dtype": dtype, "tie_word_embeddings": tied}
    _write_json(target / "config.json", opened.config.text_config.to_dict() | told)
    return files


def _new_folder(target: str | os.PathLike[str]) -> Path:
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(target, "there is something already", "name a new folder")
    return target


def _write_weights(target: Path, tensors: dict[str, Stored], shard: int) -> list[str]:
    """Write tensors, and an index if they make more than one file; the files' names."""
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
    return files


def _copy_beside(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


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
