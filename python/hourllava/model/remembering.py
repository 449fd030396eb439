# SPDX-License-Identifier: Apache-2.0
"""From the tokens of what stands at a prompt's marks to its memory, and to the few of them that become queries."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import hourllava_ext as ext
from hourllava.errors import InputError
from hourllava.memory.pages import PageLayout, row_layout, video_layout

from .configuration import HourLlavaConfig
from .forgetting import Forgetting, kept_frames, rank_frames, remembered_frames, spatial_picks, spread_frames
from .images import assemble_grid, nearest_cells
from .inputs import Visual


@dataclass(frozen=True)
class Kept:
    """The visual tokens of one mark that become queries."""

    tokens: Tensor  # (V, C), a newline after each frame, image or row of a grid
    position_ids: Tensor  # (V,) int64, in the memory of the mark's sample
    span: int  # positions that the mark takes up
    shares: tuple[int, ...] = ()  # rows that each process holds, where `tokens` are only this one's: see `sharing`

    def to(self, device: torch.device) -> "Kept":
        """The same on another device."""
        return Kept(self.tokens.to(device), self.position_ids.to(device), self.span)


@dataclass(frozen=True)
class Remembered:
    """A sample's memory: what every MemAug block makes keys and values of, and the tokens kept at each of its marks."""

    tokens: Tensor  # (R, C)
    layout: PageLayout | None  # None: another process holds all of it
    kept: list[Kept]


@dataclass(frozen=True)
class Choice:
    """How the queries of one mark are chosen."""

    forgetting: Forgetting
    question: Tensor  # (words, C) embeddings of the text behind the mark that joins the queries
    features: Tensor | None = None  # (T, N, Cv) of a video's frames, as they were before the projector
    frames: Tensor | None = None  # (n,) int64: frames of the memory to keep, whatever the rule
    patches: Tensor | None = None  # tokens to keep, whatever the rule; see `VisualOptions.spatial_picks`


def remember(
    config: HourLlavaConfig, visuals: list[Visual], tokens: list[Tensor], newline: Tensor, choices: list[Choice]
) -> Remembered:
    """The memory of what stands at the marks of a sample.

    Args:
        visuals: one video, one image in tiles, or any number of images of one tile each.
        tokens: (n, N, C) of each.
        newline: (C,).
        choices: of each.
    """
    if visuals[0].modality == "video":
        return remember_video(config, tokens[0], newline, choices[0])
    if len(tokens[0]) > 1:
        return remember_tiles(config, tokens[0], newline, choices[0], cast(tuple[int, int], visuals[0].size))
    return remember_images(config, torch.cat(tokens), newline, choices)


def repeat_frames(config: HourLlavaConfig, tokens: Tensor) -> Tensor:
    """A video's tokens (T, ...) as the memory holds them: repeated evenly if there are fewer than `min_frames`."""
    wanted = remembered_frames(config, len(tokens))
    return tokens if wanted == len(tokens) else tokens[spread_frames(len(tokens), wanted).to(tokens.device)]


def keep_of_video(config: HourLlavaConfig, tokens: Tensor, newline: Tensor, choice: Choice) -> Kept:
    """Forget all but some tokens of some frames of a video.

    Args:
        tokens: (T, N, C) of every frame of the memory.
        newline: (C,).
    """
    per_frame, device = tokens.shape[1], tokens.device
    frames = choice.frames
    if frames is None:
        rank = rank_frames(choice.forgetting, choice.features, tokens, choice.question)
        frames = kept_frames(config, len(tokens), choice.forgetting, rank)
    frames = frames.to(device, torch.int64)
    if choice.patches is None:
        side = round(per_frame**0.5)
        patches = spatial_picks(config, frames, (side, side), choice.forgetting)
    else:
        _check_picks(choice.patches, len(tokens), "the memory's frames")
        patches = choice.patches.to(device, torch.int64)[frames]
    kept, position_ids = ext.forget(tokens, frames, patches.contiguous(), newline)
    return Kept(kept.flatten(0, 1), position_ids.flatten(), len(tokens) * (per_frame + 1))


