# SPDX-License-Identifier: Apache-2.0
"""What stands at the <image> marks of a batch, and every way in which that can be wrong, named by its sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import Cache

from hourllava.errors import InputError

from .configuration import HourLlavaConfig
from .images import choose_grid

MODALITIES = ("video", "image")


@dataclass(frozen=True)
class Visual:
    """What stands at one <image> mark."""

    content: Tensor  # (n, 3, S, S) frames or tiles, or the tower's (n, N, Cv) features of them
    modality: str  # "video" or "image"
    size: tuple[int, int] | None  # height and width of a tiled image


class VisualOptions(TypedDict, total=False):
    """Keyword arguments of `forward` and `generate` that say how images and videos are used.

    `spatial_picks` and `frame_picks` hold one entry, or None, for each <image> mark. Picks are int64: of a video
    (T_mem, k), tokens of every remembered frame; of an image of one tile (k,); of a tiled image (k,), where ids below N
    are tokens of the base and the others, less N, of the unpadded grid, ascending.
    """

    query_mask: Tensor | None  # (B, L) bool: text tokens that join MemAug's queries
    spatial_picks: list[Tensor | None] | None
    frame_picks: list[Tensor | None] | None  # of a video (n,) int64, ascending: the remembered frames that stay
    temporal_forgetting: str | None  # instead of the config's rules and seed
    spatial_forgetting: str | None
    forgetting_seed: int | None
    memaug: bool  # False sends the kept tokens to the decoder as they are
    use_memory: bool  # False drops MemAug's attention to the memory
    tower_passes: int  # run the tower at least so often: see `blank`
    memory_group: dist.ProcessGroup | None  # spread each memory over these processes: see `sharing`


def pop_visual_options(kwargs: dict[str, Any]) -> VisualOptions:
    """Move the options of `VisualOptions` out of a forward's keyword arguments."""
    return cast(VisualOptions, {name: kwargs.pop(name) for name in VisualOptions.__annotations__ if name in kwargs})


def read_visuals(
    pixel_values: Sequence[Tensor] | None,
    vision_features: Sequence[Tensor] | None,
    modalities: Sequence[str] | None,
    image_sizes: Sequence[tuple[int, int] | None] | None,
) -> list[Visual]:
    """One `Visual` for each <image> mark of the batch; videos are the default modality.

    Raises:
        InputError: the lists do not fit together.
    """
    # A batch of videos of one length may come as one tensor, which has no truth value.
    pixels, features = ([] if given is None else list(given) for given in (pixel_values, vision_features))
    if pixels and features:
        raise InputError("model input", "there are both pixel_values and vision_features", "give either")
    content = pixels or [_features(x) for x in features]
    modalities = list(modalities or ["video"] * len(content))
    sizes = list(image_sizes or [None] * len(content))
    if not len(content) == len(modalities) == len(sizes):
        why = f"there are {len(content)} visual inputs, {len(modalities)} modalities and {len(sizes)} image sizes"
        raise InputError("model input", why, "give one of each for every <image> mark")
    for modality in modalities:
        if modality not in MODALITIES:
            raise InputError("model input", f"there is no modality {modality!r}", f"choose {' or '.join(MODALITIES)}")
    return [Visual(x, modality, size) for x, modality, size in zip(content, modalities, sizes, strict=True)]


def is_prompt(past: Cache | None, attention_mask: object, visuals: list[Visual]) -> bool:
    """Whether what is given is a prompt: not so once there is a cache, which holds it, or masks that `generate` has
    made for one.

    Raises:
        InputError: there is a cache, and images or videos that nothing would look at.
    """
    cached = past is not None and past.get_seq_length() > 0
    if cached and visuals:
        todo = "give them with the prompt only, or take an empty cache"
        raise InputError("model input", "there are images or videos beside a cache that holds a prompt", todo)
    return not cached and (attention_mask is None or getattr(attention_mask, "ndim", 0) == 2)


