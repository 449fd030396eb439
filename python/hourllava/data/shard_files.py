# SPDX-License-Identifier: Apache-2.0
"""Where shards are: a folder, or an object store behind a folder that keeps only as many of them as it may."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from hourllava.errors import DataError

from .mds import GET_AGAIN, INDEX, Shard, check_whole, read_index, unpacked, write_whole

ATTEMPTS = 3
PIECE = 1 << 20  # bytes read from a store at a time


class ShardFiles:
    """The shards of a data set, opened one at a time; every shard's hash is checked when a process first opens it.

    A compressed shard is unpacked once, into the folder, as one from elsewhere is fetched; what is unpacked is kept.
    Several processes may share the folder of a remote data set: each shard is fetched by one of them, and what makes
    room is the shard that has not been read for longest.

    Args:
        local: the folder of the shards, or where those of `remote` are kept for a while.
        remote: a folder, or any address that fsspec knows: s3://bucket/folder, gs://..., https://...
        cache_limit: bytes that may be kept of it; None is no limit.

    Raises:
        DataError: there is no index, it is damaged, the folder holds something else, or a shard is over the limit.
    """

    def __init__(
        self, local: str | os.PathLike[str], remote: str | os.PathLike[str] | None, cache_limit: int | None
    ) -> None:
        self.local = Path(local)
        self.remote = None if remote is None else os.fspath(remote)
        self.cache_limit = cache_limit
        self._sound: set[str] = set()  # whose hashes were checked
        self.shards = read_index(self._local_index() if self.remote is None else self._remote_index(), self._index)
        largest = max(self.shards, key=lambda shard: shard.size)
        if self.remote is not None and cache_limit is not None and largest.size > cache_limit:
            why = f"the cache may hold {cache_limit} bytes, and {largest.file} has {largest.size}"
            raise DataError(local, why, "raise cache_limit, or write smaller shards")

    @property
    def _index(self) -> str:
        return str(self.local / INDEX) if self.remote is None else f"{self.remote}/{INDEX}"

    def open(self, shard: Shard) -> BinaryIO:
        """A shard to read from, fetched if need be.

        Raises:
            DataError: it is missing or damaged, or cannot be fetched.
        """
        path = self.local / shard.file
        try:
            file: BinaryIO = path.open("rb")
            if self.remote is not None:
                os.utime(path)  # read last
        except FileNotFoundError as error:
            if self.remote is None and not shard.packed:
                raise DataError(path, "there is no such file, but the index lists it", "get it again") from error
            file = self._fetch(shard, path)
        except OSError as error:
            raise DataError(path, f"it cannot be read ({error.strerror})", "check its permissions") from error
        if shard.file not in self._sound:
            try:
                check_whole(file, shard)
            except BaseException:
                file.close()
                raise
            self._sound.add(shard.file)
        return file

    def _local_index(self) -> bytes:
        try:
            return (self.local / INDEX).read_bytes()
        except OSError as error:
            unfinished = any(self.local.glob("*.mds")) if self.local.is_dir() else False
            why = f"there is no {INDEX}" + (": the shards were not written to the end" if unfinished else "")
            raise DataError(self.local, why, "write the shards again, or name the folder that has it") from error

    def _remote_index(self) -> bytes:
        files, root = self._store()
        data = self._tried(lambda: files.cat_file(f"{root}/{INDEX}"), self._index)
        held = self.local / INDEX
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            with self._locked("index"):
                if not held.exists():
                    write_whole(held, [data])
                elif held.read_bytes() != data:
                    raise DataError(
                        self.local, f"it keeps other shards than {self.remote}", "empty it, or name another"
                    )
        except OSError as error:
            raise DataError(self.local, f"it cannot be written ({error.strerror})", "choose another place") from error
        return data

    def _fetch(self, shard: Shard, path: Path) -> BinaryIO:
        """Fetch a shard, unless another process just has, and open it: once open, nobody can take it away."""
        part = _part(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(shard.file):
                with contextlib.suppress(FileNotFoundError):
                    return path.open("rb")
                self._make_room(shard, part)
                try:
                    self._tried(lambda: self._download(shard, part), self._source(shard))
                    file = part.open("rb")
                    self._check_fetched(file, shard)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
                return file
        except OSError as error:
            todo = "free some space, or lower cache_limit"
            raise DataError(path, f"it cannot be written ({error.strerror})", todo) from error

    def _check_fetched(self, file: BinaryIO, shard: Shard) -> None:
        try:
            check_whole(file, shard)
        except DataError as error:
            file.close()
            raise DataError(self._source(shard), error.why, error.todo) from error
        self._sound.add(shard.file)

    def _download(self, shard: Shard, part: Path) -> None:
        files, root = self._store()
        name = f"{root}/{shard.packed or shard.file}"
        with files.open(name, "rb") as held, part.open("r+b") as target:
            source = unpacked(held, shard.compression) if shard.packed else held
            while piece := source.read(PIECE):
                if target.tell() + len(piece) > shard.size:
                    raise DataError(name, f"it holds more than the {shard.size} bytes of the index", GET_AGAIN)
                try:
                    target.write(piece)
                except OSError as error:
                    raise _DiskError(error) from error
            target.truncate()

    def _make_room(self, shard: Shard, part: Path) -> None:
        """Reserve the room of a shard, by a file of its size, and delete what has not been read for longest."""
        while True:
            with self._locked("room"):
                part.unlink(missing_ok=True)  # of a process that was killed
                held = sorted(self._held(), key=lambda found: found[0])
                excess = sum(size for _, size, _ in held) + shard.size - (self.cache_limit or float("inf"))
                for _, size, path in held:
                    if excess > 0 and self._delete(path):
                        excess -= size
                if excess <= 0:
                    with part.open("wb") as file:
                        file.truncate(shard.size)
                    return
            time.sleep(0.02)  # others are fetching; what they have fetched can go

    def _held(self) -> Iterator[tuple[float, int, Path]]:
        """When each file of the cache was read last, its size, and its path."""
        for shard in self.shards:
            path = self.local / shard.file
            for file in (
                _part(path),
                path,
            ):  # what is renamed meanwhile counts twice, not never
                with contextlib.suppress(FileNotFoundError):
                    found = file.stat()
                    yield found.st_mtime, found.st_size, file

    def _delete(self, path: Path) -> bool:
        """Delete a file of the cache, unless another process is writing it."""
        if path.suffix == ".part":
            name = (path.parent / path.name[1:].removesuffix(".part")).relative_to(self.local).as_posix()
            with self._lock_file(name).open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                if not path.exists():
                    return False  # it is finished, takes as much room, and has its own name
                path.unlink()
        path.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        """Alone among all processes that use the folder, as far as `what` goes."""
        with self._lock_file(what).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock_file(self, what: str) -> Path:
        return self.local / f".{what.replace('/', '_')}.lock"

    def _source(self, shard: Shard) -> str:
        """Where a shard comes from."""
        return f"{self.local if self.remote is None else self.remote}/{shard.packed or shard.file}"

    def _store(self) -> tuple[Any, str]:
        if self.remote is None:
            return fsspec.filesystem("file"), os.fspath(self.local)
        try:
            return fsspec.core.url_to_fs(self.remote)  # kept by fsspec, one for each process
        except (ImportError, ValueError) as error:
            todo = "install what it needs, for s3:// pip install 'hourllava[streaming]'"
            raise DataError(self.remote, f"fsspec cannot open it ({error})", todo) from error

    def _tried(self, read: Any, what: str) -> Any:
        """What a read of the store gives, at the third attempt at the latest."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read()
            except FileNotFoundError as error:
                raise DataError(what, "there is no such file", "check the address") from error
            except (DataError, _DiskError):
                raise
            except Exception as error:  # what a store raises is its own affair
                if attempt == ATTEMPTS:
                    why = f"it cannot be fetched ({type(error).__name__}: {error})"
                    raise DataError(what, why, "check the address, the network and your rights") from error
                time.sleep(attempt)
        raise AssertionError("unreachable")


def _part(path: Path) -> Path:
    """Where a shard is while it is being fetched."""
    return path.with_name(f".{path.name}.part")


class _DiskError(OSError):
    """The disk is at fault and not the store."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
