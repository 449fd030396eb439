# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint, ours or the original's: what they hold is held against what the model needs, by their
headers alone, before a single weight is read."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from hourllava.errors import ModelError

from .configuration import HourLlavaConfig
from .original import TOWER_REPOSITORY, is_original, tower_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOWER, RESAMPLER = "model.vision_tower.vision_tower.vision_model.", "model.vision_resampler."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
AGAIN = "download it again, all of its files"
_LFS_POINTER = b"version https://git-lfs"
_NAMED = 10  # names that an error lists of a kind


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, mapped from the file."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)


@dataclass
class Checkpoint:
    """A folder whose tensors are those of its model."""

    folder: Path
    config: HourLlavaConfig
    tensors: dict[str, Stored]  # by the model's names
    from_elsewhere: dict[str, Stored] = field(default_factory=dict)  # the tower, where the folder has none


def find_folder(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    """A checkpoint's folder: a directory, or a repository of the hub, downloaded if it is not in its cache.

    Args:
        hub: keyword arguments of `from_pretrained`; those about the hub count.

    Raises:
        ModelError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    options = {option: hub[option] for option in known if option in hub}
    try:
        files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(name), allow_patterns=files, **options))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        todo = "give a directory, or a repository of huggingface.co that can be reached"
        raise ModelError(name, "there is no such model", todo) from error


def read_config(folder: Path, **changes: Any) -> HourLlavaConfig:
    """The config in a folder, of either layout, with `changes` to its fields.

    Raises:
        ModelError: there is none, or it does not describe a model of this architecture.
    """
    told = read_json(folder / "config.json")
    try:
        config = HourLlavaConfig.from_dict(told, **changes)
    except (ValueError, KeyError, TypeError) as error:
        why = f"config.json describes no model of this kind ({str(error).splitlines()[0]})"
        raise ModelError(folder, why, "give a directory with a model of Hour-LLaVA") from error
    config.name_or_path = str(folder)
    return config


def open_checkpoint(
    folder: Path,
    network: type[nn.Module],
    config: HourLlavaConfig,
    vision_tower: str | os.PathLike[str] | None = None,
    new_resampler: int | None = None,
) -> Checkpoint:
    """Read the headers of a checkpoint's files and hold them against the model.

    Args:
        network: the class of the model, which is built without storage to know what it needs.
        config: what `read_config` gave; what only the tensors tell is set right in it: the sizes of the original's
            tower, and whether the head is tied.
        vision_tower: folder of the tower's own repository, for a checkpoint that holds no tower; by default what the
            original's `mm_vision_tower` names, if it is a folder or in the hub's cache.
        new_resampler: a checkpoint without MemAug is to get a new one of so many blocks.

    Raises:
        ModelError: a file is missing, damaged or only the pointer to one, or tensors are missing, unexpected or of
            another shape than the model's: all of them are named.
    """
    path = folder / "config.json"
    told = read_json(path) if path.is_file() else {}
    told = told if is_original(told) else {}
    checkpoint = Checkpoint(folder, config, read_headers(folder))
    if any(name.startswith(TOWER) for name in checkpoint.tensors):
        if told:
            shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
            _set_tower(config, tower_config(shapes, TOWER, told.get("vision_config") or {}))
    elif vision_tower is not None or config.vision_config is not None:
        tower, checkpoint.from_elsewhere = _tower_elsewhere(folder, vision_tower or told.get("mm_vision_tower"))
        _set_tower(config, tower)
    if told and "tie_word_embeddings" not in told:
        config.text_config.tie_word_embeddings = True
    _settle_head(checkpoint)
    fresh = new_resampler is not None and not any(name.startswith(RESAMPLER) for name in checkpoint.tensors)
    if fresh and new_resampler is not None:
        config.memaug_depth = new_resampler
    _compare(checkpoint, network, RESAMPLER if fresh else None)
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ModelError: there is no such file, or it holds none.
    """
    _check_file(path)
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ModelError(path, f"it is damaged ({str(error).splitlines()[0]})", AGAIN) from error
    if not isinstance(found, dict):
        raise ModelError(path, "it holds no JSON object", AGAIN)
    return found


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's safetensors files, by name; no weight is read.

    Raises:
        ModelError: a file is missing, damaged, cut short, or only a pointer to one.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        files = [WEIGHTS]
    else:
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(folder / INDEX, "it lists no shards", AGAIN)
        files = sorted(set(shards.values()))
    tensors = {}
    for path in (folder / file for file in files):
        _check_file(path)
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = Stored(path, name, tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            why = f"it is damaged or cut short ({str(error).splitlines()[0]})"
            raise ModelError(path, why, AGAIN) from error
    return tensors


def copy_tensors(tensors: Mapping[str, Stored | Tensor], model: nn.Module) -> None:
    """Copy tensors into a model's parameters of the same names, one at a time."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            with _whole(parameters[name]):
                parameters[name].copy_(tensor.read() if isinstance(tensor, Stored) else tensor)


@contextmanager
def own_report() -> Iterator[None]:
    """Keep transformers from telling what `open_checkpoint` has settled, and from drawing bars."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """Meanwhile every process has the whole of a parameter that ZeRO-3 has spread, and the first one's stays."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(path.parent, f"{path.name} is missing", AGAIN)
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        todo = "fetch the files themselves (git lfs pull, or hf download)"
        raise ModelError(path, "it is a Git LFS pointer, not the file", todo)
    if not head:
        raise ModelError(path, "it is empty", AGAIN)


def _set_tower(config: HourLlavaConfig, tower: dict[str, Any]) -> None:
    made = type(config)(vision_config=tower)
    for name in ("vision_config", "vision_width", "tile_size"):
        setattr(config, name, getattr(made, name))


def _tower_elsewhere(folder: Path, where: str | os.PathLike[str] | None) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Sizes and tensors of the tower in its own repository; its last layer and its head are never run."""
    todo = f"give vision_tower=DIRECTORY with the files of {TOWER_REPOSITORY}, or vision_config=None to do without"
    if where is None:
        raise ModelError(folder, "it holds no vision tower", todo)
    try:
        place = folder / where if (folder / where).is_dir() else find_folder(where, {"local_files_only": True})
    except ModelError as error:
        raise ModelError(folder, f"it holds no vision tower, and {where} is not on this machine", todo) from error
    found = read_headers(place)
    mark = "embeddings.patch_embedding.weight"
    prefix = next((name.removesuffix(mark) for name in found if name.endswith(mark)), "")
    told = read_json(place / "config.json")
    shapes = {name: stored.shape for name, stored in found.items()}
    tower = tower_config(shapes, prefix, told.get("vision_config") or told)
    if prefix != TOWER:
        tower["num_hidden_layers"] -= 1
    unused = (f"{prefix}head.", f"{prefix}encoder.layers.{tower['num_hidden_layers']}.")
    names = [name for name in found if name.startswith(prefix) and not name.startswith(unused)]
    names = [name for name in names if not name.endswith("position_ids")]
    return tower, {TOWER + name.removeprefix(prefix): found[name] for name in names}


def _settle_head(checkpoint: Checkpoint) -> None:
    """Let the tensors say whether the head is the embedding: a stored head that differs from it is one of its own."""
    config, tensors = checkpoint.config, checkpoint.tensors
    decoder = config.text_config
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head and embedding and decoder.tie_word_embeddings:
        decoder.tie_word_embeddings = head.shape == embedding.shape and torch.equal(head.read(), embedding.read())
        config.head_is_stored = decoder.tie_word_embeddings
    config.tie_word_embeddings = decoder.tie_word_embeddings


def _compare(checkpoint: Checkpoint, network: type[nn.Module], made_anew: str | None) -> None:
    with torch.device("meta"):
        needed = {name: tuple(tensor.shape) for name, tensor in network(checkpoint.config).state_dict().items()}
    if checkpoint.config.tie_word_embeddings and HEAD not in checkpoint.tensors:
        del needed[HEAD]
    if made_anew is not None:
        needed = {name: shape for name, shape in needed.items() if not name.startswith(made_anew)}
    stored = {name: tensor.shape for name, tensor in (checkpoint.tensors | checkpoint.from_elsewhere).items()}
    missing = [name for name in needed if name not in stored]
    unexpected = [name for name in stored if name not in needed]
    other = [
        f"{name} is {list(stored[name])} and should be {list(shape)}"
        for name, shape in needed.items()
        if stored.get(name, shape) != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": other}
    told = [f"{len(names)} {kind} ({_list(names)})" for kind, names in kinds.items() if names]
    if told:
        what = "tensors do not fit config.json: " + ", ".join(told)
        raise ModelError(checkpoint.folder, what, "get config.json and the weights from the same place, whole")


def _list(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
