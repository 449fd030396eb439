# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used: written down, counted over all loading processes, and shown at the end."""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from rich.markup import escape
from rich.table import Table
from torch.utils.data import get_worker_info

from hourllava.errors import DataError, HourLlavaError

LIMIT = 0.02
TRIES = 16  # samples that may fail in a row before their common cause is reported
_LEAST = 1000  # samples, or all if there are fewer, that the share is taken of at first
_WORKERS = 256
_SHOWN = 20

T = TypeVar("T")


class FailureLog:
    """Samples that were left out, as JSON lines in a file; more than a share of them stops the run.

    Worker processes of a DataLoader share the counts and the file with the process that made the log. Every rank of a
    distributed run has a log, with a file, of its own.

    Args:
        path: written to as failures happen; what an earlier run left there stays.
        limit: the share of samples that may fail, of those tried or of the first thousand.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], limit: float = LIMIT) -> None:
        self.path, self.limit = Path(path), limit
        self._counts = torch.zeros(_WORKERS, 2, dtype=torch.int64).share_memory_()  # tried, failed; a row a worker
        self._total = _LEAST
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise DataError(path, f"it cannot be written ({error.strerror})", "choose another place") from error

    def first_sound(self, numbers: Iterable[int], load: Callable[[int], T], identify: Callable[[int], str]) -> T:
        """What `load` gives of the first of some samples that does not fail; those before it are written down.

        Args:
            numbers: of the samples, the one that is wanted first; at most 16 are tried.
            load: raises DataError for a sample that cannot be used.
            identify: a sample's id.

        Raises:
            DataError: too many have failed, or all of these.
        """
        failed: list[DataError] = []
        for number in itertools.islice(numbers, TRIES):
            try:
                found = load(number)
            except DataError as error:
                failed.append(error)
                self.record(identify(number), error)
            else:
                self.loaded()
                return found
        first = failed[0]
        raise DataError(first.what, f"{first.why}; so do the {len(failed) - 1} samples after it fail", first.todo)

    def expect(self, total: int) -> None:
        """Say how many samples there are."""
        self._total = max(1, min(total, _LEAST))

    @property
    def tried(self) -> int:
        """Samples that were loaded or failed to, in all processes."""
        return int(self._counts[:, 0].sum())

    @property
    def failed(self) -> int:
        return int(self._counts[:, 1].sum())

    def loaded(self) -> None:
        """Count a sample that was loaded."""
        self._counts[self._row(), 0] += 1

    def record(self, identity: str, error: HourLlavaError) -> None:
        """Write down a sample that was not loaded.

        Raises:
            DataError: too many have failed.
        """
        self._write(identity, error)
        self._counts[self._row()] += 1
        self.check()

    def leave_out(self, errors: Sequence[DataError], total: int) -> None:
        """Write down those of `total` entries of a manifest that never became samples.

        Raises:
            DataError: they are too many.
        """
        for error in errors:
            self._write(error.what, error)
        if len(errors) > self.limit * total:
            self._stop(len(errors), total, "used")

    def check(self) -> None:
        """Raise DataError if too many samples have failed, in this process or in one that loads for it."""
        tried, failed = self.tried, self.failed
        if failed > self.limit * max(tried, self._total):
            self._stop(failed, tried, "loaded")

    def _stop(self, failed: int, total: int, verb: str) -> NoReturn:
        last = self.entries()[-1]
        why = f"{failed} of {total} samples could not be {verb}, more than {self.limit:.1%} ({self.path} lists them)"
        raise DataError(last["what"], f"{last['why']}, and {why}", "correct them, or allow for more (--failure-limit)")

    def entries(self) -> list[dict[str, str]]:
        """All that is written down: id, what, why and todo of each."""
        return _entries(self.path)

    def summary(self) -> Table | None:
        """A table of what failed, or None if nothing did."""
        return failure_table([self.path])

    def _write(self, identity: str, error: HourLlavaError) -> None:
        fields = {"id": identity, "what": error.what, "why": error.why, "todo": error.todo}
        # What is no UTF-8, as of file names with other bytes, becomes the escape that JSON has for it.
        line = (json.dumps(fields, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        # One write to a file opened for appending: lines of several processes do not mix.
        try:
            with self.path.open("ab", buffering=len(line) + 1) as file:
                file.write(line)
        except OSError as failure:
            why = f"it cannot be written ({failure.strerror})"
            raise DataError(self.path, why, "free some space, and run the same command again") from failure

    def _row(self) -> int:
        worker = get_worker_info()
        return 0 if worker is None else 1 + worker.id % (_WORKERS - 1)


def failure_table(logs: Sequence[Path]) -> Table | None:
    """What failed by some logs, those of several processes say, or None if nothing did."""
    times = Counter((entry["what"], entry["why"]) for path in logs for entry in _entries(path))
    if not times:
        return None
    table = Table(title=f"{len(times)} samples were left out", title_justify="left")
    for name in ("sample", "why", "times"):
        table.add_column(name, overflow="fold", justify="right" if name == "times" else "left")
    for (what, why), count in list(times.items())[:_SHOWN]:
        table.add_row(escape(what), escape(why), str(count))
    if len(times) > _SHOWN:
        table.add_row(f"and {len(times) - _SHOWN} more", escape(f"in {', '.join(map(str, logs))}"), "")
    return table


def _entries(path: Path) -> list[dict[str, str]]:
    entries = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):  # a full disk may have cut a line short
                entries.append(json.loads(line))
    return entries
