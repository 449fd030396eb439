# SPDX-License-Identifier: Apache-2.0
"""Single images in tiles: the grid that fits an image best, and the grid of tokens without its padding."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hourllava.errors import InputError

from .configuration import HourLlavaConfig

# A grid of tokens is shrunk once its side is this many times what `image_max_tiles` tiles would give.
_SLACK = 1.1
_MEAN_COLOUR = (127, 127, 127)

Picture = Image.Image | Tensor


def tile_image(image: Picture, config: HourLlavaConfig, name: str = "image") -> tuple[Tensor, tuple[int, int]]:
    """Cut an image into the tiles that the model sees it in.

    The image is scaled to the grid of at most image_grid x image_grid tiles that keeps most of it and wastes least,
    centred on black, and cut up row by row; before the tiles comes the whole image stretched to one tile.

    Args:
        image: a PIL image, or uint8 RGB (3, H, W).
        name: what an error calls the image.

    Returns:
        tiles (1 + rows * columns, 3, S, S) uint8 and the image's (height, width).

    Raises:
        InputError: the image is a pixel wide or high, or so thin that less than a row of patches is left of it.
    """
    picture = _to_pil(image, name)
    width, height = picture.size
    side = config.tile_size
    rows, columns = choose_grid((height, width), config, name)
    # The side that fills the grid decides the scale; the other one is rounded up.
    across, down = columns * side / width, rows * side / height
    if across < down:
        size = columns * side, min(math.ceil(height * across), rows * side)
    else:
        size = min(math.ceil(width * down), columns * side), rows * side
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(picture.resize(size), ((canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2))
    tiles = _to_tensor(canvas).view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    base = _to_tensor(picture.resize((side, side)))[None]
    return torch.cat([base, tiles]), (height, width)


def square_image(image: Picture, config: HourLlavaConfig, name: str = "image") -> tuple[Tensor, tuple[int, int]]:
    """One tile of an image that shares its prompt with others: centred on grey, then scaled.

    Args, returns and errors are those of `tile_image`, with a single tile (1, 3, S, S).
    """
    picture = _to_pil(image, name)
    width, height = picture.size
    choose_grid((height, width), config, name)
    longest = max(width, height)
    canvas = Image.new("RGB", (longest, longest), _MEAN_COLOUR)
    canvas.paste(picture, ((longest - width) // 2, (longest - height) // 2))
    tile = canvas.resize((config.tile_size, config.tile_size), Image.Resampling.BICUBIC)
    return _to_tensor(tile)[None], (height, width)


def choose_grid(size: tuple[int, int], config: HourLlavaConfig, name: str = "image") -> tuple[int, int]:
    """Rows and columns of tiles for an image of `size` (height, width).

    Of all grids, the one that shows most of the image's pixels, and of these the smallest; of equals, the narrowest.

    Raises:
        InputError: as `tile_image`.
    """
    height, width = size
    what = f"{name} of {width} x {height} pixels"
    if min(height, width) < 2:
        raise InputError(what, "there is nothing to see on it", "leave it out, or give the real image")
    best, chosen = (0, 0), (0, 0)
    for columns in range(1, config.image_grid + 1):
        for rows in range(1, config.image_grid + 1):
            across, down = columns * config.tile_size, rows * config.tile_size
            scale = min(across / width, down / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            if (shown, shown - across * down) > best or not any(chosen):
                best, chosen = (shown, shown - across * down), (rows, columns)
    patches = config.patches_per_side
    if 0 in _inside((chosen[0] * patches, chosen[1] * patches), size):
        raise InputError(what, "it is too thin for a single row of patches", "crop it to its interesting part")
    return chosen


def assemble_grid(tiles: Tensor, size: tuple[int, int], config: HourLlavaConfig) -> Tensor:
    """Put the tokens of tiles together as the image they show, without the padding.

    Args:
        tiles: (rows * columns, N, C) tokens of the tiles after the base, N a square number.
        size: the image's (height, width), which tells the grid and the padding.

    Returns:
        (h, w, C); scaled down bilinearly where h * w would be well above `image_max_tiles` tiles.

    Raises:
        InputError: an image of this size has not so many tiles.
    """
    rows, columns = choose_grid(size, config)
    patches = math.isqrt(tiles.shape[1])
    if len(tiles) != rows * columns:
        why = f"its {size[1]} x {size[0]} pixels make {1 + rows * columns} tiles, but {1 + len(tiles)} were given"
        raise InputError("image", why, "give the tiles and the size that tile_image returns")
    grid = tiles.view(rows, columns, patches, patches, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
    height, width = _inside((grid.shape[1], grid.shape[2]), size)
    top, left = (grid.shape[1] - height) // 2, (grid.shape[2] - width) // 2
    grid = grid[:, top : grid.shape[1] - top, left : grid.shape[2] - left]
    height, width = grid.shape[1:]
    excess = math.sqrt(height * width / (config.image_max_tiles * patches**2))
    if excess > _SLACK:
        smaller = [int(height // excess), int(width // excess)]
        grid = F.interpolate(grid[None], smaller, mode="bilinear", align_corners=False)[0]
    return grid.permute(1, 2, 0)


def nearest_cells(side: int, height: int, width: int, device: torch.device) -> Tensor:
    """Ids (side * side,) int64, row by row in a grid height x width, of the cells nearest to those of a square grid."""
    row, column = (torch.linspace(0, n - 1, side).round().to(torch.int64) for n in (height, width))
    return (row[:, None] * width + column).flatten().to(device)


def _inside(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of `size` (height, width) that fills a grid of cells in one direction."""
    (rows, columns), (height, width) = grid, size
    if width / height > columns / rows:
        return int(height * (columns / width)), columns
    return rows, int(width * (rows / height))


def _to_pil(image: Picture, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(name, f"it is {given}", "give a PIL image or a uint8 RGB tensor (3, H, W)")
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
