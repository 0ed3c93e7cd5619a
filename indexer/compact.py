"""Merge small segments, drop dead vectors, and build `ann/`: fewer files to open, less to search and to store.

`merge.py` tells how one commit puts new segments in place of old ones. Vectors keep their ids and their bits, so every
search finds what it found before. Readers keep the files that they have mapped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa

from indexer.ann import DEFAULT_RECALL, check_choice, update_ann
from indexer.leftovers import finish_change
from indexer.lock import LockedIndex
from indexer.merge import Piece, foreign_keys_checked_once, name_in_place_of, tidy_tables, write_full_segments
from indexer.segments import check_named_segments, delete_orphans
from searchengine.errors import IndexFormatError, UsageError
from searchengine.index.ann import AnnParameters
from searchengine.index.layout import REPAIR, RESTORE, IndexIdentity, IndexPaths, read_identity
from searchengine.index.schema import images, migrate, schema_version, segments, vectors
from searchengine.index.segments import Ids, load_segment
from searchengine.models.published import sha256_of
from searchengine.text import printable

SEGMENT_BYTES = 256 * 2**20  # of vectors, in a full segment
ROWS_PER_COPY = 4096


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
    should be. Takes memory for the ids of one segment of SEGMENT_BYTES, or for the codes. Raises IndexNotFound,
    IndexFormatError where a segment is damaged, IndexLocked, IndexUnusable, UsageError for a kind that does not fit.
    """
    if not 0 < recall <= 1:
        raise UsageError(f"the recall to reach is {recall}; it must be above 0 and at most 1")
    locked = LockedIndex(index)
    read_identity(locked.folder)
    if not locked.paths.database.is_file():
        raise IndexFormatError(f"the index at {printable(str(locked.folder))} has lost its metadata.sqlite; {RESTORE}")
    with locked, locked.disk_errors():
        identity = read_identity(locked.folder)  # the model may have changed before the lock was to be had
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
    finish_change(locked.paths)
    delete_orphans(locked.engine, locked.paths)
    before_bytes = _size_bytes(locked.paths)
    capacity = max(1, SEGMENT_BYTES // (4 * identity.dim))
    sources = _to_merge(locked.engine, capacity)
    written = dropped = 0
    if sources:
        locked.begin_run()
        try:
            living = _living_vectors(locked, sources, dim=identity.dim)
            new = write_full_segments(locked, living, capacity=capacity, dim=identity.dim)
            with foreign_keys_checked_once(locked.engine) as connection:
                dropped = name_in_place_of(connection, [source.id for source in sources], new)
                locked.end_run(connection)
        except BaseException:
            delete_orphans(locked.engine, locked.paths)  # on a full disk it matters
            raise
        written = len(new)
        for source in sources:
            with suppress(OSError):  # the next process that writes deletes it
                locked.paths.segment(source.file).unlink()
    tidy_tables(locked.engine)
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


def _size_bytes(paths: IndexPaths) -> int:
    return sum(
        file.stat().st_size for file in (*paths.segments.glob("*.faiss"), *paths.folder.glob("metadata.sqlite*"))
    )
