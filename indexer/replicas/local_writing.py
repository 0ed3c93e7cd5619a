"""A local index as `copy` writes it: under the ids that its source has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from indexer.compact import merge_segments
from indexer.replicas import Value, Values, kind_of
from indexer.replicas.local import LocalReplica
from indexer.replicas.rows import PhotoRow
from indexer.segments import next_id, segment_file, write_segment
from indexer.writable import WritableIndex
from searchengine.errors import IndexUnusable
from searchengine.index.schema import encode_key, failures, labels, mounts, runs, segments, taggings
from searchengine.index.schema import vectors as vector_rows
from searchengine.index.segments import Ids
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, check_unit_rows

KNOWN = "SELECT id, content_hash FROM vectors WHERE id IN (SELECT value FROM json_each(?))"
PHOTO = """
    INSERT INTO images (id, vector_id, store, key, size_bytes, mtime_ns, etag, width, height, taken_at, latitude,
        longitude, camera)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# A label that is not known is one of a publication that never ended.
TAG = "INSERT INTO tags SELECT ?, id, ? FROM labels WHERE label = ?"
COUNTER = "INSERT INTO sqlite_sequence SELECT ?, 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?)"


class Diverged(IndexUnusable):
    """An index gave out ids to other photos than its source did, so it cannot become a copy of it."""


class WritableLocalReplica(WritableIndex):
    """Raises as `WritableIndex` does; an OSError or one of SQLite's becomes IndexUnusable. Readers see whole writes."""

    photos_per_write = 32_768

    def view(self) -> LocalReplica:
        return LocalReplica(self.folder)

    def write(self, photos: Sequence[PhotoRow], matrix: FloatMatrix) -> None:
        """Raises Diverged where the index has another vector under an id of these."""
        check_unit_rows(matrix, dim=self.identity.dim)
        places = {photo.vector_id: place for place, photo in enumerate(photos)}  # copies share a vector
        with self.disk_errors(), self.engine.begin() as connection:
            known = self._known(connection, photos, matrix, places)
            new = {vector_id: photos[places[vector_id]] for vector_id in sorted(places.keys() - known)}
            _make_room(connection, photos, [photo.content_hash for photo in new.values()])
            if new:
                ids: Ids = np.array(list(new), np.int64)
                self._add_segment(connection, ids, matrix[[places[vector_id] for vector_id in new]], new)
            connection.exec_driver_sql(PHOTO, [_row(photo) for photo in photos])
            connection.exec_driver_sql("DELETE FROM tags WHERE vector_id = ?", [(each,) for each in places])
            tags = [(each, *tag[::-1]) for each, place in places.items() for tag in photos[place].tags]
            if tags:
                connection.exec_driver_sql(TAG, tags)

    def remove(self, ids: Sequence[int]) -> None:
        with self.disk_errors(), self.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM images WHERE id = ?", [(image_id,) for image_id in ids])

    def write_values(self, values: Values, *, forgotten: Values) -> None:
        with self.disk_errors(), self.engine.begin() as connection:
            _set(connection, taggings, _of_kind(values, "tagging"))
            _set_labels(connection, _of_kind(values, "label"), forgotten=_of_kind(forgotten, "label"))
            _forget(connection, taggings, _of_kind(forgotten, "tagging"))
            for kind, table in (("mount", mounts), ("failure", failures)):
                _forget(connection, table, _of_kind(forgotten, kind))
                _set(connection, table, _of_kind(values, kind))
            for table_name, highest in values.get("counters", {}).items():
                connection.exec_driver_sql(COUNTER, (table_name, table_name))
                higher = "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?"
                connection.exec_driver_sql(higher, (highest, table_name))
            if "last_run" in values:
                connection.execute(sa.update(runs).where(runs.c.id == self.run_id).values(values["last_run"]))

    def finish(self, *, vectors: int) -> None:
        """Let the files go of vectors that the source does not have any more; commits are on disk already."""
        with self.disk_errors(), self.engine.begin() as connection:
            held = connection.execute(sa.select(sa.func.coalesce(sa.func.sum(segments.c.count), 0))).scalar_one()
            named = connection.execute(sa.select(sa.func.count()).select_from(vector_rows)).scalar_one()
        if held != named:
            merge_segments(self, self.identity)

    def _known(
        self, connection: sa.Connection, photos: Sequence[PhotoRow], matrix: FloatMatrix, places: Mapping[int, int]
    ) -> set[int]:
        """Those of the vectors that the index has already, byte for byte."""
        found = connection.exec_driver_sql(KNOWN, (json.dumps(list(places)),))
        known: dict[int, bytes] = {row[0]: row[1] for row in found}
        if known:
            with self.view() as view:
                stored = view.vectors(np.array(list(known), np.int64))
            for (vector_id, content_hash), vector in zip(known.items(), stored, strict=True):
                place = places[vector_id]
                if photos[place].content_hash != content_hash or matrix[place].tobytes() != vector.tobytes():
                    raise Diverged(
                        f"the index at {printable(str(self.folder))} cannot become a copy: under the id {vector_id} it "
                        "has another vector than the index to copy; copy into a new folder"
                    )
        return set(known)

    def _add_segment(
        self, connection: sa.Connection, ids: Ids, matrix: FloatMatrix, new: Mapping[int, PhotoRow]
    ) -> None:
        number = next_id(connection, "segments")
        file = segment_file(number)
        count, sha256 = write_segment(self.paths.segment(file), [(ids, matrix)], dim=self.identity.dim)
        connection.execute(sa.insert(segments).values(id=number, file=file, count=count, sha256=sha256))
        rows = [(vector_id, photo.content_hash, number) for vector_id, photo in new.items()]
        connection.exec_driver_sql("INSERT INTO vectors (id, content_hash, segment_id) VALUES (?, ?, ?)", rows)


