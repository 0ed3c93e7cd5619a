"""A staging index as it is published, beside what was published of it before.

`published.sqlite` has the rows of the photos as Milvus has them, and which commit of Milvus that is. So what to publish
next is told by SQL, without asking Milvus for what it has, and without computing digests.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from array import array
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from indexer.replicas import Differences
from indexer.replicas.local import LocalReplica
from searchengine.errors import IndexUnusable
from searchengine.index.schema import images
from searchengine.milvus.connection import MilvusPlace
from searchengine.text import printable

COLUMNS = ", ".join(column.name for column in images.c if column.name != "id")
TABLES = f"""
    CREATE TABLE IF NOT EXISTS published (id INTEGER PRIMARY KEY, {COLUMNS}, tags);
    CREATE TABLE IF NOT EXISTS standing (reached INTEGER NOT NULL, begun INTEGER NOT NULL);
"""
# The photos as they are now, each with its tags as one text.
NOW = f"""
    SELECT id, {COLUMNS}, (
        SELECT group_concat(quote(label) || quote(probability)) FROM (
            SELECT label, probability FROM tags JOIN labels ON labels.id = tags.label_id
            WHERE tags.vector_id = images.vector_id ORDER BY label
        )
    ) AS tags FROM images
"""
DIFFERENT = " OR ".join(f"now.{name} IS NOT published.{name}" for name in f"{COLUMNS}, tags".split(", "))
ADDED = "SELECT id FROM images WHERE id NOT IN (SELECT id FROM published) ORDER BY id"
UPDATED = f"SELECT now.id FROM ({NOW}) AS now JOIN published ON published.id = now.id WHERE {DIFFERENT} ORDER BY now.id"
SAME = f"SELECT now.id FROM ({NOW}) AS now JOIN published ON published.id = now.id WHERE NOT ({DIFFERENT})"
SURPLUS = "SELECT id FROM published WHERE id NOT IN (SELECT id FROM images) ORDER BY id"


def staging_folder(place: MilvusPlace, root: Path) -> Path:
    """Where the staging index of an index in Milvus is, below `root`."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.shown.partition("://")[2]).strip("-")[-60:]
    return root / f"{readable}-{sha256(place.shown.encode()).hexdigest()[:8]}"


class Standing(NamedTuple):
    """What the index in Milvus had as the number of its commit: when it was `reached`, and, where a publication from
    here did not end, what that may have `begun`; else the two are the same."""

    reached: int
    begun: int


def read_standing(file: Path) -> Standing | None:
    """None where nothing was published or fetched. A damaged file is deleted: Milvus can be asked for all that it said.

    Raises IndexUnusable.
    """
    try:
        with closing(_connect(file)) as connection:
            row = connection.execute("SELECT reached, begun FROM standing").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise IndexUnusable(
                f"{printable(str(file))} cannot be read ({error}); check the disk and its permissions"
            ) from None
        for damaged in (file, file.with_name(f"{file.name}-journal")):
            damaged.unlink(missing_ok=True)
        return None
    return Standing(*row) if row else None


def write_standing(file: Path, standing: Standing | None) -> None:
    """Survives a crash."""
    with closing(_connect(file)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        _stand(connection, standing)
        connection.execute("COMMIT")


class StagedReplica(LocalReplica):
    """The staging index in `folder`, beside the file `published`, of which nothing is kept but by `remember`."""

    user_version = "PRAGMA index_.user_version"

    def __init__(self, folder: Path, *, published: Path) -> None:
        super().__init__(folder)
        self._published = published

    def connect(self) -> sqlite3.Connection:
        connection = _connect(self._published)
        connection.execute("ATTACH ? AS index_", (f"file:{quote(os.fsencode(self.paths.database))}?mode=ro",))
        return connection

    def differences(self) -> Differences:
        """What was published has otherwise."""
        with self.errors_named():
            added, updated, surplus = (
                array("q", (row[0] for row in self.connection.execute(query))) for query in (ADDED, UPDATED, SURPLUS)
            )
            same = array("q", (row[0] for row in self.connection.execute(SAME)))
        return Differences(added=added, updated=updated, surplus=surplus, same=same)

    def remember(self, standing: Standing, published: Differences | None) -> None:
        """All of it is published now; `published` is what differed, None where that is not known."""
        with self.errors_named():
            if published is None:
                self.connection.execute("DELETE FROM published")
                self.connection.execute(f"INSERT INTO published {NOW}")
            else:
                for ids in (published.added, published.updated):
                    named = "WHERE id IN (SELECT value FROM json_each(?))"
                    self.connection.execute(
                        f"INSERT OR REPLACE INTO published {NOW} {named}", (json.dumps(ids.tolist()),)
                    )
                self.connection.execute("DELETE FROM published WHERE id NOT IN (SELECT id FROM images)")
            _stand(self.connection, standing)
            self.connection.execute("COMMIT")


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(file))}", isolation_level=None, uri=True, check_same_thread=False
    )
    connection.executescript(TABLES)
    return connection


def _stand(connection: sqlite3.Connection, standing: Standing | None) -> None:
    connection.execute("DELETE FROM standing")
    if standing is None:
        connection.execute("DELETE FROM published")
    else:
        connection.execute("INSERT INTO standing VALUES (?, ?)", standing)
