# SPDX-License-Identifier: Apache-2.0
"""Values of MDS columns: what can be decoded safely is, and what would have to be unpickled is refused."""

import io
import json
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from hourllava.errors import DataError

_SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
# What an ndarray column says of its dtype, if its encoding does not.
_DTYPES = {
    **{8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32"},
    **{64: "uint64", 65: "int64", 66: "float64"},
}

_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, struct.error, OSError)


def decode(encoding: str, data: bytes, what: object) -> Any:
    """A value of a column.

    Images come as PIL images that are not decoded yet. `jpeg_list`, the original's encoding of several images, is a
    pickled list of byte strings: it is read by a parser that knows nothing but lists and byte strings.

    Args:
        encoding: as the index names it, with its parameters.
        data: the bytes.
        what: the sample and the column, for messages.

    Raises:
        DataError: the encoding is not known or not safe, or the bytes are damaged.
    """
    name, _, parameters = encoding.partition(":")
    if name == "pkl":
        raise DataError(what, "it is pickled, and could run anything when it is loaded", "write it in another encoding")
    if name not in _DECODERS:
        known = ", ".join(sorted(_DECODERS))
        raise DataError(what, f"its encoding {encoding!r} is not known", f"write it as one of {known}")
    try:
        return _DECODERS[name](data, parameters)
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(what, f"its {name} value is damaged", "get the shard again, or write it again") from error


def _ndarray(data: bytes, parameters: str) -> np.ndarray:
    given = parameters.split(":") if parameters else []
    place = 0
    if given:
        dtype = given[0]
    else:
        dtype, place = _DTYPES[data[0]], 1
    if dtype not in _SCALARS:
        raise ValueError(dtype)
    if len(given) > 1:
        shape = [int(size) for size in given[1].split(",")]
    else:
        axes, width = data[place] >> 2, 1 << (data[place] & 3)
        numbers = data[place + 1 : place + 1 + axes * width]
        shape = np.frombuffer(numbers, f"<u{width}").tolist()
        place += 1 + axes * width
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=place).reshape(shape)


def _scalar(dtype: str) -> Callable[[bytes, str], Any]:
    def read(data: bytes, _: str) -> Any:
        (value,) = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
        return value.item()

    return read


def _image(*formats: str) -> Callable[[bytes, str], Image.Image]:
    def read(data: bytes, _: str) -> Image.Image:
        return Image.open(io.BytesIO(data), formats=formats)

    return read


def _raw_image(data: bytes, _: str) -> Image.Image:
    width, height, length = struct.unpack_from("<3I", data)
    if width * height > 8 * len(data):  # no mode has more than eight pixels in a byte
        raise ValueError("it says that it is larger than it is")
    return Image.frombytes(data[12 : 12 + length].decode(), (width, height), data[12 + length :])


def _jpeg_list(data: bytes, _: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(item), formats=("JPEG",)) for item in pickled_bytes(data)]


def pickled_bytes(data: bytes) -> list[bytes]:
    """The byte strings of a pickled list of them, without unpickling.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    mark = object()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(data):
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                stack.append(mark)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                start = max(place for place, item in enumerate(stack) if item is mark)
                stack[start - 1].extend(stack[start + 1 :])
                del stack[start:]
            case "STOP":
                break
            case other:
                raise ValueError(f"{other} has no place in a list of byte strings")
    if len(stack) != 1 or not isinstance(stack[0], list) or not all(isinstance(item, bytes) for item in stack[0]):
        raise ValueError("it is no list of byte strings")
    return stack[0]


_DECODERS: dict[str, Callable[[bytes, str], Any]] = {
    "bytes": lambda data, _: data,
    "str": lambda data, _: data.decode(),
    "json": lambda data, _: json.loads(data),
    "int": _scalar("int64"),
    "str_int": lambda data, _: int(data.decode()),
    "str_float": lambda data, _: float(data.decode()),
    "ndarray": _ndarray,
    "jpeg": _image("JPEG"),
    "png": _image("PNG"),
    "pil": _raw_image,
    "jpeg_list": _jpeg_list,
    **{dtype: _scalar(dtype) for dtype in _SCALARS},
}
