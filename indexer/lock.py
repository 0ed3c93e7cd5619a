"""One process at a time: whatever writes, merges or repairs an index holds it through a `LockedIndex`."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Self

import filelock
import sqlalchemy as sa

from searchengine.errors import IndexFormatError, IndexLocked, IndexUnusable
from searchengine.index.layout import REPAIR, IndexPaths, index_folder
from searchengine.index.schema import connect_for_reading, connect_for_writing, runs
from searchengine.text import printable

# A run that watches, or that is started each minute, would fill the table in the course of years.
RUNS_KEPT = 1000
# `verify` takes the lock for a moment to see what belongs to nobody.
LOCK_SECONDS = 1.0


class LockedIndex:
    """An index that no other process writes while the context lasts. A process that dies lets go of its lock.

    Raises IndexLocked while another process holds it, IndexUnusable where it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = index_folder(folder)
        self.paths = IndexPaths(self.folder)
        self.engine = connect_for_writing(self.paths.database)

    def __enter__(self) -> Self:
        with self.disk_errors():
            self._lock = filelock.FileLock(self.paths.lock)
            try:
                self._lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.05)
            except filelock.Timeout:
                raise IndexLocked(
                    f"another process is writing the index at {printable(str(self.folder))}{self._holder()}; "
                    "wait for it, or end it"
                ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.release()
        if isinstance(error, sa.exc.DBAPIError | sqlite3.Error):
            raise self.unusable(error) from error

    def release(self) -> None:
        self.engine.dispose()
        self._lock.release()

    def begin_run(self) -> None:
        """Sign in the table `runs` as who holds the lock, for others to be told."""
        process = f"process {os.getpid()} on {socket.gethostname()}"
        with self.engine.begin() as connection:
            result = connection.execute(sa.insert(runs).values(started_at=now(), process=process))
            self.run_id = int(result.inserted_primary_key[0])  # type: ignore[index]
            connection.execute(sa.delete(runs).where(runs.c.id <= self.run_id - RUNS_KEPT))

    def end_run(self, connection: sa.Connection) -> None:
        connection.execute(sa.update(runs).where(runs.c.id == self.run_id).values(finished_at=now()))

    def _holder(self) -> str:
        """Who writes: the newest unfinished run, unless its process is dead and the holder has yet to sign."""
        try:
            with connect_for_reading(self.paths.database).connect() as connection:
                query = sa.select(runs.c.process, runs.c.started_at).where(runs.c.finished_at.is_(None))
                row = connection.execute(query.order_by(runs.c.id.desc()).limit(1)).one_or_none()
        except sa.exc.DBAPIError:
            return ""
        return f" ({row[0]}, since {row[1]})" if row and not is_dead(row[0]) else ""

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """A full or read-only disk ends what is done with the last commit intact."""
        try:
            yield
        except (OSError, sa.exc.DBAPIError, sqlite3.Error) as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> IndexUnusable:
        shown = printable(str(self.folder))
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        # SQLite tells damage by the bare class, and what can pass (a full disk, a lock) by a class below it.
        if type(cause) is sqlite3.DatabaseError:
            return IndexFormatError(f"the tables of the index at {shown} are damaged ({cause}); {REPAIR}")
        if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            return IndexUnusable(
                f"the index at {shown} cannot be written: another program holds its metadata.sqlite; end that, then "
                "run again (everything committed so far is safe)"
            )
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0][:200] or type(cause).__name__
        return IndexUnusable(
            f"the index at {shown} cannot be written: {reason}; free space or fix permissions, then run again "
            "(everything committed so far is safe)"
        )


def now() -> str:
    """In UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_dead(process: str) -> bool:
    """Whether a process, as `begin_run` writes it, was one of this machine that has ended."""
    match = re.fullmatch(r"process (\d+) on (.*)", process)
    if os.name != "posix" or match is None or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)  # signal 0 only asks
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
