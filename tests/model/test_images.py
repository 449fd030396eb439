# SPDX-License-Identifier: Apache-2.0
"""Images in tiles: which grid, which pixels, and which tokens are left without the padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from hourllava.errors import InputError
from hourllava.model import HourLlavaConfig, tiny_config
from hourllava.model.images import assemble_grid, choose_grid, nearest_cells, square_image, tile_image

CONFIG = HourLlavaConfig()


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((384, 384), (1, 1)),
        ((2, 2), (1, 1)),
        ((500, 700), (2, 2)),
        ((400, 300), (2, 1)),
        ((300, 2000), (1, 6)),
        ((2000, 300), (6, 1)),
        ((5000, 5000), (6, 6)),
        ((1080, 1920), (3, 5)),
        ((1, 384 * 6 + 1), None),
    ],
)
def test_grid(size, grid):
    if grid is None:
        with pytest.raises(InputError):
            choose_grid(size, CONFIG)
    else:
        assert choose_grid(size, CONFIG) == grid


def test_tiles_are_the_image_where_it_fits():
    image = noise(384, 768)
    tiles, size = tile_image(image, CONFIG)
    assert size == (384, 768)
    assert tiles.dtype == torch.uint8
    whole = pixels(image)
    assert torch.equal(tiles[1], whole[:, :, :384])
    assert torch.equal(tiles[2], whole[:, :, 384:])
    assert torch.equal(tiles[0], pixels(image.resize((384, 384), Image.Resampling.BICUBIC)))
    assert torch.equal(tile_image(whole, CONFIG)[0], tiles)


def test_what_is_left_over_is_black_on_both_sides():
    tiles, _ = tile_image(Image.new("RGB", (700, 500), (255, 255, 255)), CONFIG)
    assert tiles.shape == (5, 3, 384, 384)
    canvas = torch.cat([torch.cat(list(tiles[1:3]), 2), torch.cat(list(tiles[3:]), 2)], 1)
    # 768 pixels wide, 768 * 500 / 700 = 548.6 high, rounded up and centred.
    assert canvas[:, 109:658].eq(255).all()
    assert not canvas[:, :109].any()
    assert not canvas[:, 658:].any()
    assert tiles[0].eq(255).all()


def test_grey_squares():
    tile, size = square_image(Image.new("RGB", (100, 50), (0, 0, 0)), CONFIG)
    assert size == (50, 100)
    assert tile.shape == (1, 3, 384, 384)
    assert tile[0, :, :90].eq(127).all()
    assert not tile[0, :, 105:280].any()
    assert tile[0, :, 295:].eq(127).all()


def test_a_small_tower_has_small_tiles():
    config = tiny_config()
    tiles, _ = tile_image(noise(64, 200), config)
    assert tiles.shape == (5, 3, 64, 64)
    assert (config.tile_size, config.patches_per_side) == (64, 8)


def test_grid_of_tokens():
    # Two rows and three columns of tiles of 4 x 4; a token says where it stands.
    config = HourLlavaConfig(tile_size=56)
    size = (112, 168)
    assert choose_grid(size, config) == (2, 3)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    where = torch.stack([row, column], -1)
    tiles = torch.stack([where[r : r + 4, c : c + 4].flatten(0, 1) for r in (0, 4) for c in (0, 4, 8)])
    assert torch.equal(assemble_grid(tiles, size, config), where)
    # A wide image leaves int(84 * 12 / 168) = 6 of 8 rows, a high one int(112 * 8 / 168) = 5 of 8 columns.
    assert torch.equal(assemble_grid(tiles, (84, 168), config), where[1:7])
    with pytest.raises(InputError, match="make 5 tiles, but 7 were given"):
        assemble_grid(tiles, (112, 112), config)


def test_many_tiles_are_scaled_down():
    config = HourLlavaConfig(tile_size=56, image_max_tiles=2)
    tiles = torch.ones(6, 16, 5)
    # 8 x 12 tokens where two tiles hold 32: divided by sqrt(3) and floored.
    assert assemble_grid(tiles, (112, 168), config).shape == (4, 6, 5)
    assert assemble_grid(torch.ones(36, 729, 1), (3000, 3000), CONFIG).shape == (81, 81, 1)


def test_nearest_cells():
    assert nearest_cells(3, 5, 9, torch.device("cpu")).tolist() == [0, 4, 8, 18, 22, 26, 36, 40, 44]
    # Halves go to the even neighbour: 0, 0.5, 1 is 0, 0, 1.
    assert nearest_cells(3, 2, 1, torch.device("cpu")).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("cut", [tile_image, square_image])
@pytest.mark.parametrize(
    ("size", "why"), [((1, 1), "nothing to see"), ((1, 50), "nothing to see"), ((30000, 20), "too thin")]
)
def test_images_that_show_nothing(cut, size, why):
    for width, height in (size, size[::-1]):
        with pytest.raises(InputError, match=why) as caught:
            cut(Image.new("RGB", (width, height)), CONFIG, "picture 3")
        assert str(caught.value).startswith(f"picture 3 of {width} x {height} pixels")


def test_not_an_image():
    with pytest.raises(InputError, match="give a PIL image"):
        tile_image(torch.zeros(3, 9, 9), CONFIG)
    with pytest.raises(InputError, match="it is str"):
        tile_image("picture.png", CONFIG)
