# SPDX-License-Identifier: Apache-2.0
"""Watching: frames flow from the decoder through the tower into the pages of a memory, a few at a time."""

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

from hourllava.errors import ModelError, VideoError
from hourllava.memory import MemoryShape, ShardedMemory, VideoMemory, scratch_files
from hourllava.video import FrameFolder, LiveReader, VideoReader, open_video, resize_frames

from .configuration import HourLlavaConfig
from .memaug import rotary_frequencies

if TYPE_CHECKING:
    from .modeling import HourLlavaForConditionalGeneration

# Frames in one pass through the tower. A pass costs the same however few frames it is given, so that a frame's numbers
# never depend on its neighbours; more frames a pass would make short appends dearer without making long ones faster.
BATCH = 16
CHUNK = 4 * BATCH  # frames taken from the decoder at a time, and committed together

Source = str | os.PathLike[str] | VideoReader | FrameFolder | LiveReader | Tensor | Iterable[Tensor]


class FrameWriter:
    """Makes memory of frames with one model's tower, projector and key/value projections."""

    batch = BATCH

    def __init__(self, model: "HourLlavaForConditionalGeneration") -> None:
        config, weight = model.config, model.model.image_newline
        if config.vision_config is None:
            raise ModelError("model", "it was built without a vision tower", "use a model with one to watch videos")
        self.model = model
        self.device = weight.device
        self.grid = config.video_grid
        self.feature_width = config.vision_width
        self.shape = memory_shape(config, weight.dtype)
        self.inv_freq = rotary_frequencies(config.text_config, weight.device)
        self._tower: tuple[tuple, str] | None = None

    def fingerprint(self) -> str:
        return memory_fingerprint(self.model)

    def tower_fingerprint(self) -> str:
        state = _state(_tower_parameters(self.model))
        if self._tower is None or self._tower[0] != state:  # hashing a large tower takes seconds
            self._tower = state, tower_fingerprint(self.model)
        return self._tower[1]

    def encode(self, frames: Tensor) -> Tensor:
        """Features (n, N, Cv) of uint8 frames (n, 3, H, W): the tower's patches, pooled to the video's grid."""
        size = self.model.config.vision_config.image_size
        if frames.shape[-2:] != (size, size):
            frames = resize_frames(frames, size)
        assert self.model.model.vision_tower is not None
        with no_autocast(self.device):
            return self.model.model.vision_tower.encode([frames], self.grid)[0]

    def project(self, features: Tensor) -> Tensor:
        with no_autocast(self.device):
            return self.model.model.mm_projector(features)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        newlines = self.model.model.image_newline.expand(len(tokens), -1)
        rows = torch.cat([tokens.flatten(0, 1), newlines])
        with no_autocast(self.device):
            return [block.cross_attn.keys_values(rows) for block in self.model.model.vision_resampler.blocks]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """What a memory holds, and what is read out of it, has the model's dtype whatever autocast the caller is in."""
    inside = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()


def memory_shape(config: HourLlavaConfig, dtype: torch.dtype) -> MemoryShape:
    """Sizes of the memories that a model with a tower makes in this dtype."""
    decoder = config.text_config
    return MemoryShape(
        per_frame=min(config.patches_per_side, config.video_grid) ** 2,
        width=decoder.hidden_size,
        blocks=config.memaug_depth,
        kv_heads=decoder.num_key_value_heads,
        head_dim=decoder.hidden_size // decoder.num_attention_heads,
        dtype=dtype,
    )


def memory_fingerprint(model: "HourLlavaForConditionalGeneration") -> str:
    """Hash of the weights and settings that a memory's contents come from; computed again only if they changed."""
    inner = model.model
    named = _named_parameters(projector=inner.mm_projector, tower=inner.vision_tower)
    named["newline"] = inner.image_newline
    for number, block in enumerate(inner.vision_resampler.blocks):
        named |= {f"{number}.{k}": v for k, v in block.cross_attn.Wkv.named_parameters()}
    state = _state(named)
    if model.fingerprint_cache is None or model.fingerprint_cache[0] != state:
        settings = (model.config.video_grid, model.config.text_config.rope_parameters["rope_theta"])
        model.fingerprint_cache = (state, _hash_of(named, settings))
    return model.fingerprint_cache[1]


def tower_fingerprint(model: "HourLlavaForConditionalGeneration") -> str:
    """Hash of the weights and settings that pooled features come from.

    The weights count as they are in bfloat16, to which features are rounded at the finest: a copy of a model in float32
    has the fingerprint of the one in bfloat16, whichever of them was made of the other.
    """
    return _hash_of(_tower_parameters(model), model.config.video_grid, torch.bfloat16)


def _tower_parameters(model: "HourLlavaForConditionalGeneration") -> dict[str, Tensor]:
    return _named_parameters(tower=model.model.vision_tower)


def _state(named: dict[str, Tensor]) -> tuple:
    """Differs when a weight has changed."""
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in named.values())


