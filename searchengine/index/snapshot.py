"""One committed state of an index, and how its nearest vectors are found.

few vectors allowed, or no `ann/`      every one of them is compared
else                                   `ann/` for what it holds, every newer vector compared; both merged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from searchengine.errors import UsageError
from searchengine.index import exact
from searchengine.index.allowed import Allowed, RememberedAllowed
from searchengine.index.ann import Ann, resident_bytes
from searchengine.index.commits import Version
from searchengine.index.segments import Ids, Segment
from searchengine.index.table import NO_ROWS, NO_SCORES, Rows, VectorTable
from searchengine.vectors import FloatMatrix

# Up to so many allowed vectors are compared one by one, in about 4 ms.
COMPARED_AT_MOST = 16_384

# A few dead vectors are dropped from the candidates, where they are.
DEAD_SHARE = 0.01

# An approximate search may miss another photo when it is asked for more, which would shift all ranks behind it between
# two pages. So ranks up to each depth always come from a search of that depth, those beyond the last from an exact one.
DEPTHS = (10, 100, 1000)

# So many vectors nearest to each condition of a query are looked at, before all are.
NEAREST = DEPTHS[-1]


@dataclass(frozen=True)
class Snapshot:
    """The vectors of one committed state, and the `ann/` over most of them, if there is one."""

    version: Version
    table: VectorTable
    ann: Ann | None

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.table.segments

    def __len__(self) -> int:
        """How many vectors there are, without those of no photo."""
        return self.table.living

    @cached_property
    def _remembered(self) -> RememberedAllowed:
        return RememberedAllowed()

    @cached_property
    def fresh(self) -> Allowed:
        """The vectors that are newer than `ann`, which holds all others."""
        through_id = self.ann.parameters.through_id if self.ann else -1
        return Allowed(self.table, self.table.ids[self.table.ids > through_id])

    @cached_property
    def _living(self) -> Allowed | None:
        """All vectors that have a photo, where so many have none that it is worth telling FAISS."""
        many = len(self.table.dead_rows) > DEAD_SHARE * len(self.table)
        return Allowed(self.table, self.table.ids) if many else None

    def rank(
        self, query: FloatMatrix, *, k: int, among: Ids | None = None, depths: Sequence[int] = DEPTHS
    ) -> tuple[FloatMatrix, Ids]:
        """Scores (k',) and ids (k',) of the nearest vectors to `query` (dim,), k' = min(k, allowed vectors).

        The first j do not depend on k: pages cut from it never overlap. With an `ann`, a photo that a search of less
        depth missed comes later than its score would have it; otherwise scores fall. That holds among searches of the
        same `depths`, rising.
        """
        return self._rank(query, k=k, allowed=self._allowed(among), depths=depths)

    def _rank(
        self, query: FloatMatrix, *, k: int, allowed: Allowed | None, depths: Sequence[int] = DEPTHS
    ) -> tuple[FloatMatrix, Ids]:
        if self.is_exact(allowed):
            return exact.search(self.table, query[None], k=k, allowed=allowed)[0]
        scores, ids = NO_SCORES, NO_ROWS
        for depth in (*depths, len(self.table)):
            if depth <= depths[-1]:
                more_scores, more_ids = self._approximate(query, k=depth, allowed=allowed)
            else:
                more_scores, more_ids = exact.search(self.table, query[None], k=k, allowed=allowed)[0]
            late = ~np.isin(more_ids, ids)
            scores, ids = np.concatenate([scores, more_scores[late]]), np.concatenate([ids, more_ids[late]])
            if k <= depth:
                break
        return scores[:k], ids[:k]

    def search(self, queries: FloatMatrix, *, k: int, among: Ids | None = None) -> tuple[FloatMatrix, Ids]:
        """The same for each of `queries` (q, dim): scores (q, k'), falling, and ids (q, k')."""
        allowed = self._allowed(among)
        if self.is_exact(allowed):
            found = exact.search(self.table, queries, k=k, allowed=allowed)
        else:
            found = [self._rank(query, k=k, allowed=allowed) for query in queries]
        width = min((len(ids) for _, ids in found), default=0)
        scores, ids = np.empty((len(queries), width), np.float32), np.empty((len(queries), width), np.int64)
        for number, (row_scores, row_ids) in enumerate(found):
            order = np.lexsort((row_ids, -row_scores))[:width]
            scores[number], ids[number] = row_scores[order], row_ids[order]
        return scores, ids

    @property
    def resident_bytes_per_vector(self) -> int:
        """What a search keeps in memory for each vector, beside the pages of segments that the system has room for."""
        return resident_bytes(self.ann.parameters.code_bytes if self.ann else 0)

    def _allowed(self, among: Ids | None) -> Allowed | None:
        if among is None:
            return None
        if not isinstance(among, np.ndarray) or among.dtype != np.int64 or among.ndim != 1:
            raise UsageError("`among` must be an array of the ids of vectors, int64 (n,)")
        return self._remembered.get(self.table, among)

    def is_exact(self, allowed: Allowed | None = None) -> bool:
        """Whether a search among `allowed`, or all, compares every vector."""
        return self.ann is None or (len(self) if allowed is None else len(allowed)) <= COMPARED_AT_MOST

    def _approximate(self, query: FloatMatrix, *, k: int, allowed: Allowed | None) -> tuple[FloatMatrix, Ids]:
        assert self.ann is not None
        rows, scores = self.ann.candidates(self.table, query, k=k, allowed=allowed or self._living)
        fresh = self._fresh_rows(allowed)
        if len(fresh):
            rows = np.concatenate([rows, fresh])
            scores = np.concatenate([scores, self.table.scores(query, fresh)])
        if len(rows) < min(k, len(self) if allowed is None else len(allowed)):
            # FAISS leaves out codes of the least score there can be, which matters where nearly all are asked for.
            return exact.search(self.table, query[None], k=k, allowed=allowed)[0]
        return exact.rank(self.table, query, rows, scores, k=k)

    def _fresh_rows(self, allowed: Allowed | None) -> Rows:
        if allowed is None or not len(self.fresh):
            return self.fresh.rows
        return np.intersect1d(self.fresh.rows, allowed.rows, assume_unique=True)
