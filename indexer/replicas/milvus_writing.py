"""An index in Milvus as `copy` writes it.

A publication first raises the number of the commit to an even one, then changes what differs, then raises it to an odd
one with what is there now. So everyone sees a publication that was begun and never ended, and readers what is new. The
vectors of another encoder go into a collection of their own; the row that names it is the change of the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from indexer.replicas import Value, Values
from indexer.replicas.lease import Lease
from indexer.replicas.milvus import MilvusReplica, is_loaded, is_whole, read_state
from indexer.replicas.rows import PhotoRow, digest_of
from searchengine.errors import IndexUnusable
from searchengine.index.layout import IndexIdentity
from searchengine.milvus.connection import REQUEST_SECONDS, Connection, MilvusPlace
from searchengine.milvus.schema import (
    MAX_TAGS_OF_A_PHOTO,
    MAX_TEXT_BYTES,
    NOTHING,
    PART,
    STATE,
    State,
    derived,
    escaped,
    make_photos,
    make_state,
    photos_collection,
    state_collection,
)
from searchengine.vectors import FloatMatrix, check_unit_rows

ROWS_PER_UPSERT = 500  # with their vectors, within what one message may hold
# After so many photos they are put into a segment, which is read faster; fewer, and Milvus does that by itself.
FLUSH_FROM = 1000
FLUSH_SECONDS = 600.0
PART_CHARACTERS = MAX_TEXT_BYTES - 1024


class WritableMilvusReplica:
    """Under a lease. Raises IndexUnusable where Milvus does not answer, IndexLocked where the lease is lost."""

    photos_per_write = 2_000

    def __init__(
        self, connection: Connection, lease: Lease, identity: IndexIdentity, *, first_commit: int | None = None
    ) -> None:
        """From `first_commit` on, commits are counted where there is no index yet."""
        self.identity = identity
        self._first_commit = new_commit() if first_commit is None else first_commit
        self._connection = connection
        self._lease = lease
        self._photos = photos_collection(connection.name, identity.fingerprint)
        self._state_collection = state_collection(connection.name)
        self._begun = False
        self._unflushed = 0
        if not is_loaded(connection, self._photos):
            make_photos(connection, self._photos, dim=identity.dim)

    def view(self) -> MilvusReplica:
        return MilvusReplica(self._connection, self.identity)

    def write(self, photos: Sequence[PhotoRow], matrix: FloatMatrix) -> None:
        check_unit_rows(matrix, dim=self.identity.dim)
        self._begin()
        for start in range(0, len(photos), ROWS_PER_UPSERT):
            some = slice(start, start + ROWS_PER_UPSERT)
            rows = [_entity(photo, vector) for photo, vector in zip(photos[some], matrix[some], strict=True)]
            with self._connection.errors_named():
                self._connection.client.upsert(self._photos, rows, timeout=REQUEST_SECONDS)
            self._unflushed += len(rows)

    def remove(self, ids: Sequence[int]) -> None:
        self._begin()
        self._delete(self._photos, list(ids))

    def write_values(self, values: Values, *, forgotten: Values) -> None:
        self._begin()
        known = self.view().values()
        if "counters" in values:
            highest = known.get("counters", {})
            counters = {table: max(number, highest.get(table, 0)) for table, number in values["counters"].items()}
            values = {**values, "counters": counters}
        rows = [row for name, value in values.items() for row in _rows(name, value)]
        written = {row["name"] for row in rows}
        replaced = [row["name"] for name, value in known.items() if name in values for row in _rows(name, value)]
        dropped = [row["name"] for name, value in forgotten.items() for row in _rows(name, value)]
        with self._connection.errors_named():
            for start in range(0, len(rows), ROWS_PER_UPSERT):
                some = rows[start : start + ROWS_PER_UPSERT]
                self._connection.client.upsert(self._state_collection, some, timeout=REQUEST_SECONDS)
        self._delete(self._state_collection, sorted({*replaced, *dropped} - written))

    def finish(self, *, vectors: int) -> None:
        before = read_state(self._connection)
        images = self.view().count()
        state = State(
            collection=self._photos,
            commit=before.commit if before else self._first_commit,
            identity=self.identity,
            images=images,
            vectors=vectors,
        )
        if state == before and is_whole(before):
            return
        if self._unflushed >= FLUSH_FROM:
            with self._connection.errors_named():
                self._connection.client.flush(self._photos, timeout=FLUSH_SECONDS)
            self._unflushed = 0
        self._lease.check()
        self._write_state(replace(state, commit=(state.commit + 1) | 1))
        self._begun = False
        if before is not None and before.collection != self._photos:
            with self._connection.errors_named():
                self._connection.client.drop_collection(before.collection, timeout=REQUEST_SECONDS)

    def _begin(self) -> None:
        """Before each write: whether this process may still write, and that others see that it does."""
        self._lease.check()
        before = read_state(self._connection) if not self._begun else None
        if before is not None:
            self._write_state(replace(before, commit=(before.commit + 2) & ~1))
        self._begun = True

    def _delete(self, collection: str, keys: Sequence[int | str]) -> None:
        with self._connection.errors_named():
            for start in range(0, len(keys), ROWS_PER_UPSERT):
                self._connection.client.delete(
                    collection, ids=keys[start : start + ROWS_PER_UPSERT], timeout=REQUEST_SECONDS
                )

    def _write_state(self, state: State) -> None:
        row = {"name": STATE, "payload": state.payload(), "nothing": NOTHING}
        with self._connection.errors_named():
            self._connection.client.upsert(self._state_collection, [row], timeout=REQUEST_SECONDS)


@contextmanager
def open_for_writing(address: str, identity: IndexIdentity) -> Iterator[WritableMilvusReplica]:
    """An index of that encoder in Milvus, made if there is none, and held by this process alone. Raises IndexLocked."""
    with closing(Connection(MilvusPlace.parse(address), create=True)) as connection:
        make_state_collection(connection)
        with Lease(connection) as lease:
            yield WritableMilvusReplica(connection, lease, identity)


def new_commit() -> int:
    """Where to begin to count: the milliseconds since 1970, so that no number of an index that was dropped, which a
    staging index may remember, comes again."""
    return time.time_ns() // 1_000_000


def make_state_collection(connection: Connection) -> None:
    """Where there is none yet: the lease is in it."""
    if not is_loaded(connection, state_collection(connection.name)):
        make_state(connection, state_collection(connection.name))


def _rows(name: str, value: Value) -> list[dict[str, Any]]:
    """A value as rows of NAME_state: one, or as many more as it takes."""
    payload = json.dumps(value, sort_keys=True)
    rows = [{"name": name, "payload": payload, "nothing": NOTHING}]
    if len(payload) > MAX_TEXT_BYTES:
        parts = [payload[start : start + PART_CHARACTERS] for start in range(0, len(payload), PART_CHARACTERS)]
        rows[0]["payload"] = json.dumps({"parts": len(parts)})
        rows += [
            {"name": f"{name}{PART}{number}", "payload": part, "nothing": NOTHING} for number, part in enumerate(parts)
        ]
    return rows


def _entity(photo: PhotoRow, vector: FloatMatrix) -> dict[str, Any]:
    if len(photo.tags) > MAX_TAGS_OF_A_PHOTO:
        raise IndexUnusable(
            f"a photo has {len(photo.tags):,} tags, and Milvus keeps {MAX_TAGS_OF_A_PHOTO:,} at most; forget some "
            "with: searchengine tags --remove"
        )
    return {
        "id": photo.id,
        "vector_id": photo.vector_id,
        "content_hash": photo.content_hash.hex(),
        "embedding": vector,
        "store": escaped(photo.store),
        "key": escaped(photo.key),
        "size_bytes": photo.size_bytes,
        "mtime_ns": photo.mtime_ns,
        "etag": None if photo.etag is None else escaped(photo.etag),
        "width": photo.width,
        "height": photo.height,
        "taken_at": photo.taken_at,
        "latitude": photo.latitude,
        "longitude": photo.longitude,
        "camera": None if photo.camera is None else escaped(photo.camera),
        "tags": [escaped(label) for label, _ in photo.tags],
        "tag_probabilities": [probability for _, probability in photo.tags],
        "digest": digest_of(photo, vector),
        **derived(vector_id=photo.vector_id, width=photo.width, height=photo.height, camera=photo.camera),
    }
