# SPDX-License-Identifier: Apache-2.0
"""What so many hours of video will take of the device, the host and the disk, known before anything runs."""

import bisect
import os
from dataclasses import dataclass

import torch

from hourllava.errors import InputError, ModelError
from hourllava.memory import MemoryShape
from hourllava.memory.pages import page_count
from hourllava.memory.segments import packed_bytes
from hourllava.video.runs import PICTURES_AHEAD

from .budget import as_budget
from .checkpoint import read_config
from .configuration import HourLlavaConfig
from .forgetting import remembered_frames, spatial_picks
from .loading import model_folder
from .modeling import HourLlavaForConditionalGeneration
from .released import RELEASED, released_config
from .watching import BATCH, CHUNK, memory_shape

LONGEST = 24 * 366  # hours: position ids and page numbers are known to hold for a day, and memory for no year
PROMPT = 64  # tokens of a question and the template around it, those of the answer among them
# Rows that are alive at once at the widest point, in multiples of a width: the MLP of a MemAug block holds its hidden
# rows (4 widths) before and behind the activation, above the residual and what it is made of; the decoder's holds the
# gate, its activation and the up projection.
MEMAUG_WIDTHS, DECODER_WIDTHS, DECODER_INTERMEDIATES = 12, 6, 3
TOWER_WIDTHS, TOWER_INTERMEDIATES = 4, 2


@dataclass(frozen=True)
class Plan:
    """Bytes by place and by what they are for, of a video that is watched into a repository and asked from a pool."""

    model: str
    hours: float
    frames: int  # seconds
    tokens: int
    dtype: str
    queries: int  # rows that MemAug and the decoder read
    pages: int  # of keys and values, in each MemAug block, and
    pages_read: int  # those that a question reads, as the model's config says
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def device_peak(self) -> int:
        """Bytes on the device at the most: while watching or while asking."""
        device = self.device
        return device["weights"] + max(device["pages"] + device["question"], device["tower"])


def config_of(model: str | os.PathLike[str]) -> HourLlavaConfig:
    """The configuration of a released model by its size, of a preset, or of a model's directory; no weight is read.

    Raises:
        ModelError: there is no such model.
    """
    if str(model).lower() in RELEASED:
        return released_config(str(model).lower())
    try:
        return read_config(model_folder(model))
    except ModelError as error:
        raise ModelError(model, error.why, f"{error.todo}, or one of {', '.join(RELEASED)}") from error


def dtype_of(config: HourLlavaConfig) -> torch.dtype:
    """The dtype that a model's weights are kept in, which is that of its memories, too."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")


def plan(
    model: str | os.PathLike[str], hours: float, precision: str = "bfloat16", config: HourLlavaConfig | None = None
) -> Plan:
    """What a memory of `hours` of video takes.

    Args:
        model: what `config_of` takes.
        hours: of video, at one frame per second.
        precision: of the features on the disk, "bfloat16" or "int8".
        config: the model's, if it has been read already.

    Raises:
        InputError: `hours` is not above 0, or more than a year.
        ModelError: there is no such model.
    """
    frames = round(hours * 3600) if 0 < hours <= LONGEST else 0
    if frames < 1:
        raise InputError(f"{hours:g} hours", "that is no length of a video", f"give more than 0 and up to {LONGEST}")
    config = config or config_of(model)
    dtype = dtype_of(config)
    if config.vision_config is None:
        raise ModelError(model, "it was built without a vision tower", "plan with a model that has one")
    shape = memory_shape(config, dtype)
    remembered = remembered_frames(config, frames)
    queries = _kept_tokens(config, remembered, shape.per_frame) + PROMPT
    kept, asked = (page_count(count, shape.per_frame) for count in (frames, remembered))
    # Of a short video, pages of its repeated frames are made for the question.
    pages = (kept + asked if remembered > frames else kept) * shape.page_bytes
    budget = as_budget(config.memory_budget)
    tower = config.vision_config
    return Plan(
        model=str(model),
        hours=hours,
        frames=frames,
        tokens=frames * (shape.per_frame + 1),
        dtype=str(dtype).removeprefix("torch."),
        queries=queries,
        pages=asked,
        pages_read=asked if budget is None else budget.most(frames, remembered, shape.per_frame),
        device={
            "weights": _weights(config) * dtype.itemsize,
            "pages": pages,
            "question": _question(config, queries) * dtype.itemsize,
            "tower": _watching(config) * dtype.itemsize,
        },
        host={"frames": frames_ahead() * 3 * tower.image_size**2},
        disk={
            "features": frames * packed_bytes(precision, shape.per_frame, config.vision_width),
            "pages": kept * shape.page_bytes,
            "tokens": frames * shape.token_bytes,
        },
    )


def longest_in(shape: MemoryShape, budget: int) -> float:
    """Hours of video whose pages fit into `budget` bytes."""
    pages = budget // shape.page_bytes
    longest = bisect.bisect_right(range(LONGEST * 3600), pages, key=lambda n: page_count(n, shape.per_frame)) - 1
    return longest / 3600


def _weights(config: HourLlavaConfig) -> int:
    """Parameters, a tied head counted once."""
    with torch.device("meta"):
        model = HourLlavaForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _kept_tokens(config: HourLlavaConfig, remembered: int, per_frame: int) -> int:
    count = max(1, min(config.max_kept_frames, remembered // config.temporal_ratio))
    side = round(per_frame**0.5)
    return count * (spatial_picks(config, torch.zeros(1, dtype=torch.int64), (side, side)).shape[1] + 1)


def _question(config: HourLlavaConfig, rows: int) -> int:
    """Numbers alive at the widest point of a question: in MemAug, or in the decoder's first pass."""
    decoder = config.text_config
    width, head_dim = decoder.hidden_size, decoder.hidden_size // decoder.num_attention_heads
    cache = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * head_dim
    memaug = MEMAUG_WIDTHS * width
    prefill = cache + DECODER_WIDTHS * width + DECODER_INTERMEDIATES * decoder.intermediate_size
    return rows * max(memaug, prefill)


def _watching(config: HourLlavaConfig) -> int:
    """Numbers alive at the widest point of a pass through the tower."""
    tower = config.vision_config
    per_patch = TOWER_WIDTHS * tower.hidden_size + TOWER_INTERMEDIATES * tower.intermediate_size
    return BATCH * config.patches_per_side**2 * per_patch


def frames_ahead() -> int:
    """Pictures that exist at once between the decoder and the tower."""
    return 2 * CHUNK + (torch.get_num_threads() + 1) * PICTURES_AHEAD
