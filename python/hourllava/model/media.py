# SPDX-License-Identifier: Apache-2.0
"""Images and videos as people hand them over: found in chat messages, given out to prompts, read from files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hourllava.errors import InputError
from hourllava.video import open_video, resize_frames

from .configuration import HourLlavaConfig
from .images import square_image, tile_image
from .prompt import IMAGE

_CHUNK = 64  # frames of a video that are decoded at a time


@dataclass(frozen=True)
class Media:
    """What an `<image>` mark stands for."""

    kind: Literal["image", "video"]
    source: Any


def check_messages(messages: Any) -> None:
    """Raise InputError unless these are messages of a chat."""
    todo = 'give [{"role": "user", "content": text or [{"type": ..., ...}, ...]}, ...]'
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("messages", f"they are {messages!r}"[:80], todo)
    for number, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        content = fields.get("content")
        parts = content if isinstance(content, list | tuple) else []
        sound = isinstance(content, str | list | tuple) and all(isinstance(part, dict) for part in parts)
        if not sound or not isinstance(fields.get("role"), str):
            why = "its content is neither text nor a list of parts" if "role" in fields else "it has no role"
            raise InputError(f"message {number}", why, todo)


def media_of_messages(messages: Sequence[dict[str, Any]]) -> list[Media]:
    """The images and videos of a conversation, in reading order.

    Raises:
        InputError: a part of a message holds neither text nor an image nor a video.
    """
    found = []
    for message in messages:
        content = message["content"]
        for part in [] if isinstance(content, str) else content:
            kind = part.get("type", "").removesuffix("_url")
            if kind == "text":
                continue
            names = (kind, f"{kind}_url", "url", "path")
            source = next((part[name] for name in names if part.get(name) is not None), None)
            if isinstance(source, dict):  # OpenAI's {"type": "video_url", "video_url": {"url": ...}}
                source = source.get("url")
            if kind not in ("image", "video") or source is None:
                todo = 'give {"type": "text" | "image" | "video", ...} with the value under the same name'
                raise InputError("message", f"a part of type {part.get('type')!r} cannot be used", todo)
            found.append(Media(kind, source))
    return found


def distribute(prompts: Sequence[str], images: Any, videos: Any) -> list[list[Media]]:
    """Give images and videos to the prompts whose marks they stand for.

    Args:
        images, videos: one, or all of a batch in reading order, or one list a prompt; see `HourLlavaProcessor`.

    Raises:
        InputError: there are not as many as marks, or it cannot be told which mark is whose.
    """
    given = {"image": _nested(images, _is_image, prompts), "video": _nested(videos, _is_video, prompts)}
    media = []
    for number in range(len(prompts)):
        seen = [Media(kind, source) for kind in ("image", "video") for source in given[kind][number]]  # type: ignore[arg-type]
        if len({medium.kind for medium in seen}) > 1:
            todo = "give a prompt one video or some images, or use chat messages"
            raise InputError(f"prompt {number}", "it is given images and videos", todo)
        media.append(seen)
    return media


def read_image(source: Any, config: HourLlavaConfig, shares_prompt: bool, name: str) -> tuple[Tensor, tuple[int, int]]:
    """Tiles (n, 3, S, S) uint8 of an image, one only if it shares its prompt with others, and its (height, width).

    Raises:
        InputError: it cannot be read or seen.
    """
    if isinstance(source, str | os.PathLike):
        path = _local(source, name)
        try:
            with Image.open(path) as opened:
                source = ImageOps.exif_transpose(opened).convert("RGB")  # upright, as a camera means it
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL has them
            raise InputError(path, f"it is no image that can be read ({error})", "give a PNG or JPEG file") from error
    elif _is_pil(source):
        source = ImageOps.exif_transpose(source)
    return (square_image if shares_prompt else tile_image)(_to_channels_first(source), config, name)


def read_video(source: Any, size: int, name: str) -> tuple[Tensor, float]:
    """Frames (T, 3, size, size) uint8 of a video, one a second, and the seconds that it lasts.

    Raises:
        InputError: the frames are no pictures.
        VideoError: the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        reader = open_video(_local(source, name))
        return torch.cat([chunk.frames for chunk in reader.chunks(size, _CHUNK)]), float(reader.duration)
    pictures = [_to_channels_first(picture) for picture in source]
    frames = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) if _is_pil(p) else p for p in pictures]
    odd = [frame for frame in frames if frame.dtype != torch.uint8 or frame.dim() != 3 or len(frame) != 3]
    if odd or not frames:
        why = f"a frame is {odd[0].dtype} {tuple(odd[0].shape)}" if odd else "it holds no frame"
        raise InputError(name, why, "give uint8 RGB frames (T, 3, H, W)")
    return torch.cat([resize_frames(frame[None], size) for frame in frames]), float(len(frames))


def _local(source: str | os.PathLike[str], name: str) -> Path:
    text = os.fspath(source)
    if text.startswith("file://"):
        plain = Path(text.removeprefix("file://"))
        return plain if plain.exists() else Path(unquote(os.fspath(plain)))  # as `Path.as_uri` writes a space
    if "://" in text:
        raise InputError(name, f"{text} is on the net", "download it and give the file")
    return Path(text)


def _to_channels_first(picture: Any) -> Any:
    """Arrays are (H, W, 3), tensors (3, H, W)."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) if isinstance(picture, np.ndarray) else picture


def _nested(given: Any, is_one: Any, prompts: Sequence[str]) -> list[list[Any]]:
    """What is given, as one list a prompt."""
    if given is None:
        return [[] for _ in prompts]
    if is_one(given):
        given = [given]
    if given and all(is_one(one) for one in given):
        rest = iter(given)
        nested = [[one for _, one in zip(range(prompt.count(IMAGE)), rest)] for prompt in prompts]  # noqa: B905
        left = len(list(rest))
        if left:
            raise InputError("prompts", f"{left} images or videos are left over", f"give each an {IMAGE} mark")
        return nested
    if len(given) != len(prompts):
        raise InputError("prompts", f"there are {len(prompts)} for {len(given)} lists", "give one list a prompt")
    return [[one] if is_one(one) else list(one) for one in given]


def _is_pil(x: Any) -> bool:
    return isinstance(x, Image.Image)


def _is_image(x: Any) -> bool:
    return _is_pil(x) or isinstance(x, str | os.PathLike) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 3)


def _is_video(x: Any) -> bool:
    if isinstance(x, str | os.PathLike) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 4):
        return True
    return isinstance(x, list | tuple) and bool(x) and all(_is_image(f) and not isinstance(f, str | Path) for f in x)
