"""Full segments in place of others: what `compact` and a change of the model have in common.

New segments are written and published first; one transaction then names them in place of the old ones, whose files
belong to nobody from then on. Killed at any instant, the index is what it was before or after that transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from indexer.lock import LockedIndex
from indexer.segments import next_id, segment_file, write_segment
from searchengine.errors import IndexFormatError
from searchengine.index.layout import REPAIR
from searchengine.index.schema import segments, tags, vectors
from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix

IDS_PER_STATEMENT = 10_000

Piece = tuple[Ids, FloatMatrix]


class Written(NamedTuple):
    """A segment that is published, and that no row names yet. `ids` are those of its vectors."""

    number: int
    file: str
    sha256: str
    ids: Ids


def write_full_segments(locked: LockedIndex, pieces: Iterator[Piece], *, capacity: int, dim: int) -> list[Written]:
    """Segments of `capacity` vectors each, but for the last. Raises OSError, and what `pieces` raises."""
    with locked.engine.begin() as connection:
        number = next_id(connection, "segments")
    left = _Pieces(pieces)
    written: list[Written] = []
    while left:
        ids: list[Ids] = []
        file = segment_file(number)
        _, sha256 = write_segment(locked.paths.segment(file), left.take(capacity, ids), dim=dim)
        written.append(Written(number, file, sha256, np.concatenate(ids)))
        number += 1
    return written


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


def name_in_place_of(connection: sa.Connection, old: Sequence[int], written: Sequence[Written]) -> int:
    """The rows name the segments `written` in place of those with the ids `old`; vectors that only these had are gone.

    Returns how many those are. Within `foreign_keys_checked_once`.
    """
    for segment in written:
        values = {"id": segment.number, "file": segment.file, "count": len(segment.ids), "sha256": segment.sha256}
        connection.execute(sa.insert(segments).values(values))
        # Past SQLAlchemy, whose handling of parameters would take longer than the updates.
        rows = [(segment.number, vector_id) for vector_id in segment.ids.tolist()]
        connection.exec_driver_sql("UPDATE vectors SET segment_id = ? WHERE id = ?", rows)
    dropped = 0
    for start in range(0, len(old), IDS_PER_STATEMENT):
        some = old[start : start + IDS_PER_STATEMENT]
        dropped += connection.execute(sa.delete(vectors).where(vectors.c.segment_id.in_(some))).rowcount
        connection.execute(sa.delete(segments).where(segments.c.id.in_(some)))
    if dropped:
        connection.execute(sa.delete(tags).where(tags.c.vector_id.not_in(sa.select(vectors.c.id))))
    return dropped


@contextmanager
def foreign_keys_checked_once(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction in which foreign keys are checked at its end: else each deleted segment costs a look at all
    vectors. Nothing is deleted by them meanwhile."""
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


def tidy_tables(engine: sa.Engine) -> None:
    """Give the disk back what deleted rows took, where that is a tenth of the tables or more."""
    driver: Any = engine.raw_connection().driver_connection
    (free,), (pages,) = (driver.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_count"))
    if 10 * free >= pages:
        driver.execute("VACUUM")
    driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
