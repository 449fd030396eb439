# SPDX-License-Identifier: Apache-2.0
"""A sample as a row of a shard, ours and the original's three kinds, with or without what it shows."""

import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hourllava.errors import DataError
from hourllava.memory import Repository, packed_features, unpack_features

from .dataset import Held
from .manifest import Entry
from .original import read_original_features
from .samples import Media, Places, Sample, to_sample

COLUMNS = {"media": "bytes", "sample": "json"}  # safetensors, empty if all media are paths; and everything else
_AGAIN = "get the shard again, or write it again"


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard, with those of its media that the shard holds."""

    sample: Sample
    held: tuple[Held | None, ...]  # of each medium: what the shard holds, or None, and its path says where it is


def to_row(sample: Sample, inside: bool) -> dict[str, bytes]:
    """The columns of a sample, encoded.

    Args:
        inside: hold the features of videos, as they are kept, and the files of images, and not only their paths.

    Raises:
        DataError: a video has no features, or an image cannot be read.
        MemoryFileError: there is no such memory, or it is damaged.
    """
    media: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, medium in enumerate(sample.media):
        note: dict[str, Any] = {"kind": medium.kind, "path": os.path.abspath(medium.path), "name": medium.name}
        note |= {"fps": medium.fps} if medium.kind == "video" else {}
        if inside:
            held, note["seconds"], note["tower"] = _load(medium, sample.id)
            tensors |= {f"{number}.{key}": tensor for key, tensor in held.items()}
        media.append(note)
    about = {"id": sample.id, "turns": sample.turns, "source": sample.source, "stream": sample.stream, "media": media}
    return {"sample": json.dumps(about).encode(), "media": save(tensors) if tensors else b""}


def of_row(row: dict[str, Any], what: str) -> ShardSample:
    """The sample of decoded columns.

    Args:
        what: the row's place, for messages.

    Raises:
        DataError: the row is damaged, or of no kind that is known.
    """
    if row.keys() == COLUMNS.keys():
        try:
            return _of_ours(row)
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise DataError(what, "it is damaged", _AGAIN) from error
    if isinstance(row.get("text"), dict) and row.keys() <= {"text", "image", "video"}:
        return _of_original(row, what)
    todo = f"give shards of {', '.join(COLUMNS)}, or of text with image or video"
    raise DataError(what, f"it has columns {', '.join(row)}", todo)


def _of_ours(row: dict[str, Any]) -> ShardSample:
    about = row["sample"]
    turns = tuple((str(question), str(answer)) for question, answer in about["turns"])
    media = tuple(
        Media(note["kind"], Path(note["path"]), note["name"], float(note.get("fps", 1))) for note in about["media"]
    )
    tensors = load(row["media"]) if row["media"] else {}
    contents: list[Held | None] = []
    for number, note in enumerate(about["media"]):
        packed = {key: tensors[f"{number}.{key}"] for key in ("features", "scales") if f"{number}.{key}" in tensors}
        if packed:
            exact = packed["features"] if packed["features"].is_floating_point() else unpack_features(packed)
            contents.append(Held(exact, float(note["seconds"]), str(note["tower"])))
        elif f"{number}.image" in tensors:
            contents.append(Held(_image(tensors[f"{number}.image"].numpy().tobytes(), note["path"])))
        else:
            contents.append(None)
    return ShardSample(Sample(about["id"], turns, media, about["source"], about["stream"]), tuple(contents))


def _of_original(row: dict[str, Any], what: str) -> ShardSample:
    value = dict(row["text"])
    images = row.get("image", [])
    images = images if isinstance(images, list) else [images]
    if len(images) == 1 and images[0].size == (1, 1):  # stands in rows that show nothing
        images = []
    video = row.get("video")
    if video is None:
        value = {key: item for key, item in value.items() if key not in ("video", "features")}
    value["image"] = [f"{what} image {number}" for number in range(len(images))]
    if video is not None:
        value.setdefault("video", video)
    sample = to_sample(Entry(what, value), Places(Path()))
    if video is not None:
        kind: Literal["features", "video"] = "features" if video.endswith(".pt") else "video"
        medium = replace(sample.media[0], kind=kind, path=Path(video))
        return ShardSample(replace(sample, media=(medium,)), (None,))
    return ShardSample(sample, tuple(map(Held, images)))


def _load(medium: Media, id: str) -> tuple[dict[str, Tensor], float, str]:
    """What a medium's file holds, as tensors, the seconds that it lasts, and the tower that made it, if known."""
    if medium.kind == "image":
        try:
            data = medium.path.read_bytes()
        except OSError as error:
            raise DataError(medium.path, f"it cannot be read ({error.strerror})", "check the path") from error
        _image(data, medium.path)
        return {"image": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, 0.0, ""
    if medium.kind == "video":
        why = f"sample {id} shows it, and there are no features of it"
        raise DataError(medium.path, why, "embed the videos first, and name the repository as the mixture's features")
    if medium.path.suffix == ".pt":
        features, seconds = read_original_features(medium.path)
        return {"features": features.bfloat16()}, seconds, ""
    folder, name = medium.path.parent, medium.path.name
    if not Repository.is_at(folder):
        raise DataError(folder, "there is no repository there", "name one that `hourllava embed` made")
    repository = Repository(folder)
    packed = packed_features(repository, name)
    return packed, float(len(packed["features"])), repository.catalogue.video(name).tower


def _image(data: bytes, what: object) -> Image.Image:
    """An image that is opened and not decoded yet."""
    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(what, "it is no image, or a damaged one", "give an image that opens") from error
