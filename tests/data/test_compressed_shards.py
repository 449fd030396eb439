# SPDX-License-Identifier: Apache-2.0
"""Shards that others have compressed: unpacked once, whole or not at all, and never more than the index says."""

import bz2
import gzip
import json
import shutil
import sys

import pytest
from mds_by_hand import numbers

from hourllava.data.shards import ShardDataset
from hourllava.errors import DataError


def zstd(data):
    zstandard = pytest.importorskip("zstandard", reason="NOT TESTED: zstandard is not installed")
    return zstandard.ZstdCompressor(level=3).compress(data)


PACK = {"zstd:3": zstd, "gz": gzip.compress, "bz2:9": bz2.compress}


def pack(folder, compression):
    """Compress a folder's shards, as the format's own writer lays them out."""
    name = compression.partition(":")[0]
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        path = folder / entry["raw_data"]["basename"]
        target = path.with_name(f"{path.name}.{name}")
        target.write_bytes(PACK[compression](path.read_bytes()))
        path.unlink()
        entry["compression"] = compression
        entry["zip_data"] = {"basename": target.name, "bytes": target.stat().st_size, "hashes": {}}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("compression", PACK)
def test_compressed_shards_are_read(shards, tmp_path, compression):
    plain = numbers(ShardDataset(shards, shuffle_seed=1))
    pack(shards, compression)
    cache = tmp_path / "cache"
    assert numbers(ShardDataset(cache, shards, cache_limit=5000)) == list(range(100))
    assert 0 < sum(path.stat().st_size for path in cache.glob("*.mds")) <= 5000
    assert not list(shards.glob("*.mds"))  # what comes from elsewhere is unpacked in the cache
    assert numbers(ShardDataset(shards, shuffle_seed=1)) == plain
    stamps = {path: path.stat().st_mtime_ns for path in shards.glob("*.mds")}
    assert len(stamps) > 10
    assert numbers(ShardDataset(shards, shuffle_seed=1)) == plain
    assert {path: path.stat().st_mtime_ns for path in shards.glob("*.mds")} == stamps


@pytest.mark.parametrize("compression", PACK)
def test_damaged_ones(shards, compression, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    pack(shards, compression)
    first, second, third, fourth = sorted(shards.glob("shard.*"))[:4]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.write_bytes(PACK[compression](bytes(1 << 24)))
    third.write_bytes(b"noise" * 20)
    fourth.unlink()
    dataset = ShardDataset(shards)
    why = ["cannot be fetched|bytes, and", "holds more than the", "cannot be fetched", "there is no such file"]
    for number, path, reason in zip([0, *dataset._ends[:3].tolist()], (first, second, third, fourth), why, strict=True):
        with pytest.raises(DataError, match=reason) as caught:
            dataset[number]
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(shards.glob("*.mds"))
    assert not list(shards.glob(".*.part"))
    assert numbers([dataset[99]]) == [99]


def test_zstandard_is_named_where_it_is_missing(shards, monkeypatch):
    shutil.copytree(shards, shards.with_name("plain"))
    pack(shards, "gz")
    index = (shards / "index.json").read_text().replace('"compression": "gz"', '"compression": "zstd"')
    (shards / "index.json").write_text(index)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"zstd need zstandard; .*pip install 'hourllava\[streaming\]'"):
        ShardDataset(shards)[0]
    assert ShardDataset(shards.with_name("plain"))[0].sample.id == "id 0"
