# SPDX-License-Identifier: Apache-2.0
"""A memory's file: whole or as it was before, and never wrong without saying so."""

import os

import pytest
import torch
from memories import full_disk
from safetensors.torch import load_file, save_file

from hourllava.errors import MemoryFileError
from hourllava.memory.storage import Pieces, read_memory_file
from hourllava.memory.storage import write_memory_file as write_pieces

NOTES = {"model": "abc", "damage": ""}


def make_tensors(fill=1.0):
    return {"tokens": torch.full((3, 4, 8), fill), "pages": torch.arange(64, dtype=torch.bfloat16).view(2, 32)}


def write_memory_file(path, tensors, notes):
    write_pieces(path, {name: Pieces.of(tensor) for name, tensor in tensors.items()}, notes)


def test_round_trip(tmp_path):
    write_memory_file(tmp_path / "film.memory", make_tensors(), NOTES)
    tensors, notes = read_memory_file(tmp_path / "film.memory")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in make_tensors().items())
    assert notes.items() >= NOTES.items()
    assert load_file(tmp_path / "film.memory").keys() == tensors.keys()  # any reader of the format can open it
    assert [path.name for path in tmp_path.iterdir()] == ["film.memory"]
    (tmp_path / "other").touch()
    assert (tmp_path / "film.memory").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_stays_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "film.memory").symlink_to(disk / "film.memory")
    for fill in (1.0, 2.0):
        write_memory_file(tmp_path / "film.memory", make_tensors(fill), NOTES)
        assert (tmp_path / "film.memory").is_symlink()
        assert read_memory_file(disk / "film.memory")[0]["tokens"].unique().tolist() == [fill]
    assert [path.name for path in disk.iterdir()] == ["film.memory"]


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(MemoryFileError, match="File name too long"):
        write_memory_file(tmp_path / ("n" * 300), make_tensors(), NOTES)


def test_a_device_is_not_replaced(tmp_path):
    """What root could do to /dev/null; a pipe stands for it here."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(MemoryFileError, match=f"{name}: it is no file that could be replaced"):
            write_memory_file(tmp_path / name, make_tensors(), NOTES)
    assert (tmp_path / "pipe").is_fifo()


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "film.memory"
    write_memory_file(path, make_tensors(), NOTES)
    sound = path.read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(MemoryFileError) as caught:
            read_memory_file(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = tmp_path / "film.memory"
    write_memory_file(path, make_tensors(), NOTES)
    sound = path.read_bytes()
    path.write_bytes(sound[: int(len(sound) * share)])
    with pytest.raises(MemoryFileError, match="watch the video again"):
        read_memory_file(path)


def test_other_files(tmp_path):
    with pytest.raises(MemoryFileError, match="there is no such file"):
        read_memory_file(tmp_path / "none.memory")
    with pytest.raises(MemoryFileError, match="it is a directory"):
        read_memory_file(tmp_path)
    (tmp_path / "notes.txt").write_text("these are my notes on the film, and no memory of it")
    with pytest.raises(MemoryFileError, match="not a memory file"):
        read_memory_file(tmp_path / "notes.txt")
    save_file(make_tensors(), tmp_path / "weights.safetensors")
    with pytest.raises(MemoryFileError, match="not a memory file"):
        read_memory_file(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 500, 900])
def test_full_disk_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "film.memory"
    write_memory_file(path, make_tensors(), NOTES)
    before = path.read_bytes()
    assert len(before) > 900
    with full_disk(size), pytest.raises(MemoryFileError, match="cannot be written") as caught:
        write_memory_file(path, make_tensors(2.0), NOTES)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["film.memory"]


@pytest.mark.parametrize("step", ["_write_safetensors", "os.fsync", "os.replace"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interruption_between_steps_leaves_the_old_file(tmp_path, monkeypatch, step, interruption):
    path = tmp_path / "film.memory"
    write_memory_file(path, make_tensors(), NOTES)
    before = path.read_bytes()

    def interrupted(*_, **__):
        raise interruption

    monkeypatch.setattr(f"hourllava.memory.storage.{step}", interrupted)
    with pytest.raises(MemoryFileError if interruption is OSError else KeyboardInterrupt):
        write_memory_file(path, make_tensors(2.0), NOTES)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["film.memory"]


def test_written_in_pieces_is_written_at_once(tmp_path):
    rows = torch.randn(100, 3)
    write_pieces(tmp_path / "a", {"x": Pieces(rows.dtype, (100, 3), rows.split(7))}, NOTES)
    write_pieces(tmp_path / "b", {"x": Pieces.of(rows)}, NOTES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(MemoryFileError, match="cannot be written"):
        write_memory_file(tmp_path / "none" / "film.memory", make_tensors(), NOTES)


def test_a_file_that_is_removed_while_it_is_opened(tmp_path, monkeypatch):
    path, mapped = tmp_path / "film.memory", torch.UntypedStorage.from_file
    write_memory_file(path, make_tensors(), NOTES)

    def remove_first(*args, **kwargs):
        path.unlink()
        return mapped(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", remove_first)
    with pytest.raises(MemoryFileError, match=r"film\.memory: it is damaged or not a memory file"):
        read_memory_file(path)
