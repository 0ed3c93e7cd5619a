"""Is a hit a match, or only the nearest of what there is? Cosines of dual encoders have no universal scale.

The library itself is the yardstick. Most photos do not match a given query, so the bulk of their scores shows what
"no match" looks like for this very query. A hit's distance from that bulk, in units of the bulk's own spread, is turned
into a probability by a logistic curve whose two constants were fitted on captioned photos (scripts/fit_relevance.py).
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from searchengine.index.reader import Index
from searchengine.vectors import FloatMatrix

# From this relevance on, a hit counts as a match.
MATCH = 0.5

SAMPLE_SIZE = 4096
SLOPE, THRESHOLD = 1.8, 2.0

# Below this many photos the spread of their scores says little, so that of text queries over a large library stands in.
SMALLEST_SAMPLE = 20
SMALL_CENTRE, SMALL_SPREAD = 0.093, 0.065


class Background:
    """The scores that a query gets from photos at large, by a sample of the index that is drawn once a commit."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._version = -1
        self._sample: FloatMatrix = np.empty((0, index.dim), np.float32)

    def relevance(self, query: FloatMatrix, scores: FloatMatrix) -> NDArray[np.float32]:
        """Probabilities (n,) that hits with these `scores` (n,) match the unit vector `query` (dim,)."""
        return relevance(scores, background=self._newest_sample() @ query)

    def _newest_sample(self) -> FloatMatrix:
        version = self._index.snapshot().version
        with self._lock:
            if version != self._version:
                self._sample = self._index.sample_vectors(SAMPLE_SIZE)
                self._version = version
            return self._sample


def relevance(scores: FloatMatrix, *, background: FloatMatrix) -> NDArray[np.float32]:
    """Probabilities (n,) for hits with `scores` (n,), given the scores (m,) of a sample of the library."""
    distance = standard_distance(scores, background=background)
    return np.asarray(1 / (1 + np.exp(-SLOPE * (distance - THRESHOLD))), dtype=np.float32)


def standard_distance(scores: FloatMatrix, *, background: FloatMatrix) -> NDArray[np.float64]:
    """How far `scores` lie above the bulk of `background`, in units of its spread.

    The spread is taken below the median, where no match can be, so that many matches do not widen it.
    """
    centre, spread = SMALL_CENTRE, SMALL_SPREAD
    if len(background) >= SMALLEST_SAMPLE:
        low, centre = np.quantile(background, (0.1587, 0.5))  # one standard deviation below a normal's mean, and it
        spread = max(centre - low, 1e-6)
    return (np.asarray(scores, dtype=np.float64) - centre) / spread
