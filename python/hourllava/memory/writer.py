# SPDX-License-Identifier: Apache-2.0
"""Who makes memory of frames, what it is made of, and who keeps it for good."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hourllava.errors import VideoError

from .pages import PAGE_SIZE

if TYPE_CHECKING:
    from .video_memory import VideoMemory

SUMMARY_ROWS = 3  # of a page and head: mean, least and greatest key


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of everything a memory holds, per frame and per block."""

    per_frame: int  # visual tokens of a frame
    width: int  # channels of a token
    blocks: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all blocks: keys, values, their summary, and how many rows are in use."""
        row = self.blocks * self.kv_heads * self.head_dim
        rows = 2 * PAGE_SIZE * self.dtype.itemsize + SUMMARY_ROWS * summary_dtype(self.dtype).itemsize
        return row * rows + torch.int32.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of the visual tokens of one frame."""
        return self.per_frame * self.width * self.dtype.itemsize


class MemoryWriter(Protocol):
    """What makes memory of frames: a model."""

    shape: MemoryShape
    feature_width: int  # channels of a feature
    device: torch.device
    inv_freq: Tensor  # float32 (F,)
    batch: int  # frames are encoded in batches that start at multiples of this

    def fingerprint(self) -> str:
        """Identifies everything that the memory's contents depend on besides the frames."""

    def tower_fingerprint(self) -> str:
        """Identifies everything that features depend on besides the frames."""

    def encode(self, frames: Tensor) -> Tensor:
        """Features (n, N, Cv) of frames (n, 3, H, W)."""

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (n, N, C) of features (n, N, Cv)."""

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every block's unrotated keys and values, (n * (N + 1), Hkv, D), of tokens (n, N, C) and then n newlines."""


class Journal(Protocol):
    """Where a memory's features are kept for good: a video of a repository."""

    def keep(self, features: Tensor) -> Tensor:
        """Take in the next frames' features (n, N, Cv), and return them as they will be read back, in their dtype."""

    def commit(self, first: int, memory: "VideoMemory") -> None:
        """Keep what was taken in, of frames `first` on; when it returns, that survives whatever happens."""

    def abandon(self) -> None:
        """Forget what was taken in since the last commit."""

    def close(self) -> None:
        """Take in no more."""


def summary_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the summaries of pages of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def check_pictures(frames: object) -> None:
    """Raise VideoError unless these are pictures that memory is made of: uint8 RGB (n, 3, H, W).

    Other numbers would be taken for other pictures without a word.
    """
    if isinstance(frames, Tensor):
        sound = frames.dtype == torch.uint8 and frames.dim() == 4 and frames.shape[1] == 3 and 0 not in frames.shape[2:]
        given = f"{frames.dtype} {tuple(frames.shape)}"
    else:
        sound, given = False, f"of type {type(frames).__name__}"
    if not sound:
        raise VideoError("frames", f"they are {given}", "give a tensor of uint8 RGB (n, 3, H, W), one frame a second")
