# SPDX-License-Identifier: Apache-2.0
"""Samples as the model's inputs: tokens, labels, and the frames, tiles or features that stand at their marks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hourllava.errors import DataError, HourLlavaError
from hourllava.model.configuration import HourLlavaConfig
from hourllava.model.forgetting import remembered_frames, spatial_picks, spread_frames
from hourllava.model.images import assemble_grid
from hourllava.model.inputs import check_length
from hourllava.model.media import read_image
from hourllava.model.prompt import encode_turns, tell_time, time_instruction

from .encoded import check_tower, check_towers, first_tower, read_features
from .failures import FailureLog
from .original import check_frames
from .samples import Media, Sample

VISUAL_WORDS = 128  # what an image or a video adds to a sample's length in words
_CHUNK = 32  # frames that are decoded at a time


class Item(TypedDict):
    """A sample, ready to be collated."""

    input_ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) int64
    pixel_values: list[Tensor]  # for each mark: (n, 3, S, S) uint8 frames or tiles, or (n, N, Cv) features
    modalities: list[str]  # "video" or "image" for each mark
    image_sizes: list[tuple[int, int] | None]  # (height, width) of an image


@dataclass(frozen=True)
class Held:
    """What a shard holds of a medium."""

    content: Any  # features (T, N, Cv), or an image that PIL has opened
    seconds: float = 0.0  # that a video lasts
    tower: str = ""  # fingerprint of what made the features, if it is known


class ConversationDataset(Dataset):
    """Conversations by number; media are read when an item is asked for.

    A sample that fails is written to `failures`, and the next one of the same modality that does not fail takes its
    place, so that what a number gives depends on the data alone.

    Args:
        samples: what `load_mixture` gives.
        tokenizer: with a token for `<image>`.
        config: the model's.
        failures: None lets a sample that fails raise.
        tower: fingerprint of the tower that features must be of (`tower_fingerprint` of the model); None takes that of
            the first that is found, so that at least all come from one. Of .pt files only the sizes are known.
        max_frames: take at most so many frames of a video, spread evenly.

    Raises:
        DataError: a sample's features, as the catalogue of their repository has them, are of another tower.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        config: HourLlavaConfig,
        failures: FailureLog | None = None,
        tower: str | None = None,
        max_frames: int | None = None,
    ) -> None:
        self.samples, self.tokenizer, self.config = samples, tokenizer, config
        self.failures, self.max_frames = failures, max_frames
        encoded = [medium.path for sample in samples for medium in sample.media if medium.kind == "features"]
        self.tower = tower or first_tower(encoded)
        check_towers(samples, self.tower)
        if failures is not None:
            failures.expect(len(samples))

    @cached_property
    def lengths(self) -> list[int]:
        """Words of each sample, and 128 for each image or video; nothing is decoded for it."""
        words = (sum(len(text.split()) for turn in sample.turns for text in turn) for sample in self.samples)
        return [n + VISUAL_WORDS * len(sample.media) for n, sample in zip(words, self.samples, strict=True)]

    @cached_property
    def modalities(self) -> list[str]:
        """What each sample shows: "text" (nothing), "image", "images" or "video"."""
        return [_modality(sample) for sample in self.samples]

    @property
    def streams(self) -> list[str]:
        """The stream that each sample belongs to."""
        return [sample.stream for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Item:
        """The item of a sample, or of what takes its place.

        Raises:
            DataError: it fails and there is no log of failures, too many have failed, or 16 fail in a row.
        """
        if self.failures is None:
            return self.load(number)
        return self.failures.first_sound(self._stand_ins(number), self.load, lambda one: self.samples[one].id)

    def load(self, number: int) -> Item:
        """The item of a sample itself.

        Raises:
            DataError: a file is missing or damaged, or the decoder does not read so many tokens; names the sample.
        """
        return self.make_item(self.samples[number])

    def make_item(self, sample: Sample, held: Sequence[Held | None] = ()) -> Item:
        """The item of any sample.

        Args:
            held: what is there already of each medium, and None where its file is to be read.

        Raises:
            DataError: as for `load`.
        """
        try:
            return self._item(sample, held or [None] * len(sample.media))
        except HourLlavaError as error:
            raise DataError(sample.named, f"{error.what}: {error.why}", error.todo) from error

    def _item(self, sample: Sample, held: Sequence[Held | None]) -> Item:
        turns = list(sample.turns)
        content: list[Tensor] = []
        sizes: list[tuple[int, int] | None] = []
        for medium, there in zip(sample.media, held, strict=True):
            if medium.kind == "image":
                source = medium.path if there is None else there.content
                tiles, size = read_image(source, self.config, len(sample.media) > 1, medium.path.name)
                content.append(tiles)
                sizes.append(size)
            else:
                frames, seconds = self._video(medium, there)
                content.append(frames)
                sizes.append(None)
                if self.config.time_instruction:
                    turns = tell_time(turns, time_instruction(seconds, len(frames)))
        ids, labels = encode_turns(self.tokenizer, turns)
        visual = sum(map(self._kept, content, sizes))
        total, limit = len(ids) - len(content) + visual, self.config.text_config.max_position_embeddings
        check_length("its conversation", total, visual, limit)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": content,
            "modalities": ["video" if size is None else "image" for size in sizes],
            "image_sizes": sizes,
        }

    def _video(self, medium: Media, held: Held | None) -> tuple[Tensor, float]:
        """Frames (n, 3, S, S) uint8 or features (n, N, Cv), one a second, and the seconds that the video lasts."""
        if held is not None:
            check_frames(medium.path, held.content, self.config.video_grid**2, self.config.vision_width)
            check_tower(medium.path, held.tower, self.tower)
            return self._thinned(held.content), held.seconds
        if medium.kind == "features":
            features, seconds = read_features(medium.path, self.config, self.tower)
            return self._thinned(features), seconds
        reader = medium.open()
        chosen = self._chosen(reader.frames_expected)
        frames = torch.empty(len(chosen), 3, self.config.tile_size, self.config.tile_size, dtype=torch.uint8)
        first = taken = 0
        for chunk in reader.chunks(self.config.tile_size, _CHUNK):
            inside = chosen[(chosen >= first) & (chosen < first + len(chunk.frames))] - first
            frames[taken : taken + len(inside)] = chunk.frames[inside]
            first, taken = first + len(chunk.frames), taken + len(inside)
        return frames, reader.duration

    def _thinned(self, features: Tensor) -> Tensor:
        chosen = self._chosen(len(features))
        return features if len(chosen) == len(features) else features[chosen]

    def _chosen(self, frames: int) -> Tensor:
        return spread_frames(frames, min(frames, self.max_frames or frames))

    def _kept(self, content: Tensor, size: tuple[int, int] | None) -> int:
        """Visual tokens that the decoder reads of what stands at a mark."""
        side = self.config.patches_per_side
        if size is None:
            grid = min(self.config.video_grid, side)
            frames = remembered_frames(self.config, len(content)) // self.config.temporal_ratio
            return max(1, min(self.config.max_kept_frames, frames)) * (len(self._picks(0, grid, grid)) + 1)
        base = len(self._picks(0, side, side))
        if len(content) == 1:
            return base + 1
        tiles = torch.empty(len(content) - 1, side**2, 1, device="meta")
        height, width, _ = assemble_grid(tiles, size, self.config).shape
        picks = self._picks(1, height, width)
        return base + len(picks) + len((picks // width).unique())  # a newline for each row that keeps a token

    def _picks(self, number: int, height: int, width: int) -> Tensor:
        return spatial_picks(self.config, torch.tensor([number]), (height, width))[0]

    def _stand_ins(self, number: int) -> Iterator[int]:
        """A number, then those of the next samples of its modality, around the end."""
        kind, count = self.modalities[number], len(self.samples)
        others = ((number + step) % count for step in range(1, count))
        return itertools.chain([number], (other for other in others if self.modalities[other] == kind))


def _modality(sample: Sample) -> str:
    if len(sample.media) > 1:
        return "images"
    return "text" if not sample.media else "image" if sample.media[0].kind == "image" else "video"
