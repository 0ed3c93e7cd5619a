"""The only code that writes an index: one writer at a time, and one commit point.

A commit writes the new vectors to a segment under a temporary name, makes it durable, gives it its final name, and
only then names it in one SQLite transaction together with all rows of the batch. Whenever the process or the power
fails, the index is what the last transaction said; a segment that no row names is garbage and harmless.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import sqlalchemy as sa

from indexer.segments import next_id, segment_file, write_segment
from indexer.writable import WritableIndex, identity_of
from searchengine.index.layout import IndexIdentity
from searchengine.index.schema import failures, images, runs, segments, vectors
from searchengine.metadata import PhotoMetadata
from searchengine.stores import StoredPhoto
from searchengine.vectors import Encoder, FloatMatrix, check_unit_rows

# Unlike the size of any file, so that a failure recorded with it is tried again by the next run.
NO_SIZE = -1
# Enough to be fast, and few enough to take no memory worth mentioning.
ROWS_A_STATEMENT = 200


@dataclass(frozen=True, kw_only=True)
class NewPhoto:
    """A photo to be recorded. `moved_from` is the id of the row that it had under its former name."""

    store: str
    listed: StoredPhoto
    content_hash: bytes
    metadata: PhotoMetadata
    moved_from: int | None = None


@dataclass(frozen=True, kw_only=True)
class FailedPhoto:
    """A file that could not be used. `damaged` tells broken content from a file that could just not be read now."""

    store: str
    listed: StoredPhoto
    reason: str
    damaged: bool


@dataclass(kw_only=True)
class NextCommit:
    """What the next commit will hold. Row i of the vectors belongs to `hashes[i]`."""

    hashes: list[bytes] = field(default_factory=list)
    vectors: list[FloatMatrix] = field(default_factory=list)
    photos: list[NewPhoto] = field(default_factory=list)
    failures: list[FailedPhoto] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    recovered: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.photos) + len(self.failures) + len(self.removed) + len(self.recovered)


class IndexWriter(WritableIndex):
    """Open for writing, as a context manager. Makes the index if there is none, deletes what a killed process left.

    Raises IndexLocked while another process writes, ModelMismatch where the index belongs to another encoder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, encoder: Encoder | IndexIdentity) -> None:
        """`encoder` makes the vectors, or made them."""
        super().__init__(folder, identity=encoder if isinstance(encoder, IndexIdentity) else identity_of(encoder))
        self._batch = NextCommit()

    # -- what the next commit will hold ------------------------------------------------------------------------

    def add_vectors(self, hashes: Sequence[bytes], embeddings: FloatMatrix) -> None:
        """Queue new vectors: unit rows, float32 (n, dim), one for each content hash that the index lacks."""
        check_unit_rows(embeddings, dim=self.identity.dim)
        self._batch.hashes.extend(hashes)
        self._batch.vectors.append(embeddings)

    def add_photo(self, photo: NewPhoto) -> None:
        """Queue a photo whose vector is in the index or queued; it replaces what was known under its name."""
        self._batch.photos.append(photo)

    def add_failure(self, failure: FailedPhoto) -> None:
        """Queue a failure. Damaged content takes the place of the photo that was known under its name."""
        self._batch.failures.append(failure)

    def remove_photos(self, image_ids: Sequence[int]) -> None:
        self._batch.removed.extend(image_ids)

    def forget_failures(self, names: Sequence[tuple[str, str]]) -> None:
        """Failed files that are gone: (store, key) each."""
        self._batch.recovered.extend(names)

    @property
    def pending(self) -> int:
        """Photos, failures and removals that the next commit will record."""
        return len(self._batch)

    def commit(
        self,
        *,
        report: dict[str, Any],
        finished: bool = False,
        with_photos: Callable[[sa.Connection], None] = lambda connection: None,
    ) -> None:
        """Make the queued batch durable and visible, whole or not at all. Without one, only `finished` is recorded.

        `with_photos` records in the same transaction what else belongs to them.
        """
        batch = self._batch
        if not (batch.hashes or len(batch) or finished):
            return
        with self.disk_errors(), self.engine.begin() as connection:
            if batch.hashes:
                self._add_segment(connection, batch)
            record_photos(connection, batch)
            with_photos(connection)
            connection.execute(sa.update(runs).where(runs.c.id == self.run_id).values(report=report))
            if finished:
                self.end_run(connection)
        self._batch = NextCommit()

    def _add_segment(self, connection: sa.Connection, batch: NextCommit) -> None:
        first_id, number = next_id(connection, "vectors"), next_id(connection, "segments")
        ids = np.arange(first_id, first_id + len(batch.hashes), dtype=np.int64)
        bounds = np.cumsum([len(matrix) for matrix in batch.vectors])[:-1]
        pieces = zip(np.split(ids, bounds), batch.vectors, strict=True)
        file = segment_file(number)
        count, sha256 = write_segment(self.paths.segment(file), pieces, dim=self.identity.dim)
        connection.execute(sa.insert(segments).values(id=number, file=file, count=count, sha256=sha256))
        rows = [(vector_id, content, number) for vector_id, content in zip(ids.tolist(), batch.hashes, strict=True)]
        connection.exec_driver_sql("INSERT INTO vectors (id, content_hash, segment_id) VALUES (?, ?, ?)", rows)


