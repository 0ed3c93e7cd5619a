"""The vectors that a filter leaves, and what is worth keeping of them while the same filter is used again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import faiss
import numpy as np
from numpy.typing import NDArray

from searchengine.index.segments import Ids
from searchengine.index.table import Rows, VectorTable
from searchengine.vectors import FloatMatrix

# A filter that is used again gets its vectors side by side, up to this size; they are read many times faster then.
MATRIX_BYTES = 32 * 2**20

REMEMBERED = 4


class Allowed:
    """Living vectors of a table that a search may return: those of `ids` (n,), rising."""

    def __init__(self, table: VectorTable, ids: Ids) -> None:
        rows = table.rows_of(ids)
        self._table = table
        rows = rows[~table.is_dead(rows)]
        self.rows: Rows = rows if np.all(rows[1:] > rows[:-1]) else np.unique(rows)
        self._matrix: FloatMatrix | None = None
        self._used = 0
        # How many of them are in each list of an `Ann`, which keeps it here.
        self.list_sizes: tuple[object, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keeps_matrix(self) -> bool:
        return 4 * self._table.dim * len(self.rows) <= MATRIX_BYTES

    def matrix(self) -> FloatMatrix:
        """The vectors, float32 (n, dim), side by side."""
        if self._matrix is None:
            self._matrix = self._table.gather(self.rows)
        return self._matrix

    def scores(self, query: FloatMatrix) -> FloatMatrix:
        """Inner products (n,) with `query` (dim,), within the rounding of float32."""
        self._used += 1
        if self.keeps_matrix and self._used > 1:
            products: FloatMatrix = self.matrix() @ query
            return products
        return self._table.scores(query, self.rows)

    @cached_property
    def hidden_rows(self) -> Rows:
        """The rows of all other vectors."""
        return np.flatnonzero(np.bincount(self.rows, minlength=len(self._table)) == 0)

    def ids(self) -> Ids:
        return self._table.ids[self.rows]

    @cached_property
    def selector(self) -> faiss.IDSelector:
        """The same as a bitmap over ids, which FAISS asks."""
        ids = self.ids()
        bits = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.bool_)
        bits[ids] = True
        self._bitmap: NDArray[np.uint8] = np.packbits(bits, bitorder="little")  # FAISS does not keep it alive
        return faiss.IDSelectorBitmap(self._bitmap)  # type: ignore[call-arg,arg-type]


class RememberedAllowed:
    """The last few, by the very array of ids that was asked for, so that pages and repeated filters are quick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[Ids, Allowed]] = OrderedDict()

    def get(self, table: VectorTable, ids: Ids) -> Allowed:
        if ids.flags.writeable:  # it may hold others tomorrow
            return Allowed(table, ids)
        with self._lock:
            known = self._kept.get(id(ids))
            if known is not None and known[0] is ids:
                self._kept.move_to_end(id(ids))
                return known[1]
        allowed = Allowed(table, ids)
        with self._lock:
            self._kept[id(ids)] = (ids, allowed)
            while len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return allowed
