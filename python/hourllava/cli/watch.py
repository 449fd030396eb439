# SPDX-License-Identifier: Apache-2.0
"""`hourllava watch`, and what it shares with `ask`: opening a video or a memory, and checking outputs beforehand."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from hourllava.errors import HourLlavaError, MemoryFileError

if TYPE_CHECKING:
    from hourllava.memory import ShardedMemory, VideoMemory
    from hourllava.model import HourLlavaForConditionalGeneration
    from hourllava.video import LiveReader

# What the memory calls its stages, and what a reader calls them.
STAGES = {"decode": "decode", "encode": "encode", "write": "memory"}


def watch(video: "Path | LiveReader", output: Path, model_name: str, progress: bool) -> bool:
    """Watch ``video``, save its memory to ``output`` and print what it took; True if part of the video was lost.

    Raises:
        HourLlavaError: anything that keeps the memory from being written.
    """
    check_output(output)
    if str(output).encode(errors="replace") != os.fsencode(output):
        raise HourLlavaError(output, "a memory can be read only under a name in UTF-8", "choose another name")
    from hourllava.cli.text import print_times
    from hourllava.model import best_device, load_model
    from hourllava.video import clock

    memory, times = take_in(load_model(model_name, device=best_device()), video, progress, folder=output.parent)
    began = time.perf_counter()
    memory.save(output)
    times["save"] = time.perf_counter() - began
    size = f"{output.stat().st_size / 1e6:.1f} MB"
    print(f"{output}: the memory of {clock(memory.frames)} of {name_of(video)}, {size}{how_it_ended(video)}")
    print_times(times)
    return warn_of_loss(memory, video)


def watch_into(
    entry: Path, video: "Path | LiveReader", model_name: str, precision: str, pages: bool, progress: bool
) -> bool:
    """Watch ``video`` into a repository, as ``entry``, its directory and a name; True if part of the video was lost.

    An entry of the same video is gone on with where it ends; a stream, which has no beginning, is added to it.

    Raises:
        HourLlavaError: anything that keeps the memory from being written; what was committed stays.
    """
    from hourllava.cli.text import print_times
    from hourllava.memory import Repository
    from hourllava.model import FrameWriter, best_device, load_model
    from hourllava.video import clock

    repository, source = Repository(entry.parent), name_of(video, absolute=True)
    begun = repository.catalogue.find(entry.name)
    if begun is not None and begun.source and os.path.realpath(begun.source) != os.path.realpath(source):
        todo = f"choose another --name than {entry.name}, or delete it first"
        raise MemoryFileError(entry, f"it is the memory of {begun.source} and not of {source}", todo)
    model = load_model(model_name, device=best_device())
    writer = FrameWriter(model)
    if begun is None:
        memory = repository.add(entry.name, writer, precision, pages, source)
    elif (pages and not begun.pages) or precision not in ("bfloat16", begun.precision):
        why = f"it is kept with {begun.precision} features and {'' if begun.pages else 'no '}ready pages"
        raise MemoryFileError(entry, why, "leave out --precision and --pages, or choose another --name")
    else:
        memory = repository.open(entry.name, writer)
    held = memory.frames
    try:
        model.watch(video, progress=progress, into=memory)
    except HourLlavaError:
        if begun is None and not memory.frames:
            memory.close()
            with contextlib.suppress(HourLlavaError, OSError):  # what went wrong first is what is told
                repository.delete(entry.name)
        raise
    new = f"{clock(memory.frames - held)} of it new{how_it_ended(video)}"
    print(f"{entry}: {clock(memory.frames)} of {name_of(video)}, {new}")
    print_times({word: memory.timings[stage] for stage, word in STAGES.items()})
    return warn_of_loss(memory, video)


def name_of(video: "Path | LiveReader", absolute: bool = False) -> str:
    """What to call a video: its path, or the address of a stream."""
    if isinstance(video, Path):
        return str(video.absolute() if absolute else video)
    return video.path or video.name if absolute else video.name


def how_it_ended(video: "Path | LiveReader") -> str:
    """What a line about a source that was followed ends with."""
    return "" if isinstance(video, Path) or video.ending is None else f"; {video.ending}"


@contextlib.contextmanager
def stopping() -> Iterator[Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the program as it always does."""
    stop, before = Event(), dict[signal.Signals, object]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()


def take_in(
    model: "HourLlavaForConditionalGeneration",
    source: "Path | LiveReader",
    progress: bool,
    folder: Path | None = None,
) -> tuple["VideoMemory", dict[str, float]]:
    """The memory of a video, or of what a memory file or REPOSITORY/NAME holds, and the seconds of each stage.

    With a folder, the memory of a video lives in files there and takes no RAM.

    Raises:
        HourLlavaError: the file is neither, or cannot be read.
    """
    from hourllava.memory import Repository, VideoMemory
    from hourllava.model import FrameWriter

    began = time.perf_counter()
    if isinstance(source, Path) and is_memory_file(source):
        memory = VideoMemory.load(source, model.device)
        model.attach(memory)
        return memory, {"load": time.perf_counter() - began}
    if isinstance(source, Path) and is_kept(source):
        memory = Repository(source.parent).open(source.name, FrameWriter(model), append=False)
        return memory, {"load": time.perf_counter() - began}
    memory = model.watch(source, progress=progress, into=folder)
    return memory, {word: memory.timings[stage] for stage, word in STAGES.items()}


def is_kept(source: Path) -> bool:
    """Whether a path means a memory and no video: a memory file, or REPOSITORY/NAME, be there such a video or not."""
    from hourllava.memory import Repository

    kept = Repository.is_at(source.parent) and (source.is_dir() or not source.exists())
    return kept or is_memory_file(source)


def is_memory_file(path: Path) -> bool:
    """Whether a file begins as safetensors files do: 8 bytes of header length, then a JSON object."""
    try:
        if not path.is_file():
            return False  # a pipe would be waited for
        with path.open("rb") as file:
            return file.read(10)[8:] == b'{"'
    except OSError:
        return False  # the reader of videos says what is wrong with it


def check_picture(path: Path) -> None:
    """`check_output` for a picture, which has to be a PNG."""
    check_output(path)
    if path.suffix.lower() != ".png":
        raise HourLlavaError(path, "the picture is written as PNG", "let its name end in .png")


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before hours of work and not after.

    Raises:
        HourLlavaError: the path is a directory, or its folder is missing or not writable.
    """
    folder = path.parent
    if path.is_dir():
        raise HourLlavaError(path, "is a directory", "name a file inside it")
    if not folder.is_dir():
        raise HourLlavaError(path, f"there is no folder {folder}", "make it first, or choose another place")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise HourLlavaError(path, "there is no permission to write there", "choose another place")


def warn_of_loss(memory: "VideoMemory | ShardedMemory", video: "Path | LiveReader | None" = None) -> bool:
    """Say in one line each on stderr what of the video could not be read, and that a stream broke off; True if so."""
    lost = [memory.damage] if memory.damage else []
    if video is not None and not isinstance(video, Path) and video.broken:
        lost.append(f"{video.name}: {video.ending}; what came is kept, with --into the same command goes on with it")
    for line in lost:
        print(f"hourllava: {line}", file=sys.stderr)
    return bool(lost)