def _make_room(connection: sa.Connection, photos: Sequence[PhotoRow], hashes: Sequence[bytes]) -> None:
    """Delete what is known under the ids and names of these photos, and other vectors of these contents."""
    connection.exec_driver_sql("DELETE FROM images WHERE id = ?", [(photo.id,) for photo in photos])
    names = [(encode_key(photo.store), encode_key(photo.key)) for photo in photos]
    connection.exec_driver_sql("DELETE FROM images WHERE store = ? AND key = ?", names)
    if hashes:
        contents = [(content_hash,) for content_hash in hashes]
        of_content = "vector_id = (SELECT id FROM vectors WHERE content_hash = ?)"
        connection.exec_driver_sql(f"DELETE FROM images WHERE {of_content}", contents)
        connection.exec_driver_sql("DELETE FROM vectors WHERE content_hash = ?", contents)


def _row(photo: PhotoRow) -> tuple[Any, ...]:
    return (
        photo.id,
        photo.vector_id,
        encode_key(photo.store),
        encode_key(photo.key),
        photo.size_bytes,
        photo.mtime_ns,
        photo.etag,
        photo.width,
        photo.height,
        photo.taken_at,
        photo.latitude,
        photo.longitude,
        photo.camera,
    )


def _of_kind(values: Values, kind: str) -> list[Value]:
    return [value for name, value in values.items() if kind_of(name) == kind]


def _forget(connection: sa.Connection, table: sa.Table, rows: Sequence[Value]) -> None:
    keys = list(table.primary_key.columns)
    if rows:
        same = sa.and_(*(key == sa.bindparam(f"old_{key.name}", type_=key.type) for key in keys))
        connection.execute(
            sa.delete(table).where(same), [{f"old_{key.name}": row[key.name] for key in keys} for row in rows]
        )


def _set(connection: sa.Connection, table: sa.Table, rows: Sequence[Value]) -> None:
    if rows:
        statement = insert(table)
        keys = [key.name for key in table.primary_key.columns]
        facts = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
        # Not OR REPLACE, which would delete what refers to a row along with it.
        columns = table.columns.keys()
        connection.execute(
            statement.on_conflict_do_update(index_elements=keys, set_=facts),
            [{name: row[name] for name in columns} for row in rows],
        )


def _set_labels(connection: sa.Connection, rows: Sequence[Value], *, forgotten: Sequence[Value]) -> None:
    """A label keeps its tags when its id becomes another; ids may have been given out again."""
    known = {label: label_id for label_id, label in connection.exec_driver_sql("SELECT id, label FROM labels")}
    wanted = {row["label"]: row["id"] for row in rows}
    gone = {row["id"] for row in forgotten} | set(wanted.values())
    freed = {
        label: label_id
        for label, label_id in known.items()
        if wanted.get(label, label_id) != label_id or (label_id in gone and label not in wanted)
    }
    connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")  # until this transaction ends
    for label_id in freed.values():
        _rename(connection, label_id, -label_id)
    for label, label_id in freed.items():
        if label in wanted:
            _rename(connection, -label_id, wanted[label])
    connection.exec_driver_sql("DELETE FROM labels WHERE id < 0")
    _set(connection, labels, rows)


def _rename(connection: sa.Connection, label_id: int, new_id: int) -> None:
    connection.exec_driver_sql("UPDATE labels SET id = ? WHERE id = ?", (new_id, label_id))
    connection.exec_driver_sql("UPDATE tags SET label_id = ? WHERE label_id = ?", (new_id, label_id))
