# SPDX-License-Identifier: Apache-2.0
"""A memory's file: safetensors with a checksum of every tensor and of the header, replaced whole or not at all."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hourllava.errors import MemoryFileError

FORMAT = "hourllava-memory-1"
WATCH_AGAIN = "watch the video again to make a new one"


def write_memory_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write tensors and notes to `path`.

    The file is written beside `path`, flushed to the disk and only then renamed, so that an interruption at any byte
    leaves what `path` held before.

    Raises:
        MemoryFileError: the file cannot be written (no space, no permission, no such folder).
    """
    target = Path(path)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    notes = {**notes, "format": FORMAT} | {f"sha256.{name}": _digest(tensor) for name, tensor in tensors.items()}
    notes["sha256"] = _header_digest(notes, tensors)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=notes)
        temporary.chmod(usual)  # safetensors makes files that only their owner may read
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        why = f"it cannot be written ({_reason(error)})"
        raise MemoryFileError(target, why, "free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_memory_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_memory_file` wrote, checking every byte.

    Raises:
        MemoryFileError: the file is missing, damaged, or not a memory.
    """
    target = Path(path)
    if not target.is_file():
        why = "it is a directory" if target.is_dir() else "there is no such file"
        raise MemoryFileError(target, why, "name a file that `watch` saved")
    try:
        with safe_open(target, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemoryFileError(target, f"it is damaged or not a memory file ({_reason(error)})", WATCH_AGAIN) from error
    if not notes.get("format", "").startswith("hourllava-memory"):
        raise MemoryFileError(target, "it is not a memory file", "name a file that `watch` saved")
    if notes["format"] != FORMAT:
        raise MemoryFileError(target, f"its format {notes['format']} is not {FORMAT}", WATCH_AGAIN)
    if notes.get("sha256") != _header_digest({k: v for k, v in notes.items() if k != "sha256"}, tensors):
        raise MemoryFileError(target, "its header is damaged", WATCH_AGAIN)
    damaged = [name for name, tensor in tensors.items() if notes.get(f"sha256.{name}") != _digest(tensor)]
    if damaged:
        raise MemoryFileError(target, f"it is damaged (checksum of {damaged[0]} differs)", WATCH_AGAIN)
    return tensors, notes


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _header_digest(notes: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Covers the notes, the checksums among them, and every tensor's name, dtype and shape."""
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([notes, shapes], sort_keys=True).encode()).hexdigest()


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
