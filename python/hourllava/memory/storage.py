# SPDX-License-Identifier: Apache-2.0
"""A memory's file: safetensors with a checksum of every tensor and of the header, replaced whole or not at all."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hourllava.errors import MemoryFileError, StorageError

FORMAT = "hourllava-memory-2"
WATCH_AGAIN = "watch the video again to make a new one"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class Pieces:
    """A tensor that is written a few rows at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]  # of any number of rows each, together `shape`

    @classmethod
    def of(cls, tensor: Tensor) -> "Pieces":
        return cls(tensor.dtype, tuple(tensor.shape), [tensor])

    @property
    def nbytes(self) -> int:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


def write_memory_file(path: str | os.PathLike[str], tensors: dict[str, Pieces], notes: dict[str, str]) -> str:
    """Write tensors and notes to `path`, and return the checksum that covers them all.

    The file is written beside `path`, flushed to the disk and only then renamed, so that an interruption at any byte
    leaves what `path` held before. No more than one piece of a tensor need be in RAM at a time.

    Raises:
        StorageError: the file cannot be written (no space, no permission, no such folder).
    """
    # A link goes on leading there, and the file lies on the disk that it leads to.
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        raise MemoryFileError(path, "it is no file that could be replaced", "choose another place")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    # Names of files may hold what is no UTF-8, and a header of safetensors may not.
    told = {name: text.encode(errors="backslashreplace").decode() for name, text in notes.items()}
    try:
        with temporary.open("wb") as file:
            digest = _write_safetensors(file, tensors, {**told, "format": FORMAT})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush(target.parent)
        return digest
    except OSError as error:
        why = f"it cannot be written ({reason(error)})"
        raise StorageError(path, why, "free some space or choose another place") from error
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
    if os.fsencode(target) != str(target).encode(errors="replace"):  # safetensors cannot open it
        raise MemoryFileError(target, "its name or a folder's is no UTF-8", "rename that; the file may be sound")
    try:
        with safe_open(target, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # RuntimeError: torch maps the file anew, and a writer may have removed it since.
    except (SafetensorError, OSError, RuntimeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemoryFileError(target, f"it is damaged or not a memory file ({reason(error)})", WATCH_AGAIN) from error
    if not notes.get("format", "").startswith("hourllava-memory"):
        raise MemoryFileError(target, "it is not a memory file", "name a file that `watch` saved")
    if notes["format"] != FORMAT:
        raise MemoryFileError(target, f"its format {notes['format']} is not {FORMAT}", WATCH_AGAIN)
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    if notes.get("sha256") != _header_digest({k: v for k, v in notes.items() if k != "sha256"}, shapes):
        raise MemoryFileError(target, "its header is damaged", WATCH_AGAIN)
    damaged = [name for name, tensor in tensors.items() if notes.get(f"sha256.{name}") != _digest(tensor)]
    if damaged:
        raise MemoryFileError(target, f"it is damaged (checksum of {damaged[0]} differs)", WATCH_AGAIN)
    return tensors, notes


def _write_safetensors(file: BinaryIO, tensors: dict[str, Pieces], notes: dict[str, str]) -> str:
    """Header, then data; the checksums are known only then, and go into the place that the header keeps for them."""
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shapes = {name: [str(tensors[name].dtype), *tensors[name].shape] for name in names}
    blank = "0" * hashlib.sha256().digest_size * 2
    file.write(_header(tensors, names, notes | {f"sha256.{name}": blank for name in names} | {"sha256": blank}))
    digests = {}
    for name in names:
        digest = hashlib.sha256()
        for piece in tensors[name].pieces:
            data = as_bytes(piece)
            digest.update(data)
            file.write(data)
        digests[f"sha256.{name}"] = digest.hexdigest()
    notes = notes | digests
    whole = _header_digest(notes, shapes)
    file.seek(0)
    file.write(_header(tensors, names, notes | {"sha256": whole}))
    return whole


def _header(tensors: dict[str, Pieces], names: list[str], notes: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": notes}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is dense and on the CPU."""
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def _header_digest(notes: dict[str, str], shapes: dict[str, list]) -> str:
    """Covers the notes, the checksums among them, and every tensor's name, dtype and shape."""
    return hashlib.sha256(json.dumps([notes, shapes], sort_keys=True).encode()).hexdigest()


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """An error of the system in a few words."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
