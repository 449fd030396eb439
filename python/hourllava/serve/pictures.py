# SPDX-License-Identifier: Apache-2.0
"""Pictures that clients send or name, checked before they are decoded."""

import binascii
import re
import tempfile
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hourllava.errors import InputError, SourceError

from .fetching import fetch
from .files import Stop
from .sources import SourcePolicy, identify

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000  # a few bytes may unfold to any number of them


def load_pictures(messages: Sequence[dict[str, Any]], policy: SourcePolicy) -> list[dict[str, Any]]:
    """Chat messages with their images as the model takes them.

    Args:
        messages: whose images are named: `{"type": "image", "url": ...}`, a data: URL or what the policy allows.
        policy: where images may be taken from.

    Raises:
        InputError: an image is none that can be read.
        SourceError: it may not be had, or cannot.
    """
    return [message | {"content": [_loaded(part, policy) for part in message["content"]]} for message in messages]


def _loaded(part: dict[str, Any], policy: SourcePolicy) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    url = part["url"]
    what = "image" if url[:5].lower() == "data:" else url
    return {"type": "image", "image": decode_picture(_bytes_of(url, policy), what)}


def _bytes_of(url: str, policy: SourcePolicy) -> bytes:
    if url[:5].lower() == "data:":
        head = re.match(r"data:image/[\w.+-]+;base64,", url, re.IGNORECASE)
        if head is None:
            raise InputError("image", "its data: URL holds no picture in base64", "write data:image/jpeg;base64,...")
        return _unpacked(url[head.end() :], "image")
    source = identify(url, policy)
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(source, replace(policy, max_bytes=MAX_BYTES), Path(folder) / "picture", Stop())
        try:
            with path.open("rb") as file:
                return file.read(MAX_BYTES)
        except OSError as error:
            raise SourceError(url, f"it cannot be read ({error.strerror})", "check the file's permissions") from error


def decode_picture(data: bytes, what: str) -> Image.Image:
    """An RGB picture, upright, of the bytes of a file.

    Args:
        what: what an error calls it.

    Raises:
        InputError: it is none, of another format, damaged, or too large.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                why = f"it has {picture.width} x {picture.height} pixels"
                raise InputError(what, why, f"give one of at most {MAX_PIXELS} pixels")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(what, "it is no picture that can be read", f"give one as {', '.join(FORMATS)}") from error


def decode_frame(data: str) -> Tensor:
    """A frame uint8 (1, 3, H, W) of a picture in base64.

    Raises:
        InputError: it is no base64, or no picture.
    """
    picture = decode_picture(_unpacked(data, "frame"), "frame")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous()


def _unpacked(text: str, what: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(what, "it is not base64", "encode the bytes of the file, without line breaks") from error
