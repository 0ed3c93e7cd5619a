"""What a run would do, told from the listing alone; nothing is written."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from indexer.crawl import Crawl
from indexer.report import Report
from indexer.scope import Globs, parts_of
from searchengine.errors import IndexNotFound, IndexUnusable
from searchengine.index.layout import IndexPaths, index_folder, read_identity
from searchengine.index.schema import MIGRATIONS, connect_for_reading, migrate, open_read_only, schema_version
from searchengine.stores import open_stores
from searchengine.text import printable


def plan(
    index: str | os.PathLike[str],
    stores: Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    retry_failed: bool = False,
) -> Report:
    """What `build` would find, told from the listing alone: a moved photo counts as one added and one deleted."""
    parts = parts_of(open_stores(stores), None)
    globs = Globs(include=tuple(include), exclude=tuple(exclude))
    report = Report()
    started = time.monotonic()
    with _tables_as_they_are(index_folder(index)) as engine:
        crawl = Crawl(parts=parts, globs=globs, engine=engine, retry_failed=retry_failed)
        crawl.list_stores(stop=threading.Event())
        report.unlistable = len(crawl.unlistable)
        crawl.count_known(report)
        for change in crawl.changes():
            report.updated += change.known
            report.added += not change.known
        report.deleted = sum(len(page) for page in crawl.gone())
    report.seconds = time.monotonic() - started
    return report


@contextmanager
def _tables_as_they_are(folder: Path) -> Iterator[sa.Engine]:
    """The tables of an index, on a connection that can write nothing but temporary tables.

    Those of an index that is not there yet, or of an older version, are made in memory.
    """
    database = IndexPaths(folder).database
    try:
        read_identity(folder)
    except IndexNotFound:
        engine = _in_memory()
        migrate(engine, folder)
    else:
        engine = connect_for_reading(database, poolclass=StaticPool)
    try:
        with engine.connect() as connection:
            version = schema_version(connection, database)
        if version < len(MIGRATIONS):
            engine = _in_memory()
            with closing(open_read_only(database)) as source, closing(engine.raw_connection()) as copy:
                source.backup(cast(sqlite3.Connection, copy.driver_connection))
            migrate(engine, database)
        yield engine
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise IndexUnusable(
            f"the tables of the index at {printable(str(folder))} cannot be read ({reason}); check the disk and "
            "permissions, restore the index, or index again"
        ) from error
    finally:
        engine.dispose()


def _in_memory() -> sa.Engine:
    return sa.create_engine("sqlite://", poolclass=StaticPool)
