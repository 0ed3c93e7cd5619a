"""A local index as `copy` reads it: one committed state, tables and vectors of one moment."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from indexer.replicas import Value, Values
from indexer.replicas.rows import PhotoRow, digest_of, name_hash
from searchengine.errors import IndexFormatError
from searchengine.index.layout import REPAIR, IndexIdentity, IndexPaths, read_identity
from searchengine.index.schema import (
    ENCODERS_VERSION,
    TAGS_VERSION,
    open_read_only,
    refuse_newer_tables,
)
from searchengine.index.segments import Ids, load_segment
from searchengine.index.table import VectorTable
from searchengine.models.published import sha256_of
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

PHOTOS_PER_PAGE = 2048
# From which version on the tables have them.
MOUNTS_VERSION = 2
ETAGS_VERSION = 5
PHOTOS = """
    SELECT images.id, images.vector_id, vectors.content_hash, store, key, size_bytes, mtime_ns, {etag}, width, height,
        taken_at, latitude, longitude, camera
    FROM images LEFT JOIN vectors ON vectors.id = images.vector_id
"""
TAGS = """
    SELECT vector_id, label, probability FROM tags JOIN labels ON labels.id = tags.label_id
    WHERE vector_id IN (SELECT value FROM json_each(?)) ORDER BY vector_id, label
"""
LABELS = """
    SELECT id, label, tagging_id, (
        SELECT count(*) FROM tags JOIN images ON images.vector_id = tags.vector_id WHERE tags.label_id = labels.id
    ) AS photos FROM labels
