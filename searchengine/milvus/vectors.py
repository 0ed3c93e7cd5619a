"""The vectors of a collection as a table, whose rows are their ids. The last few that were fetched are remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, Rows, exact_inner_products
from searchengine.milvus.connection import Connection
from searchengine.milvus.expressions import EVERY, among
from searchengine.milvus.schema import MAX_HITS
from searchengine.vectors import FloatMatrix

REMEMBERED_BYTES = 64 * 2**20
BYTES_AT_A_TIME = 8 * 2**20  # of vectors in one message, which by default may hold 64 MiB of all there is
IDS_AT_A_TIME = 4096  # in an expression; of more, one part after the other


class FetchedVectors:
    """Vectors (dim,) by their ids, at most `REMEMBERED_BYTES`; of one committed state."""

    def __init__(self, *, dim: int) -> None:
        self._kept: OrderedDict[int, FloatMatrix] = OrderedDict()
        self._at_most = max(1, REMEMBERED_BYTES // (4 * dim))
        self._lock = threading.Lock()

    def get(self, ids: Iterable[int]) -> dict[int, FloatMatrix]:
        """Those of `ids` that are remembered."""
        with self._lock:
            found = {number: self._kept[number] for number in ids if number in self._kept}
            for number in found:
                self._kept.move_to_end(number)
        return found

    def put(self, vectors: dict[int, FloatMatrix]) -> None:
        with self._lock:
            self._kept.update(vectors)
            while len(self._kept) > self._at_most:
                self._kept.popitem(last=False)


class MilvusVectors:
    """Of one committed state. Each id is taken for that of a vector until it is fetched."""

    def __init__(self, connection: Connection, collection: str, *, dim: int, fetched: FetchedVectors) -> None:
        self.dim = dim
        self._connection = connection
        self._collection = collection
        self._fetched = fetched

    @cached_property
    def living_ids(self) -> Ids:
        """All of them, which takes 8 bytes a vector and a walk through the collection."""
        pages = self._connection.iterate(self._collection, EVERY, ("vector_id",), batch_size=MAX_HITS)
        parts = [np.fromiter((entity["vector_id"] for entity in page), np.int64, len(page)) for page in pages]
        return np.unique(np.concatenate([NO_ROWS, *parts]))

    def rows_of(self, ids: Ids) -> Rows:
        return ids

    def ids_of(self, rows: Rows) -> Ids:
        return rows

    def gather(self, rows: Rows) -> FloatMatrix:
        """As float32 (n, dim). A vector that is gone since is not a number, like one that is damaged."""
        wanted = rows.tolist()
        known = self._fetched.get(wanted)
        missing = [number for number in dict.fromkeys(wanted) if number not in known]
        size = max(1, BYTES_AT_A_TIME // (4 * self.dim))
        for start in range(0, len(missing), size):
            found = self.fetch(among("vector_id", missing[start : start + size]))
            self._fetched.put(found)
            known.update(found)
        gathered = np.full((len(rows), self.dim), np.nan, np.float32)
        for place, number in enumerate(wanted):
            if number in known:
                gathered[place] = known[number]
        return gathered

    def fetch(self, expression: str) -> dict[int, FloatMatrix]:
        """The vectors of the photos that fulfil it, by their ids."""
        found: dict[int, FloatMatrix] = {}
        size = max(1, BYTES_AT_A_TIME // (4 * self.dim))
        fields = ("vector_id", "embedding")
        for page in self._connection.iterate(self._collection, expression, fields, batch_size=min(size, MAX_HITS)):
            found |= vectors_in(page)
        return found

    def scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        products: FloatMatrix = self.gather(rows) @ query
        return products

    def exact_scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        scores = np.empty(len(rows), np.float32)
        size = max(1, BYTES_AT_A_TIME // (4 * self.dim))
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            scores[some] = exact_inner_products(self.gather(rows[some]), query)
        return scores


def vectors_in(entities: Iterable[dict[str, Any]]) -> dict[int, FloatMatrix]:
    """The vectors of some entities by their ids; each is a copy, which keeps no message alive."""
    found: dict[int, FloatMatrix] = {}
    for entity in entities:
        if entity["vector_id"] not in found:
            found[entity["vector_id"]] = np.array(entity["embedding"], np.float32)
    return found
