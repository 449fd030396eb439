# SPDX-License-Identifier: Apache-2.0
"""A benchmark's folder as a user has downloaded it: where its videos and subtitles are, and what is still packed."""

import json
import os
from pathlib import Path
from typing import Any

from hourllava.data.embedding import VIDEO_SUFFIXES
from hourllava.errors import DataError

_PACKED = (".zip", ".tar", ".tar.gz", ".tgz")
_PART = (".zip.", ".tar.part.", ".tar.")  # of an archive that is published in pieces
_INTACT = "download it again, as the benchmark publishes it"


class DataFolder:
    """Every file below a folder, found by its name wherever the user has unpacked it.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(root, "there is no such folder", "name the folder that holds the benchmark's files")
        self.root = root
        self.archives: list[str] = []
        self._videos: dict[str, list[Path]] = {}  # by name without suffix
        self._files: dict[str, list[Path]] = {}
        seen = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            place = os.path.realpath(folder)
            if place in seen:  # a link to where we have been
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    self._add(Path(folder, name))

    def _add(self, path: Path) -> None:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            self._videos.setdefault(path.stem, []).append(path)
        elif path.name.endswith(_PACKED) or any(part in path.name for part in _PART):
            self.archives.append(path.name)
        else:
            self._files.setdefault(path.name, []).append(path)

    def video(self, name: str) -> Path | None:
        """The video whose file is called `name`, whatever its suffix; None if there is none.

        Raises:
            DataError: there are two.
        """
        return self._only(name, self._videos.get(name, []))

    def file(self, name: str) -> Path | None:
        """The file of that name that is no video; None if there is none.

        Raises:
            DataError: there are two.
        """
        return self._only(name, self._files.get(name, []))

    def find(self, *patterns: str) -> list[Path]:
        """The files, none of them a video, that the first pattern names that names any, in order."""
        files = sorted(path for paths in self._files.values() for path in paths)
        found = ([path for path in files if path.match(pattern)] for pattern in patterns)
        return next(filter(None, found), [])

    @property
    def packed(self) -> str:
        """What is still packed, in a few words; empty if nothing is."""
        if not self.archives:
            return ""
        more = f" and {len(self.archives) - 1} more" if len(self.archives) > 1 else ""
        return f"{self.archives[0]}{more} may still have to be unpacked"

    def _only(self, name: str, paths: list[Path]) -> Path | None:
        if len(paths) > 1:
            where = " and ".join(str(path.relative_to(self.root)) for path in paths[:2])
            raise DataError(self.root, f"{where} are both called {name}", "keep the one that belongs to the benchmark")
        return paths[0] if paths else None


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, a JSON list or JSON lines, each with its place (file#number, from 0).

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix == ".jsonl":
        rows = [_parse(f"{path}#{number}", line) for number, line in enumerate(read_text(path).split("\n")) if line]
    else:
        rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(path, "it is no list of questions", _INTACT)
    return [(f"{path}#{number}", row) for number, row in enumerate(rows)]


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    return _parse(str(path), read_text(path))


def read_text(path: Path) -> str:
    """Raises DataError where a file cannot be read, or is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(path, "it is not UTF-8 text", _INTACT) from error


def field(row: Any, name: str, kind: type | tuple[type, ...], source: str) -> Any:
    """A field of a row.

    Raises:
        DataError: it is missing, or of another kind, or the row has no fields.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        why = f"its {name} is missing" if value is None else f"its {name} is {value!r:.60}"
        raise DataError(source, why, _INTACT)
    return value


def _parse(source: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(source, f"it is no JSON ({error.msg})", _INTACT) from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        todo = "install the extra: pip install 'hourllava[evaluate]'"
        raise DataError(path, "reading parquet needs pyarrow", todo) from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        why = f"it is no parquet file ({str(error).partition(chr(10))[0]})"
        raise DataError(path, why, _INTACT) from error
