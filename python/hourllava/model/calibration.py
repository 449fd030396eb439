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
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import hourllava_ext as ext
from hourllava.memory import Repository
from hourllava.memory.pages import PAGE_SIZE
from hourllava.video import VideoReader, write_video

from .configuration import HourLlavaConfig
from .memaug import Block, rotary_frequencies
from .vision import VisionTower
from .watching import BATCH, CHUNK, memory_shape

ROUNDS = 3
ROWS = 256  # of a question, and
PAGES = 64  # that these read: enough that a rate does not depend on them
CLIP_SIZE, CLIP_FPS, CLIP_SECONDS = (360, 640), 25, 8
LAYER_FLOP = 2e10  # about a second on a slow machine: a pass has as many frames as stay below this


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    decode: float  # seconds of video (640 x 360, 25 frames a second) decoded in a second
    encode: float  # frames through the tower in a second
    write: float  # frames projected, written to pages and committed in a second
    row: float  # seconds that MemAug and the decoder take for a row of a question
    pair: float  # seconds that one head's attention takes for a row of a question and one that it looks at

    def times(self, config: HourLlavaConfig, frames: int, tokens: int, queries: int) -> dict[str, float]:
        """Seconds to decode, encode and write so many frames, and to the first word of an answer about them."""
        decoder = config.text_config
        pairs = config.memaug_depth * queries * (tokens + queries) + decoder.num_hidden_layers * queries**2 / 2
        return {
            "decode": frames / self.decode,
            "encode": frames / self.encode,
            "write": frames / self.write,
            "question": queries * self.row + pairs * decoder.num_attention_heads * self.pair,
        }


@torch.no_grad()
def measure(config: HourLlavaConfig, dtype: torch.dtype) -> Rates:
    """Run layers of a model's shapes on this machine's CPU; no weight is read."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        row, pair = _question_rates(config)
        return Rates(_decode_rate(), _encode_rate(config), _write_rate(config, dtype), row, pair)
    finally:
        torch.set_default_dtype(before)


def seconds(work: Callable[[], object]) -> float:
    """The least time that a call takes, after one that warms up."""
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _decode_rate() -> float:
    height, width = CLIP_SIZE
    ramp = np.arange(height)[:, None, None] + np.arange(width)[:, None] + np.arange(3) * 40
    pictures = ((ramp + 5 * n).astype(np.uint8) for n in range(CLIP_FPS * CLIP_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, pictures, Fraction(CLIP_FPS), CLIP_SIZE)
        return CLIP_SECONDS / seconds(lambda: sum(1 for _ in VideoReader(path).chunks(384, CLIP_SECONDS)))


def _encode_rate(config: HourLlavaConfig) -> float:
    """From one layer and two: the difference is a layer's time, the rest that of what stands around the layers."""
    tower = config.vision_config
    patches = config.patches_per_side**2
    flop = 2.0 * patches * tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
    frames = torch.zeros(max(1, min(BATCH, int(LAYER_FLOP / flop))), 3, tower.image_size, tower.image_size)
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
    """Seconds per row, and per row, other row and head."""
    decoder = config.text_config
    heads, key_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    head_dim = decoder.hidden_size // heads
    block, inv_freq = Block(decoder), rotary_frequencies(decoder, torch.device("cpu"))
    x = torch.randn(ROWS, decoder.hidden_size)
    memaug = seconds(lambda: block.mlp(x))
    for layer in (block.self_attn.Wqkv, block.self_attn.Wo, block.cross_attn.Wq, block.cross_attn.Wo):
        memaug += seconds(lambda layer=layer: layer(x))  # type: ignore[misc]
    mlp = Qwen2MLP(decoder)
    pages = torch.randn(PAGES, key_heads, PAGE_SIZE, head_dim)
    table = torch.arange(PAGES, dtype=torch.int32)[None]
    lengths = torch.full((PAGES,), PAGE_SIZE, dtype=torch.int32)
    places = torch.arange(ROWS), torch.tensor([0, ROWS]), inv_freq
    query = torch.randn(ROWS, heads, head_dim)
    attention = seconds(lambda: ext.paged_attention(query, pages, pages, table, lengths, *places))
    row = (config.memaug_depth * memaug + decoder.num_hidden_layers * seconds(lambda: mlp(x))) / ROWS
    return row, attention / (ROWS * PAGES * PAGE_SIZE * heads)
