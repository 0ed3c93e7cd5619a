"""When an index has changed under a reader: by a commit, by another model, or because another one took its place."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from searchengine.errors import IndexFormatError, ModelMismatch
from searchengine.index.layout import REPAIR, RESTORE, IndexIdentity, read_identity
from searchengine.index.schema import is_frozen, open_read_only
from searchengine.text import printable


def check_identity(folder: Path, known: IndexIdentity, *, in_tables: str | None) -> None:
    """Whether an index is still of the encoder that it was opened with; `in_tables` is the fingerprint that they name.

    Raises ModelMismatch where it is not, IndexFormatError where tables and index.json disagree.
    """
    identity, shown = read_identity(folder), printable(str(folder))
    if identity != known:
        raise ModelMismatch(
            f"the index at {shown} was replaced by one of encoder {printable(identity.encoder)}; open it again, with "
            f"that encoder in {identity.precision}"
        )
    if in_tables not in (None, known.fingerprint):
        raise IndexFormatError(f"the tables of the index at {shown} name another encoder than its index.json; {REPAIR}")


class Version(NamedTuple):
    """Differs after each commit of another process. The first two tell a database from another one of its name."""

    device: int
    inode: int
    opened: int
    data_version: int

    @property
    def file(self) -> tuple[int, int]:
        return self.device, self.inode


class Commits:
    """Keeps one connection open, for SQLite counts on it what others commit (PRAGMA data_version)."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._opened = 0
        self._connection: sqlite3.Connection | None = None
        self._seen: tuple[tuple[int, ...], ...] = ()
        self._is_blind = False

    def version(self) -> Version:
        """Raises IndexFormatError where the database is gone, sqlite3.Error where it cannot be read."""
        seen = self._look()
        # A connection that takes the file for frozen, as on a read-only disk, sees nothing of what others do.
        if self._connection is None or seen[0] != self._seen[0] or (self._is_blind and seen != self._seen):
            self.close()
            self._seen, self._is_blind = seen, is_frozen(self._database)
            self._connection = open_read_only(self._database)
            self._opened += 1
        data_version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        device, inode = seen[0]
        return Version(device, inode, self._opened, data_version)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _look(self) -> tuple[tuple[int, ...], ...]:
        try:
            database = os.stat(self._database)
        except OSError as error:
            raise IndexFormatError(
                f"the index at {printable(str(self._database.parent))} has lost its metadata.sqlite "
                f"({error.strerror}); {RESTORE}"
            ) from None
        try:
            log = os.stat(self._database.with_name(self._database.name + "-wal"))
        except OSError:
            log = database
        changed = (database.st_mtime_ns, database.st_size, log.st_mtime_ns, log.st_size)
        return (database.st_dev, database.st_ino), changed
