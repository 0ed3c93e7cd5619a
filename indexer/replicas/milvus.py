"""An index in Milvus as `copy` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from indexer.replicas import Value, Values
from indexer.replicas.rows import PhotoRow
from searchengine.errors import IndexNotFound, IndexUnusable
from searchengine.index.layout import IndexIdentity
from searchengine.milvus.connection import REQUEST_SECONDS, Connection, MilvusPlace
from searchengine.milvus.schema import (
    MAX_HITS,
    PART,
    STATE,
    State,
    damaged,
    photos_collection,
    state_collection,
    unescaped,
)
from searchengine.vectors import FloatMatrix

ROWS_PER_PAGE = MAX_HITS
ROWS_PER_QUERY = 500  # with their vectors, within what one message may hold
FIELDS = (*(field.name for field in fields(PhotoRow)), "tag_probabilities", "embedding")

LEASE = "lease"


class MilvusReplica:
    """What is in Milvus of the encoder `identity`, whether a state names it already or it is still being written."""

    def __init__(self, connection: Connection, identity: IndexIdentity) -> None:
        self.identity = identity
        self.shown = connection.place.shown
        self._connection = connection
        self._photos = photos_collection(connection.name, identity.fingerprint)
        self._values = state_collection(connection.name)
        self._opened_at = read_state(connection)
        is_loaded(connection, self._photos)

    def __enter__(self) -> MilvusReplica:
        return self

    def __exit__(self, *_: object) -> None:
        """The connection is its owner's to close."""

    def count(self) -> int:
        return self._connection.count(self._photos, "", strong=True)

    def count_vectors(self) -> int:
        return self._opened_at.vectors if self._opened_at else 0

    def ids(self) -> Iterator[Sequence[int]]:
        for page in self._pages("id"):
            yield [row["id"] for row in page]

    def digests(self) -> Iterator[Sequence[tuple[int, str]]]:
        for page in self._pages("id", "digest"):
            yield [(row["id"], row["digest"]) for row in page]

    def photos(self, ids: Sequence[int]) -> tuple[list[PhotoRow], FloatMatrix]:
        rows: list[dict[str, Any]] = []
        with self._connection.errors_named():
            for start in range(0, len(ids), ROWS_PER_QUERY):
                rows += self._connection.client.get(
                    self._photos,
                    ids=list(ids[start : start + ROWS_PER_QUERY]),
                    output_fields=list(FIELDS),
                    timeout=REQUEST_SECONDS,
                    consistency_level="Strong",
                )
        rows.sort(key=lambda row: row["id"])
        return [_photo(row) for row in rows], self._matrix(rows)

    def everything(self) -> Iterator[tuple[list[str], list[PhotoRow], FloatMatrix]]:
        """All photos by id, in pages: the digests that were stored with them, they themselves, and their vectors."""
        for page in self._pages(*FIELDS, "digest", size=ROWS_PER_QUERY):
            yield [row["digest"] for row in page], [_photo(row) for row in page], self._matrix(page)

    def values(self) -> Values:
        rows = {
            row["name"]: row["payload"]
            for page in self._connection.iterate(
                self._values, 'name != ""', ("name", "payload"), batch_size=ROWS_PER_PAGE
            )
            for row in page
        }
        try:
            return {
                name: _joined(name, payload, rows)
                for name, payload in rows.items()
                if PART not in name and name not in (STATE, LEASE)
            }
        except (ValueError, KeyError, TypeError):
            raise damaged(self.shown) from None

    def has_changed(self) -> bool:
        return read_state(self._connection) != self._opened_at

    def _matrix(self, rows: Sequence[dict[str, Any]]) -> FloatMatrix:
        matrix: FloatMatrix = np.array([row["embedding"] for row in rows], np.float32).reshape(-1, self.identity.dim)
        return matrix

    def _pages(self, *fields: str, size: int = ROWS_PER_PAGE) -> Iterator[list[dict[str, Any]]]:
        """Of all photos, by id."""
        for page in self._connection.iterate(self._photos, "id >= 0", fields, batch_size=size):
            yield sorted(page, key=lambda row: int(row["id"]))


@contextmanager
def open_replica(address: str, *, whole: bool = False) -> Iterator[MilvusReplica]:
    """Raises IndexNotFound where nothing was ever published there, IndexUnusable where half is and `whole` is asked."""
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        state = read_state(connection)
        if state is None:
            raise IndexNotFound(f"there is no index at {connection.place.shown}")
        if whole and not is_whole(state):
            raise IndexUnusable(
                f"a publication to the index at {connection.place.shown} has begun and not ended; wait for it, or run "
                "`searchengine index` as before, which ends it"
            )
        yield MilvusReplica(connection, state.identity)


def read_state(connection: Connection) -> State | None:
    """None where nothing was ever published. Raises IndexFormatError."""
    collection = state_collection(connection.name)
    if not is_loaded(connection, collection):
        return None
    rows = connection.query(collection, f'name == "{STATE}"', ("payload",), strong=True)
    return State.parse(rows[0]["payload"], place=connection.place.shown) if rows else None


def is_whole(state: State) -> bool:
    """Whether no publication has begun since its last one ended (milvus_writing.py)."""
    return state.commit % 2 == 1


def is_loaded(connection: Connection, collection: str) -> bool:
    """Whether there is such a collection; then it can be read from now on, which a file that was just opened wants."""
    if not connection.exists(collection):
        return False
    connection.load(collection)
    return True


def _joined(name: str, payload: str, rows: dict[str, str]) -> Value:
    value: Value = json.loads(payload)
    if "parts" in value:
        value = json.loads("".join(rows[f"{name}{PART}{number}"] for number in range(value["parts"])))
    return value


def _photo(row: dict[str, Any]) -> PhotoRow:
    return PhotoRow(
        id=row["id"],
        vector_id=row["vector_id"],
        content_hash=bytes.fromhex(row["content_hash"]),
        store=unescaped(row["store"]),
        key=unescaped(row["key"]),
        size_bytes=row["size_bytes"],
        mtime_ns=row["mtime_ns"],
        etag=_maybe(row["etag"]),
        width=row["width"],
        height=row["height"],
        taken_at=row["taken_at"],
        latitude=row["latitude"],
        longitude=row["longitude"],
        camera=_maybe(row["camera"]),
        tags=tuple(
            (unescaped(label), float(probability))
            for label, probability in zip(row["tags"], row["tag_probabilities"], strict=True)
        ),
    )


def _maybe(text: str | None) -> str | None:
    return None if text is None else unescaped(text)
