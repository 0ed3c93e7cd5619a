"""The read-only view of an index: vectors by inner product, photos by id, filters in SQL.

Every search sees one committed state. A newer commit is noticed by the next search, without a restart.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import sqlalchemy as sa

from searchengine.errors import IndexFormatError, ModelMismatch
from searchengine.index.commits import Commits, Version
from searchengine.index.filters import Filters
from searchengine.index.layout import RESTORE, IndexIdentity, IndexPaths, index_folder, read_identity
from searchengine.index.schema import connect_for_reading, failures, images, runs, schema_version, segments, vectors
from searchengine.index.segments import Ids, Segment, load_segment
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

# SQLite's default bound on variables in one statement is 32,766; lists of ids are sent in pieces below it.
IDS_PER_STATEMENT = 10_000

NO_IDS: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A photo as the index knows it. `width` and `height` in pixels; `taken_at` ISO 8601, camera's local time."""

    id: int
    store: str
    key: str
    size_bytes: int
    mtime_ns: int
    width: int
    height: int
    taken_at: str | None
    latitude: float | None
    longitude: float | None
    camera: str | None
    vector_id: int


@dataclass(frozen=True)
class Snapshot:
    """The segments of one committed state. `alive` is None while every vector belongs to a photo."""

    version: Version
    segments: tuple[Segment, ...]
    alive: Ids | None

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


