"""Is a hit a match, or only the nearest of what there is? Cosines of dual encoders have no universal scale.

The library itself is the yardstick. Most photos do not match a given query, so the bulk of their scores shows what
"no match" looks like for this very query. A hit's distance from that bulk, in units of the bulk's own spread, is turned
into a probability by a logistic curve whose two constants were fitted on captioned photos (scripts/fit_relevance.py).
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import IndexFormatError
from searchengine.hits import MATCH as MATCH
from searchengine.index.commits import Version
from searchengine.index.layout import REPAIR
from searchengine.index.reader import Index
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, UsualScores

SAMPLE_SIZE = 4096
SLOPE, THRESHOLD = 1.7, 2.3

# A small library says little about its own bulk, so the usual scores of its encoder count as this many of its photos.
USUAL_COUNT = 20


class Background:
    """The scores that a query gets from photos at large, by a sample of the index that is drawn once a commit."""

    def __init__(self, index: Index, usual: UsualScores) -> None:
        self._index = index
        self._usual = usual
        self._lock = threading.Lock()
        self._version: Version | None = None
        self._sample: FloatMatrix = np.empty((0, index.dim), np.float32)

    def relevance(self, query: FloatMatrix, scores: FloatMatrix) -> NDArray[np.float32]:
        """Probabilities (n,) that hits with these `scores` (n,) match the unit vector `query` (dim,)."""
        return relevance(scores, background=self._newest_sample() @ query, usual=self._usual)

    def _newest_sample(self) -> FloatMatrix:
        version = self._index.snapshot().version
        with self._lock:
            if version != self._version:
                sample = self._index.sample_vectors(SAMPLE_SIZE)
                if not np.all(np.isfinite(sample)):
                    folder = printable(str(self._index.folder))
                    raise IndexFormatError(f"the index at {folder} holds vectors that are not finite; {REPAIR}")
                self._sample = sample
                self._version = version
            return self._sample


def relevance(scores: FloatMatrix, *, background: FloatMatrix, usual: UsualScores) -> NDArray[np.float32]:
    """Probabilities (n,) for hits with `scores` (n,), given the scores (m,) of a sample of the library."""
    distance = standard_distance(scores, background=background, usual=usual)
    return np.asarray(1 / (1 + np.exp(-SLOPE * (distance - THRESHOLD))), dtype=np.float32)


def standard_distance(scores: FloatMatrix, *, background: FloatMatrix, usual: UsualScores) -> NDArray[np.float64]:
    """How far `scores` lie above the bulk of `background`, in units of its spread.

    The spread is taken below the median, where no match can be, so that many matches do not widen it.
    """
    centre, spread = usual
    if len(background):
        low, median = np.quantile(background, (0.1587, 0.5))  # one standard deviation below a normal's mean, and it
        own = len(background) / (len(background) + USUAL_COUNT)
        centre = own * median + (1 - own) * usual.centre
        spread = own * (median - low) + (1 - own) * usual.spread
    return (np.asarray(scores, dtype=np.float64) - centre) / max(spread, 1e-6)
