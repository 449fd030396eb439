# SPDX-License-Identifier: Apache-2.0
"""What the tests of a server's videos share: a library of them, a gate before the tower, and what memories hold."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from hourllava.memory import MemoryPrefix, Repository
from hourllava.model import FrameWriter, HourLlavaForConditionalGeneration
from hourllava.serve.library import Library
from hourllava.serve.shelf import FILMS
from hourllava.serve.sources import SourcePolicy

SECONDS = 150  # three chunks, the last of them short
CHUNK, BATCH = 64, 16
DEADLINE = 30.0


class Gate:
    """Lets so many batches through the tower, and counts those that came."""

    def __init__(self) -> None:
        self.free = threading.Semaphore(0)
        self.batches = 0
        self.error: Exception | None = None

    def open(self, batches: int = 10_000) -> None:
        self.free.release(batches)


@contextmanager
def gated() -> Iterator[Gate]:
    gate, encode = Gate(), FrameWriter.encode

    def waits(writer: FrameWriter, frames: Tensor) -> Tensor:
        assert gate.free.acquire(timeout=DEADLINE)
        gate.batches += 1
        if gate.error is not None:
            raise gate.error
        return encode(writer, frames)

    with patch.object(FrameWriter, "encode", waits):
        yield gate
        gate.open()


@contextmanager
def library(
    model: HourLlavaForConditionalGeneration,
    folder: Path,
    local: Path | None = None,
    keep_videos: bool = False,
    max_bytes: int = 1 << 30,
) -> Iterator[Library]:
    """A library that reads files of `local`, and from this machine's net."""
    policy = SourcePolicy(local, ("127.0.0.1",), max_bytes, timeout=DEADLINE)
    held = Library(model, folder, "64MiB", policy, keep_videos)
    try:
        yield held
    finally:
        held.close()


def kept_content(model: HourLlavaForConditionalGeneration, film: Path, folder: Path) -> list[Tensor]:
    """What a repository's memory of a film holds that was watched without a server."""
    memory = Repository(folder).add("film", FrameWriter(model), pages=True)
    model.watch(film, progress=False, into=memory)
    return content(memory.prefix())


def content(seen: MemoryPrefix) -> list[Tensor]:
    """All rows that a question can see, wherever their pages lie."""
    found = [seen.tokens.clone()]
    for pages in seen.pages:
        table = pages.page_table[0].long()
        inside = torch.arange(pages.key_pages.shape[2]) < pages.page_lengths[table][:, None]
        found += [slab[table].transpose(1, 2)[inside] for slab in (pages.key_pages, pages.value_pages)]
    return found


def held_content(held: Library, name: str) -> list[Tensor]:
    with held.use(name) as memory:
        return content(memory.prefix())


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def films_in(folder: Path) -> set[str]:
    """The files that a library keeps in its folder."""
    return {path.name for path in (folder / FILMS).iterdir()} - {".lock"}


def upload(held: Library, name: str, film: Path) -> None:
    sent = held.upload(name)
    data = film.read_bytes()
    for first in range(0, len(data), 10_000):
        sent.write(data[first : first + 10_000])
    sent.commit()


def data_url(film: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(film.read_bytes()).decode()}"
