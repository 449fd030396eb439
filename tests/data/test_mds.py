# SPDX-License-Identifier: Apache-2.0
"""The MDS format, byte by byte, and the values of its columns, none of which is ever unpickled."""

import contextlib
import hashlib
import io
import json
import pickle
import struct

import numpy as np
import pytest
from mds_by_hand import Evil, jpeg, write_by_hand, write_index
from PIL import Image

from hourllava.data.encodings import decode, pickled_bytes
from hourllava.data.mds import ShardWriter, check_whole, read_index, read_offsets, read_row
from hourllava.errors import DataError


def rows_of(folder):
    found = []
    for shard in read_index((folder / "index.json").read_bytes(), folder):
        with (folder / shard.file).open("rb") as file:
            check_whole(file, shard)
            offsets = read_offsets(file, shard)
            found += [read_row(file, shard, offsets, number) for number in range(shard.samples)]
    return found


def test_what_others_write_is_read(tmp_path):
    columns = [("b", "bytes", None), ("n", "int", 8), ("a", "str", None)]
    rows = [{"b": b"x" * n, "n": struct.pack("<q", n), "a": b"" if n % 2 else b"word"} for n in range(5)]
    first = write_by_hand(tmp_path, columns, rows[:2], hashes=["sha1", "xxh64"])
    second = write_by_hand(tmp_path, columns, rows[2:], "sub/shard.00000.mds", ["md5"])
    write_index(tmp_path, first, second)
    assert rows_of(tmp_path) == rows


def test_what_is_written_is_laid_out_as_others_do(tmp_path):
    writer = ShardWriter(tmp_path, {"text": "json", "data": "bytes"}, size_limit=1 << 20)
    rows = [{"data": bytes([n]) * n, "text": json.dumps(n).encode()} for n in range(4)]
    for row in rows:
        writer.write(row, "sample")
    writer.close()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["version"] == 2
    (entry,) = index["shards"]
    data = (tmp_path / "shard.00000.mds").read_bytes()
    by_hand = write_by_hand(tmp_path / "hand", [("text", "json", None), ("data", "bytes", None)], rows)
    for key in ("column_names", "column_encodings", "column_sizes", "compression", "format", "version", "zip_data"):
        assert entry[key] == by_hand[key]
    assert entry["raw_data"]["basename"] == "shard.00000.mds"
    assert entry["raw_data"]["bytes"] == len(data)
    assert entry["raw_data"]["hashes"] == {"sha256": hashlib.sha256(data).hexdigest()}
    count, *offsets = struct.unpack_from("<6I", data)
    assert (count, offsets[-1]) == (4, len(data))
    # Between the numbers and the samples stand the columns, as JSON.
    config = json.loads(data[24 : offsets[0]])
    assert config["column_names"] == ["data", "text"]
    for number, row in enumerate(rows):
        sample = data[offsets[number] : offsets[number + 1]]
        sizes = struct.pack("<2I", len(row["data"]), len(row["text"]))
        assert sample == sizes + row["data"] + row["text"]
    assert rows_of(tmp_path) == rows


def test_full_shards_and_large_samples(tmp_path):
    writer = ShardWriter(tmp_path, {"data": "bytes"}, size_limit=1000)
    rows = [{"data": bytes(size)} for size in (300, 300, 300, 5000, 10, 10)]
    for row in rows:
        writer.write(row, "sample")
    writer.close()
    shards = read_index((tmp_path / "index.json").read_bytes(), tmp_path)
    assert [shard.samples for shard in shards] == [2, 1, 1, 2]
    assert all(shard.size <= 1000 for shard in shards if shard.samples != 1)
    assert rows_of(tmp_path) == rows


