"""AND, OR and NOT over the probabilities that a photo matches, with filters inside.

What AND, OR and NOT make of probabilities, query_logic.py tells.

Which photos are worth it, the nearest of each condition tell first, where comparing all is slow. Of a photo beyond
those it is known what it can be at most, so what lies above that is final: Fagin's threshold algorithm (Fagin, Lotem,
Naor, "Optimal aggregation algorithms for middleware", 2003). If that is too little, every vector is compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from searchengine.composition import Composition, combined
from searchengine.filters import Filters
from searchengine.index import exact
from searchengine.index.protocol import PhotoIndex
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, Rows
from searchengine.query_filters import Joined
from searchengine.query_logic import Probabilities, is_filter, leaves_of, log_odds, normal_form
from searchengine.query_tree import Not, Query, Vector, shows_pictures
from searchengine.ranking import Ranked
from searchengine.relevance import Background, Kind
from searchengine.vectors import FloatMatrix

# Probabilities of so many photos are held at a time.
ROWS_AT_A_TIME = 2**18


class Combination:
    """A query of AND, OR, NOT, answered from one committed state.

    Photos must pass `filters`; those of the vectors `without` are left out. Raises QueryError.
    """

    def __init__(
        self,
        query: Query,
        parts: Composition,
        index: PhotoIndex,
        background: Background,
        *,
        filters: Filters | None = None,
        without: Collection[int] = (),
    ) -> None:
        self._index = index
        self._table = index.snapshot().table
        self._background = background
        self._filters = filters
        self._without = np.fromiter(without, np.int64)
        self._tree, self._leaves = normal_form(query)
        self._vectors = {n: parts.vector(leaf) for n, leaf in enumerate(self._leaves) if isinstance(leaf, Vector)}
        self._conditions = {n: leaf for n, leaf in enumerate(self._leaves) if is_filter(leaf)}
        self._direction = self._direction_of_score()

    def best(self, count: int) -> Ranked:
        """The `count` best photos, or all there are; the first j are the same for every `count` >= j.

        In an index that is too large to be compared whole, what lies beyond the nearest of each condition is left out.
        """
        effort = self._index.effort(self._filters)
        ranked, are_final = Ranked.none(), 0
        for depth in effort.depths:
            ranked, are_final = self._by_nearest(depth)
            if are_final >= count:
                return ranked[:count]
        if not effort.compares_all:
            return ranked[:count]
        final = ranked[:are_final]
        ids = self._index.vector_ids(self._filters) if self._filters else self._table.living_ids
        rows = self._table.rows_of(ids[~np.isin(ids, self._without)])
        ranked, _ = self._ranked(self._worth_it(rows, count))
        return (final + ranked[~np.isin(ranked.photos, final.photos)])[:count]

    def _by_nearest(self, depth: int) -> tuple[Ranked, int]:
        """The photos that are among the `depth` nearest of a condition; so many of them nothing else can surpass."""
        found = [self._without[:0]]
        limits = {number: np.ones(1) for number in self._conditions}
        for number, vector in self._vectors.items():
            scores, ids = self._index.nearest_vectors(vector, k=depth, filters=self._filters)
            found.append(ids)
            limits[number] = self._probabilities(number, scores.min(initial=1, keepdims=True))
        at_most = log_odds(self._tree, lambda leaf: np.zeros(1) if leaf.negated else limits[leaf.number])
        candidates = np.unique(np.concatenate(found))
        ranked, logits = self._ranked(self._table.rows_of(candidates[~np.isin(candidates, self._without)]))
        return ranked, int(np.sum(logits > at_most))

    def _worth_it(self, rows: Rows, count: int) -> Rows:
        """Those of `rows` that can be among the `count` best, whatever float32 rounds."""
        passes = {
            number: [self._index.vector_ids(Joined(query).filters) for query in (condition, Not(condition))]
            for number, condition in self._conditions.items()
        }
        parts = [
            self._bounds(rows[start : start + ROWS_AT_A_TIME], passes) for start in range(0, len(rows), ROWS_AT_A_TIME)
        ]
        rows, least, most = (np.concatenate(part) for part in zip((NO_ROWS, *[np.empty(0)] * 2), *parts, strict=True))
        if len(rows) <= count:
            return rows
        found: Rows = rows[most >= np.partition(least, -count)[-count]]
        return found

    def _bounds(
        self, rows: Rows, passes: Mapping[int, Sequence[Ids]]
    ) -> tuple[Rows, NDArray[np.float64], NDArray[np.float64]]:
        """Those of `rows` that can be found, and what the log-odds of their photos are at least and at most.

        `passes` holds for each filter the vectors of which some photos pass, and of which some fail: copies may differ.
        """
        scores = self._rough_scores(rows)
        sound = np.isfinite(scores).all(axis=0)  # others are damage, which `verify` tells
        rows, scores = rows[sound], scores[:, sound]
        ids = self._table.ids_of(rows)
        bounds: dict[int, tuple[Probabilities, ...]] = {
            number: (np.where(np.isin(ids, some_fail), 0.0, 1.0), np.where(np.isin(ids, some_pass), 1.0, 0.0))
            for number, (some_pass, some_fail) in passes.items()
        }
        for number, rough in zip(self._vectors, scores, strict=True):
            either = np.concatenate([rough - exact.ROUNDING, rough + exact.ROUNDING])
            bounds[number] = tuple(np.split(self._probabilities(number, either), 2))
        least = log_odds(self._tree, lambda leaf: bounds[leaf.number][leaf.negated])
        most = log_odds(self._tree, lambda leaf: bounds[leaf.number][not leaf.negated])
        return rows, least, most

    def _rough_scores(self, rows: Rows) -> FloatMatrix:
        """Inner products (vectors, rows) of each vector of the query with some of the table, as float32 rounds them."""
        scores = np.empty((len(self._vectors), len(rows)), np.float32)
        for start in range(0, len(rows), exact.ROWS_PER_BLOCK):
            block = slice(start, start + exact.ROWS_PER_BLOCK)
            for number, vector in enumerate(self._vectors.values()):  # while the block is in the processor's cache
                scores[number, block] = self._table.scores(vector, rows[block])
        return scores

    def _ranked(self, rows: Rows) -> tuple[Ranked, NDArray[np.float64]]:
        """The photos of these vectors that pass, best first, and their log-odds, by exact scores."""
        rows = np.sort(rows)
        ids = self._table.ids_of(rows)
        photos, places = self._index.photos_of(ids, filters=self._filters)
        probabilities = {
            number: self._probabilities(number, self._table.exact_scores(vector, rows))[places]
            for number, vector in self._vectors.items()
        }
        for number, condition in self._conditions.items():
            passing, _ = self._index.photos_of(ids, filters=Joined(condition).filters)
            probabilities[number] = np.isin(photos, passing).astype(np.float64)
        logits = log_odds(self._tree, lambda leaf: probabilities[leaf.number])
        scores = self._table.exact_scores(self._direction, rows)[places]
        order = np.lexsort((photos, ids[places], -scores, -logits))
        return Ranked(photos, scores, _logistic(logits))[order], logits[order]

    def _probabilities(self, number: int, scores: FloatMatrix) -> Probabilities:
        kind: Kind = "image" if shows_pictures(self._leaves[number]) else "text"
        found = self._background.relevance(self._vectors[number], scores, kind=kind)
        return np.clip(found.astype(np.float64), 0, 1)

    def _direction_of_score(self) -> FloatMatrix:
        """What a score is the cosine to: the sum of what is asked for; else the opposite of what is not."""
        signs = {leaf.number: leaf.negated for leaf in sorted(leaves_of(self._tree), reverse=True)}
        wanted = [vector for number, vector in self._vectors.items() if not signs[number]]
        return combined([(1, vector) for vector in wanted] or [(-1, vector) for vector in self._vectors.values()])


def _logistic(logits: NDArray[np.float64]) -> Probabilities:
    return np.exp(-np.logaddexp(0, -logits))
