"""One committed state of an index in Milvus."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import numpy as np

from searchengine.filters import Filters
from searchengine.index.segments import Ids
from searchengine.milvus.connection import Connection
from searchengine.milvus.expressions import among, expression_of
from searchengine.milvus.nearest import FLAT, Search
from searchengine.milvus.passing import FIELDS, Passing
from searchengine.milvus.schema import State
from searchengine.milvus.vectors import IDS_AT_A_TIME, FetchedVectors, MilvusVectors
from searchengine.vectors import FloatMatrix


class Version(NamedTuple):
    collection: str
    commit: int


class MilvusSnapshot:
    """`index_type` is that of Milvus for the vectors."""

    segments: tuple[()] = ()

    def __init__(
        self, connection: Connection, state: State, *, index_type: str, fetched: FetchedVectors, passing: Passing
    ) -> None:
        self.version = Version(state.collection, state.commit)
        self.state = state
        self.index_type = index_type
        self.table = MilvusVectors(connection, state.collection, dim=state.identity.dim, fetched=fetched)
        self._connection = connection
        self._fetched = fetched
        self._passing = passing

    @property
    def is_exact(self) -> bool:
        """Whether Milvus compares every vector in a search."""
        return self.index_type in FLAT

    def __len__(self) -> int:
        return self.state.vectors

    def search(self, queries: FloatMatrix, *, k: int, among: Ids | None = None) -> tuple[FloatMatrix, Ids]:
        """For each of `queries` (q, dim) scores (q, k'), falling, and ids (q, k') of the nearest vectors."""
        found = self.searching(allowed=among).nearest(queries, k=k)
        width = min((len(one.ids) for one in found), default=0)
        scores = np.array([one.scores[:width] for one in found], np.float32).reshape(len(queries), width)
        return scores, np.array([one.ids[:width] for one in found], np.int64).reshape(len(queries), width)

    def searching(
        self, filters: Filters | None = None, *, without: Collection[int] = (), allowed: Ids | None = None
    ) -> Search:
        """Searches among the photos that pass, but for those of the vectors `without`; of those `allowed`, if not all.

        Few ids go to Milvus. Of many, what Milvus finds is looked up in them.
        """
        expression = expression_of(filters)
        judge = None
        if filters and not expression.is_exact:
            judge = partial(self._passing.among, filters=filters)
        if without:
            expression = expression.and_(among("vector_id", sorted(without), negated=True))
        if allowed is not None and len(allowed) <= IDS_AT_A_TIME:
            expression = expression.and_(among("vector_id", allowed.tolist()))
            allowed = None
        return Search(
            self._connection,
            self.state.collection,
            dim=self.state.identity.dim,
            expression=expression,
            judge=judge,
            judged_fields=FIELDS if judge else (),
            allowed=allowed,
            index_type=self.index_type,
            fetched=self._fetched,
        )
