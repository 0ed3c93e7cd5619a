"""The commit by which the vectors in `next/` take the place of an index's own.

They are copied into full segments, under the ids that the index has for their contents. One transaction then names
these segments in place of the old ones, and the encoder that made them; that is the change. The card index.json follows
it, and what nobody names any more is deleted. Killed before the transaction, the old vectors serve and `next/` is as it
was; killed after it, the new ones serve, and the next writer does what is left to do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import sqlalchemy as sa

from indexer.compact import ROWS_PER_COPY, SEGMENT_BYTES
from indexer.lacking import Lacking
from indexer.lock import LockedIndex
from indexer.merge import Piece, foreign_keys_checked_once, name_in_place_of, tidy_tables, write_full_segments
from indexer.segments import delete_orphans, next_id
from indexer.writer import NextCommit, record_photos
from searchengine.errors import IndexFormatError
from searchengine.index.layout import IndexIdentity, IndexPaths
from searchengine.index.schema import ann, encoders, segments, vectors
from searchengine.index.segments import load_segment
from searchengine.models.published import sha256_of
from searchengine.text import printable


def take_over(locked: LockedIndex, lacking: Lacking, identity: IndexIdentity, batch: NextCommit) -> int:
    """Make the vectors in `next/`, of the encoder `identity`, those of the index, and record `batch` with them.

    `batch` holds what becomes of photos of which `next/` has no vector, and no vectors. Returns how many vectors the
    index has now. Raises IndexFormatError where `next/` is damaged, OSError.
    """
    with locked.engine.begin() as connection:
        first_id = next_id(connection, "vectors")
        old = list(connection.execute(sa.select(segments.c.id)).scalars())
    new = lacking.want((photo.content_hash for photo in batch.photos), first_id=first_id)
    try:
        written = write_full_segments(
            locked,
            _vectors(locked.paths.next, lacking, dim=identity.dim),
            capacity=max(1, SEGMENT_BYTES // (4 * identity.dim)),
            dim=identity.dim,
        )
        with foreign_keys_checked_once(locked.engine) as connection:
            for vector_id, content_hash in new:
                row = {"id": vector_id, "content_hash": content_hash, "segment_id": written[0].number}
                connection.execute(sa.insert(vectors).values(row))
            record_photos(connection, batch)
            name_in_place_of(connection, old, written)
            connection.execute(sa.delete(ann))  # it holds codes of the old vectors
            connection.execute(sa.delete(encoders))
            connection.execute(sa.insert(encoders).values(fingerprint=identity.fingerprint))
            locked.end_run(connection)
    except BaseException:
        delete_orphans(locked.engine, locked.paths)  # on a full disk it matters
        raise
    delete_orphans(locked.engine, locked.paths)
    tidy_tables(locked.engine)
    return sum(len(segment.ids) for segment in written)


def _vectors(staged: IndexPaths, lacking: Lacking, *, dim: int) -> Iterator[Piece]:
    """What the index has a use for. What is damaged is refused, lest it get a new sha256."""
    for number, file, count, sha256 in lacking.segments():
        path = staged.segment(file)
        segment = load_segment(path, count=count, dim=dim)
        there, here = lacking.pairs(number)
        order = np.argsort(segment.ids, kind="stable")
        places = np.searchsorted(segment.ids, there, sorter=order)
        positions = order[np.minimum(places, len(order) - 1)]
        if sha256_of(path) != sha256 or not np.array_equal(segment.ids[positions], there):
            raise IndexFormatError(
                f"{printable(str(path))} is damaged; run `searchengine verify --repair`, then `searchengine reencode` "
                "again"
            )
        for start in range(0, len(here), ROWS_PER_COPY):
            some = slice(start, start + ROWS_PER_COPY)
            yield here[some], segment.matrix[positions[some]]
