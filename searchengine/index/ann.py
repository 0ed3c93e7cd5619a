"""Approximate search, held to a measured recall: short codes point to candidates, exact scores decide among them.

The vectors are rotated at random and split into cells around centroids; the vectors of a cell, into lists by how far
they lie from its centroid. A code tells where a vector lies beside its centroid: 4 bits for each few dimensions, the
nearest of 16 points that suit a normal distribution, times the scale of the list. (After a random rotation residuals
are nearly normal, so the points need no training.) FAISS compares 32 codes at a time in registers ("fast scan", André
et al., PVLDB 2015). `scan` reads the codes of all lists, `ivf` those of the lists that can matter.

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
MAX_SHARE = 1e6  # far beyond a margin or a scale, far below where float32 ends

FIRST_LISTS = 64
FIRST_CANDIDATES = 64
CANDIDATES = {"scan": 4096, "ivf": 400}
# From so many codes on, a second thread saves more than it costs.
CODES_PER_THREAD = 150_000
THREADS = 2

LEAST_DEVIATION, DEVIATION_STEP = -8.0, 0.01
_SHARE_ABOVE = np.array(
    [0.5 * math.erfc((LEAST_DEVIATION + step * DEVIATION_STEP) / math.sqrt(2)) for step in range(1601)], np.float32
)

ID_BYTES = 8


def resident_bytes(code_bytes: int) -> int:
    """What a search keeps in memory for each vector: its id, and a code with its id if there is an `ann/`."""
    return ID_BYTES + (code_bytes + ID_BYTES if code_bytes else 0)


@dataclass(frozen=True, kw_only=True)
class AnnParameters:
    """What an `ann/` was built for and as. `through_id`: it holds every vector up to this id.

    `miss` is the share of the k best that may be expected in unread lists. `margin`: how far below the k-th best the
    code of one of the k best may put it. `recall_at_10` was measured against exact search. List i belongs to the scale
    number i // cells, with as many cells for each scale; an older program had one.
    """

    kind: str
    through_id: int
    count: int
    code_bytes: int
    lists: int
    scales: tuple[float, ...] = (1.0,)
    miss: float
    margin: float
    recall_target: float
    recall_at_10: float

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for values that cannot be: a table may be damaged."""
        object.__setattr__(self, "scales", tuple(self.scales))  # a list, out of JSON
        numbers = (self.through_id, self.count, self.code_bytes, self.lists)
        shares = (self.miss, self.margin, self.recall_target, self.recall_at_10)
        if (
            self.kind not in CANDIDATES
            or not all(type(number) is int and 0 <= number < MAX_ID for number in numbers)
            or not all(type(share) in (int, float) and 0 <= share < MAX_SHARE for share in (*shares, *self.scales))
            or not self.scales
            or min(self.scales) == 0
            or self.lists % len(self.scales)
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
        quantizer = faiss.downcast_index(codes.quantizer)
        self._centroids: FloatMatrix = quantizer.reconstruct_n(0, quantizer.ntotal)
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
        centres = self._centres(rotated)
        sizes = self._sizes if allowed is None else self._allowed_sizes(allowed)
        probe = _Probe(self, table, query, rotated, centres, k=k, allowed=allowed)
        if self.parameters.kind == "scan":
            probe.read(np.flatnonzero(sizes))
            return probe.scored()
        variance = float(rotated @ inner_products(self._covariance, rotated))
        deviation = math.sqrt(max(variance, 1e-12)) * self._spread
        first = _first_lists(centres + deviation, sizes, vectors=4 * k)
        probe.read(first)
        expected = sizes * _share_above((probe.kth_best - centres) / deviation)
        expected[first] = 0
        # What a filter leaves is not spread over the lists as all vectors are, so more may be missed than is expected.
        share = miss if allowed is None else miss / 4
        probe.read(_all_but(expected, missing=share * k))
        return probe.scored()

    def scores_by_code(self, query: FloatMatrix, *, count: int) -> tuple[FloatMatrix, Ids]:
        """Scores by codes alone (n <= count,) and ids of the best in all lists."""
        rotated = inner_products(self._rotation, query)
        centres = self._centres(rotated)
        lists = np.flatnonzero(self._sizes)
        scores, ids, _ = self.read_codes(rotated, lists, centres, count=count, selector=None)
        best = np.argsort(-scores)[:count]
        return scores[best], ids[best]

    def _centres(self, rotated: FloatMatrix) -> FloatMatrix:
        """The score (lists,) of each list's centroid."""
        return np.tile(inner_products(self._centroids, rotated), len(self.parameters.scales))

    def read_codes(
        self, rotated: FloatMatrix, lists: Lists, centres: FloatMatrix, *, count: int, selector: Any
    ) -> tuple[FloatMatrix, Ids, float]:
        """Scores by codes (n,) and ids of the best in some lists, and the score down to which none is left out."""
        lists = np.sort(lists)
        bounds = np.searchsorted(lists, np.arange(len(self.parameters.scales) + 1) * len(self._centroids))
        parts = [
            (scale, lists[start:end])
            for scale, start, end in zip(self.parameters.scales, bounds[:-1], bounds[1:], strict=True)
            if end > start
        ]

        def read(part: tuple[float, Lists]) -> tuple[FloatMatrix, Ids, float]:
            scale, some = part
            codes = self.codes_in(some)
            scores, ids = best_by_code(
                self._codes,
                rotated * np.float32(scale),
                some,
                centres[some],
                count=min(count, codes),
                selector=selector,
            )
            # What was left out is below the last.
            return scores, ids, float(scores.min()) if len(scores) == count < codes else -math.inf

        if len(parts) > 1 and self.codes_in(lists) >= 2 * CODES_PER_THREAD and _cores() > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                found = list(pool.map(read, parts))
        else:
            found = [read(part) for part in parts]
        known_to = max((known_to for _, _, known_to in found), default=-math.inf)
        scores = np.concatenate([NO_SCORES, *(scores for scores, _, _ in found)])
        ids = np.concatenate([NO_ROWS, *(ids for _, ids, _ in found)])
        return scores[scores >= known_to], ids[scores >= known_to], known_to

    def codes_in(self, lists: Lists) -> int:
        return int(self._sizes[lists].sum())

    def _allowed_sizes(self, allowed: Allowed) -> Lists:
        if allowed.list_sizes is None or allowed.list_sizes[0] is not self:
            ids = allowed.ids()
            lists = self.list_of[ids[ids <= self.parameters.through_id]]
            allowed.list_sizes = self, np.bincount(lists[lists >= 0], minlength=len(self._sizes))
        return allowed.list_sizes[1]


def _first_lists(promise: FloatMatrix, sizes: Lists, *, vectors: int) -> Lists:
    """The most promising lists that hold so many vectors together, and at least FIRST_LISTS; none that is empty."""
    promise = np.where(sizes > 0, promise, -np.inf)
    count = FIRST_LISTS
    while True:
        count = min(count, len(sizes))
        lists = np.argpartition(-promise, count - 1)[:count]
        if count == len(sizes) or sizes[lists].sum() >= vectors:
            return lists[sizes[lists] > 0]
        count *= 4


def _share_above(deviations: FloatMatrix) -> FloatMatrix:
    """Of normally distributed scores the share (n,) that lies so many `deviations` (n,) above their mean or higher."""
    steps = np.clip((deviations - LEAST_DEVIATION) / DEVIATION_STEP, 0, len(_SHARE_ABOVE) - 1)
    share: FloatMatrix = _SHARE_ABOVE[steps.astype(np.int32)]
    return share


def _all_but(expected: FloatMatrix, *, missing: float) -> Lists:
    """The fewest lists that leave out less than `missing` of what is `expected` (lists,) in all."""
    # Sorting all would take longer than all else here: the least can be left out together.
    least = expected <= missing / len(expected)
    missing -= float(expected[least].sum())
    others = np.flatnonzero(~least)
    others = others[np.argsort(expected[others])]
    left_out = others[np.cumsum(expected[others]) <= missing]
    chosen = ~least
    chosen[left_out] = False
    return np.flatnonzero(chosen)


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
        count = max(CANDIDATES[self._ann.parameters.kind], 4 * self._k)
        while codes:
            by_code, ids, known_to = self._ann.read_codes(
                self._rotated, lists, self._centres, count=count, selector=self._selector
            )
            rest = slice(None)
            known = self._rows, self._scores
            if len(known[0]) < self._k:
                surest = min(max(FIRST_CANDIDATES, 2 * self._k), len(ids))
                order = np.argpartition(-by_code, surest - 1)
                by_code, ids = by_code[order], ids[order]
                self._score(ids[:surest])
                rest = slice(surest, None)
            if known_to == -math.inf or known_to < self._bar:
                hopeful = by_code[rest] >= self._bar
                self._by_code = np.concatenate([self._by_code, by_code[rest][hopeful]])
                self._ids = np.concatenate([self._ids, ids[rest][hopeful]])
                return
            self._rows, self._scores = known
            count *= 3

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
