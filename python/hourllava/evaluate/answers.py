# SPDX-License-Identifier: Apache-2.0
"""Answers on the disk as they come: JSON lines under the settings that gave them, so that a run can go on."""

import fcntl
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from hourllava.errors import HourLlavaError


class AnswerLog:
    """A file of answers, held by one process; its first line is the settings of the run.

    A last line that was cut off when its writer was killed is dropped.

    Attributes:
        records: what is answered, by the question's id.

    Raises:
        HourLlavaError: another process writes to the file, other settings gave its answers, or it is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(json.loads(json.dumps(settings)))  # as they come back from a file
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write down an answer, whose "id" is the question's; it survives a kill from here on."""
        self.records[record["id"]] = record
        self._write(record)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = "another process writes its answers there"
            raise HourLlavaError(self.path, why, "wait for that, or name another -o") from error

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        if rest:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write({"settings": settings})
            return
        todo = "name another -o, or delete it"
        try:
            held, *records = [json.loads(line) for line in lines]
            held = held["settings"]
            self.records = {record["id"]: record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise HourLlavaError(self.path, "it holds something else than answers", todo) from error
        other = sorted(name for name in held.keys() | settings.keys() if held.get(name) != settings.get(name))
        if other:
            raise HourLlavaError(self.path, f"its answers were given with other settings ({', '.join(other)})", todo)

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write((json.dumps(value) + "\n").encode())
        self._file.flush()
