"""Tables that are damaged, put together anew from the rows that can still be read."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from indexer.lock import LockedIndex
from searchengine.index.layout import IndexPaths, publish
from searchengine.index.schema import ann, connect_for_writing, metadata, migrate

ROWS_PER_COPY = 4096
MAX_ID = 2**53  # beyond any library; a higher one is damage
TOO_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_ERROR}

# What the first bytes of tables made by this program always are (https://www.sqlite.org/fileformat2.html#magic).
HEADER = {
    0: b"SQLite format 3\0",
    16: b"\x10\x00",  # pages of 4096 bytes
    18: b"\x02\x02",  # a write-ahead log
    20: b"\x00\x40\x20\x20",
    56: b"\x00\x00\x00\x01",  # UTF-8
}


def rebuild_tables(locked: LockedIndex, untrusted: Mapping[str, frozenset[int]]) -> int | None:
    """Replace the tables by what can be read of them, less the `untrusted` rowids of each; the number of photos kept.

    None where no vector's row can be read: then everything stays as it is. The damaged tables are kept beside the new
    ones. Raises OSError, sqlite3.Error.
    """
    paths = locked.paths
    locked.engine.dispose()
    _delete_unfinished(paths)
    try:
        kept = _collect(paths, untrusted)
        if kept is not None:
            _keep_damaged(paths)
            _publish(paths)
        return kept
    finally:
        _delete_unfinished(paths)


def _collect(paths: IndexPaths, untrusted: Mapping[str, frozenset[int]]) -> int | None:
    """Fill a new database beside the damaged one."""
    engine = connect_for_writing(paths.new_database)
    migrate(engine, paths.new_database)
    engine.dispose()
    with (
        closing(sqlite3.connect(_copy_to_read(paths))) as old,
        closing(sqlite3.connect(paths.new_database, isolation_level=None)) as new,
    ):
        new.execute("BEGIN")
        for table in metadata.sorted_tables:
            if table is ann:  # `compact` makes it anew
                continue
            _copy_rows(old, new, table.name, untrusted.get(table.name, frozenset()))
        for name in ("segments", "vectors", "images"):
            _keep_counter(old, new, name, at_least=_highest_segment(paths) if name == "segments" else 0)
        new.execute("UPDATE taggings SET through_id = 0")  # some tags may be lost
        new.execute("COMMIT")
        vectors, photos = (new.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("vectors", "images"))
    return int(photos) if vectors else None


def _copy_to_read(paths: IndexPaths) -> Path:
    """A copy whose header says what that of all our tables says, so that damage there does not hide the rest."""
    copy = paths.new_database.with_name(paths.new_database.name + "-damaged")
    shutil.copyfile(paths.database, copy)
    with suppress(FileNotFoundError):
        shutil.copyfile(_beside(paths.database, "-wal"), _beside(copy, "-wal"))
    with open(copy, "r+b") as file:
        for place, content in HEADER.items():
            file.seek(place)
            file.write(content)
    return copy


def _copy_rows(old: sqlite3.Connection, new: sqlite3.Connection, table: str, untrusted: frozenset[int]) -> None:
    """What cannot be read is left out: a range of rows is halved until that is a single row.

    By position: a damaged definition may have lost the names, and later versions add columns at the end.
    """
    highest = _highest_rowid(old, table)
    ranges = [(low, low + ROWS_PER_COPY - 1) for low in range(1, highest + 1, ROWS_PER_COPY)]
    while ranges:
        low, high = ranges.pop()
        try:
            query = f"SELECT rowid, * FROM {table} NOT INDEXED WHERE rowid BETWEEN ? AND ?"
            rows = [row[1:] for row in old.execute(query, (low, high)) if row[0] not in untrusted]
        except sqlite3.DatabaseError:
            if low < high:
                middle = (low + high) // 2
                ranges += [(low, middle), (middle + 1, high)]
            continue
        if rows:
            columns = [row[0] for row in new.execute("SELECT name FROM pragma_table_info(?)", (table,))][: len(rows[0])]
            values = ", ".join("?" * len(columns))
            new.executemany(f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({values})", rows)


def _highest_rowid(old: sqlite3.Connection, table: str) -> int:
    found = [0]
    for query in (
        f"SELECT max(rowid) FROM {table}",
        f"SELECT count(*) FROM {table}",
        f"SELECT max(seq) FROM sqlite_sequence WHERE name = '{table}'",
    ):
        with suppress(sqlite3.DatabaseError):
            value = old.execute(query).fetchone()[0]
            if isinstance(value, int) and value <= MAX_ID:
                found.append(value)
    return max(found)


def _keep_counter(old: sqlite3.Connection, new: sqlite3.Connection, table: str, *, at_least: int) -> None:
    """Ids that were given out are not given out again, though their rows are lost."""
    counters = [at_least]
    for connection in (old, new):
        with suppress(sqlite3.DatabaseError):
            query = "SELECT seq FROM sqlite_sequence WHERE name = ?"
            counters += [row[0] for row in connection.execute(query, (table,)).fetchall()]
    highest = max(value for value in counters if isinstance(value, int) and value <= MAX_ID)
    new.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
    new.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, highest))


def _highest_segment(paths: IndexPaths) -> int:
    return max((int(file.stem) for file in paths.segments.glob("*.faiss") if file.stem.isdecimal()), default=0)


def _keep_damaged(paths: IndexPaths) -> None:
    for suffix in ("-wal", ""):
        original, copy = _beside(paths.database, suffix), _beside(paths.damaged_database, suffix)
        if original.exists():
            unfinished = _beside(paths.new_database, "-kept")
            shutil.copyfile(original, unfinished)
            publish(unfinished, copy)
        else:
            copy.unlink(missing_ok=True)


def _beside(database: Path, suffix: str) -> Path:
    return database.with_name(database.name + suffix)


def _publish(paths: IndexPaths) -> None:
    """SQLite itself copies the new tables over the old, in one transaction: readers see them at once, and a crash
    leaves the one or the other. Where the old file is too damaged for that, the new one takes its name."""
    try:
        with (
            closing(sqlite3.connect(paths.new_database)) as new,
            closing(sqlite3.connect(paths.database)) as old,
        ):
            new.backup(old)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in TOO_DAMAGED:
            raise
        for suffix in ("-wal", "-shm"):  # they belong to the old file
            _beside(paths.database, suffix).unlink(missing_ok=True)
        publish(paths.new_database, paths.database)


def _delete_unfinished(paths: IndexPaths) -> None:
    for file in paths.folder.glob(paths.new_database.name + "*"):
        file.unlink(missing_ok=True)
