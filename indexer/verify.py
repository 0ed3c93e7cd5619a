"""Hold an index against itself: tables, segments and files must agree; on request against its photos too. Repair it.

The checks see one committed state, while other processes may write or compact.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy as sa

from indexer.checks.ann import check_ann
from indexer.checks.change import DROP, GO_ON, check_change
from indexer.checks.photos import check_photos
from indexer.checks.problems import REPAIR_ALONE, DeleteFile, Problem, Repair, RewriteSegments
from indexer.checks.segments import check_segments
from indexer.checks.tables import check_rows, check_tables, damaged_tables
from indexer.leftovers import is_taken_over
from indexer.lock import LockedIndex
from indexer.repair import mend
from indexer.segments import orphans
from searchengine.decode import DEFAULT_LIMITS
from searchengine.errors import IndexFormatError, IndexNotFound, IndexTooNew, IndexUnusable
from searchengine.index.layout import RESTORE, IndexIdentity, IndexPaths, index_folder, read_identity
from searchengine.index.schema import ANN_VERSION, open_read_only, refuse_newer_tables
from searchengine.text import printable

MAX_ROUNDS = 10  # of repair: each shows what the one before made visible


@dataclass(frozen=True, kw_only=True)
class Verification:
    """`problems` are those that are left; `repaired` those that were mended."""

    problems: list[Problem]
    repaired: list[Repair]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "problems": [problem.as_dict() for problem in self.problems],
            "repaired": [repair.as_dict() for repair in self.repaired],
        }


def verify(
    index: str | os.PathLike[str],
    *,
    stores: bool = False,
    repair: bool = False,
    max_file_bytes: int = DEFAULT_LIMITS.max_file_bytes,
    workers: int | None = None,
    on_notice: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Check the index in the folder `index`; with `stores` also every photo that it knows, in `workers` threads.

    `repair` mends what can be mended and drops what cannot, so that the next `build` makes just that anew. Raises
    IndexNotFound, IndexUnusable where it cannot be read, IndexTooNew where a newer program made it, and to repair
    IndexLocked.
    """
    paths = IndexPaths(index_folder(index))
    identity, problems = _check_identity(paths)
    if identity is None:
        return Verification(problems=problems, repaired=[])

    def photo_problems() -> list[Problem]:
        if not stores:
            return []
        with closing(_open(paths)) as connection:
            checks = check_photos(
                connection, max_bytes=max_file_bytes, workers=workers or os.cpu_count() or 1, on_progress=on_progress
            )
            return list(checks)

    if not repair:
        problems = check_index(paths, identity, on_notice=on_notice)
        problems += _check_next(paths, identity, on_notice)
        if not any(problem.kind == "tables" for problem in problems):
            problems += photo_problems()
        if problems and read_identity(paths.folder) != identity:  # the model was changed meanwhile
            return verify(index, stores=stores, max_file_bytes=max_file_bytes, workers=workers, on_notice=on_notice)
        return Verification(problems=problems, repaired=[])
    with LockedIndex(paths.folder) as locked:
        identity = read_identity(paths.folder)  # the model may have changed before the lock was to be had
        _open(paths).close()  # of a newer program, nothing is written
        with suppress(sa.exc.DBAPIError):  # tables too damaged to sign in
            locked.begin_run()
        problems, repaired = _mend_all(locked, identity, on_notice)
        if not any(problem.kind == "tables" for problem in problems):
            of_photos = photo_problems()
            mended = mend(locked, identity, of_photos)
            problems += [problem for problem in of_photos if not any(problem is repair.problem for repair in mended)]
            repaired += mended
        of_next, mended = _mend_next(paths, identity, on_notice)
        problems += of_next
        repaired += mended
        with suppress(sa.exc.DBAPIError, AttributeError), locked.engine.begin() as connection:
            locked.end_run(connection)
    # What a repair has left is beyond it.
    left = [replace(problem, remedy=RESTORE) if REPAIR_ALONE in problem.remedy else problem for problem in problems]
    return Verification(problems=left, repaired=repaired)


def _mend_all(
    locked: LockedIndex, identity: IndexIdentity, on_notice: Callable[[str], None]
) -> tuple[list[Problem], list[Repair]]:
    """Check and mend by turns; what is left, and what was mended."""
    repaired: list[Repair] = []
    for _ in range(MAX_ROUNDS):
        problems = check_index(locked.paths, identity, on_notice=on_notice, locked=True)
        mended = mend(locked, identity, problems)
        repaired += mended
        if not mended:
            break
    return problems, repaired


def check_index(
    paths: IndexPaths, identity: IndexIdentity, *, on_notice: Callable[[str], None], locked: bool = False
) -> list[Problem]:
    """All but the photos. `locked` says that the caller holds the writer's lock."""
    while True:
        with closing(_open(paths)) as connection:
            problems = list(check_tables(connection))
            if problems:
                return problems
            try:
                problems += check_rows(connection)
                problems += check_segments(connection, paths, dim=identity.dim)
                problems += check_ann(connection, paths, dim=identity.dim)
                problems += check_change(connection, paths, identity)
                checked = _named_files(connection)
            except sqlite3.DatabaseError as error:
                return [*problems, damaged_tables(f"cannot be read ({error})")]
        # A segment that was merged into another meanwhile is deleted, though its row was there when the check began.
        if checked <= _named_now(paths) or not any(problem.kind in {"segment", "ann"} for problem in problems):
            return problems + _orphans(paths, locked=locked, on_notice=on_notice)


