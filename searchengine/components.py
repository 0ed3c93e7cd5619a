"""Components of vectors that are near each other: union-find, and families in which each has many neighbours.

Asking for all the neighbours of each of n copies of a photo would bring n * n pairs, nearly all of them between vectors
that are joined already. So of a component nothing is asked within. Those of its vectors that lie near one of them, the
centre, are looked at together: what joins them with another component is no further from the centre than what is
furthest of them and a neighbour of it can be together (the triangle inequality). Around most families nothing is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from searchengine.index import exact
from searchengine.index.protocol import PhotoSnapshot, Vectors
from searchengine.index.segments import Ids
from searchengine.index.table import Rows
from searchengine.vectors import UNIT_TOLERANCE, FloatMatrix

ROWS_PER_BLOCK = 1024
CROWD, DEEPER = 100, 10  # so many vectors around a centre are asked for first, and so many times more then


class Components:
    """Union-find over 0..n-1, many pairs at a time. The root of a component is its least member."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def unite(self, first: Ids, second: Ids) -> None:
        """Join the components of first[i] and second[i], for each i."""
        while len(first):
            first, second = self.roots(first), self.roots(second)
            apart = first != second
            first, second = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            # Where a root gets several parents the last one stays; the other pairs come again.
            self._parent[second] = first

    def roots(self, members: Ids) -> Ids:
        """Those of `members` (m,)."""
        found: Ids = self._parent[members]
        while np.any(self._parent[found] != found):
            found = self._parent[found]
        self._parent[members] = found
        return found


def join_crowds(
    snapshot: PhotoSnapshot, ids: Ids, parts: Components, crowded: Ids, *, certain: float, among: Ids | None
) -> None:
    """Join with the vectors `crowded` all that have a cosine of `certain` with one of them; both are places in `ids`.

    Exact where the searches of `snapshot` are. In the worst case, thousands of components that each come close to many
    others and to none close enough, it takes as long as comparing all these pairs.
    """
    table = snapshot.table
    rows = table.rows_of(ids)
    roots = parts.roots(crowded)
    order = np.argsort(roots, kind="stable")
    for members in np.split(crowded[order], np.flatnonzero(np.diff(roots[order])) + 1):
        others, k = among, CROWD
        while len(members):
            centre = table.gather(rows[members[:1]])
            away = _distance(table.exact_scores(centre[0], rows[members]))
            around = away <= _distance(certain)
            around[0] = True
            floor = 1 - 3 * UNIT_TOLERANCE - (away[around].max() + _distance(certain)) ** 2 / 2
            scores, found = snapshot.search(centre, k=k, among=others)
            while found.shape[1] == k and scores[0, -1] >= floor:
                if others is among:  # else most of what is found would be of this component
                    others = ids[parts.roots(np.arange(len(ids))) != parts.roots(members[:1])]
                else:
                    k *= DEEPER
                scores, found = snapshot.search(centre, k=k, among=others)
            places = np.searchsorted(ids, found[0])
            places = places[(scores[0] >= floor) & (parts.roots(places) != parts.roots(members[:1]))]
            joined = places[_are_near(table, rows[places], rows[members[around]], certain)]
            parts.unite(joined, np.full(len(joined), members[0]))
            members, k = members[~around], CROWD


def _are_near(table: Vectors, rows: Rows, others: Rows, least: float) -> NDArray[np.bool_]:
    """Whether each of the vectors in `rows` (n,) has a cosine of `least` with any of those in `others` (m,)."""
    found = np.zeros(len(rows), np.bool_)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        some = slice(start, start + ROWS_PER_BLOCK)
        vectors = table.gather(rows[some])
        best = np.full(len(vectors), -np.inf, np.float32)
        for first in range(0, len(others), ROWS_PER_BLOCK):
            best = np.maximum(best, (vectors @ table.gather(others[first : first + ROWS_PER_BLOCK]).T).max(axis=1))
        found[some] = best >= least
        for place in np.flatnonzero(np.abs(best - least) <= exact.ROUNDING):
            found[start + place] = table.exact_scores(vectors[place], others).max() >= least
    return found


def _distance(cosine: float | FloatMatrix) -> NDArray[np.float64]:
    """At most so far are two vectors of that cosine from each other, though their lengths are not quite 1."""
    found: NDArray[np.float64] = np.sqrt(np.maximum(2 - 2 * np.asarray(cosine, np.float64), 0) + 5 * UNIT_TOLERANCE)
    return found
