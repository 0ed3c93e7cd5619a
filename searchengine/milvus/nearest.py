"""The nearest vectors by Milvus, scored anew in float64, so that a photo has the score that it has in any index.

Milvus searches photos. Of each search it is known that what it did not give scores no more than its last hit, within
rounding. So a vector that scores more is known with all its photos, and so are the best ones. Until enough of them are,
Milvus is asked for more, and beyond the most that one search gives, for those that were not given yet.

Where its index is approximate, a search of another depth may find another photo, which would shift all ranks behind it
between two pages. So ranks up to each of some depths come from a search of just that depth, as in `index.snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from searchengine.index.exact import ROUNDING
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, NO_SCORES, exact_inner_products
from searchengine.milvus.connection import ANSWER_SECONDS, Connection
from searchengine.milvus.expressions import Expression, among
from searchengine.milvus.schema import MAX_HITS
from searchengine.milvus.vectors import BYTES_AT_A_TIME, FetchedVectors, vectors_in
from searchengine.vectors import FloatMatrix

# A few more than asked for tell at once whether the last one is alone in its score.
MORE, FACTOR = 8, 8

FLAT = ("FLAT", "BRUTE_FORCE")  # the indexes of Milvus that compare every vector

# So many candidates a search in a graph (HNSW) keeps at least: of 100,000 photos it then finds 99 % of the ten nearest
# to what lies off all of them, as texts do (scripts/bench_milvus.py). Other indexes search as Milvus thinks best.
CANDIDATES = 1024


class Nearest(NamedTuple):
    """Vectors by falling scores (n,), their ids (n,), and for each its photos that pass; None: ask for them."""

    scores: FloatMatrix
    ids: Ids
    photos: list[list[int]] | None


Judge = Callable[[Sequence[dict[str, Any]]], set[int]]


class Search:
    """Searches in one collection among the photos that `expression` lets through.

    `judge` tells which of some photos pass indeed; `judged_fields` are what it must know of them. `allowed` (n,) are
    the ids of the vectors that may be found, if not all. `index_type` is that of Milvus for the vectors.
    """

    def __init__(
        self,
        connection: Connection,
        collection: str,
        *,
        dim: int,
        expression: Expression,
        judge: Judge | None = None,
        judged_fields: Sequence[str] = (),
        allowed: Ids | None = None,
        index_type: str,
        fetched: FetchedVectors,
    ) -> None:
        self._connection = connection
        self._collection = collection
        self._dim = dim
        self._expression = expression
        self._judge = judge
        self._fields = sorted({"vector_id", "embedding", *judged_fields})
        self._allowed = allowed
        self._index_type = index_type
        self._fetched = fetched

    def nearest(self, queries: FloatMatrix, *, k: int) -> list[Nearest]:
        """For each query (dim,) its `k` nearest vectors, or all there are."""
        found = [Found(query, allowed=self._allowed) for query in queries]
        limit = min(k + MORE, MAX_HITS)
        while lacking := [one for one in found if not one.is_enough(k)]:
            for some in self._blocks(lacking, limit):
                self._ask(some, limit)
            if limit == MAX_HITS:
                for one in lacking:
                    one.begin_anew()
            limit = min(limit * FACTOR, MAX_HITS)
        return [one.best(k) for one in found]

    def ranked(self, query: FloatMatrix, *, k: int, depths: Sequence[int]) -> Nearest:
        """The `k` nearest by an approximate index: the first j do not depend on `k`, at the same `depths`, rising."""
        scores, ids, photos = NO_SCORES, NO_ROWS, [[0]][:0]
        are_known = True
        for depth in (*depths, MAX_HITS, k):
            (more,) = self.nearest(query[None], k=depth)
            late = np.flatnonzero(~np.isin(more.ids, ids))
            scores, ids = np.concatenate([scores, more.scores[late]]), np.concatenate([ids, more.ids[late]])
            if more.photos is None:
                are_known = False
            else:
                photos += [more.photos[place] for place in late]
            if k <= depth:
                break
        return Nearest(scores[:k], ids[:k], photos[:k] if are_known else None)

    def _blocks(self, found: Sequence[Found], limit: int) -> Iterator[Sequence[Found]]:
        """As many queries at once as one message holds the answers to; each that leaves out some ids by itself."""
        size = max(1, BYTES_AT_A_TIME // (4 * self._dim * limit))
        if any(one.left_out for one in found):
            size = 1
        for start in range(0, len(found), size):
            yield found[start : start + size]

    def _ask(self, found: Sequence[Found], limit: int) -> None:
        expression = self._expression
        parameters = {"ef": max(CANDIDATES, limit)} if self._index_type.startswith("HNSW") else {}
        if found[0].left_out:
            expression = expression.and_(among("vector_id", sorted(found[0].left_out), negated=True))
        with self._connection.errors_named():
            answers = self._connection.client.search(
                self._collection,
                data=[one.query for one in found],
                anns_field="embedding",
                filter=expression.text,
                limit=limit,
                output_fields=self._fields,
                search_params={"metric_type": "IP", "params": parameters},
                timeout=ANSWER_SECONDS,
            )
            hits = [[{"id": hit["id"], "distance": hit["distance"], **hit["entity"]} for hit in one] for one in answers]
        for one, some in zip(found, hits, strict=True):
            passing = self._judge(some) if self._judge else None
            vectors = vectors_in(some)
            self._fetched.put(vectors)
            one.add(some, vectors, passing=passing, is_all=self._are_all(some, expression, limit))

    def _are_all(self, hits: Sequence[dict[str, Any]], expression: Expression, limit: int) -> bool:
        """Whether fewer hits than asked for are all there are. An approximate index may lose its way under a filter."""
        if len(hits) == limit or self._index_type in FLAT or limit == MAX_HITS:
            return len(hits) < limit
        return len(hits) >= self._connection.count(self._collection, expression.text)


class Found:
    """What is known of the vectors nearest to one `query` (dim,)."""

    def __init__(self, query: FloatMatrix, *, allowed: Ids | None) -> None:
        self.query = query
        self.left_out: set[int] = set()  # vectors that the next search is not to give
        self._allowed = allowed
        self._scores: dict[int, float] = {}  # of vectors with a photo that passes
        self._photos: dict[int, set[int]] = {}
        self._floor = np.inf  # what was not given yet scores no more
        self._seen: set[int] = set()

    def add(
        self, hits: Sequence[dict[str, Any]], vectors: dict[int, FloatMatrix], *, passing: set[int] | None, is_all: bool
    ) -> None:
        """What a search gave, best first; the photos `passing` of them pass, or all."""
        self._floor = -np.inf if is_all else float(hits[-1]["distance"]) if hits else np.inf
        self._seen |= vectors.keys()
        for hit in hits:
            if passing is None or hit["id"] in passing:
                self._photos.setdefault(hit["vector_id"], set()).add(hit["id"])
        new = [number for number in vectors if number in self._photos and number not in self._scores]
        if self._allowed is not None:
            new = np.array(new, np.int64)[np.isin(new, self._allowed)].tolist()
        if new:
            scores = exact_inner_products(np.stack([vectors[number] for number in new]), self.query)
            self._scores.update(zip(new, scores.tolist(), strict=True))

    def begin_anew(self) -> None:
        self.left_out = set(self._seen)

    def is_enough(self, k: int) -> bool:
        return self._floor == -np.inf or sum(score > self._floor + ROUNDING for score in self._scores.values()) >= k

    def best(self, k: int) -> Nearest:
        """The `k` best, those of equal score by their ids; of those that were left out, a search may lack photos."""
        ids = np.fromiter(self._scores, np.int64)
        scores = np.fromiter(self._scores.values(), np.float32)
        order = np.lexsort((ids, -scores))[:k]
        photos = None if self.left_out else [sorted(self._photos[number]) for number in ids[order].tolist()]
        return Nearest(scores[order], ids[order], photos)