def _named_parameters(**modules: nn.Module | None) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part, module in modules.items() if module for k, v in module.named_parameters()}


def _hash_of(named: dict[str, Tensor], settings: object, dtype: torch.dtype | None = None) -> str:
    """Of the weights as they are, or as they would be in `dtype`."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in sorted(named.items()):
        tensor = weight.detach().to(dtype or weight.dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def watch(
    model: "HourLlavaForConditionalGeneration",
    source: Source,
    progress: bool = True,
    on_chunk: Callable[[VideoMemory], None] | None = None,
    into: VideoMemory | str | os.PathLike[str] | None = None,
) -> VideoMemory:
    """See `HourLlavaForConditionalGeneration.watch`."""
    memory = into if isinstance(into, VideoMemory) else new_memory(FrameWriter(model), into)
    with closing(_take_in(model, source, memory, progress)) as chunks:
        for _ in chunks:
            if on_chunk is not None:
                on_chunk(memory)
    return memory


def watch_sharded(
    model: "HourLlavaForConditionalGeneration",
    source: Source,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> ShardedMemory:
    """Take a video in, spread over the processes of a group, all of which call this.

    Each decodes all of it, and encodes and keeps its part.

    Args:
        source: what `HourLlavaForConditionalGeneration.watch` takes, but no stream.
        group: None is the default group.
        progress: show a bar on stderr.

    Raises:
        VideoError: the video cannot be read at all, or is a stream.
        ModelError: the model has no vision tower.
        HourLlavaError: there is no group.
    """
    if isinstance(source, LiveReader):
        todo = "let one process follow it with --into, and ask the repository"
        raise VideoError(source.name, "every process would get another part of a stream", todo)
    memory = ShardedMemory(FrameWriter(model), group)
    with closing(_take_in(model, source, memory, progress)) as chunks:
        for _ in chunks:
            pass
    return memory


@torch.no_grad()
def _take_in(
    model: "HourLlavaForConditionalGeneration", source: Source, memory: VideoMemory | ShardedMemory, progress: bool
) -> Generator[None]:
    """Append a video's frames to its memory, and yield after each chunk of them; closed, it leaves no thread."""
    began = time.perf_counter()
    opened = open_video(source, device=model.device) if isinstance(source, str | os.PathLike) else source
    memory.timings["decode"] += time.perf_counter() - began  # its index is read
    expected = opened.frames_expected if isinstance(opened, VideoReader | FrameFolder) else None
    if isinstance(opened, Tensor):
        expected = len(opened)
    if isinstance(source, str | os.PathLike):
        memory.source = os.path.abspath(source)
    elif isinstance(source, LiveReader):
        memory.source = source.path
    memory.reserve(expected or 0)
    before = memory.damage
    begins_anew = not (isinstance(opened, LiveReader) and opened.path is None)  # as a stream does not
    held = memory.frames if begins_anew else 0
    chunks = _after(held, _chunks(opened, model.config.vision_config.image_size))
    bar = tqdm(total=expected, initial=memory.frames, unit="s", desc="watching", disable=not progress)
    with bar, closing(chunks):  # an error that is kept keeps the decoder, too, unless that is closed
        while True:
            started = time.perf_counter()
            frames = next(chunks, None)
            memory.timings["decode"] += time.perf_counter() - started
            if frames is None:
                break
            if isinstance(opened, VideoReader | FrameFolder):
                memory.damage = opened.report.message
            elif isinstance(opened, LiveReader):
                memory.damage = opened.message or (before if opened.path is None else None)
            memory.append(frames)
            bar.update(len(frames))
            del frames  # or it would be there until the next chunk has been made
            yield
    if memory.frames == 0:
        raise VideoError("video", "it holds no frame", "give at least one frame")


def new_memory(writer: FrameWriter, folder: str | os.PathLike[str] | None = None) -> VideoMemory:
    """An empty memory that a model can append to; with a folder, it lives in files there and takes no RAM."""
    files = None if folder is None else scratch_files(folder)
    memory = VideoMemory(writer.shape, writer.fingerprint(), writer.device, files)
    memory.attach(writer)
    return memory


def _after(frames: int, chunks: Iterator[Tensor]) -> Generator[Tensor]:
    """Leave out the first frames, which a memory holds already; chunks that were given out are not held.

    A chunk of which nothing is left is given out empty, so that who waits for its turn to stop need not wait for long.
    """
    for chunk in chunks:
        rest = chunk[frames:]
        frames -= len(chunk) - len(rest)
        del chunk
        yield rest
        del rest


def _chunks(source: VideoReader | FrameFolder | LiveReader | Tensor | Iterable[Tensor], size: int) -> Iterator[Tensor]:
    if isinstance(source, VideoReader | FrameFolder | LiveReader):
        return map(attrgetter("frames"), source.chunks(size, chunk=CHUNK))
    if isinstance(source, Tensor):
        return iter(source.split(CHUNK))
    return iter(source)