class Index:
    """Open for reading; `close` it, or use it as a context manager. Searches from several threads are safe."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = index_folder(folder)
        self.identity: IndexIdentity = read_identity(self.folder)
        self._paths = IndexPaths(self.folder)
        if not self._paths.database.is_file():
            raise IndexFormatError(
                f"the index at {printable(str(self.folder))} has lost its metadata.sqlite; {RESTORE}"
            )
        self._engine = connect_for_reading(self._paths.database)
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._commits = Commits(self._paths.database)
        with self._errors_named():
            self._file = self._commits.version().file

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._commits.close()
        self._engine.dispose()

    @property
    def dim(self) -> int:
        return self.identity.dim

    def snapshot(self) -> Snapshot:
        """The newest committed state; loaded anew only after a commit."""
        with self._lock, self._errors_named():
            version = self._version()
            while self._snapshot is None or version != self._snapshot.version:
                try:
                    self._snapshot = self._load(version)
                except IndexFormatError:
                    # `compact` may have deleted a segment after its row was read here; then it has committed since.
                    before, version = version, self._version()
                    if version == before:
                        raise
            return self._snapshot

    def _version(self) -> Version:
        version = self._commits.version()
        if version.file != self._file:
            identity = read_identity(self.folder)
            if identity != self.identity:
                raise ModelMismatch(
                    f"the index at {printable(str(self.folder))} was replaced by one of encoder "
                    f"{printable(identity.encoder)}; open it again"
                )
            self._file, self._snapshot = version.file, None  # its segments have the names of others now
        return version

    def search(self, queries: FloatMatrix, *, k: int, among: Ids | None = None) -> tuple[FloatMatrix, Ids]:
        """Exact inner-product search.

        `queries` is float32 (q, dim), unit rows; `among` narrows it to those vector ids. Returns scores
        float32 (q, k'), falling, and vector ids int64 (q, k'), with k' = min(k, number of vectors). Equal scores
        come in the order of their ids.
        """
        snapshot = self.snapshot()
        allowed = snapshot.alive if among is None else among
        selector = None if allowed is None else faiss.IDSelectorBatch(allowed)
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        width = min(k, len(snapshot) if allowed is None else len(allowed))
        found = [segment.nearest(queries, k=width, parameters=parameters) for segment in snapshot.segments if width]
        if not found:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        ids = np.concatenate([ids for _, ids in found], axis=1)
        scores[ids < 0] = -np.inf  # a segment with fewer allowed vectors than asked for pads with id -1
        order = np.lexsort((ids, -scores), axis=1)[:, :width]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def vector_ids(self, filters: Filters) -> Ids:
        """Ids of the vectors that have at least one photo which passes `filters`, rising."""
        query = sa.select(images.c.vector_id).distinct().where(filters.condition())
        with self._reading() as connection:
            ids = [row[0] for row in connection.execute(query)]
        return np.sort(np.asarray(ids, dtype=np.int64))

    def images_of(self, vector_ids: Sequence[int], *, filters: Filters | None = None) -> dict[int, list[ImageRow]]:
        """The photos of each vector that pass `filters`, in order of their ids."""
        rows: dict[int, list[ImageRow]] = {}
        condition = filters.condition() if filters else sa.true()
        with self._reading() as connection:
            for start in range(0, len(vector_ids), IDS_PER_STATEMENT):
                piece = [int(i) for i in vector_ids[start : start + IDS_PER_STATEMENT]]
                query = sa.select(images).where(images.c.vector_id.in_(piece), condition).order_by(images.c.id)
                for row in connection.execute(query):
                    rows.setdefault(row.vector_id, []).append(ImageRow(*row))
        return rows

    def image(self, image_id: int) -> ImageRow | None:
        return self._one_image(images.c.id == image_id)

    def image_by_key(self, store: str, key: str) -> ImageRow | None:
        return self._one_image(sa.and_(images.c.store == store, images.c.key == key))

    def vector_id_by_content(self, content_hash: bytes) -> int | None:
        with self._reading() as connection:
            query = sa.select(vectors.c.id).where(vectors.c.content_hash == content_hash)
            found: int | None = connection.execute(query).scalar_one_or_none()
        return found

    def vector(self, vector_id: int) -> FloatMatrix:
        """The stored vector, float32 (dim,). Raises KeyError for an id that no segment holds."""
        for segment in self.snapshot().segments:
            position = np.flatnonzero(segment.ids == vector_id)
            if position.size:
                row: FloatMatrix = segment.vectors()[int(position[0])].copy()
                return row
        raise KeyError(vector_id)

    def sample_vectors(self, size: int, *, seed: int = 0) -> FloatMatrix:
        """At most `size` living vectors, float32 (n, dim): the same ones for the same state of the index."""
        snapshot = self.snapshot()
        pieces = [
            segment.vectors() if snapshot.alive is None else segment.vectors()[np.isin(segment.ids, snapshot.alive)]
            for segment in snapshot.segments
        ]
        count = sum(len(piece) for piece in pieces)
        if count <= size:
            return np.concatenate([np.empty((0, self.dim), np.float32), *pieces])
        chosen = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
        bounds = np.cumsum([0, *(len(piece) for piece in pieces)])
        return np.concatenate(
            [
                piece[chosen[(chosen >= low) & (chosen < high)] - low]
                for piece, low, high in zip(pieces, bounds[:-1], bounds[1:], strict=True)
            ]
        )

    def count_images(self, filters: Filters | None = None) -> int:
        condition = filters.condition() if filters else sa.true()
        return self._scalar(sa.select(sa.func.count()).select_from(images).where(condition))

    def count_failures(self) -> int:
        return self._scalar(sa.select(sa.func.count()).select_from(failures))

    def failed_photos(self) -> Iterator[tuple[str, str, str]]:
        """(store, key, reason) of each photo that could not be used, by key."""
        query = sa.select(failures.c.store, failures.c.key, failures.c.reason).order_by(failures.c.key)
        with self._reading() as connection:
            yield from connection.execute(query)

    def last_run(self) -> dict[str, Any] | None:
        """The newest run that committed: when it started and ended, and its counters."""
        query = (
            sa.select(runs.c.started_at, runs.c.finished_at, runs.c.report)
            .where(runs.c.report.is_not(None))
            .order_by(runs.c.id.desc())
            .limit(1)
        )
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else {"started_at": row[0], "finished_at": row[1], **row[2]}

    def size_bytes(self) -> int:
        """What the index takes on disk."""
        total = 0
        for file in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # a writer's temporary file
                total += file.stat().st_size if file.is_file() else 0
        return total

    def _one_image(self, condition: sa.ColumnElement[bool]) -> ImageRow | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(images).where(condition)).one_or_none()
        return None if row is None else ImageRow(*row)

    def _scalar(self, query: sa.Executable) -> int:
        with self._reading() as connection:
            return int(connection.execute(query).scalar_one())

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one committed state, however many statements it runs. Raises IndexFormatError."""
        with self._errors_named(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise IndexFormatError(
                f"the tables of the index at {printable(str(self.folder))} cannot be read ({reason}); "
                "check the disk and permissions, run `searchengine verify --repair`, or restore it and index again"
            ) from None

    def _load(self, version: Version) -> Snapshot:
        with self._reading() as connection:
            schema_version(connection, self._paths.database)
            rows = connection.execute(sa.select(segments.c.file, segments.c.count).order_by(segments.c.id)).all()
            dead = sa.select(vectors.c.id).where(~sa.exists().where(images.c.vector_id == vectors.c.id)).limit(1)
            alive: Ids | None = None
            if connection.execute(dead).first() is not None:
                living = connection.execute(sa.select(images.c.vector_id).distinct())
                alive = np.sort(np.asarray([row[0] for row in living], dtype=np.int64))
        known = {segment.file: segment for segment in self._snapshot.segments} if self._snapshot else {}
        return Snapshot(
            version=version,
            segments=tuple(
                known.get(file) or load_segment(self._paths.segment(file), count=count, dim=self.dim)
                for file, count in rows
            ),
            alive=alive,
        )
