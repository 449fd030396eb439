# SPDX-License-Identifier: Apache-2.0
"""How fast this machine would be with a model: layers of its shapes, of random weights, run for a second each."""

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
from transformers import Qwen2Model

from hourllava.memory import Repository
from hourllava.memory.pages import PAGE_SIZE, MemoryPages
from hourllava.video import VideoReader, repeat_video, write_video
from hourllava.video.runs import SEGMENT

from .configuration import HourLlavaConfig
from .loading import load_model
from .memaug import Block, MemoryUse, rotary_frequencies
from .planning import PROMPT
from .stream import QueryStream
from .vision import VisionTower
from .watching import BATCH, CHUNK, memory_shape

ROUNDS = 3
ROWS = 256  # of a question, and
PAGES = 64  # that these read: enough that a rate does not depend on them
CLIP_SIZE, CLIP_FPS, CLIP_SECONDS = (360, 640), 25, 10
LAYER_FLOP = 2e10  # about a second on a slow machine: a pass has as many frames as stay below this


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    decode: float  # seconds of video (640 x 360, 25 frames a second) decoded in a second
    encode: float  # frames through the tower in a second
    write: float  # frames projected, written to pages and committed in a second
    row: float  # seconds that MemAug and the decoder take for a row of a question
    pair: float  # seconds that one head's attention takes for a row of a question and one that it looks at
    least: float  # seconds that a question takes whatever the model

    def times(self, config: HourLlavaConfig, frames: int, tokens: int, queries: int) -> dict[str, float]:
        """Seconds to decode, encode and write so many frames, and to the first word of an answer about them."""
        decoder = config.text_config
        pairs = config.memaug_depth * queries * (tokens + queries) + decoder.num_hidden_layers * queries**2 / 2
        return {
            "decode": frames / self.decode,
            "encode": frames / self.encode,
            "write": frames / self.write,
            "question": self.least + queries * self.row + pairs * decoder.num_attention_heads * self.pair,
        }