def test_writing_that_fails(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no sample was written"):
        ShardWriter(tmp_path / "empty", {"data": "bytes"}, 1000).close()
    writer = ShardWriter(tmp_path / "a", {"data": "bytes"}, 1000)
    monkeypatch.setattr("hourllava.data.mds.LARGEST", 4000)
    with pytest.raises(DataError, match=r"s7: it takes 0.0 GB, and a shard holds"):
        writer.write({"data": bytes(5000)}, "s7")
    writer.write({"data": b"1"}, "sample")
    writer.close()
    with pytest.raises(DataError, match="holds shards already"):
        ShardWriter(tmp_path / "a", {"data": "bytes"}, 1000)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        ShardWriter(tmp_path / "file", {"data": "bytes"}, 1000)


def entry(folder, **changes):
    return write_by_hand(folder, [("b", "bytes", None)], [{"b": b"12345"}] * 3) | changes


def raw(basename="shard.00000.mds", size=100):
    return {"basename": basename, "bytes": size, "hashes": {}}


BAD_INDEX = {
    "no json": (b"{", "damaged"),
    "list": (b"[]", "damaged"),
    "version": (b'{"version": 1, "shards": []}', "its version 1 is not 2"),
    "empty": (b'{"version": 2, "shards": []}', "no sample"),
    "format": ({"format": "csv"}, "are csv, not mds"),
    "compressed": ({"compression": "br:11", "zip_data": raw()}, "are compressed with br; .*one of zstd, gz, bz2"),
    "not packed": ({"compression": "zstd"}, "damaged"),
    "packed above": ({"compression": "gz", "zip_data": raw("../shard.00000.mds.gz")}, "outside its folder"),
    "negative": ({"samples": -1}, "damaged"),
    "absolute": ({"raw_data": raw("/etc/passwd")}, "outside its folder"),
    "above": ({"raw_data": raw("../shard.00000.mds")}, "outside its folder"),
    "columns": ({"column_sizes": [None, None]}, "damaged"),
    "size": ({"raw_data": raw(size=10)}, "damaged"),
    "missing": ({"raw_data": None}, "damaged"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_bad_index(tmp_path, name):
    contents, why = BAD_INDEX[name]
    if isinstance(contents, dict):
        contents = json.dumps({"version": 2, "shards": [entry(tmp_path, **contents)]}).encode()
    with pytest.raises(DataError, match=why) as caught:
        read_index(contents, tmp_path / "index.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", range(60))
def test_a_flipped_byte_never_gives_another_shape(tmp_path, place):
    """Without hashes, as the original writes: an error, or as many columns as there are; never a crash."""
    write_index(tmp_path, entry(tmp_path))
    path = tmp_path / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        assert [list(row) for row in rows_of(tmp_path)] == [["b"]] * 3


def test_with_hashes_every_flipped_byte_is_found(tmp_path):
    writer = ShardWriter(tmp_path, {"data": "bytes"}, 1000)
    writer.write({"data": b"12345"}, "sample")
    writer.close()
    path = tmp_path / "shard.00000.mds"
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(DataError, match="damaged"):
            rows_of(tmp_path)
    path.write_bytes(sound[:-1])
    with pytest.raises(DataError, match="bytes, and"):
        rows_of(tmp_path)


VALUES = {
    "bytes": (b"abc", b"abc"),
    "str": ("hä".encode(), "hä"),
    "json": (b'{"a": [1, null]}', {"a": [1, None]}),
    "int": (struct.pack("<q", -7), -7),
    "uint16": (struct.pack("<H", 65000), 65000),
    "float32": (struct.pack("<f", 0.5), 0.5),
    "str_int": (b"123456789012345678901234567890", 123456789012345678901234567890),
    "str_float": (b"1e-3", 1e-3),
}


@pytest.mark.parametrize("encoding", VALUES)
def test_values(encoding):
    data, value = VALUES[encoding]
    decoded = decode(encoding, data, "sample")
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("ndarray", bytes([18, 2 << 2, 3, 4])),
        ("ndarray", bytes([18, 2 << 2 | 1]) + struct.pack("<2H", 3, 4)),
        ("ndarray:float16", bytes([2 << 2, 3, 4])),
        ("ndarray:float16:3,4", b""),
    ],
)
def test_arrays(encoding, head):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    decoded = decode(encoding, head + array.tobytes(), "sample")
    assert decoded.dtype == np.float16
    np.testing.assert_array_equal(decoded, array)


def test_images():
    for encoding in ("jpeg", "jpeg:90"):
        image = decode(encoding, jpeg("red"), "sample")
        assert (image.format, image.size) == ("JPEG", (8, 6))
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "blue").save(file, "PNG")
    assert decode("png", file.getvalue(), "sample").getpixel((0, 0)) == (0, 0, 255)
    raw_image = struct.pack("<3I", 2, 1, 3) + b"RGB" + bytes(range(6))
    assert decode("pil", raw_image, "sample").getpixel((1, 0)) == (3, 4, 5)
    with pytest.raises(DataError, match="jpeg value is damaged"):
        decode("jpeg", file.getvalue(), "sample")  # what it says it is, and nothing else


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("items", [[], [b"one"], [b"", b"a" * 300, b"a" * 70000], [b"x"] * 3])
def test_a_pickled_list_of_bytes_is_read_without_unpickling(monkeypatch, items, protocol):
    data = pickle.dumps(items, protocol)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    assert pickled_bytes(data) == items


def test_several_images():
    images = decode("jpeg_list", pickle.dumps([jpeg("red"), jpeg("blue", (4, 4))]), "sample")
    assert [image.size for image in images] == [(8, 6), (4, 4)]


def test_nothing_is_run(tmp_path):
    for hostile in (Evil(tmp_path / "ran"), [Evil(tmp_path / "ran")], [b"a", "text"], [[b"a"]], {"a": b"b"}, b"a", 1):
        for data in (pickle.dumps(hostile), pickle.dumps(hostile, 0)):
            with pytest.raises(DataError, match="jpeg_list value is damaged") as caught:
                decode("jpeg_list", data, "sample 3 image")
            assert str(caught.value).startswith("sample 3 image: ")
    with pytest.raises(DataError, match="pickled, and could run anything"):
        decode("pkl", pickle.dumps(1), "sample")
    assert not (tmp_path / "ran").exists()
    sound = pickle.dumps([b"abc", b"def"])
    for end in range(len(sound)):
        with pytest.raises(DataError, match="damaged"):
            decode("jpeg_list", sound[:end], "sample")
    for data in (b"a.", b"e.", b"h\x00.", b"\x94.", b"(e.", b"(a.", b"]]a.", b"."):  # operations without operands
        with pytest.raises(DataError, match="damaged"):
            decode("jpeg_list", data, "sample")


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("int", b"123"),
        ("uint8", b""),
        ("json", b"{"),
        ("json", b"[" * 100_000),
        ("str", b"\xff"),
        ("ndarray", b"\x01"),
        ("ndarray", b""),
        ("ndarray:object:1", b"12345678"),
        ("ndarray:float16:2,2", b"12"),
        ("pil", b"123"),
        ("pil", struct.pack("<3I", 1 << 30, 1 << 30, 3) + b"RGB"),
        ("str_int", b"one"),
    ],
)
def test_damaged_values(encoding, data):
    with pytest.raises(DataError, match="value is damaged"):
        decode(encoding, data, "sample")


def test_unknown_encoding():
    with pytest.raises(DataError, match=r"'jxl' is not known; write it as one of bytes"):
        decode("jxl", b"", "sample")
