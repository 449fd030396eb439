# SPDX-License-Identifier: Apache-2.0
"""How fast this machine would be with a model: layers of its shapes, of random weights, run for seconds."""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from hourllava.errors import VideoError
from hourllava.memory import Repository, VideoMemory
from hourllava.memory.pages import PAGE_SIZE, MemoryPages
from hourllava.memory.writer import summary_dtype
from hourllava.video import VideoReader, repeat_video, write_video
from hourllava.video.runs import SEGMENT

from .configuration import HourLlavaConfig
from .loading import load_model
from .memaug import Block, MemoryUse, PageBudget, rotary_frequencies
from .planning import PROMPT, Plan, frames_ahead
from .stream import QueryStream
from .vision import VisionTower
from .watching import BATCH, CHUNK, memory_shape

ROUNDS = 3
WATCHES = 5  # of a clip, by turns of decoder and tower that are never quite the same
ROWS = 1024  # of a question, at the most: with so many, a row's time no longer depends on their number
PAGES, TIMES_PAGES = 64, (5, 16)  # that they read, and as many times more as can be read soon
CLIP_SIZE, CLIP_FPS, CLIP_SECONDS = (360, 640), 25, 10
CLIP_SEGMENTS = 4  # that each core decodes of what is watched, behind
WARM = 2 * CHUNK  # frames
FLOP = 2e10  # of the vision tower's layers, in whatever is timed at once: about a second on a slow machine


@dataclass(frozen=True)
class Rates:
    """What was measured, in seconds."""

    decode: float  # that watching waits for the decoder, per frame
    encode: float  # in the vision tower, per frame
    write: float  # to project a frame, write it to pages and commit it
    row: float  # of MemAug and the decoder, per row of a question of `rows`, without what the memory takes
    page: float  # of a block's attention, per row and page that it reads
    score: float  # of a block's choice of pages, per row and page that it chooses from
    least: float  # of a question, whatever the model
    rows: int

    def times(self, config: HourLlavaConfig, planned: Plan) -> dict[str, float]:
        """Seconds to decode, encode and write a video, and to the first word of an answer about it."""
        frames, rows, blocks = planned.frames, planned.queries, config.memaug_depth
        behind = max(rows - self.rows, 0) / PAGE_SIZE  # rows that a row of so long a question looks at, too
        pages = blocks * (planned.pages_read + behind) + config.text_config.num_hidden_layers * behind / 2
        scored = blocks * planned.pages if planned.pages_read < planned.pages else 0
        return {
            "decode": frames * self.decode,
            "encode": frames * self.encode,
            "write": frames * self.write,
            "question": self.least + rows * (self.row + pages * self.page + scored * self.score),
        }