def group_by_sample(marks: Tensor, visuals: list[Visual]) -> list[list[Visual]]:
    """The visuals of each sample: one video, one image in tiles, or any number of images of one tile each.

    Args:
        marks: (B, L) bool.

    Raises:
        InputError: there are more marks than visuals or fewer, or a sample's visuals do not go together.
    """
    counts = marks.sum(1).tolist()
    groups, first = [], 0
    for number, count in enumerate(counts):
        group = visuals[first : first + count]
        what = name_sample(number, len(counts))
        if len(group) < count:
            why = f"<image> stands in it {count} times, but the images and videos left for it are {len(group)}"
            raise InputError(what, why, "give one for every mark, in reading order over the batch")
        if count > 1 and any(visual.modality != "image" or len(visual.content) != 1 for visual in group):
            why = f"<image> stands in it {count} times, but not all that belongs there are images of one tile"
            raise InputError(what, why, "give a prompt one video, one tiled image, or images of one tile each")
        groups.append(group)
        first += count
    if first < len(visuals):
        per_sample = " + ".join(map(str, counts))
        why = f"{len(visuals)} images and videos are given, but <image> stands {per_sample} times in the samples"
        raise InputError("model input", why, "put a mark where each of them belongs")
    return groups


def check_content(groups: list[list[Visual]], config: HourLlavaConfig) -> None:
    """Raise InputError for what cannot be a frame, a tile, a feature, or an image's size."""
    for number, group in enumerate(groups):
        for visual in group:
            what = f"{visual.modality} of {name_sample(number, len(groups))}"
            shape = tuple(visual.content.shape)
            if visual.content.dim() == 4:
                wanted, good = f"(n, 3, {config.tile_size}, {config.tile_size})", shape[1] == 3
                good = good and shape[2] == shape[3] == config.tile_size
            else:
                wanted = f"(n, side * side, {config.vision_width})"
                good = len(shape) == 3 and shape[2] == config.vision_width and math.isqrt(shape[1]) ** 2 == shape[1] > 0
            if not good or shape[0] == 0:
                raise InputError(what, f"it has shape {shape}", f"give {wanted} with n > 0")
            dtype = visual.content.dtype
            if not dtype.is_floating_point and (dtype != torch.uint8 or len(shape) == 3):
                raise InputError(
                    what, f"it is {dtype}", "give pixels in uint8 or normalised floats, features in floats"
                )
            if visual.modality == "image" and shape[0] > 1:
                _check_tiles(what, visual, config)


def check_lengths(lengths: list[int], visual: list[int], groups: list[list[Visual]], limit: int) -> None:
    """Raise InputError if one of the samples is longer than the decoder reads.

    Args:
        lengths: tokens of each sample.
        visual: those of them at each mark.
    """
    first = 0
    for number, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        check_length(name_sample(number, len(lengths)), length, sum(visual[first : first + len(group)]), limit)
        first += len(group)


def check_length(what: str, length: int, visual: int, limit: int) -> None:
    """Raise InputError if `length` tokens, `visual` of them visual, are more than the decoder's `limit`."""
    if length > limit:
        why = f"it comes to {length} tokens, {visual} of them visual, but the decoder reads {limit}"
        raise InputError(what, why, "shorten its text, or keep fewer visual tokens")


def check_targets(targets: Tensor) -> None:
    """Raise InputError if a sample of `targets` (B, L) bool, the tokens that are learnt, has none behind its first."""
    learns_nothing = (~targets[:, 1:].any(1)).nonzero()
    if len(learns_nothing):
        what = name_sample(int(learns_nothing[0]), len(targets))
        raise InputError(what, "all its labels are ignored (-100)", "label its answer, or leave the sample out")


def name_sample(number: int, count: int) -> str:
    return f"sample {number} of {count} (the first is 0)"


def _check_tiles(what: str, visual: Visual, config: HourLlavaConfig) -> None:
    if visual.size is None:
        raise InputError(what, "it has tiles but no size", "give (height, width) in image_sizes")
    rows, columns = choose_grid(visual.size, config, what)
    tiles = len(visual.content)
    if tiles != 1 + rows * columns:
        height, width = visual.size
        why = f"its {width} x {height} pixels make {1 + rows * columns} tiles, but it has {tiles}"
        raise InputError(what, why, "give the tiles and the size that tile_image returns")


def _features(x: Tensor) -> Tensor:
    """Features (n, g, g, Cv), as they are stored beside videos, as (n, g * g, Cv)."""
    return x.flatten(1, 2) if x.dim() == 4 else x
