"""Merge small segments, drop dead vectors, and build `ann/`: fewer files to open, less to search and to store.

New segments are written and published first; one transaction then names them in place of the old ones, whose files are
deleted last. Killed at any instant, the index is what it was before or after that transaction. Vectors keep their ids
and their bits, so every search finds what it found before. Readers keep the files that they have mapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from indexer.ann import DEFAULT_RECALL, check_choice, update_ann
from indexer.lock import LockedIndex
from indexer.segments import check_named_segments, delete_orphans, next_id, segment_file, write_segment
from searchengine.errors import IndexFormatError, UsageError
from searchengine.index.ann import AnnParameters
from searchengine.index.layout import REPAIR, RESTORE, IndexIdentity, IndexPaths, read_identity
from searchengine.index.schema import images, migrate, schema_version, segments, vectors
from searchengine.index.segments import Ids, load_segment
from searchengine.models.published import sha256_of
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

SEGMENT_BYTES = 256 * 2**20  # of vectors, in a full segment
ROWS_PER_COPY = 4096
IDS_PER_STATEMENT = 10_000

Piece = tuple[Ids, FloatMatrix]


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What was done: `merged` segments became `written` ones, `dropped` vectors of no photo are gone.

    `built` is the `ann/` that was built, None where there was none to build.
    """

    merged: int
    written: int
    dropped: int
    freed_bytes: int
    built: AnnParameters | None


class _Source(NamedTuple):
    """A row of `segments`, with the number of its vectors that have a photo."""

    id: int
    file: str
    vectors: int
    sha256: str
    living: int


class _Written(NamedTuple):
    segment: _Source
    ids: Ids


