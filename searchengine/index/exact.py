"""Exact search: the inner product with every vector, or with every one of a chosen few.

Scores are computed fast in float32 first. Whoever may be among the k best, whatever that rounds, is scored anew in
float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from searchengine.index.allowed import Allowed
from searchengine.index.kernels import inner_products
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, Rows, VectorTable
from searchengine.vectors import FloatMatrix

# More than what float32 rounds in an inner product of unit vectors of some thousand dimensions.
ROUNDING = 1e-5

ROWS_PER_BLOCK = 8192
QUERIES_PER_BLOCK = 128
SCORES_PER_CHUNK = 128

# Above this share of allowed vectors, reading all of them one after the other is faster than picking.
DENSE = 0.4

NO_SCORES: FloatMatrix = np.empty(0, np.float32)


def search(
    table: VectorTable, queries: FloatMatrix, *, k: int, allowed: Allowed | None = None
) -> list[tuple[FloatMatrix, Ids]]:
    """For each query (dim,) the scores and ids of its k best living vectors, best first, among `allowed` if given."""
    if allowed is not None and len(allowed.rows) < DENSE * len(table):
        if len(queries) > 1:
            return [
                one
                for start in range(0, len(queries), QUERIES_PER_BLOCK)
                for one in _pick_many(table, queries[start : start + QUERIES_PER_BLOCK], allowed, k=k)
            ]
        return [rank(table, query, allowed.rows, allowed.scores(query), k=k) for query in queries]
    hidden = table.dead_rows if allowed is None else allowed.hidden_rows
    if len(queries) == 1:
        return [_scan_one(table, queries[0], hidden, k=k)]
    found: list[tuple[FloatMatrix, Ids]] = []
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        found += _scan_many(table, queries[start : start + QUERIES_PER_BLOCK], hidden, k=k)
    return found


def rank(table: VectorTable, query: FloatMatrix, rows: Rows, scores: FloatMatrix, *, k: int) -> tuple[FloatMatrix, Ids]:
    """The k best of `rows` (n,), all different, whose scores in float32 are `scores` (n,); equal ones by their ids."""
    finite = np.isfinite(scores)  # others are damage, which `verify` tells
    if not finite.all():
        rows, scores = rows[finite], scores[finite]
    if len(rows) > k:
        rows = rows[scores >= np.partition(scores, -k)[-k] - ROUNDING]
    rows = np.sort(rows)
    exact, ids = table.exact_scores(query, rows), table.ids[rows]
    order = np.lexsort((ids, -exact))[:k]
    return exact[order], ids[order]


def _scan_one(table: VectorTable, query: FloatMatrix, hidden: Rows, *, k: int) -> tuple[FloatMatrix, Ids]:
    found = _Found(k)
    for start, block in table.blocks(max(1, len(table))):
        scores = inner_products(block, query)
        scores[_within(hidden, start, len(block))] = -np.inf
        found.add(start, scores, floor_of(scores[None], k=k)[0])
    return rank(table, query, *found.all(), k=k)


def _scan_many(table: VectorTable, queries: FloatMatrix, hidden: Rows, *, k: int) -> list[tuple[FloatMatrix, Ids]]:
    """A product of matrices by the block, which stays in the processor's cache."""
    found = [_Found(k) for _ in queries]
    aligned = np.empty((ROWS_PER_BLOCK, table.dim), np.float32)
    products = np.empty((len(queries), ROWS_PER_BLOCK), np.float32)
    for start, block in table.blocks(ROWS_PER_BLOCK):
        count = len(block)
        np.copyto(aligned[:count], block)
        scores = np.matmul(queries, aligned[:count].T, out=products[:, :count] if count == ROWS_PER_BLOCK else None)
        scores[:, _within(hidden, start, count)] = -np.inf
        for one, row, floor in zip(found, scores, floor_of(scores, k=k), strict=True):
            one.add(start, row, floor)
    return [rank(table, query, *one.all(), k=k) for query, one in zip(queries, found, strict=True)]


def _pick_many(table: VectorTable, queries: FloatMatrix, allowed: Allowed, *, k: int) -> list[tuple[FloatMatrix, Ids]]:
    found = [_Found(k) for _ in queries]
    for start in range(0, len(allowed.rows), ROWS_PER_BLOCK):
        some = slice(start, start + ROWS_PER_BLOCK)
        block = allowed.matrix()[some] if allowed.keeps_matrix else table.gather(allowed.rows[some])
        scores = queries @ block.T
        for one, row, floor in zip(found, scores, floor_of(scores, k=k), strict=True):
            one.add(start, row, floor)
    places = [one.all() for one in found]
    return [
        rank(table, query, allowed.rows[rows], scores, k=k)
        for query, (rows, scores) in zip(queries, places, strict=True)
    ]


class _Found:
    """The best rows so far: at least the k best, and all that float32 cannot tell from them."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._floor = np.float32(-np.inf)
        self._rows: list[Rows] = []
        self._scores: list[FloatMatrix] = []
        self._held = 0

    def add(self, start: int, scores: FloatMatrix, floor: np.float32) -> None:
        """`floor` is at most the k-th best of `scores`, which belong to the rows from `start` on."""
        self._floor = max(self._floor, floor)
        places = np.flatnonzero(scores >= self._floor - ROUNDING) if self._floor > -np.inf else _finite(scores)
        self._rows.append(places + start)
        self._scores.append(scores[places])
        self._held += len(places)
        if self._held > 4 * self._k + 4 * SCORES_PER_CHUNK:
            self._shrink()

    def _shrink(self) -> None:
        rows, scores = self.all()
        if len(rows) > self._k:
            self._floor = max(self._floor, np.partition(scores, -self._k)[-self._k])
            kept = scores >= self._floor - ROUNDING
            rows, scores = rows[kept], scores[kept]
        self._rows, self._scores, self._held = [rows], [scores], 0

    def all(self) -> tuple[Rows, FloatMatrix]:
        return np.concatenate([NO_ROWS, *self._rows]), np.concatenate([NO_SCORES, *self._scores])


def floor_of(scores: FloatMatrix, *, k: int) -> FloatMatrix:
    """For each row of (q, n) a number that at least k of its values reach, or -inf: the k-th largest of the largest of
    each chunk, which takes one quick pass."""
    count = scores.shape[1]
    chunk = min(SCORES_PER_CHUNK, count // (2 * k))
    if chunk < 1:
        return np.full(len(scores), -np.inf, np.float32)
    chunks = scores[:, : count // chunk * chunk].reshape(len(scores), -1, chunk)
    floors: FloatMatrix = np.partition(np.fmax.reduce(chunks, axis=2), -k, axis=1)[:, -k]
    return floors


def _finite(scores: FloatMatrix) -> NDArray[np.int64]:
    return np.flatnonzero(scores > -np.inf)


def _within(rows: Rows, start: int, count: int) -> Rows:
    """Those of the rising `rows` that lie in a block, counted from its start."""
    first, last = np.searchsorted(rows, (start, start + count))
    return rows[first:last] - start