@torch.no_grad()
def measure(config: HourLlavaConfig, dtype: torch.dtype, queries: int, like: str | None = None) -> Rates:
    """Run layers of a model's shapes on this machine's CPU; no weight is read.

    Args:
        config: the model's.
        dtype: of its weights and of its memories.
        queries: rows of the questions that are planned.
        like: path of a video that is decoded as those that are planned will be; None makes a clip.

    Raises:
        VideoError: the video cannot be read.
    """
    rows = min(queries, ROWS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        rates = *_watch_rates(config, dtype, like), *_question_rates(config, rows)
    finally:
        torch.set_default_dtype(before)
    return Rates(*rates, _least_question(), rows)


def seconds(work: Callable[[], object]) -> float:
    """The least time that a call takes, after one that warms up."""
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _watch_rates(config: HourLlavaConfig, dtype: torch.dtype, like: str | None) -> tuple[float, float, float]:
    """Seconds a frame of the stages of minutes that are watched into a repository, since cores that decode are taken
    from the tower. Of a large tower, the layers that would take too long are left out there and timed alone.
    """
    depth = config.vision_config.num_hidden_layers
    frames = -(-CLIP_SEGMENTS * SEGMENT * torch.get_num_threads() // CHUNK) * CHUNK  # whole chunks
    layers = min(depth, int(FLOP / (_layer_flop(config) * frames)))
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        clip = like or _write_clip(Path(folder), WARM + frames + frames_ahead())
        repository, writer = Repository(Path(folder) / "memories"), _Writer(config, dtype, layers)
        for number in range(1 + WATCHES):
            memory = repository.add(f"{number}", writer, pages=True)
            taken.append(_watch(clip, memory, config.tile_size, frames))
            memory.close()
    decode, encode, write = sorted(taken[1:], key=sum)[WATCHES // 2]  # the first has warmed up
    alone = (depth - layers) * _layer_time(config) if layers < depth else 0.0
    return decode, encode + alone, write


def _watch(clip: str, memory: VideoMemory, size: int, most: int) -> tuple[float, float, float]:
    """Seconds per frame to decode, encode and write, of so many frames or all there are, with the index of all.

    Decoders are ahead of the tower in the middle of a video: unless it is short, the clock starts when they are.
    """
    began = time.perf_counter()
    reader = VideoReader(clip)
    started = ended = time.perf_counter()
    index = (started - began) / max(reader.frames_expected, 1)
    warm = WARM if reader.frames_expected > WARM + CHUNK else 0
    memory.reserve(min(warm + most, reader.frames_expected))
    for chunk in reader.chunks(size, CHUNK):
        memory.append(chunk.frames)
        ended = time.perf_counter()
        if memory.frames == warm:
            started, memory.timings = ended, dict.fromkeys(memory.timings, 0.0)
        if memory.frames >= warm + most:
            break  # what decoders have done beyond is not counted, as what they had done before is not
    frames = memory.frames - warm
    if frames < 1:
        raise VideoError(clip, "it holds too few frames", "give one that is longer, or is not damaged")
    encode, write = memory.timings["encode"], memory.timings["write"]
    return index + (ended - started - encode - write) / frames, encode / frames, write / frames


def _write_clip(folder: Path, frames: int) -> str:
    """A clip of so many seconds at the least, as restless as a film of 0.2 Mbit a second."""
    height, width = CLIP_SIZE
    ramp = (np.arange(height)[:, None, None] + np.arange(width)[:, None] + np.arange(3) * 40) // 5
    grain = np.random.default_rng(0).integers(-5, 6, (height, width, 1)) // 2
    pictures = (
        (ramp + np.roll(grain, (7 * n, 13 * n), (0, 1))).astype(np.uint8) for n in range(CLIP_FPS * CLIP_SECONDS)
    )
    once, clip = folder / "once.mp4", folder / "clip.mp4"
    write_video(once, pictures, Fraction(CLIP_FPS), CLIP_SIZE)
    repeat_video(once, clip, -(-frames // CLIP_SECONDS))
    return str(clip)


def _layer_flop(config: HourLlavaConfig) -> float:
    """Of a frame in a layer of the tower."""
    tower, patches = config.vision_config, config.patches_per_side**2
    return 4.0 * patches * tower.hidden_size * (2 * tower.hidden_size + tower.intermediate_size + patches)


def _tower(config: HourLlavaConfig, layers: int) -> VisionTower:
    smaller = deepcopy(config.vision_config)
    smaller.num_hidden_layers = layers
    return VisionTower(smaller).eval()


def _layer_time(config: HourLlavaConfig) -> float:
    """Seconds a frame in a layer of the tower: what a second one adds."""
    size = config.vision_config.image_size
    frames = torch.zeros(max(1, min(BATCH, int(FLOP / _layer_flop(config)))), 3, size, size, dtype=torch.uint8)
    towers = [_tower(config, layers) for layers in (1, 2)]
    one, two = (seconds(lambda tower=tower: tower.encode([frames], config.video_grid)) for tower in towers)  # type: ignore[misc]
    return max(two - one, 0.0) / len(frames)


class _Writer:
    """Makes memory as a model does, with some layers of its tower and one block's weights for all."""

    batch = BATCH
    device = torch.device("cpu")

    def __init__(self, config: HourLlavaConfig, dtype: torch.dtype, layers: int) -> None:
        decoder, width = config.text_config, config.text_config.hidden_size
        self.shape = memory_shape(config, dtype)
        self.grid, self.feature_width = config.video_grid, config.vision_width
        self.inv_freq = rotary_frequencies(decoder, self.device)
        self.tower = _tower(config, layers)
        self.project = nn.Sequential(nn.Linear(self.feature_width, width), nn.GELU(), nn.Linear(width, width))
        self.key_value = nn.Linear(width, 2 * self.shape.kv_heads * self.shape.head_dim)

    def fingerprint(self) -> str:
        return "calibration"

    def tower_fingerprint(self) -> str:
        return "calibration"

    def encode(self, frames: Tensor) -> Tensor:
        return self.tower.encode([frames], self.grid)[0]

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = torch.cat([tokens.flatten(0, 1), tokens[:, 0]])
        sizes = (len(rows), 2, self.shape.kv_heads, self.shape.head_dim)
        made = [self.key_value(rows).view(sizes).unbind(1) for _ in range(self.shape.blocks)]
        return [(key, value) for key, value in made]


def _question_rates(config: HourLlavaConfig, rows: int) -> tuple[float, float, float]:
    """Seconds per row, per row and page read, and per row and page to choose from: from a block that reads few pages,
    more, and few of more; and from decoders of one layer and of two."""
    decoder = config.text_config
    block, inv_freq = Block(decoder), rotary_frequencies(decoder, torch.device("cpu"))
    x = torch.randn(rows, decoder.hidden_size)
    ids, bounds = torch.arange(rows), torch.tensor([0, rows])
    stream = QueryStream(ids, bounds, [rows])
    weight = (ids >= rows - PROMPT).float()

    def attend(pages: int, budget: int | None = None) -> float:
        memory = _random_pages(config, pages)
        use = MemoryUse(budget=None if budget is None else PageBudget(budget), mass_weight=weight)
        return seconds(lambda: block(x, memory.key_pages, memory.value_pages, stream, inv_freq, memory, use))

    soon = int(2 * FLOP / (4 * rows * PAGES * PAGE_SIZE * decoder.hidden_size))
    pages = PAGES * min(max(soon, TIMES_PAGES[0]), TIMES_PAGES[1])
    few, more, chosen = attend(PAGES), attend(pages), attend(pages, PAGES)
    page, score = max(more - few, 0.0) / (pages - PAGES), max(chosen - few, 0.0) / pages
    models = [Qwen2Model(_decoder(config, layers)).eval() for layers in (1, 2)]
    one, two = (seconds(lambda model=model: model(inputs_embeds=x[None])) for model in models)  # type: ignore[misc]
    row = config.memaug_depth * (few - PAGES * page) + decoder.num_hidden_layers * max(two - one, 0.0)
    return row / rows, page / rows, score / rows


def _random_pages(config: HourLlavaConfig, pages: int) -> MemoryPages:
    decoder = config.text_config
    heads, head_dim = decoder.num_key_value_heads, decoder.hidden_size // decoder.num_attention_heads
    keys, values = torch.randn(2, pages, heads, PAGE_SIZE, head_dim)
    summary = torch.stack([keys.mean(2), keys.amin(2), keys.amax(2)], 2).to(summary_dtype(keys.dtype))
    lengths = torch.full((pages,), PAGE_SIZE, dtype=torch.int32)
    return MemoryPages(keys, values, summary, lengths, torch.arange(pages, dtype=torch.int32)[None])


def _decoder(config: HourLlavaConfig, layers: int) -> Qwen2Config:
    smaller = deepcopy(config.text_config)
    smaller.num_hidden_layers, smaller.vocab_size = layers, 8
    smaller.layer_types = smaller.layer_types[:layers]
    return smaller


def _least_question() -> float:
    """Seconds that a question takes whatever the model: of the small one, about one second and without MemAug."""
    model = load_model("tiny")
    memory = model.watch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), progress=False)
    return seconds(lambda: model.ask(memory, "What is seen?", memaug=False, max_new_tokens=1))
