# SPDX-License-Identifier: Apache-2.0
"""What tests of shards share: samples, and shards laid out byte by byte, as others write them."""

import hashlib
import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from hourllava.data.samples import Sample


def jpeg(colour, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def write_by_hand(folder, columns, rows, name="shard.00000.mds", hashes=()):
    """Columns: (name, encoding, size); rows: encoded columns. As the format's own writer lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = sorted(columns)
    samples = []
    for row in rows:
        sizes = [len(row[name]) for name, _, size in columns if size is None]
        samples.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(row[name] for name, _, _ in columns))
    config = b'{"anything": "that the reader passes over"}'
    offsets = np.cumsum([4 * (len(rows) + 2) + len(config), *map(len, samples)])
    data = struct.pack(f"<{len(rows) + 2}I", len(rows), *offsets) + config + b"".join(samples)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return {
        "column_names": [n for n, _, _ in columns],
        "column_encodings": [e for _, e, _ in columns],
        "column_sizes": [s for _, _, s in columns],
        "compression": None,
        "format": "mds",
        "hashes": list(hashes),
        "raw_data": {
            "basename": name,
            "bytes": len(data),
            "hashes": {h: hashlib.new(h, data).hexdigest() if h != "xxh64" else "?" for h in hashes},
        },
        "samples": len(rows),
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }


def write_index(folder, *entries):
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": list(entries)}))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.mkdir, (self.place,)


def conversation(number, *media):
    marks = "<image>\n" * len(media)
    return Sample(f"id {number}", ((f"{marks}What?", f"Ä {number}"),), media, f"data.json:{number}", "long")


def texts(count):
    return [conversation(number) for number in range(count)]


def numbers(samples):
    return [int(found.sample.id.split()[1]) for found in samples]