def record_photos(connection: sa.Connection, batch: NextCommit) -> None:
    """The rows of one batch. Removals come first, so that a name freed by them can be taken by a moved photo."""
    if batch.removed:
        statement = sa.delete(images).where(images.c.id == sa.bindparam("image_id"))
        connection.execute(statement, [{"image_id": image_id} for image_id in batch.removed])
    # A statement for many photos takes a tenth of the time of one each; a moved photo keeps its place among them.
    for moved, photos in groupby(batch.photos, key=lambda photo: photo.moved_from is not None):
        while some := list(islice(photos, ROWS_A_STATEMENT)):
            (_record_moved if moved else _record_named)(connection, some)
    readable = [(photo.store, photo.listed.key) for photo in batch.photos] + batch.recovered
    if readable:
        statement = sa.delete(failures).where(
            failures.c.store == sa.bindparam("of_store"), failures.c.key == sa.bindparam("of_key")
        )
        for start in range(0, len(readable), ROWS_A_STATEMENT):
            names = readable[start : start + ROWS_A_STATEMENT]
            connection.execute(statement, [{"of_store": store, "of_key": key} for store, key in names])
    for failure in batch.failures:
        name = {"store": failure.store, "key": failure.listed.key}
        connection.execute(sa.delete(failures).where(failures.c.store == name["store"], failures.c.key == name["key"]))
        if failure.damaged:
            connection.execute(sa.delete(images).where(images.c.store == name["store"], images.c.key == name["key"]))
        # What could just not be read may be readable next time, though its size and time stay: permissions, a network.
        size_bytes = failure.listed.size_bytes if failure.damaged else NO_SIZE
        facts = {"size_bytes": size_bytes, "mtime_ns": failure.listed.mtime_ns, "etag": failure.listed.etag}
        connection.execute(sa.insert(failures).values(name | facts | {"reason": failure.reason}))


def _record_named(connection: sa.Connection, photos: Sequence[NewPhoto]) -> None:
    """Each takes the place of what was known under its name. No id is taken for what is there already."""
    rows = list({(photo.store, photo.listed.key): _row(photo) for photo in photos}.values())
    facts: dict[str, Any] = {
        column.name: sa.bindparam(f"new_{column.name}", type_=column.type)
        for column in images.c
        if column.name not in ("id", "vector_id")
    }
    facts["vector_id"] = _vector_of(sa.bindparam("new_hash"))
    same_name = sa.and_(images.c.store == sa.bindparam("new_store"), images.c.key == sa.bindparam("new_key"))
    connection.execute(sa.update(images).where(same_name).values(facts), rows)
    others = sa.select(*facts.values()).where(~sa.exists().where(same_name))
    connection.execute(sa.insert(images).from_select(list(facts), others), rows)


def _record_moved(connection: sa.Connection, photos: Sequence[NewPhoto]) -> None:
    for photo in photos:
        same_name = sa.and_(images.c.store == photo.store, images.c.key == photo.listed.key)
        connection.execute(sa.delete(images).where(same_name, images.c.id != photo.moved_from))
        row = {name.removeprefix("new_"): value for name, value in _row(photo).items()}
        row["vector_id"] = _vector_of(row.pop("hash"))
        connection.execute(sa.update(images).where(images.c.id == photo.moved_from).values(row))


def _vector_of(content_hash: Any) -> sa.ScalarSelect[Any]:
    return sa.select(vectors.c.id).where(vectors.c.content_hash == content_hash).scalar_subquery()


def _row(photo: NewPhoto) -> dict[str, Any]:
    """The values of a row of `images`, prefixed: names of columns are taken in the statements they go into."""
    metadata, listed = photo.metadata, photo.listed
    return {
        "new_store": photo.store,
        "new_key": listed.key,
        "new_size_bytes": listed.size_bytes,
        "new_mtime_ns": listed.mtime_ns,
        "new_etag": listed.etag,
        "new_width": metadata.width,
        "new_height": metadata.height,
        "new_taken_at": metadata.taken_at,
        "new_latitude": metadata.latitude,
        "new_longitude": metadata.longitude,
        "new_camera": metadata.camera,
        "new_hash": photo.content_hash,
    }
