"""What is in an archive or a list, recorded once for each state of it, so that looking things up takes no memory.

The table is a file of SQLite in the user's cache folder, made beside its place, renamed into it, and not changed then.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from searchengine.errors import StoreUnusable
from searchengine.text import printable

VERSION = 1
SUFFIX = ".sqlite"
KEPT_DAYS = 90  # of what nobody has looked at since
DAY_SECONDS = 86_400
MAX_INTEGER = 2**63 - 1  # of SQLite
ENTRIES_PER_PAGE = 64

SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA user_version = {VERSION};
CREATE TABLE about (state TEXT, trouble TEXT);
CREATE TABLE entries (
    name BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, etag TEXT,
    offset INTEGER, stored_bytes INTEGER, method INTEGER, crc INTEGER, trouble TEXT
) WITHOUT ROWID;
"""


class Malformed(Exception):
    """It is no such archive or list, or none that can be read here. The message is the reason."""


class CutShort(Exception):
    """There is more, which cannot be told; what came before counts. The message is the reason."""


class Outdated(Exception):
    """The table is not there any more, or tells of another state; have it made again."""


class Entry(NamedTuple):
    """A file in an archive, or a place in a list.

    In an archive, `stored_bytes` lie at `offset`, packed by `method`. `size_bytes` is None where a list does not tell
    it. `trouble` is why it cannot be read, where that is known beforehand.
    """

    name: str
    size_bytes: int | None = None
    mtime_ns: int = 0
    etag: str | None = None
    offset: int = 0
    stored_bytes: int = 0
    method: int = 0
    crc: int | None = None
    trouble: str | None = None


class _Page(NamedTuple):
    """All entries whose names lie between `first` and `last`, these included."""

    first: bytes
    last: bytes
    entries: dict[bytes, Entry]


class Contents:
    """The entries of one state, by their names; of several with one name, the last. Threads may share one.

    Every method raises Outdated. `trouble`: why there is more than these entries, if there is.
    """

    def __init__(self, path: Path, *, state: str, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.state = state
        self._path = path
        self._folder = folder  # which goes with this object, where there is one
        self._page = _Page(b"\1", b"\0", {})  # nothing lies between these
        with self._reading() as connection:
            self.trouble: str | None = connection.execute("SELECT trouble FROM about").fetchone()[0]

    def find(self, name: str) -> Entry | None:
        """Photos are read in the order of their names, so those that follow are looked up with it."""
        wanted = _encoded(name)
        page = self._page
        if not page.first <= wanted <= page.last:
            with self._reading() as connection:
                query = "SELECT * FROM entries WHERE name >= ? ORDER BY name LIMIT ?"
                rows = connection.execute(query, (wanted, ENTRIES_PER_PAGE)).fetchall()
            found = {row[0]: _entry(row) for row in rows}
            page = self._page = _Page(wanted, max(found, default=wanted), found)
        return page.entries.get(wanted)

    def below(self, prefix: str) -> Iterator[Entry]:
        """All whose names begin with `prefix`, in the order of names."""
        start = _encoded(prefix)
        with self._reading() as connection:
            for row in connection.execute("SELECT * FROM entries WHERE name >= ? ORDER BY name", (start,)):
                if not row[0].startswith(start):
                    return
                yield _entry(row)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection each time: a thousand archives need no thousand open files."""
        try:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
                # What is renamed into its place meanwhile is another file.
                if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
                    raise Outdated("the table is of another version")
                if connection.execute("SELECT state FROM about").fetchone() != (self.state,):
                    raise Outdated("the table is of another state")
                yield connection
        except sqlite3.Error as error:
            with suppress(OSError):
                self._path.unlink()  # damaged, or never there
            raise Outdated(str(error)) from None


def contents_of(place: str, *, state: str, is_lasting: bool, entries: Iterable[Entry]) -> Contents:
    """The table of what is at `place` now: that of before, if it is of the same state, else one made of `entries`.

    One that is not `is_lasting` is for this process alone. Raises StoreUnusable, and what `entries` raises, but
    CutShort.
    """
    path = None
    if is_lasting:
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            kept = platformdirs.user_cache_path("searchengine", appauthor=False) / "contents"
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = kept / (hashlib.blake2b(_encoded(place), digest_size=20).hexdigest() + SUFFIX)
            with suppress(Outdated):
                found = Contents(path, state=state)
                os.utime(path)
                return found
            _forget_old(kept)
    try:
        folder = None if path and os.access(path.parent, os.W_OK) else tempfile.TemporaryDirectory()
        path = path if path and folder is None else Path(folder.name if folder else "") / f"contents{SUFFIX}"
        _write(path, state, entries)
        return Contents(path, state=state, folder=folder)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnusable(
            f"what is in {printable(place)} cannot be noted down: {error}; make room in the folder for temporary files"
        ) from None


def _write(path: Path, state: str, entries: Iterable[Entry]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.executescript(SCHEMA)
            connection.execute("BEGIN")
            trouble: list[str] = []
            rows = (_row(entry) for entry in _until_cut_short(entries, trouble))
            connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            connection.execute("INSERT INTO about VALUES (?, ?)", (state, trouble[0] if trouble else None))
            connection.execute("COMMIT")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _until_cut_short(entries: Iterable[Entry], trouble: list[str]) -> Iterator[Entry]:
    try:
        yield from entries
    except CutShort as error:
        trouble.append(str(error))


def _forget_old(folder: Path) -> None:
    before = time.time() - KEPT_DAYS * DAY_SECONDS
    with os.scandir(folder) as files:
        for file in files:
            with suppress(OSError):
                if file.stat().st_mtime < before:
                    os.unlink(file)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _row(entry: Entry) -> tuple[Any, ...]:
    """Of an archive that claims what no table can hold, only that."""
    if max(entry.size_bytes or 0, abs(entry.mtime_ns), entry.offset, entry.stored_bytes) > MAX_INTEGER:
        entry = Entry(entry.name, trouble="is damaged: its size, or its place in its archive, makes no sense")
    return _encoded(entry.name), *entry[1:]


def _entry(row: tuple[Any, ...]) -> Entry:
    return Entry(row[0].decode("utf-8", "surrogateescape"), *row[1:])
