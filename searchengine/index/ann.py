"""Approximate search, held to a measured recall: short codes point to candidates, exact scores decide among them.

The vectors are rotated at random and split into lists around centroids. A vector's code holds where it lies beside its
centroid: 4 bits for each few dimensions, the nearest of 16 points that suit a normal distribution (after a random
rotation every residual is nearly that, so the points need no training). FAISS compares 32 codes at a time in registers
("fast scan": André et al., PVLDB 2015). `scan` reads the codes of all lists, `ivf` those of the lists that can matter.

Which lists can matter is found for each query anew, since a text lies much further from photos than photos do from each
other. Beside its centroid a list's scores are nearly normal, with a variance that the covariance of residuals gives for
this query's direction. So it can be told how many vectors in unread lists should beat the k-th best known, and lists
are read until that is below `miss` * k. `miss` was chosen when the lists were built, to reach a recall.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from searchengine.index.allowed import Allowed
from searchengine.index.kernels import best_by_code, inner_products
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, NO_SCORES, Rows, VectorTable
from searchengine.vectors import FloatMatrix

Lists = NDArray[np.int64]

MAX_ID = 2**40  # far beyond any library; `list_of` takes memory up to the highest id

FIRST_LISTS = 24
FIRST_CANDIDATES = 64
CANDIDATES = {"scan": 4096, "ivf": 400}
# From so many codes on, a second thread saves more than it costs.
CODES_PER_THREAD = 150_000
THREADS = 2

# The chance that a normal variable exceeds z, by interpolation: numpy has no error function.
_Z = np.linspace(-8, 8, 1601)
_TAIL = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in _Z])


ID_BYTES = 8


def resident_bytes(code_bytes: int) -> int:
    """What a search keeps in memory for each vector: its id, and a code with its id if there is an `ann/`."""
    return ID_BYTES + (code_bytes + ID_BYTES if code_bytes else 0)


@dataclass(frozen=True, kw_only=True)
class AnnParameters:
    """What an `ann/` was built for and as. `through_id`: it holds every vector up to this id.

    `miss` is the share of the k best that may be expected in unread lists. `margin`: how far below the k-th best the
    code of one of the k best may put it. `recall_at_10` was measured against exact search.
    """

    kind: str
    through_id: int
    count: int
    code_bytes: int
    lists: int
    miss: float
    margin: float
    recall_target: float
    recall_at_10: float

    def __post_init__(self) -> None:
        """Raises ValueError for values that cannot be: a table may be damaged."""
        numbers = (self.through_id, self.count, self.code_bytes, self.lists)
        shares = (self.miss, self.margin, self.recall_target, self.recall_at_10)
        if (
            self.kind not in CANDIDATES
            or not all(type(number) is int and 0 <= number < MAX_ID for number in numbers)
            or not all(type(share) in (int, float) and 0 <= share < math.inf for share in shares)
        ):
            raise ValueError("a parameter cannot be")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ann:
    """The codes of vectors in lists, and what is known of the lists.

    `rotation` (dim, dim); `covariance` (dim, dim) of the rotated residuals; `spread` (lists,): how far the vectors of
    each list lie from their centroid, relative to all.
    """

    def __init__(
        self,
        codes: Any,
        *,
        owner: Any = None,
        sha256: str = "",
        recorded: str = "",
        rotation: FloatMatrix,
        covariance: FloatMatrix,
        spread: FloatMatrix,
        parameters: AnnParameters,
    ) -> None:
        self._owner = owner  # takes the codes along when it goes
        self.sha256, self.recorded = sha256, recorded
        self.parameters = parameters
        self._codes = codes
        self._rotation = rotation
        self._covariance = covariance
        self._spread = spread
        self._centroids: FloatMatrix = faiss.downcast_index(codes.quantizer).reconstruct_n(0, codes.nlist)
        self._sizes: Lists = np.array([codes.invlists.list_size(number) for number in range(codes.nlist)], np.int64)

    @cached_property
    def list_of(self) -> NDArray[np.int32]:
        """The list of each vector, by id; -1 for ids that are not here."""
        lists = np.full(self.parameters.through_id + 1, -1, np.int32)
        for number in np.flatnonzero(self._sizes):
            lists[self.ids_in(int(number))] = number
        return lists

    def ids_in(self, number: int) -> Ids:
        """The ids of the vectors in a list."""
        size, invlists = int(self._sizes[number]), self._codes.invlists
        pointer = invlists.get_ids(number)
        try:
            ids: Ids = faiss.rev_swig_ptr(pointer, size).copy()
        finally:
            invlists.release_ids(number, pointer)
        return ids

    def candidates(
        self,
        table: VectorTable,
        query: FloatMatrix,
        *,
        k: int,
        allowed: Allowed | None = None,
        miss: float | None = None,
    ) -> tuple[Rows, FloatMatrix]:
        """Rows (n,), all living and `allowed`, that hold the k best of this ann, nearly always; and their scores (n,).

        `miss` stands in for the parameter of this name. Scores are exact but for the rounding of float32.
        """
        miss = self.parameters.miss if miss is None else miss
        rotated = inner_products(self._rotation, query)
        centres = inner_products(self._centroids, rotated)
        sizes = self._sizes if allowed is None else self._allowed_sizes(allowed)
        probe = _Probe(self, table, query, rotated, centres, k=k, allowed=allowed)
        if self.parameters.kind == "scan":
            probe.read(np.flatnonzero(sizes))
            return probe.scored()
        variance = float(rotated @ inner_products(self._covariance, rotated))
        deviation = math.sqrt(max(variance, 1e-12)) * self._spread
        hopeful = np.argsort(-(centres + deviation))
        hopeful = hopeful[sizes[hopeful] > 0]
        enough = int(np.searchsorted(np.cumsum(sizes[hopeful]), 4 * k)) + 1
        first = hopeful[: max(FIRST_LISTS, enough)]
        probe.read(first)
        expected = sizes * np.interp((probe.kth_best - centres) / deviation, _Z, _TAIL)
        expected[first] = 0
        order = np.argsort(-expected)
        left = np.cumsum(expected[order][::-1])[::-1]  # expected in the lists from here on
        # What a filter leaves is not spread over the lists as all vectors are, so more may be missed than is expected.
        share = miss if allowed is None else miss / 4
        probe.read(order[: int(np.count_nonzero(left > share * k))])
        return probe.scored()

    def scores_by_code(self, query: FloatMatrix, *, count: int) -> tuple[FloatMatrix, Ids]:
        """Scores by codes alone (n <= count,) and ids of the best in all lists."""
        rotated = inner_products(self._rotation, query)
        centres = inner_products(self._centroids, rotated)
        lists = np.flatnonzero(self._sizes)
        return self.read_codes(rotated, lists, centres, count=min(count, self.codes_in(lists)), selector=None)

    def read_codes(
        self, rotated: FloatMatrix, lists: Lists, centres: FloatMatrix, *, count: int, selector: Any
    ) -> tuple[FloatMatrix, Ids]:
        """Scores by codes (n <= count,) and ids of the best in some lists."""
        if self.codes_in(lists) >= 2 * CODES_PER_THREAD and len(lists) > 1 and _cores() > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                halves = [
                    pool.submit(self._read, rotated, lists[part::THREADS], centres, count, selector)
                    for part in range(THREADS)
                ]
            found = [half.result() for half in halves]
            # What a full half left out is below its last, so that is as far down as both are known.
            known_to = max((scores.min() for scores, _ in found if len(scores) == count), default=-np.inf)
            scores, ids = (np.concatenate(part) for part in zip(*found, strict=True))
            return scores[scores >= known_to], ids[scores >= known_to]
        return self._read(rotated, lists, centres, count, selector)

    def _read(
        self, rotated: FloatMatrix, lists: Lists, centres: FloatMatrix, count: int, selector: Any
    ) -> tuple[FloatMatrix, Ids]:
        return best_by_code(self._codes, rotated, lists, centres[lists], count=count, selector=selector)

    def codes_in(self, lists: Lists) -> int:
        return int(self._sizes[lists].sum())

    def _allowed_sizes(self, allowed: Allowed) -> Lists:
        if allowed.list_sizes is None or allowed.list_sizes[0] is not self:
            ids = allowed.ids()
            lists = self.list_of[ids[ids <= self.parameters.through_id]]
            allowed.list_sizes = self, np.bincount(lists[lists >= 0], minlength=len(self._sizes))
        return allowed.list_sizes[1]


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Probe:
    """The candidates of one query so far."""

    def __init__(
        self,
        ann: Ann,
        table: VectorTable,
        query: FloatMatrix,
        rotated: FloatMatrix,
        centres: FloatMatrix,
        *,
        k: int,
        allowed: Allowed | None,
    ) -> None:
        self._ann, self._table, self._query, self._rotated, self._centres = ann, table, query, rotated, centres
        self._k = k
        self._selector = None if allowed is None else allowed.selector
        self._by_code, self._ids = NO_SCORES, NO_ROWS  # read and not scored yet, best first
        self._rows, self._scores = NO_ROWS, NO_SCORES
        self.kth_best = -math.inf

    def read(self, lists: Lists) -> None:
        """Read codes until whoever is left out cannot be among the k best; score the best of them exactly."""
        codes = self._ann.codes_in(lists)
        wanted = max(CANDIDATES[self._ann.parameters.kind], 4 * self._k)
        while codes:
            count = min(wanted, codes)
            by_code, ids = self._ann.read_codes(
                self._rotated, lists, self._centres, count=count, selector=self._selector
            )
            order = np.argsort(-by_code)
            by_code, ids = by_code[order], ids[order]
            surest = max(FIRST_CANDIDATES, 2 * self._k)
            known = self._rows, self._scores
            if len(known[0]) < self._k:
                self._score(ids[:surest])
                rest = slice(surest, None)
            else:
                rest = slice(None)
            if len(ids) < count or count == codes or by_code[-1] < self._bar:
                self._by_code = np.concatenate([self._by_code, by_code[rest]])
                self._ids = np.concatenate([self._ids, ids[rest]])
                return
            self._rows, self._scores = known
            wanted *= 8

    def scored(self) -> tuple[Rows, FloatMatrix]:
        """All rows that may be among the k best, and their scores."""
        self._score(self._ids[self._by_code >= self._bar])
        return self._rows, self._scores

    @property
    def _bar(self) -> float:
        """The score by code below which nobody is expected among the k best."""
        return self.kth_best - self._ann.parameters.margin

    def _score(self, ids: Ids) -> None:
        rows = np.sort(self._table.rows_of(ids))
        rows = rows[~self._table.is_dead(rows)]
        scores = self._table.scores(self._query, rows)
        self._rows, self._scores = np.concatenate([self._rows, rows]), np.concatenate([self._scores, scores])
        if len(self._scores) >= self._k:
            self.kth_best = float(np.partition(self._scores, -self._k)[-self._k])
