"""All vectors of one committed state as one table: row numbers, ids, and inner products with a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from searchengine.index.kernels import inner_products_of
from searchengine.index.segments import Ids, Segment
from searchengine.vectors import FloatMatrix

Rows = NDArray[np.int64]

NO_ROWS: Rows = np.empty(0, dtype=np.int64)
NO_SCORES: FloatMatrix = np.empty(0, np.float32)
ROWS_PER_EXACT_SCORE = 2048


def exact_inner_products(vectors: FloatMatrix, query: FloatMatrix) -> FloatMatrix:
    """Scores (n,) of `vectors` (n, dim) for `query` (dim,), computed in float64 and rounded once to float32."""
    # Row by row, which a product of matrices is not: there a row's rounding depends on its neighbours.
    products: FloatMatrix = np.einsum("nd,d->n", vectors.astype(np.float64), query.astype(np.float64)).astype(
        np.float32
    )
    return products


class VectorTable:
    """The vectors of several segments, one after the other: row r is the vector with id `ids[r]`.

    `dead_rows` are those of vectors of no photo: no search returns them.
    """

    def __init__(self, segments: Sequence[Segment], *, dim: int) -> None:
        self.segments = tuple(segments)
        self.dim = dim
        self.ids: Ids = np.concatenate([NO_ROWS, *(segment.ids for segment in self.segments)])
        self._starts = np.cumsum([0, *(len(segment.ids) for segment in self.segments)])
        self._rising = bool(np.all(self.ids[1:] > self.ids[:-1]))
        self._gapless = self._rising and len(self.ids) > 0 and self.ids[-1] - self.ids[0] == len(self.ids) - 1
        self.dead_rows: Rows = NO_ROWS

    def bury(self, used: Ids) -> None:
        """Take all but the vectors `used` for dead."""
        self.dead_rows = np.flatnonzero(~np.isin(self.ids, used))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def living(self) -> int:
        return len(self.ids) - len(self.dead_rows)

    @property
    def living_rows(self) -> Rows:
        return np.delete(np.arange(len(self.ids)), self.dead_rows)

    @property
    def living_ids(self) -> Ids:
        """The ids of the vectors that have a photo, rising."""
        ids: Ids = self.ids[self.living_rows]
        return ids if self._rising else np.sort(ids)

    def ids_of(self, rows: Rows) -> Ids:
        return self.ids[rows]

    @cached_property
    def _order(self) -> Rows:
        """Rows in the order of their ids, where that is another one: after segments were merged."""
        return np.argsort(self.ids, kind="stable")

    @cached_property
    def _sorted_ids(self) -> Ids:
        return self.ids[self._order]

    def rows_of(self, ids: Ids) -> Rows:
        """The rows of those of `ids` that are in the table, in their order."""
        if self._gapless:
            rows: Rows = ids - self.ids[0]
            return rows[(rows >= 0) & (rows < len(self.ids))]
        known = self.ids if self._rising else self._sorted_ids
        if not len(known):
            return NO_ROWS
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        places = places[known[places] == ids]
        found: Rows = places if self._rising else self._order[places]
        return found

    def is_dead(self, rows: Rows) -> NDArray[np.bool_]:
        if not len(self.dead_rows):
            return np.zeros(len(rows), dtype=np.bool_)
        places = np.minimum(np.searchsorted(self.dead_rows, rows), len(self.dead_rows) - 1)
        found: NDArray[np.bool_] = self.dead_rows[places] == rows
        return found

    def gather(self, rows: Rows) -> FloatMatrix:
        """A copy of some vectors, float32 (n, dim)."""
        copied = np.empty((len(rows), self.dim), np.float32)
        for segment, places, within in self._by_segment(rows):
            copied[places] = segment.matrix[within]
        return copied

    def blocks(self, size: int) -> Iterator[tuple[int, FloatMatrix]]:
        """All vectors by turns, float32 (n <= size, dim), each with its first row. Mapped, so rarely aligned."""
        for segment, start in zip(self.segments, self._starts, strict=False):
            for first in range(0, len(segment.ids), size):
                yield int(start) + first, segment.matrix[first : first + size]

    def scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        """Inner products (n,) of `query` (dim,) with some vectors, within the rounding of float32."""
        scores = np.empty(len(rows), np.float32)
        for segment, places, within in self._by_segment(rows):
            scores[places] = inner_products_of(segment.matrix, within, query)
        return scores

    def exact_scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        """The same computed in float64 and rounded once: a vector's score does not depend on how it was found."""
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), ROWS_PER_EXACT_SCORE):
            some = self.gather(rows[start : start + ROWS_PER_EXACT_SCORE])
            scores[start : start + len(some)] = exact_inner_products(some, query)
        return scores

    def _by_segment(self, rows: Rows) -> Iterator[tuple[Segment, slice | Rows, Rows]]:
        """Each segment that has some of `rows`, with the places of those in `rows`, and their rows within it."""
        if not len(rows):
            return
        if np.all(rows[1:] >= rows[:-1]):
            bounds = np.searchsorted(rows, self._starts)
            for number in np.flatnonzero(bounds[1:] > bounds[:-1]):
                some = slice(int(bounds[number]), int(bounds[number + 1]))
                yield self.segments[number], some, rows[some] - self._starts[number]
            return
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield self.segments[number], places, rows[places] - self._starts[number]