@torch.no_grad()
def measure(config: HourLlavaConfig, dtype: torch.dtype) -> Rates:
    """Run layers of a model's shapes on this machine's CPU; no weight is read."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        row, pair = _question_rates(config)
        rates = _decode_rate(config.tile_size), _encode_rate(config), _write_rate(config, dtype), row, pair
    finally:
        torch.set_default_dtype(before)
    return Rates(*rates, _least_question())


def seconds(work: Callable[[], object]) -> float:
    """The least time that a call takes, after one that warms up."""
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _decode_rate(size: int) -> float:
    """Of a clip that is long enough for all cores and as restless as a camera's, to pictures of this side."""
    height, width = CLIP_SIZE
    ramp = (np.arange(height)[:, None, None] + np.arange(width)[:, None] + np.arange(3) * 40) // 5
    grain = np.random.default_rng(0).integers(-2, 3, (height, width, 1))
    pictures = (
        (ramp + np.roll(grain, (7 * n, 13 * n), (0, 1))).astype(np.uint8) for n in range(CLIP_FPS * CLIP_SECONDS)
    )
    times = -(-2 * SEGMENT * torch.get_num_threads() // CLIP_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        once, clip = Path(folder) / "once.mp4", Path(folder) / "clip.mp4"
        write_video(once, pictures, Fraction(CLIP_FPS), CLIP_SIZE)
        repeat_video(once, clip, times)
        return times * CLIP_SECONDS / seconds(lambda: sum(1 for _ in VideoReader(clip).chunks(size, CHUNK)))


def _encode_rate(config: HourLlavaConfig) -> float:
    """From one layer and two: the difference is a layer's time, the rest that of what stands around the layers."""
    tower = config.vision_config
    patches = config.patches_per_side**2
    flop = 2.0 * patches * tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
    count = max(1, min(BATCH, int(LAYER_FLOP / flop)))
    frames = torch.zeros(count, 3, tower.image_size, tower.image_size, dtype=torch.uint8)
    times = []
    for layers in (1, 2):
        smaller = deepcopy(tower)
        smaller.num_hidden_layers = layers
        model = VisionTower(smaller).eval()
        times.append(seconds(lambda model=model: model.encode([frames], config.video_grid)))  # type: ignore[misc]
    layer = max(times[1] - times[0], 0.0)
    return len(frames) / (times[0] + (tower.num_hidden_layers - 1) * layer)


class _Writer:
    """Makes memory as a model does, with features for nothing and one block's weights for all."""

    batch = BATCH
    device = torch.device("cpu")

    def __init__(self, config: HourLlavaConfig, dtype: torch.dtype) -> None:
        decoder, width = config.text_config, config.text_config.hidden_size
        self.shape = memory_shape(config, dtype)
        self.feature_width = config.vision_width
        self.inv_freq = rotary_frequencies(decoder, self.device)
        self.features = torch.randn(BATCH, self.shape.per_frame, self.feature_width)
        self.project = nn.Sequential(nn.Linear(self.feature_width, width), nn.GELU(), nn.Linear(width, width))
        self.key_value = nn.Linear(width, 2 * self.shape.kv_heads * self.shape.head_dim)

    def fingerprint(self) -> str:
        return "calibration"

    def tower_fingerprint(self) -> str:
        return "calibration"

    def encode(self, frames: Tensor) -> Tensor:
        return self.features[: len(frames)]

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = torch.cat([tokens.flatten(0, 1), tokens[:, 0]])
        sizes = (len(rows), 2, self.shape.kv_heads, self.shape.head_dim)
        made = [self.key_value(rows).view(sizes).unbind(1) for _ in range(self.shape.blocks)]
        return [(key, value) for key, value in made]


def _write_rate(config: HourLlavaConfig, dtype: torch.dtype) -> float:
    with tempfile.TemporaryDirectory() as folder:
        memory = Repository(folder).add("calibration", _Writer(config, dtype), pages=True)
        frames = torch.zeros(CHUNK, 3, 1, 1, dtype=torch.uint8)
        return CHUNK / seconds(lambda: memory.append(frames))


def _question_rates(config: HourLlavaConfig) -> tuple[float, float]:
    """Seconds per row, and per row, other row and head: from blocks with little memory and with more, and from decoders
    of one layer and of two."""
    decoder = config.text_config
    block, inv_freq = Block(decoder), rotary_frequencies(decoder, torch.device("cpu"))
    x = torch.randn(ROWS, decoder.hidden_size)
    ids, bounds = torch.arange(ROWS), torch.tensor([0, ROWS])
    stream = QueryStream(ids, bounds, [ROWS])
    use = MemoryUse(mass_weight=(ids >= ROWS - PROMPT).float())

    def attend(pages: int) -> float:
        shape = (pages, decoder.num_key_value_heads, PAGE_SIZE, decoder.hidden_size // decoder.num_attention_heads)
        keys, values = torch.randn(shape), torch.randn(shape)
        table, lengths = (
            torch.arange(pages, dtype=torch.int32)[None],
            torch.full((pages,), PAGE_SIZE, dtype=torch.int32),
        )
        memory = MemoryPages(keys, values, torch.empty(0), lengths, table)
        return seconds(lambda: block(x, keys, values, stream, inv_freq, memory, use))

    few, more = attend(PAGES), attend(5 * PAGES)
    page = max(more - few, 0.0) / (4 * PAGES)
    times = []
    for layers in (1, 2):
        smaller = deepcopy(decoder)
        smaller.num_hidden_layers, smaller.vocab_size = layers, 8
        smaller.layer_types = smaller.layer_types[:layers]
        model = Qwen2Model(smaller).eval()
        times.append(seconds(lambda model=model: model(inputs_embeds=x[None])))  # type: ignore[misc]
    layer = max(times[1] - times[0], 0.0)
    row = (config.memaug_depth * (few - PAGES * page) + decoder.num_hidden_layers * layer) / ROWS
    return row, page / (ROWS * PAGE_SIZE * decoder.num_attention_heads)


def _least_question() -> float:
    """Seconds that a question takes whatever the model: of the small one, about one second."""
    model = load_model("tiny")
    memory = model.watch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), progress=False)
    return seconds(lambda: model.ask(memory, "What is seen?", budget="all", max_new_tokens=1))
