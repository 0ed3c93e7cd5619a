"""The photos nearest to queries in an index on disk: vectors by `Snapshot`, their photos by the tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix, check_unit_rows

if TYPE_CHECKING:
    from searchengine.filters import Filters
    from searchengine.index.reader import Index


def nearest_photos(
    index: Index,
    queries: FloatMatrix,
    *,
    count: int,
    filters: Filters | None,
    without: Collection[int],
    depths: Sequence[int],
) -> list[tuple[Ids, FloatMatrix]]:
    """As `PhotoIndex.nearest_photos` tells. Raises UsageError for other queries."""
    queries = check_unit_rows(np.asarray(queries), dim=index.dim)
    among = index.vector_ids(filters) if filters else None
    excluded = np.fromiter(without, np.int64)
    found = [
        (scores[usable], ids[usable])
        for scores, ids in _nearest(index, queries, k=count + len(excluded), among=among, depths=depths)
        for usable in [~np.isin(ids, excluded)]
    ]
    vector_ids = np.unique(np.concatenate([excluded[:0], *(ids for _, ids in found)]))
    photos, places = index.photos_of(vector_ids, filters=filters)
    starts = np.searchsorted(places, np.arange(len(vector_ids) + 1))
    answers = []
    for scores, ids in found:
        place = np.searchsorted(vector_ids, ids)
        counts = starts[place + 1] - starts[place]
        # The photos of each vector are a run in `photos`: of each run its first place, then one more a photo.
        ends = np.cumsum(counts)
        which = np.repeat(starts[place] - (ends - counts), counts) + np.arange(counts.sum())
        answers.append((photos[which[:count]], np.repeat(scores, counts)[:count]))
    return answers


def _nearest(
    index: Index, queries: FloatMatrix, *, k: int, among: Ids | None, depths: Sequence[int]
) -> list[tuple[FloatMatrix, Ids]]:
    """For each query the scores and ids of its nearest vectors; the first j are the same for every k >= j."""
    if index.snapshot().ann is None:
        return list(zip(*index.search(queries, k=k, among=among), strict=True))
    return [index.rank(query, k=k, among=among, depths=depths) for query in queries]
