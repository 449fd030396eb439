# SPDX-License-Identifier: Apache-2.0
"""The catalogue of a repository, in SQLite: which videos there are, and which of their frames are committed."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from hourllava.errors import MemoryFileError, StorageError

FILE = "catalogue.sqlite"
FORMAT = 1
WAIT = 30.0  # seconds for another process to finish its transaction, which takes milliseconds


@dataclass
class Video:
    """What the catalogue says of a video."""

    name: str
    source: str  # the path of its file, or where else it came from; empty if unknown
    model: str  # fingerprint of what made the pages
    tower: str  # fingerprint of what made the features
    precision: str  # of the features that are kept
    pages: bool  # whether ready pages are kept
    feature_width: int
    per_frame: int
    width: int
    blocks: int
    kv_heads: int
    head_dim: int
    dtype: str
    created: float  # seconds since 1970
    changed: float = 0.0
    damage: str = ""
    frames: int = 0  # committed


@dataclass
class Segment:
    """Committed frames of a video and the file that holds their features."""

    first: int
    frames: int
    file: str
    sha256: str  # of the file's header, which holds a checksum of everything else
    size: int  # bytes
    error: float  # root mean square error of the kept features, as a share of their own root mean square
    created: float
    rows_sha256: str = ""  # of what the frames wrote to the ready pages, if those are kept


@dataclass
class Source:
    """How far the taking in of one file of a data set came."""

    path: str  # absolute, links resolved
    video: str  # what it is called here
    done: bool
    reason: str  # why it failed, in one line, or ""


_SQL = {str: "TEXT", int: "INTEGER", float: "REAL", bool: "INTEGER"}


def _columns(kind: type) -> str:
    return ", ".join(f"{f.name} {_SQL[f.type]} NOT NULL" for f in fields(kind))  # type: ignore[index]


class Catalogue:
    """Transactions on `catalogue.sqlite` of a folder; each opens the file anew, so that processes may fork and die.

    Raises:
        MemoryFileError: the file is no catalogue, is damaged, cannot be written, or is locked for too long.
        StorageError: the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        version = self._version() if self.path.exists() else 0
        if version == 0:  # new, or another process is at this line, or one was killed at it
            with self._transaction() as db:
                db.execute(f"CREATE TABLE IF NOT EXISTS videos ({_columns(Video)}, PRIMARY KEY (name))")
                key = "video TEXT NOT NULL REFERENCES videos (name)"
                db.execute(
                    f"CREATE TABLE IF NOT EXISTS segments ({key}, {_columns(Segment)}, PRIMARY KEY (video, first))"
                )
                db.execute(f"PRAGMA user_version = {FORMAT}")
            version = FORMAT
        if version != FORMAT:
            raise MemoryFileError(self.path, f"its format {version} is not {FORMAT}", "use the version that made it")

    def videos(self) -> list[Video]:
        with self._reading() as db:
            return [_video(row) for row in db.execute("SELECT * FROM videos ORDER BY name")]

    def find(self, name: str) -> Video | None:
        """The video of that name, if there is one."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM videos WHERE name = ?", (name,)).fetchone()
        return None if row is None else _video(row)

    def video(self, name: str) -> Video:
        """Raises MemoryFileError if there is none of that name."""
        video = self.find(name)
        if video is None:
            held = ", ".join(video.name for video in self.videos()[:8]) or "none"
            raise MemoryFileError(name, f"there is no such video in {self.path.parent}", f"it holds {held}")
        return video

    def segments(self, name: str) -> list[Segment]:
        """In order of their frames."""
        with self._reading() as db:
            columns = ", ".join(f.name for f in fields(Segment))
            rows = db.execute(f"SELECT {columns} FROM segments WHERE video = ? ORDER BY first", (name,))
            return [Segment(*row) for row in rows]

    def last_segments(self, name: str, count: int) -> list[Segment]:
        """The last `count`, in order of their frames."""
        with self._reading() as db:
            columns = ", ".join(f.name for f in fields(Segment))
            query = f"SELECT {columns} FROM segments WHERE video = ? ORDER BY first DESC LIMIT ?"
            return [Segment(*row) for row in db.execute(query, (name, count))][::-1]

    def add(self, video: Video, segments: Iterable[Segment] = ()) -> None:
        """Raises MemoryFileError if there is one of that name."""
        marks = ", ".join("?" for _ in fields(Video))
        rows = [(video.name, *astuple(segment)) for segment in segments]
        with self._transaction() as db:
            try:
                db.execute(f"INSERT INTO videos VALUES ({marks})", astuple(video))
            except sqlite3.IntegrityError as error:
                raise MemoryFileError(video.name, "there is a video of that name", "choose another") from error
            db.executemany(f"INSERT INTO segments VALUES (?, {', '.join('?' for _ in fields(Segment))})", rows)

    def commit(self, name: str, segment: Segment, damage: str) -> None:
        """Count a segment in, in place of those from its first frame on; from here on it is there for everyone."""
        values = (name, *astuple(segment))
        with self._transaction() as db:
            db.execute("DELETE FROM segments WHERE video = ? AND first >= ?", (name, segment.first))
            db.execute(f"INSERT INTO segments VALUES ({', '.join('?' for _ in values)})", values)
            end = segment.first + segment.frames
            db.execute(
                "UPDATE videos SET frames = ?, changed = ?, damage = ? WHERE name = ?",
                (end, segment.created, damage, name),
            )

    def source(self, path: str) -> Source | None:
        """What was said of a file of a data set, if anything was."""
        with self._reading() as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sources'").fetchone():
                return None
            row = db.execute("SELECT path, video, done, reason FROM sources WHERE path = ?", (path,)).fetchone()
        return None if row is None else Source(row[0], row[1], bool(row[2]), row[3])

    def sources(self) -> list[Source]:
        """What was said of files, by path."""
        with self._reading() as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sources'").fetchone():
                return []
            rows = db.execute("SELECT path, video, done, reason FROM sources ORDER BY path")
            return [Source(row[0], row[1], bool(row[2]), row[3]) for row in rows]

    def record(self, source: Source) -> None:
        """Say how far a file came; what was said of it before is forgotten."""
        with self._sources() as db:
            db.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?)", astuple(source))

    def cut(self, name: str, frames: int, pages: bool) -> None:
        """Count only the segments that end by `frames`, and say whether ready pages are still kept."""
        with self._sources() as db:
            db.execute("DELETE FROM sources WHERE video = ?", (name,))
            db.execute("DELETE FROM segments WHERE video = ? AND first + frames > ?", (name, frames))
            db.execute("UPDATE videos SET frames = ?, pages = ? WHERE name = ?", (frames, pages, name))

    def delete(self, name: str) -> None:
        with self._sources() as db:
            db.execute("DELETE FROM sources WHERE video = ?", (name,))
            db.execute("DELETE FROM segments WHERE video = ?", (name,))
            db.execute("DELETE FROM videos WHERE name = ?", (name,))

    def check(self) -> str | None:
        """What SQLite finds wrong with the file, in one line, or None."""
        with self._reading() as db:
            found = db.execute("PRAGMA integrity_check").fetchone()[0]
        return None if found == "ok" else str(found).partition("\n")[0]

    def _version(self) -> int:
        with self._reading() as db:
            return db.execute("PRAGMA user_version").fetchone()[0]

    @contextlib.contextmanager
    def _sources(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which there is a table of sources; catalogues that never took in a data set have none."""
        with self._transaction() as db:
            db.execute(f"CREATE TABLE IF NOT EXISTS sources ({_columns(Source)}, PRIMARY KEY (path))")
            yield db

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        # Not "ro": whoever comes first after a writer was killed has to roll its transaction back. Where the disk is
        # read-only, SQLite reads only.
        with self._connection("rw") as db:
            yield db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection("rwc") as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.path.resolve().as_uri()}?mode={mode}"
            with contextlib.closing(sqlite3.connect(uri, WAIT, uri=True, isolation_level=None)) as db:
                yield db
        except sqlite3.DatabaseError as error:
            todo = "free some space, or run `hourllava memory verify`"
            kind = StorageError if "disk is full" in str(error) else MemoryFileError
            raise kind(self.path, f"the catalogue cannot be used ({error})", todo) from error
        except UnicodeEncodeError as error:  # a name or path of other bytes
            why, todo = "it can hold only names and paths in UTF-8", "rename the file, or choose another name"
            raise MemoryFileError(error.object, why, todo) from error


def _video(row: tuple) -> Video:
    video = Video(*row)
    video.pages = bool(video.pages)
    return video