"""


class LocalReplica:
    """Open it as a context manager. Raises IndexNotFound, IndexFormatError where anything that is read is damaged.

    `checked` reads all segments first, and refuses one that is not what was written.
    """

    user_version = "PRAGMA user_version"

    def __init__(self, folder: Path, *, checked: bool = False) -> None:
        self._checked = checked
        self.shown = printable(str(folder))
        self.paths = IndexPaths(folder)
        self.identity: IndexIdentity = read_identity(folder)

    def connect(self) -> sqlite3.Connection:
        connection = open_read_only(self.paths.database)
        connection.isolation_level = None
        return connection

    def __enter__(self) -> Self:
        with self.errors_named():
            self.connection = self.connect()
            try:
                self._begin()
                if self._checked:
                    self._check_segments()
            except BaseException:
                self.connection.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _begin(self) -> None:
        """Begin to read one state, with its segments mapped: `compact` may delete their files from then on."""
        before: list[Any] | None = None
        while True:
            self.connection.execute("BEGIN")
            self._version = int(self._one(self.user_version))
            refuse_newer_tables(self._version, self.paths.database)
            self._segments = self.connection.execute("SELECT file, count, sha256 FROM segments ORDER BY id").fetchall()
            in_tables = self._one("SELECT max(fingerprint) FROM encoders") if self._has(ENCODERS_VERSION) else None
            self.identity = read_identity(self.paths.folder)
            try:
                loaded = [
                    load_segment(self.paths.segment(file), count=count, dim=self.identity.dim)
                    for file, count, _ in self._segments
                ]
                if in_tables in (None, self.identity.fingerprint):
                    break
                raise IndexFormatError(f"the tables of the index at {self.shown} name another encoder; {REPAIR}")
            except IndexFormatError:
                self.connection.execute("ROLLBACK")
                if self._segments == before:
                    raise
                before = self._segments
        self._table = VectorTable(loaded, dim=self.identity.dim)
        self._photos = PHOTOS.format(etag="etag" if self._has(ETAGS_VERSION) else "NULL")
        self._has_tags = self._has(TAGS_VERSION) and bool(self._one("SELECT EXISTS (SELECT 1 FROM tags)"))

    def _check_segments(self) -> None:
        for file, _, sha256 in self._segments:
            with suppress(FileNotFoundError):  # merged into another meanwhile
                if sha256_of(self.paths.segment(file)) != sha256:
                    raise IndexFormatError(f"{self.shown}/segments/{file} is damaged; {REPAIR}")

    def count(self) -> int:
        with self.errors_named():
            return int(self._one("SELECT count(*) FROM images"))

    def count_vectors(self) -> int:
        with self.errors_named():
            return int(self._one("SELECT count(DISTINCT vector_id) FROM images"))

    def ids(self) -> Iterator[Sequence[int]]:
        with self.errors_named():
            found = self.connection.execute("SELECT id FROM images ORDER BY id")
            while page := found.fetchmany(PHOTOS_PER_PAGE):
                yield [row[0] for row in page]

    def digests(self) -> Iterator[Sequence[tuple[int, str]]]:
        after = -1
        while True:
            photos, vectors = self._read("WHERE images.id > ? ORDER BY images.id LIMIT ?", (after, PHOTOS_PER_PAGE))
            if not photos:
                return
            yield [(photo.id, digest_of(photo, vector)) for photo, vector in zip(photos, vectors, strict=True)]
            after = photos[-1].id

    def photos(self, ids: Sequence[int]) -> tuple[list[PhotoRow], FloatMatrix]:
        return self._read(
            "WHERE images.id IN (SELECT value FROM json_each(?)) ORDER BY images.id", (json.dumps(list(ids)),)
        )

    def values(self) -> Values:
        with self.errors_named():
            return dict(self._values())

    def has_changed(self) -> bool:
        return False  # it is one state, whatever others commit meanwhile

    def _read(self, condition: str, parameters: tuple[Any, ...]) -> tuple[list[PhotoRow], FloatMatrix]:
        with self.errors_named():
            rows = self.connection.execute(self._photos + condition, parameters).fetchall()
            tags = self._tags_of({row[1] for row in rows})
        if any(row[2] is None for row in rows):
            raise self._lacks_vectors()
        return [_photo(row, tags) for row in rows], self.vectors(np.array([row[1] for row in rows], np.int64))

    def vectors(self, vector_ids: Ids) -> FloatMatrix:
        """The stored vectors with these ids (n,), float32 (n, dim)."""
        places = self._table.rows_of(vector_ids)
        if len(places) != len(vector_ids):
            raise self._lacks_vectors()
        return self._table.gather(places)

    def _lacks_vectors(self) -> IndexFormatError:
        return IndexFormatError(f"the index at {self.shown} lacks vectors of its photos; {REPAIR}")

    def _tags_of(self, vector_ids: set[int]) -> dict[int, list[tuple[str, float]]]:
        found: dict[int, list[tuple[str, float]]] = {}
        if self._has_tags:
            for vector_id, label, probability in self.connection.execute(TAGS, (json.dumps(list(vector_ids)),)):
                found.setdefault(vector_id, []).append((label, float(probability)))
        return found

    def _values(self) -> Iterator[tuple[str, Value]]:
        etag = "etag" if self._has(ETAGS_VERSION) else "NULL AS etag"
        for row in self._rows(f"SELECT store, key, size_bytes, mtime_ns, reason, {etag} FROM failures"):
            yield f"failure/{name_hash(row['store'], row['key'])}", row
        if self._has(MOUNTS_VERSION):
            for row in self._rows("SELECT store, prefix, device FROM mounts"):
                yield f"mount/{name_hash(row['store'], row['prefix'])}", row
        if self._has(TAGS_VERSION):
            for row in self._rows(LABELS):
                yield f"label/{row['id']}", row
            for row in self._rows("SELECT * FROM taggings"):
                lists = {name: json.loads(row[name]) for name in ("labels", "templates")}
                yield f"tagging/{row['id']}", row | lists
        counters = self.connection.execute(
            "SELECT name, seq FROM sqlite_sequence WHERE name IN ('images', 'vectors') ORDER BY name"
        )
        yield "counters", {"images": 0, "vectors": 0} | dict(counters.fetchall())
        newest = "SELECT started_at, finished_at, process, report FROM runs WHERE report IS NOT NULL"
        for row in self._rows(f"{newest} ORDER BY id DESC LIMIT 1"):
            yield "last_run", row | {"report": json.loads(row["report"])}

    def _rows(self, query: str) -> Iterator[Value]:
        found = self.connection.execute(query)
        names = [column[0] for column in found.description]
        for row in found:
            yield {name: _text(value) for name, value in zip(names, row, strict=True)}

    def _has(self, version: int) -> bool:
        return self._version >= version

    def _one(self, query: str) -> Any:
        return self.connection.execute(query).fetchone()[0]

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise IndexFormatError(f"the tables of the index at {self.shown} are damaged ({error}); {REPAIR}") from None


def _photo(row: tuple[Any, ...], tags: dict[int, list[tuple[str, float]]]) -> PhotoRow:
    (
        id_,
        vector_id,
        content_hash,
        store,
        key,
        size,
        mtime,
        etag,
        width,
        height,
        taken_at,
        latitude,
        longitude,
        camera,
    ) = row
    return PhotoRow(
        id=id_,
        vector_id=vector_id,
        content_hash=content_hash,
        store=_text(store),
        key=_text(key),
        size_bytes=size,
        mtime_ns=mtime,
        etag=etag,
        width=width,
        height=height,
        taken_at=taken_at,
        latitude=latitude,
        longitude=longitude,
        camera=camera,
        tags=tuple(tags.get(vector_id, ())),
    )


def _text(value: Any) -> Any:
    """Names are kept as the bytes that they are (searchengine/index/schema.py, `Key`)."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
