"""What mends an index: what is damaged beyond repair is dropped, so that the next `index` makes just that anew."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa

from indexer.checks.problems import (
    DeleteFile,
    DropRows,
    FinishChange,
    Problem,
    RebuildTables,
    Repair,
    RewriteSegments,
    SetCount,
    SetCounter,
)
from indexer.compact import merge_segments
from indexer.leftovers import finish_change
from indexer.lock import LockedIndex
from indexer.salvage import rebuild_tables
from searchengine.errors import IndexFormatError
from searchengine.index.layout import IndexIdentity
from searchengine.index.schema import ANN_VERSION, TAGS_VERSION, ann, schema_version, taggings

# What refers to the rows of a table: (table, condition on the deleted rowid).
DEPENDENTS = {
    "segments": (
        "DELETE FROM images WHERE vector_id IN (SELECT id FROM vectors WHERE segment_id = ?)",
        "DELETE FROM vectors WHERE segment_id = ?",
    ),
    "vectors": ("DELETE FROM images WHERE vector_id = ?",),
    "taggings": ("DELETE FROM labels WHERE tagging_id = ?",),
    # Of which tagging it was may be lost with it; they all begin anew, and keep what there is meanwhile.
    "tags": ("UPDATE taggings SET through_id = 0 WHERE ? IS NOT NULL",),
}


def mend(locked: LockedIndex, identity: IndexIdentity, problems: Sequence[Problem]) -> list[Repair]:
    """Mend those of `problems` that must come first; the index is to be checked again thereafter.

    Tables come before rows, and rows before files, for what the ones say decides about the others.
    """
    for kinds in (
        (RebuildTables,),
        (DropRows, SetCount, SetCounter),
        (RewriteSegments,),
        (FinishChange,),
        (DeleteFile,),
    ):
        if chosen := [problem for problem in problems if isinstance(problem.fix, kinds)]:
            with locked.disk_errors():
                done = [(problem, _mend(locked, identity, problem)) for problem in chosen]
            if mended := [Repair(problem=problem, done=what) for problem, what in done if what is not None]:
                return mended
    return []


def _mend(locked: LockedIndex, identity: IndexIdentity, problem: Problem) -> str | None:
    """What was done; None where it could not be."""
    match problem.fix:
        case RebuildTables(untrusted=untrusted):
            kept = rebuild_tables(locked, untrusted)
            if kept is None:
                return None
            return (
                f"put together anew with the {kept:,} photos that could be read; the damaged tables are kept as "
                "metadata.sqlite.damaged; run `searchengine index` on your folders again for the others"
            )
        case DropRows(table=table, rowids=rowids):
            photos = _drop(locked.engine, table, rowids)
            if problem.kind == "photo":
                return "dropped from the index"
            if photos:
                return f"dropped; photos to index again: {photos:,} (run `searchengine index` on your folders)"
            return "dropped; no photo is lost by it"
        case SetCount(segment_id=segment_id, count=count):
            with locked.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE segments SET count = ? WHERE id = ?", (count, segment_id))
            return f"{count:,} are recorded now"
        case SetCounter(table=table):
            with locked.engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
                connection.exec_driver_sql(
                    f"INSERT INTO sqlite_sequence (name, seq) SELECT '{table}', max(id) FROM {table}"
                )
                if table == "vectors":
                    _forget_ids(connection, version=schema_version(connection, locked.paths.database))
            return "they go on from the highest one"
        case RewriteSegments():
            try:
                merge_segments(locked, identity)
            except IndexFormatError:  # another segment has a problem that cannot be mended
                return None
            return "written anew without them"
        case FinishChange():
            finish_change(locked.paths)
            return "done now"
        case DeleteFile(path=path):
            with suppress(FileNotFoundError):
                path.unlink()
            return "deleted"
    raise AssertionError(problem.fix)


def _forget_ids(connection: sa.Connection, *, version: int) -> None:
    """What knows vectors by their ids alone is void where these may be given out again."""
    if version >= ANN_VERSION:
        connection.execute(sa.delete(ann))
    if version >= TAGS_VERSION:
        connection.execute(sa.update(taggings).values(through_id=0))


def _drop(engine: sa.Engine, table: str, rowids: Sequence[int]) -> int:
    """Delete rows and what depends on them, in one transaction; the number of photos among that."""
    numbers: list[Any] = [(rowid,) for rowid in rowids]
    with engine.begin() as connection:
        before = int(connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one())
        for statement in (*DEPENDENTS.get(table, ()), f"DELETE FROM {table} WHERE rowid = ?"):
            connection.exec_driver_sql(statement, numbers)
        return before - int(connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one())
