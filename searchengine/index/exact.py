"""Exact search: the inner product with every vector, or with every one of a chosen few.

Scores are computed fast in float32 first. Whoever may be among the k best, whatever that rounds, is scored anew in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from searchengine.index.allowed import Allowed
from searchengine.index.kernels import inner_products
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, NO_SCORES, Rows, VectorTable
from searchengine.vectors import FloatMatrix

# More than what float32 rounds in an inner product of unit vectors of some thousand dimensions.
ROUNDING = 1e-5

ROWS_PER_BLOCK = 4096
QUERIES_PER_BLOCK = 128
SCORES_PER_CHUNK = 128
LEAST = -10.0  # below any inner product of unit vectors

# Above this share of allowed vectors, reading all of them one after the other is faster than picking.
DENSE = 0.4


def search(
    table: VectorTable, queries: FloatMatrix, *, k: int, allowed: Allowed | None = None
) -> list[tuple[FloatMatrix, Ids]]:
    """For each query (dim,) the scores and ids of its k best living vectors, best first, among `allowed` if given."""
    if allowed is not None and len(allowed.rows) < DENSE * len(table):
        if len(queries) == 1:
            return [rank(table, queries[0], allowed.rows, allowed.scores(queries[0]), k=k)]
        return [one for some in _blocks(queries) for one in _pick_many(table, some, allowed, k=k)]
    hidden = table.dead_rows if allowed is None else allowed.hidden_rows
    if len(queries) == 1:
        return [_scan_one(table, queries[0], hidden, k=k)]
    return [one for some in _blocks(queries) for one in _scan_many(table, some, hidden, k=k)]


def _blocks(queries: FloatMatrix) -> Iterator[FloatMatrix]:
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        yield queries[start : start + QUERIES_PER_BLOCK]


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
    found = _Found(1, k=k)
    for start, block in table.blocks(max(1, len(table))):
        scores = inner_products(block, query)
        scores[_within(hidden, start, len(block))] = -np.inf
        found.add(start, scores[None])
    ((rows, scores),) = found.of_each()
    return rank(table, query, rows, scores, k=k)


def _scan_many(table: VectorTable, queries: FloatMatrix, hidden: Rows, *, k: int) -> list[tuple[FloatMatrix, Ids]]:
    """A product of matrices by the block, which stays in the processor's cache."""
    found = _Found(len(queries), k=k)
    aligned = np.empty((ROWS_PER_BLOCK, table.dim), np.float32)
    products = np.empty(len(queries) * ROWS_PER_BLOCK, np.float32)
    for start, block in table.blocks(ROWS_PER_BLOCK):
        np.copyto(aligned[: len(block)], block)
        scores = np.matmul(
            queries, aligned[: len(block)].T, out=products[: len(queries) * len(block)].reshape(len(queries), -1)
        )
        scores[:, _within(hidden, start, len(block))] = -np.inf
        found.add(start, scores)
    return [rank(table, query, *one, k=k) for query, one in zip(queries, found.of_each(), strict=True)]


def _pick_many(table: VectorTable, queries: FloatMatrix, allowed: Allowed, *, k: int) -> list[tuple[FloatMatrix, Ids]]:
    found = _Found(len(queries), k=k)
    for start in range(0, len(allowed.rows), ROWS_PER_BLOCK):
        some = slice(start, start + ROWS_PER_BLOCK)
        block = allowed.matrix()[some] if allowed.keeps_matrix else table.gather(allowed.rows[some])
        found.add(start, queries @ block.T)
    return [
        rank(table, query, allowed.rows[places], scores, k=k)
        for query, (places, scores) in zip(queries, found.of_each(), strict=True)
    ]


class _Found:
    """For each of some queries the best rows so far: the k best, and all that float32 cannot tell from them."""

    def __init__(self, queries: int, *, k: int) -> None:
        self._k = k
        # The k-th largest of the largest of each chunk is at most the k-th best of all, and near it.
        self._largest = np.empty((queries, 0), np.float32)
        self._hits: list[tuple[NDArray[np.int64], Rows, FloatMatrix]] = []

    def add(self, start: int, scores: FloatMatrix) -> None:
        """`scores` (queries, n) are of the rows from `start` on; -inf are no hits."""
        count = scores.shape[1]
        chunk = max(1, min(SCORES_PER_CHUNK, count // (2 * self._k)))
        chunks = scores[:, : count // chunk * chunk].reshape(len(scores), -1, chunk)
        largest = np.concatenate([self._largest, np.nan_to_num(np.fmax.reduce(chunks, axis=2), nan=-np.inf)], axis=1)
        if largest.shape[1] > self._k:
            largest = np.partition(largest, -self._k, axis=1)[:, -self._k :]
        self._largest = largest
        floors = largest.min(axis=1) if largest.shape[1] == self._k else np.full(len(scores), -np.inf, np.float32)
        hits = scores >= (np.maximum(floors, LEAST) - ROUNDING)[:, None]
        queries, columns = np.divmod(np.flatnonzero(hits), count)
        self._hits.append((queries, columns + start, scores[queries, columns]))

    def of_each(self) -> list[tuple[Rows, FloatMatrix]]:
        """Rows and scores for each query."""
        parts = zip(*self._hits, strict=True) if self._hits else ([NO_ROWS], [NO_ROWS], [NO_SCORES])
        queries, rows, scores = (np.concatenate(part) for part in parts)
        order = np.argsort(queries, kind="stable")
        bounds = np.searchsorted(queries[order], np.arange(len(self._largest) + 1))
        return [(rows[order[first:last]], scores[order[first:last]]) for first, last in pairwise(bounds)]


def _within(rows: Rows, start: int, count: int) -> Rows:
    """Those of the rising `rows` that lie in a block, counted from its start."""
    first, last = np.searchsorted(rows, (start, start + count))
    return rows[first:last] - start
