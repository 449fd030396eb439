# SPDX-License-Identifier: Apache-2.0
"""Shards from elsewhere: a folder, a store that fails now and then, and a cache that is never too large."""

import contextlib
import fcntl
import multiprocessing
import time
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from mds_by_hand import numbers, texts
from memories import full_disk

from hourllava.data.shards import ShardDataset, write_shards
from hourllava.errors import DataError


def cached(folder):
    """Bytes of the shards that a cache holds, unfinished ones included."""
    sizes = {}
    with (folder / ".room.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or what goes and what comes while it is counted would both count
        for path in folder.iterdir():
            if ".mds" in path.name and path.suffix != ".lock":
                with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile, and has its own name now
                    sizes[path.name.lstrip(".").removesuffix(".part")] = path.stat().st_size
    return sum(sizes.values())


@pytest.mark.parametrize("remote", ["folder", "store"])
def test_from_elsewhere_in_bounded_room(shards, tmp_path, remote):
    place = shards
    if remote == "store":
        place = f"memory://{tmp_path.name}/shards"
        fsspec.filesystem("memory").put(f"{shards}/", f"/{tmp_path.name}/shards/", recursive=True)
    cache, limit = tmp_path / "cache", 5000
    dataset = ShardDataset(cache, place, cache_limit=limit, shuffle_seed=3)
    seen = []
    for found in dataset:
        seen += numbers([found])
        assert cached(cache) <= limit
    assert sorted(seen) == list(range(100)) != seen
    assert cached(cache) > limit / 2
    # Shards are visited group after group, so that hardly any is fetched twice.
    order = [dataset._ends.searchsorted(number, side="right") for number in seen]
    assert sum(a != b for a, b in pairwise(order)) > 20
    groups = [set(order[:20]), set(order[-20:])]
    assert not groups[0] & groups[1]
    assert numbers(ShardDataset(tmp_path / "all", place)) == list(range(100))
    assert cached(tmp_path / "all") == cached(shards)
    # A cache that is there already is used.
    (tmp_path / "all" / "index.json").touch()
    stamps = {path: path.stat().st_ino for path in (tmp_path / "all").glob("*.mds")}
    assert numbers(ShardDataset(tmp_path / "all", place)) == list(range(100))
    assert {path: path.stat().st_ino for path in stamps} == stamps


def _read_all(shards, cache, limit, seed, told):
    dataset = ShardDataset(cache, shards, cache_limit=limit, shuffle_seed=seed)
    largest = 0
    for _ in dataset:
        largest = max(largest, cached(cache))
    told.send((dataset.taken, largest))


def test_processes_share_a_cache(shards, tmp_path):
    context, pipes, limit = multiprocessing.get_context("fork"), [], 5000
    (tmp_path / "cache").mkdir()
    for seed in range(4):
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=_read_all, args=(shards, tmp_path / "cache", limit, seed, sender)).start()
        sender.close()
        pipes.append(receiver)
    for taken, largest in [pipe.recv() for pipe in pipes]:
        assert taken == 100
        assert 0 < largest <= limit


@pytest.mark.parametrize("limit", [None, 5000])
def test_a_part_that_a_killed_process_left(shards, tmp_path, limit):
    cache = tmp_path / "cache"
    cache.mkdir()
    for shard in shards.glob("*.mds"):
        (cache / f".{shard.name}.part").write_bytes(b"torn" * 100)
    assert numbers(ShardDataset(cache, shards, limit)) == list(range(100))
    assert limit is not None or not list(cache.glob(".*.part"))


class FlakyFiles:
    """A store that fails now and then."""

    def __init__(self, folder, failures):
        self.folder, self.failures = folder, failures

    def cat_file(self, path):
        self.fail()
        return Path(path).read_bytes()

    def open(self, path, mode):
        self.fail()
        return Path(path).open(mode)

    def fail(self):
        if self.failures:
            self.failures -= 1
            raise TimeoutError("too slow")


def test_a_store_that_fails(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files = FlakyFiles(shards, 2)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (files, address))
    dataset = ShardDataset(tmp_path / "cache", str(shards))
    files.failures = 2
    assert dataset[50].sample.id == "id 50"
    files.failures = 3
    with pytest.raises(DataError, match=r"shard.00000.mds: it cannot be fetched \(TimeoutError: too slow\)"):
        dataset[0]
    assert dataset[0].sample.id == "id 0"


def test_bad_remotes(shards, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="there is no such file"):
        ShardDataset(cache, tmp_path / "absent")
    with pytest.raises(DataError, match="fsspec cannot open it"):
        ShardDataset(cache, "nowhere://bucket/shards")
    with pytest.raises(DataError, match="the cache may hold 100 bytes, and shard"):
        ShardDataset(cache, shards, cache_limit=100)
    write_shards(texts(7), tmp_path / "others")
    with pytest.raises(DataError, match="keeps other shards than"):
        ShardDataset(cache, tmp_path / "others")
    dataset = ShardDataset(tmp_path / "second", shards)
    damaged, short, gone = sorted(shards.glob("*.mds"))[:3]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-5])
    gone.unlink()
    firsts = [0, *dataset._ends[:2].tolist()]
    for number, path, why in zip(
        firsts, (damaged, short, gone), ("sha256 differs", "bytes, and", "no such"), strict=True
    ):
        for local in (dataset, ShardDataset(shards)):
            with pytest.raises(DataError, match=why) as caught:
                local[number]
            assert str(path) in str(caught.value)
    assert len(list((tmp_path / "second").glob("*.mds"))) == 0


def test_full_disk_while_fetching(shards, tmp_path):
    dataset = ShardDataset(tmp_path / "cache", shards)
    with full_disk(100), pytest.raises(DataError, match=r"cannot be written.*free some space"):
        dataset[0]
    assert cached(tmp_path / "cache") == 0
    assert dataset[0].sample.id == "id 0"
