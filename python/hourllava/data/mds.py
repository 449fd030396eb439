# SPDX-License-Identifier: Apache-2.0
"""The MDS format of mosaicml-streaming, read and written directly.

`index.json` lists the shards. A shard is `uint32 n, uint32 offsets[n + 1]`, its columns as JSON, and n samples; a
sample is the `uint32` sizes of those of its columns whose size varies, and then the columns, sorted by name. Numbers
are little-endian, and a shard may be compressed as a whole. The library itself asks for transformers before 5 and numpy
before 2.2, so that it cannot be installed beside this package; what is written here it reads, and the other way round.
Nothing is ever unpickled.
"""

import bz2
import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from hourllava.errors import DataError

INDEX = "index.json"
VERSION = 2
LARGEST = 2**32 - 1  # bytes of a shard, whose offsets are uint32
HASH = "sha256"
COMPRESSIONS = ("zstd", "gz", "bz2")
GET_AGAIN = "get it again from where it came from, or write it again"


@dataclass(frozen=True)
class Column:
    """One column of a shard."""

    name: str
    encoding: str
    size: int | None  # bytes, if it is the same for every sample


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard."""

    file: str  # relative to the index, with slashes
    size: int  # bytes
    samples: int
    columns: tuple[Column, ...]
    hashes: tuple[tuple[str, str], ...]  # name of the algorithm, hexadecimal digest
    packed: str = ""  # the file that it is compressed to, relative to the index, if it is
    compression: str = ""  # of that file

    @property
    def header_size(self) -> int:
        """Bytes of the numbers at the start."""
        return 4 * (self.samples + 2)


def read_index(data: bytes, what: object) -> list[Shard]:
    """The shards that an `index.json` lists.

    Args:
        data: its contents.
        what: its place, for messages.

    Raises:
        DataError: it is damaged, of another version, lists files outside its folder, or shards compressed in a way
            that is not known.
    """
    try:
        index = json.loads(data)
        if index["version"] != VERSION:
            raise DataError(what, f"its version {index['version']} is not {VERSION}", "write the shards again")
        shards = [_shard(entry, what) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(what, "it is damaged, or no index of MDS shards", GET_AGAIN) from error
    if not any(shard.samples for shard in shards):
        raise DataError(what, "it lists no sample", "write the shards again")
    return shards


def _shard(entry: dict[str, Any], what: object) -> Shard:
    if entry["format"] != "mds":
        raise DataError(what, f"its shards are {entry['format']}, not mds", "write them as MDS")
    compression = str(entry.get("compression") or "").partition(":")[0]  # what follows is its level
    if compression and compression not in COMPRESSIONS:
        todo = f"write them uncompressed, or with one of {', '.join(COMPRESSIONS)}"
        raise DataError(what, f"its shards are compressed with {compression}", todo)
    raw = entry["raw_data"]
    file = _file(raw["basename"], what)
    packed = _file(entry["zip_data"]["basename"], what) if compression else ""
    names, encodings, sizes = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    columns = tuple(Column(str(n), str(e), s or None) for n, e, s in zip(names, encodings, sizes, strict=True))
    if not all(column.size is None or (isinstance(column.size, int) and column.size > 0) for column in columns):
        raise ValueError("sizes")
    hashes = tuple(sorted(raw["hashes"].items()))
    shard = Shard(file, int(raw["bytes"]), int(entry["samples"]), columns, hashes, packed, compression)
    if shard.samples < 0 or not shard.header_size <= shard.size <= LARGEST:
        raise ValueError("bytes")
    return shard


def _file(name: str, what: object) -> str:
    file = PurePosixPath(name)
    if file.is_absolute() or ".." in file.parts or "\\" in str(file) or not file.name or file.name == INDEX:
        raise DataError(what, f"it lists {file}, outside its folder", "do not use it: it may be hostile")
    return str(file)


def unpacked(file: BinaryIO, compression: str) -> BinaryIO:
    """What is in a compressed file, to be read from its beginning.

    Raises:
        DataError: zstandard is not installed. Reading raises what the library for it raises where it is damaged.
    """
    if compression == "gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if compression == "bz2":
        return bz2.BZ2File(file)  # type: ignore[return-value]
    try:
        import zstandard
    except ImportError as error:
        todo = "install the extra for it: pip install 'hourllava[streaming]'"
        raise DataError("shards", "those compressed with zstd need zstandard", todo) from error
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def read_offsets(file: BinaryIO, shard: Shard) -> np.ndarray:
    """Where each sample of a shard begins and the last ends, (n + 1,) int64.

    Raises:
        DataError: the shard is not as the index says.
    """
    file.seek(0)
    count, *numbers = np.frombuffer(file.read(shard.header_size), "<u4").tolist()
    offsets = np.array([shard.header_size, *numbers, shard.size], dtype=np.int64)
    if count != shard.samples or len(numbers) != count + 1 or (np.diff(offsets) < 0).any():
        raise DataError(file.name, "its table of samples is damaged", GET_AGAIN)
    return offsets[1:-1]


def read_row(file: BinaryIO, shard: Shard, offsets: np.ndarray, number: int) -> dict[str, bytes]:
    """The columns of one sample, not decoded.

    Raises:
        DataError: the sample is damaged.
    """
    file.seek(offsets[number])
    left = int(offsets[number + 1] - offsets[number])
    varying = sum(column.size is None for column in shard.columns)
    given = iter(np.frombuffer(file.read(min(4 * varying, left // 4 * 4)), "<u4").tolist())
    row = {}
    try:
        sizes = [next(given) if column.size is None else column.size for column in shard.columns]
    except StopIteration:
        sizes = []
    if not sizes or 4 * varying + sum(sizes) != left:
        raise DataError(f"{file.name} sample {number}", "it is damaged", GET_AGAIN)
    for column, size in zip(shard.columns, sizes, strict=True):
        row[column.name] = file.read(size)
        if len(row[column.name]) != size:
            raise DataError(f"{file.name} sample {number}", "it is damaged", GET_AGAIN)
    return row


def check_whole(file: BinaryIO, shard: Shard) -> None:
    """Compare a shard with the index: its size, and those digests that can be computed.

    Raises:
        DataError: one differs.
    """
    size = os.fstat(file.fileno()).st_size
    if size != shard.size:
        raise DataError(file.name, f"it has {size} bytes, and {shard.size} by the index", GET_AGAIN)
    for name, digest in shard.hashes:
        if name not in hashlib.algorithms_guaranteed or name.startswith("shake"):  # xxhash is not Python's
            continue
        found = hashlib.new(name)
        file.seek(0)
        while piece := file.read(1 << 20):
            found.update(piece)
        if found.hexdigest() != digest:
            raise DataError(file.name, f"it is damaged ({name} differs)", GET_AGAIN)


class ShardWriter:
    """Writes samples to shards of a folder, and at last the index that makes them count.

    Args:
        folder: made if it is not there; must hold no index.
        columns: name and encoding of each column.
        size_limit: bytes after which a shard is full; a sample that is larger has one of its own.

    Raises:
        DataError: the folder holds shards already, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], columns: dict[str, str], size_limit: int) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            raise DataError(folder, "it holds shards already", "choose a new folder, or remove that one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(folder, error) from error
        self._columns = dict(sorted(columns.items()))
        self._limit = min(size_limit, LARGEST)
        self._config = json.dumps(self._description(), sort_keys=True).encode()
        self._rows: list[bytes] = []
        self._size = self._empty_size
        self._entries: list[dict[str, Any]] = []

    @property
    def _empty_size(self) -> int:
        return 8 + len(self._config)

    def write(self, row: dict[str, bytes], what: object) -> None:
        """Add a sample.

        Args:
            row: the columns, encoded.
            what: the sample, for messages.

        Raises:
            DataError: the sample is larger than any shard may be, or the disk is full.
        """
        values = [row[name] for name in self._columns]
        data = b"".join([np.array([len(value) for value in values], "<u4").tobytes(), *values])
        if self._empty_size + 4 + len(data) > LARGEST:
            raise DataError(what, f"it takes {len(data) / 1e9:.1f} GB, and a shard holds 4.3", "let it hold a path")
        if self._rows and self._size + 4 + len(data) > self._limit:
            self._finish_shard()
        self._rows.append(data)
        self._size += 4 + len(data)

    def close(self) -> None:
        """Write what is left, and the index.

        Raises:
            DataError: no sample was written, or the disk is full.
        """
        if self._rows:
            self._finish_shard()
        if not self._entries:
            raise DataError(self.folder, "no sample was written", "give at least one")
        index = json.dumps({"version": VERSION, "shards": self._entries}, sort_keys=True).encode()
        write_whole(self.folder / INDEX, [index])

    def _finish_shard(self) -> None:
        head = 4 * (len(self._rows) + 2) + len(self._config)
        offsets = head + np.cumsum([0, *map(len, self._rows)], dtype=np.int64)
        pieces = [np.array([len(self._rows), *offsets], "<u4").tobytes(), self._config, *self._rows]
        name = f"shard.{len(self._entries):05}.mds"
        digest = write_whole(self.folder / name, pieces)
        raw = {"basename": name, "bytes": int(offsets[-1]), "hashes": {HASH: digest}}
        self._entries.append(self._description() | {"samples": len(self._rows), "raw_data": raw, "zip_data": None})
        self._rows, self._size = [], self._empty_size

    def _description(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "format": "mds",
            "compression": None,
            "hashes": [HASH],
            "size_limit": self._limit,
            "column_names": list(self._columns),
            "column_encodings": list(self._columns.values()),
            "column_sizes": [None for _ in self._columns],
        }


def write_whole(path: Path, pieces: Sequence[bytes]) -> str:
    """Write a file that is there whole or not at all, and return its digest.

    Raises:
        DataError: it cannot be written; what the path held before is there still.
    """
    temporary = path.with_name(f".{path.name}.part")
    digest = hashlib.new(HASH)
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    return digest.hexdigest()


def _not_written(path: object, error: OSError) -> DataError:
    return DataError(path, f"it cannot be written ({error.strerror})", "free some space, or choose another place")
