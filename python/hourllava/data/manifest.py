# SPDX-License-Identifier: Apache-2.0
"""Manifests: JSON, JSON lines or parquet files whose entries are conversations, or questions about videos in rows."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hourllava.errors import DataError

PAIRS = 5  # questions about the same video in one conversation, where a manifest has them in rows
_COLUMNS = ("id", "video", "question", "answer", "data_source")
_NEEDED = ("video", "question", "answer")


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands at one place of a manifest."""

    source: str  # file:line of JSON lines, file#number from 0 of others
    value: Any  # what is read there, or the DataError of why it cannot be


def read_manifest(path: Path) -> list[Entry]:
    """Every entry of a manifest; rows of questions are put together to conversations of up to five about a video.

    Whether a file holds a JSON list or JSON lines is told by its first character, not by its name.

    Raises:
        DataError: the file is missing, or cannot be read as a whole. A bad line is an entry whose value is the error.
    """
    try:
        entries = group_rows(_read_parquet(path) if path.suffix == ".parquet" else _read_json(path), PAIRS)
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror or error})", "check the path") from error
    if not entries:
        raise DataError(path, "it holds no conversation", "give a file with at least one")
    return entries


def group_rows(rows: Iterable[Entry], pairs: int) -> list[Entry]:
    """VideoMarathon's rows, a question and its answer each, as conversations of up to `pairs` about the same video.

    Conversations come in the order of their first rows; what is no good row keeps its place.
    """
    unfinished: dict[tuple[Any, Any], dict[str, Any]] = {}
    entries: list[Entry] = []
    for row in rows:
        if not _is_row(row.value):
            entries.append(row)
            continue
        value = row.value
        lacking = [key for key in _NEEDED if not isinstance(value.get(key), str) or not value[key].strip()]
        if lacking:
            what = row.source if value.get("id") is None else f"{row.source} (id {value['id']})"
            error = DataError(what, f"its {lacking[0]} is missing or no text", f"give {', '.join(_NEEDED)}")
            entries.append(Entry(row.source, error))
            continue
        key = (value.get("data_source"), value["video"])
        entry = unfinished.get(key)
        if entry is None or len(entry["conversations"]) >= 2 * pairs:
            named = {name: value[name] for name in ("id", "video", "data_source") if value.get(name) is not None}
            entry = unfinished[key] = {**named, "conversations": []}
            entries.append(Entry(row.source, entry))
        entry["conversations"].append({"from": "human", "value": value["question"]})
        entry["conversations"].append({"from": "gpt", "value": value["answer"]})
    return entries


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" not in value and ("question" in value or "answer" in value)


def _read_json(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                for number, value in enumerate(json.load(file)):
                    yield Entry(f"{path}#{number}", value)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _read_line(f"{path}:{number}", line)
        except json.JSONDecodeError as error:
            todo = "get an intact copy, or write it again"
            raise DataError(f"{path}:{error.lineno}", f"it is no JSON ({error.msg})", todo) from error
        except UnicodeDecodeError as error:
            raise DataError(path, "it is not UTF-8 text", "give JSON, JSON lines, parquet or YAML") from error


def _read_line(source: str, line: str) -> Entry:
    try:
        return Entry(source, json.loads(line))
    except json.JSONDecodeError as error:
        return Entry(source, DataError(source, f"it is no JSON ({error.msg})", "correct the line, or leave it out"))


def _read_parquet(path: Path) -> Iterator[Entry]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        todo = "install the training extra: pip install 'hourllava[train]'"
        raise DataError(path, "reading parquet needs pyarrow", todo) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            lacking = [name for name in _NEEDED if name not in names]
            if lacking:
                why = f"it has no column {lacking[0]!r}, only {', '.join(names)}"
                raise DataError(path, why, f"give {', '.join(_NEEDED)}")
            number = 0
            for batch in file.iter_batches(columns=[name for name in _COLUMNS if name in names]):
                for value in batch.to_pylist():
                    yield Entry(f"{path}#{number}", value)
                    number += 1
    except pyarrow.ArrowException as error:
        why = f"it is no parquet file ({str(error).partition(chr(10))[0]})"
        raise DataError(path, why, "get an intact copy") from error