def compact(
    index: str | os.PathLike[str],
    *,
    kind: str = "auto",
    memory_bytes: int | None = None,
    recall: float = DEFAULT_RECALL,
    rebuild: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compaction:
    """Compact the index in the folder `index`. A second time there is nothing to do.

    `kind` is auto, flat, scan or ivf (see searchengine/index/ann.py); `memory_bytes` bounds what a search in it keeps
    in memory; `recall` is what `ivf` is tuned to, of the ten best; `rebuild` builds `ann/` even where it is as it
    should be. Takes memory for one segment of SEGMENT_BYTES, or for the codes. Raises IndexNotFound, IndexFormatError
    where a segment is damaged, IndexLocked, IndexUnusable, UsageError for a kind that does not fit.
    """
    if not 0 < recall <= 1:
        raise UsageError(f"the recall to reach is {recall}; it must be above 0 and at most 1")
    locked = LockedIndex(index)
    identity = read_identity(locked.folder)
    if not locked.paths.database.is_file():
        raise IndexFormatError(f"the index at {printable(str(locked.folder))} has lost its metadata.sqlite; {RESTORE}")
    with locked, locked.disk_errors():
        check_tables_are_there(locked)
        check_choice(locked, identity, kind=kind, memory_bytes=memory_bytes)
        done = merge_segments(locked, identity)
        built = update_ann(
            locked,
            identity,
            kind=kind,
            memory_bytes=memory_bytes,
            recall=recall,
            rebuild=rebuild,
            on_progress=on_progress,
        )
        return replace(done, built=built)


def check_tables_are_there(locked: LockedIndex) -> None:
    """Raises IndexFormatError, IndexTooNew."""
    with locked.engine.begin() as connection:
        if schema_version(connection, locked.paths.database) == 0:
            raise IndexFormatError(f"the index at {printable(str(locked.folder))} has lost its tables; {RESTORE}")


def merge_segments(locked: LockedIndex, identity: IndexIdentity) -> Compaction:
    """All but `ann/`, for who holds the lock already."""
    check_tables_are_there(locked)
    migrate(locked.engine, locked.paths.database)
    with locked.engine.begin() as connection:
        check_named_segments(connection, locked.paths, dim=identity.dim)
    delete_orphans(locked.engine, locked.paths)
    before_bytes = _size_bytes(locked.paths)
    capacity = max(1, SEGMENT_BYTES // (4 * identity.dim))
    sources = _to_merge(locked.engine, capacity)
    written = dropped = 0
    if sources:
        locked.begin_run()
        try:
            new = _write_merged(locked, sources, capacity=capacity, dim=identity.dim)
            dropped = _switch(locked, sources, new)
        except BaseException:
            delete_orphans(locked.engine, locked.paths)  # on a full disk it matters
            raise
        written = len(new)
        for source in sources:
            with suppress(OSError):  # the next process that writes deletes it
                locked.paths.segment(source.file).unlink()
    _tidy_tables(locked.engine)
    freed_bytes = max(0, before_bytes - _size_bytes(locked.paths))
    return Compaction(merged=len(sources), written=written, dropped=dropped, freed_bytes=freed_bytes, built=None)


def _to_merge(engine: sa.Engine, capacity: int) -> list[_Source]:
    """All segments that are not full or hold vectors of no photo, unless merging them would save nothing."""
    has_photo = sa.exists().where(images.c.vector_id == vectors.c.id)
    living = sa.select(vectors.c.segment_id, sa.func.count()).where(has_photo).group_by(vectors.c.segment_id)
    with engine.begin() as connection:
        living_in = {row[0]: row[1] for row in connection.execute(living)}
        rows = connection.execute(sa.select(segments).order_by(segments.c.id)).all()
    known = [_Source(row.id, row.file, row[2], row.sha256, living_in.get(row.id, 0)) for row in rows]
    wasteful = [source for source in known if source.living != source.vectors or source.vectors < capacity]
    needed = -(-sum(source.living for source in wasteful) // capacity)
    if needed == len(wasteful) and all(source.living == source.vectors for source in wasteful):
        return []
    return wasteful


def _write_merged(locked: LockedIndex, sources: list[_Source], *, capacity: int, dim: int) -> list[_Written]:
    with locked.engine.begin() as connection:
        number = next_id(connection, "segments")
    pieces = _Pieces(_living_vectors(locked, sources, dim=dim))
    written: list[_Written] = []
    while pieces:
        ids: list[Ids] = []
        file = segment_file(number)
        count, sha256 = write_segment(locked.paths.segment(file), pieces.take(capacity, ids), dim=dim)
        written.append(_Written(_Source(number, file, count, sha256, count), np.concatenate(ids)))
        number += 1
    return written


def _living_vectors(locked: LockedIndex, sources: list[_Source], *, dim: int) -> Iterator[Piece]:
    """The vectors of `sources` that have a photo. What is damaged is refused, lest it get a new sha256."""
    for source in sources:
        path = locked.paths.segment(source.file)
        segment = load_segment(path, count=source.vectors, dim=dim)
        living = _living_ids(locked.engine, source, segment.ids)
        positions = np.flatnonzero(np.isin(segment.ids, living))
        if sha256_of(path) != source.sha256 or len(living) != source.living or len(positions) != source.living:
            raise IndexFormatError(f"{printable(str(path))} is damaged; {REPAIR}")
        for start in range(0, len(positions), ROWS_PER_COPY):
            some = positions[start : start + ROWS_PER_COPY]
            yield segment.ids[some], segment.matrix[some]


def _living_ids(engine: sa.Engine, source: _Source, ids: Ids) -> Ids:
    """Those of a segment's vectors that have a photo; `ids` are in its file and narrow the search."""
    if not ids.size:
        return ids
    query = (
        sa.select(vectors.c.id)
        .where(vectors.c.segment_id == source.id, vectors.c.id.between(int(ids.min()), int(ids.max())))
        .where(sa.exists().where(images.c.vector_id == vectors.c.id))
    )
    with engine.begin() as connection:
        return np.fromiter(connection.execute(query).scalars(), np.int64)


class _Pieces:
    """Vectors that come in small pieces and are taken by the segment."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self._pieces = pieces
        self._next = next(pieces, None)

    def __bool__(self) -> bool:
        return self._next is not None

    def take(self, count: int, taken: list[Ids]) -> Iterator[Piece]:
        """The next `count` vectors, or all that are left; their ids go to `taken` too."""
        while self._next is not None and count:
            ids, rows = self._next
            taken.append(ids[:count])
            yield ids[:count], rows[:count]
            self._next = (ids[count:], rows[count:]) if len(ids) > count else next(self._pieces, None)
            count -= min(count, len(ids))


def _switch(locked: LockedIndex, sources: list[_Source], written: list[_Written]) -> int:
    """The one commit: the rows name the new segments, and vectors of no photo are gone. Returns how many those are."""
    with _foreign_keys_checked_once(locked.engine) as connection:
        for segment, ids in written:
            values = {"id": segment.id, "file": segment.file, "count": segment.vectors, "sha256": segment.sha256}
            connection.execute(sa.insert(segments).values(values))
            # Past SQLAlchemy, whose handling of parameters would take longer than the updates.
            rows = [(segment.id, vector_id) for vector_id in ids.tolist()]
            connection.exec_driver_sql("UPDATE vectors SET segment_id = ? WHERE id = ?", rows)
        old = [source.id for source in sources]
        dropped = 0
        for start in range(0, len(old), IDS_PER_STATEMENT):
            some = old[start : start + IDS_PER_STATEMENT]
            dropped += connection.execute(sa.delete(vectors).where(vectors.c.segment_id.in_(some))).rowcount
            connection.execute(sa.delete(segments).where(segments.c.id.in_(some)))
        locked.end_run(connection)
    return dropped


@contextmanager
def _foreign_keys_checked_once(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction in which foreign keys are checked at its end: else each deleted segment costs a look at all
    vectors."""
    driver: Any = engine.raw_connection().driver_connection
    driver.execute("PRAGMA foreign_keys = OFF")  # does nothing within a transaction
    try:
        with engine.begin() as connection:
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise IndexFormatError(
                    f"the tables of the index are damaged: {broken[0]} without {broken[2]}; {REPAIR}"
                )
    finally:
        driver.execute("PRAGMA foreign_keys = ON")


def _tidy_tables(engine: sa.Engine) -> None:
    """Give the disk back what deleted rows took, where that is a tenth of the tables or more."""
    driver: Any = engine.raw_connection().driver_connection
    (free,), (pages,) = (driver.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_count"))
    if 10 * free >= pages:
        driver.execute("VACUUM")
    driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _size_bytes(paths: IndexPaths) -> int:
    return sum(
        file.stat().st_size for file in (*paths.segments.glob("*.faiss"), *paths.folder.glob("metadata.sqlite*"))
    )