def remember_video(config: HourLlavaConfig, tokens: Tensor, newline: Tensor, choice: Choice) -> Remembered:
    """The memory of a video's tokens (T, N, C), every frame followed by a newline."""
    tokens = repeat_frames(config, tokens)
    rows = torch.cat([tokens.flatten(0, 1), newline.expand(len(tokens), -1)])
    layout = video_layout(len(tokens), tokens.shape[1], tokens.device)
    return Remembered(rows, layout, [keep_of_video(config, tokens, newline, choice)])


def remember_images(config: HourLlavaConfig, tokens: Tensor, newline: Tensor, choices: list[Choice]) -> Remembered:
    """The memory of images of one tile each, (n, N, C) in reading order.

    Every image is followed by a newline, and all newlines share the id behind the last image's.
    """
    count, per_image, device = *tokens.shape[:2], tokens.device
    side, last = round(per_image**0.5), count * per_image
    rows = torch.cat([tokens.flatten(0, 1), newline[None]])
    ids = torch.arange(last + 1, device=device)
    kept = []
    for number, choice in enumerate(choices):
        if choice.patches is None:
            which = torch.full((1,), number, device=device)
            patches = spatial_picks(config, which, (side, side), choice.forgetting)[0]
        else:
            patches = choice.patches.to(device, torch.int64).flatten()
        chosen = torch.cat([number * per_image + patches, ids[last:]])
        kept.append(Kept(rows[chosen], chosen, last + 1))
    # One newline more for every other image.
    order = torch.cat([ids, ids[last:].expand(count - 1)])
    return Remembered(rows[order], row_layout(order), kept)


def remember_tiles(
    config: HourLlavaConfig, tokens: Tensor, newline: Tensor, choice: Choice, size: tuple[int, int]
) -> Remembered:
    """The memory of one image in tiles, the base first.

    Args:
        tokens: (1 + rows * columns, N, C).
        size: the image's (height, width).

    The base takes the ids of the nearest tokens of the grid; after each row of the grid comes a newline, and all
    newlines share the id behind the grid's last.
    """
    per_tile, device = tokens.shape[1], tokens.device
    side = round(per_tile**0.5)
    grid = assemble_grid(tokens[1:], size, config)
    height, width = grid.shape[:2]
    cells = torch.arange(height * width, device=device)
    newline_id = torch.full((height,), height * width, device=device)
    rows = torch.cat([tokens[0], grid.flatten(0, 1), newline.expand(height, -1)])
    position_ids = torch.cat([nearest_cells(side, height, width, device), cells, newline_id])
    if choice.patches is None:
        zero, one = torch.arange(2, device=device).split(1)
        in_base = spatial_picks(config, zero, (side, side), choice.forgetting)[0]
        in_grid = spatial_picks(config, one, (height, width), choice.forgetting)[0]
    else:
        patches = choice.patches.to(device, torch.int64).flatten()
        in_base, in_grid = patches[patches < per_tile], patches[patches >= per_tile] - per_tile
    # A row of the grid that keeps a token keeps its newline, too.
    lines = (in_grid // width).unique()
    place = torch.cat([in_grid + in_grid // width, lines * (width + 1) + width])
    chosen = torch.cat([in_grid, height * width + lines])[place.argsort()] + per_tile
    chosen = torch.cat([in_base, chosen])
    kept = Kept(rows[chosen], position_ids[chosen], height * width + 1)
    return Remembered(rows, row_layout(position_ids), [kept])


def _check_picks(picks: Tensor, frames: int, of: str) -> None:
    if picks.dim() != 2 or len(picks) != frames:
        why = f"they have shape {tuple(picks.shape)}"
        raise InputError("spatial_picks", why, f"give ({frames}, k), a row for each of {of}")
