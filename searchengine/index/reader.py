"""The read-only view of an index: vectors by inner product, photos by id, filters in SQL.

Every search sees one committed state. A newer commit is noticed by the next search, without a restart.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import sqlalchemy as sa

from searchengine.errors import IndexFormatError, UsageError
from searchengine.filters import Filters
from searchengine.index import photos
from searchengine.index.ann_file import newest_ann
from searchengine.index.commits import Commits, Version, check_identity
from searchengine.index.layout import RESTORE, IndexIdentity, IndexPaths, index_folder, read_identity
from searchengine.index.nearest import nearest_photos
from searchengine.index.photos import ImageRow, RememberedIds
from searchengine.index.protocol import Effort
from searchengine.index.sampling import lasting_sample
from searchengine.index.schema import (
    ANN_ROW,
    ANN_VERSION,
    ENCODERS_VERSION,
    ann,
    connect_for_reading,
    encoders,
    failures,
    images,
    runs,
    schema_version,
    segments,
    stand_in_for_tags,
    vectors,
)
from searchengine.index.segments import Ids, load_segment
from searchengine.index.snapshot import COMPARED_AT_MOST, DEPTHS, NEAREST, Snapshot
from searchengine.index.table import VectorTable
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, check_unit_rows


class Index:
    """Open for reading; `close` it, or use it as a context manager. Searches from several threads are safe."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = index_folder(folder)
        self.place = printable(str(self.folder))
        self.identity: IndexIdentity = read_identity(self.folder)
        self._paths = IndexPaths(self.folder)
        if not self._paths.database.is_file():
            raise IndexFormatError(f"the index at {self.place} has lost its metadata.sqlite; {RESTORE}")
        self._engine = connect_for_reading(self._paths.database)
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._commits = Commits(self._paths.database)
        self._remembered = RememberedIds()
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
            check_identity(self.folder, self.identity, in_tables=None)
            self._file, self._snapshot = version.file, None  # its segments have the names of others now
        return version

    def search(self, queries: FloatMatrix, *, k: int, among: Ids | None = None) -> tuple[FloatMatrix, Ids]:
        """The nearest vectors by inner product, of those whose photo is not gone.

        `queries` is float32 (q, dim), unit rows; `among` narrows the search to those vector ids, rising. Returns scores
        float32 (q, k'), falling, and vector ids int64 (q, k'), with k' = min(k, number of vectors). Scores are exact,
        equal ones in the order of their ids. Without an `ann/` the vectors are exactly the nearest, with one nearly
        always (`snapshot().ann.parameters.recall_at_10`). Raises UsageError for other queries, or k < 1.
        """
        return self.snapshot().search(self._checked(queries, k=k), k=k, among=among)

    def rank(
        self, query: FloatMatrix, *, k: int, among: Ids | None = None, depths: Sequence[int] = DEPTHS
    ) -> tuple[FloatMatrix, Ids]:
        """The same for one query (dim,), for those who turn pages: the first j hits are the same for every k >= j."""
        return self.snapshot().rank(self._checked(query[None], k=k)[0], k=k, among=among, depths=depths)

    def nearest_photos(
        self,
        queries: FloatMatrix,
        *,
        count: int,
        filters: Filters | None = None,
        without: Collection[int] = (),
        depths: Sequence[int] = DEPTHS,
    ) -> list[tuple[Ids, FloatMatrix]]:
        return nearest_photos(self, queries, count=count, filters=filters, without=without, depths=depths)

    def nearest_vectors(self, query: FloatMatrix, *, k: int, filters: Filters | None = None) -> tuple[FloatMatrix, Ids]:
        return self.snapshot().rank(query, k=k, among=self.vector_ids(filters) if filters else None)

    def effort(self, filters: Filters | None) -> Effort:
        snapshot = self.snapshot()
        is_exact = snapshot.ann is None or len(self.vector_ids(filters) if filters else snapshot) <= COMPARED_AT_MOST
        return Effort(() if is_exact else (NEAREST,), compares_all=True)

    def _checked(self, queries: FloatMatrix, *, k: int) -> FloatMatrix:
        if not isinstance(k, int | np.integer) or k < 1:
            raise UsageError(f"k is {k}; it must be a whole number, at least 1")
        return check_unit_rows(queries, dim=self.dim)

    def vector_ids(self, filters: Filters) -> Ids:
        """Ids of the vectors that have at least one photo which passes `filters`, rising, read-only."""
        version = self.snapshot().version
        known = self._remembered.get(filters, version=version)
        if known is not None:
            return known
        with self._reading() as connection:
            ids = photos.vector_ids(connection, filters)
        self._remembered.put(filters, ids, version=version)
        return ids

    def photos_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> tuple[Ids, Ids]:
        """The photos of some vectors (m,), all different, that pass `filters`: in the vectors' order, then by id.

        Returns their ids (n,), and for each the place (n,) of its vector in `vector_ids`.
        """
        with self._reading() as connection:
            return photos.photos_of(connection, vector_ids, filters=filters)

    def images(self, image_ids: Ids) -> dict[int, ImageRow]:
        """These photos (n,), by id; one that is gone is left out."""
        with self._reading() as connection:
            return photos.rows(connection, image_ids)

    def images_of(self, vector_ids: Sequence[int], *, filters: Filters | None = None) -> dict[int, list[ImageRow]]:
        """The photos of each vector that pass `filters`, in order of their ids."""
        found: dict[int, list[ImageRow]] = {}
        with self._reading() as connection:
            ids, _ = photos.photos_of(connection, np.unique(np.asarray(vector_ids, np.int64)), filters=filters)
            for _, row in sorted(photos.rows(connection, ids).items()):
                found.setdefault(row.vector_id, []).append(row)
        return found

    def keys_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> dict[int, list[tuple[int, str]]]:
        """The photos of each vector that pass, in order of their ids: id and key, which is a local photo's path."""
        with self._reading() as connection:
            return photos.keys_of(connection, vector_ids, filters=filters)

    def image(self, image_id: int) -> ImageRow | None:
        with self._reading() as connection:
            return photos.one(connection, images.c.id == image_id)

    def image_by_key(self, store: str, key: str) -> ImageRow | None:
        with self._reading() as connection:
            return photos.one(connection, sa.and_(images.c.store == store, images.c.key == key))

    def vector_id_by_content(self, content_hash: bytes) -> int | None:
        with self._reading() as connection:
            query = sa.select(vectors.c.id).where(vectors.c.content_hash == content_hash)
            found: int | None = connection.execute(query).scalar_one_or_none()
        return found

    def vector(self, vector_id: int) -> FloatMatrix:
        """The stored vector, float32 (dim,). Raises KeyError for an id that no segment holds."""
        table = self.snapshot().table
        rows = table.rows_of(np.array([vector_id], np.int64))
        if not len(rows):
            raise KeyError(vector_id)
        found: FloatMatrix = table.gather(rows)[0]
        return found

    def sample_vectors(self, size: int) -> FloatMatrix:
        """At most `size` living vectors, float32 (n, dim): in the next state nearly the same ones (sampling.py)."""
        table = self.snapshot().table
        rows = table.living_rows
        return table.gather(np.sort(rows[lasting_sample(table.ids[rows], size)]))

    def count_images(self, filters: Filters | None = None) -> int:
        with self._reading() as connection:
            return photos.count(connection, filters)

    def count_failures(self) -> int:
        with self._reading() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(failures)).scalar_one())

    def failed_photos(self) -> Iterator[tuple[str, str, str]]:
        """(store, key, reason) of each photo that could not be used, by key."""
        query = sa.select(failures.c.store, failures.c.key, failures.c.reason).order_by(failures.c.key)
        with self._reading() as connection:
            yield from connection.execute(query)

    def tags(self, *, vector_id: int | None = None) -> list[tuple[str, int]]:
        """Each label that `classify --write-tags` gave, to `vector_id` or to any, with its photos: the most first."""
        with self._reading() as connection:
            return photos.tag_counts(connection, vector_id=vector_id)

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

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one committed state, however many statements it runs. Raises IndexFormatError."""
        with self._errors_named(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            stand_in_for_tags(connection)
            yield connection

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise IndexFormatError(
                f"the tables of the index at {self.place} cannot be read ({reason}); "
                "check the disk and permissions, run `searchengine verify --repair`, or restore it and index again"
            ) from None

    def _load(self, version: Version) -> Snapshot:
        with self._reading() as connection:
            tables = schema_version(connection, self._paths.database)
            if tables >= ENCODERS_VERSION:
                in_tables = connection.execute(sa.select(encoders.c.fingerprint)).scalar()
                if in_tables not in (None, self.identity.fingerprint):
                    check_identity(self.folder, self.identity, in_tables=in_tables)
            rows = connection.execute(sa.select(segments.c.file, segments.c.count).order_by(segments.c.id)).all()
            used = self._vectors_of_photos(connection, vectors_in_segments=sum(count for _, count in rows))
            newest = sa.select(*ANN_ROW).order_by(ann.c.id.desc()).limit(1)
            built = connection.execute(newest).one_or_none() if tables >= ANN_VERSION else None
        before = self._snapshot
        known = {segment.file: segment for segment in before.segments} if before else {}
        loaded = []
        for file, count in rows:
            segment = known.get(file)
            if segment is None or len(segment.ids) != count:
                segment = load_segment(self._paths.segment(file), count=count, dim=self.dim)
            loaded.append(segment)
        table = VectorTable(loaded, dim=self.dim)
        if used is not None:
            table.bury(used)
        known_ann = before.ann if before else None
        return Snapshot(version, table, newest_ann(built, paths=self._paths, dim=self.dim, known=known_ann))

    def _vectors_of_photos(self, connection: sa.Connection, *, vectors_in_segments: int) -> Ids | None:
        """The vectors that have a photo; None where all have one, as a rule, which an index over the photos tells."""
        used = sa.select(sa.func.count(sa.distinct(images.c.vector_id)))
        if connection.execute(used).scalar_one() == vectors_in_segments:
            return None
        return photos.vectors_in_use(connection)