def _check_next(
    paths: IndexPaths, identity: IndexIdentity, on_notice: Callable[[str], None], *, locked: bool = False
) -> list[Problem]:
    """What is made of another model's vectors; the index serves whatever is wrong with them."""
    if is_taken_over(paths, identity):
        return []
    try:
        card, problems = _check_identity(paths.next)
        if card is not None:
            problems = check_index(paths.next, card, on_notice=on_notice, locked=locked)
    except (IndexUnusable, sqlite3.Error) as error:
        if paths.next.folder.is_dir() and not isinstance(error, IndexNotFound):
            raise
        return []  # none was begun, or its process was killed at once
    if not paths.next.folder.is_dir():  # it came to its end meanwhile
        return []
    # Vectors beyond those that are named do no harm there, and a rewrite would drop all that have no photo yet.
    return [
        replace(problem, object=f"next/{problem.object}", remedy=DROP if card is None else GO_ON)
        for problem in problems
        if not isinstance(problem.fix, RewriteSegments)
    ]


def _mend_next(
    paths: IndexPaths, identity: IndexIdentity, on_notice: Callable[[str], None]
) -> tuple[list[Problem], list[Repair]]:
    """What is left of the problems of `next/`, and what was mended."""
    problems, repaired = _check_next(paths, identity, on_notice), list[Repair]()
    if any(problem.fix for problem in problems):
        with LockedIndex(paths.next.folder) as locked:
            for _ in range(MAX_ROUNDS):
                mended = mend(locked, read_identity(paths.next.folder), problems)
                repaired += mended
                problems = _check_next(paths, identity, on_notice, locked=True)
                if not mended:
                    break
    return [replace(problem, remedy=DROP) for problem in problems], repaired


def _check_identity(paths: IndexPaths) -> tuple[IndexIdentity | None, list[Problem]]:
    """The identity card, None where it or the tables are lost: then the rest is not worth a look."""
    try:
        identity = read_identity(paths.folder)
    except IndexNotFound:
        if not _was_used(paths):
            raise
        return None, [_lost("index.json", "is missing")]
    except IndexTooNew:
        raise
    except IndexFormatError as error:
        message, _, remedy = str(error).partition("; ")
        return None, [Problem(kind="identity", object="index.json", message=message, remedy=remedy)]
    try:
        paths.database.open("rb").close()
    except FileNotFoundError:
        return None, [_lost("metadata.sqlite", "is missing")]
    except OSError as error:
        raise IndexUnusable(
            f"the index at {printable(str(paths.folder))} cannot be read: {error.strerror}; check its permissions"
        ) from None
    return identity, []


def _lost(name: str, message: str) -> Problem:
    kind = "identity" if name == "index.json" else "tables"
    return Problem(kind=kind, object=name, message=message, remedy=RESTORE)


def _was_used(paths: IndexPaths) -> bool:
    """Whether tables without an identity card ever held a vector: else a run was killed when it began the index."""
    if not paths.database.is_file():
        return False
    try:
        with closing(open_read_only(paths.database)) as connection:
            if connection.execute("SELECT 1 FROM sqlite_schema").fetchone() is None:  # it is just being made
                return any(paths.segments.glob("*.faiss"))
            return connection.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'vectors'").fetchone() is not None
    except sqlite3.DatabaseError:
        return True


def _open(paths: IndexPaths) -> sqlite3.Connection:
    """One committed state, on a connection that reads text which is no UTF-8. Raises IndexTooNew."""
    connection = open_read_only(paths.database)
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    try:
        connection.execute("BEGIN")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN:
            connection.close()
            raise IndexUnusable(
                f"the index at {printable(str(paths.folder))} is on a disk that cannot be written, with commits that "
                "are still in its metadata.sqlite-wal; copy it to another disk"
            ) from None
        return connection  # damaged, which the checks tell
    try:
        refuse_newer_tables(version, paths.database)
    except IndexTooNew:
        connection.close()
        raise
    return connection


def _named_files(connection: sqlite3.Connection) -> set[str]:
    """Paths within the index."""
    named = {f"segments/{row[0]}" for row in connection.execute("SELECT file FROM segments")}
    if connection.execute("PRAGMA user_version").fetchone()[0] >= ANN_VERSION:
        named |= {f"ann/{row[0]}" for row in connection.execute("SELECT file FROM ann")}
    return named


def _named_now(paths: IndexPaths) -> set[str]:
    with closing(_open(paths)) as connection:
        return _named_files(connection)


def _orphans(paths: IndexPaths, *, locked: bool, on_notice: Callable[[str], None]) -> list[Problem]:
    """Files that belong to nobody. What a living writer has just written looks like one, so its lock is asked for."""
    if not orphans(paths, _named_now(paths)):
        return []
    if not locked and not _is_read_only(paths.folder):
        lock = filelock.FileLock(paths.lock)
        try:
            lock.acquire(blocking=False)
        except (filelock.Timeout, OSError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "another process is writing"
            on_notice(f"files that belong to nobody were not looked for: {why}")
            return []
        try:
            return _orphans(paths, locked=True, on_notice=on_notice)
        finally:
            lock.release()
    return [
        Problem(
            kind="orphan",
            object=printable(str(file.relative_to(paths.folder))),
            message="belongs to nobody: left by a process that was killed, or by a repair",
            remedy=REPAIR_ALONE,
            fix=DeleteFile(file),
        )
        for file in orphans(paths, _named_now(paths))
    ]


def _is_read_only(folder: Path) -> bool:
    """Whether nobody can write there, so that there is no lock to be had and none is needed."""
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
