"""Is a hit a match, or only the nearest of what there is? Cosines of dual encoders have no universal scale.

The library itself is the yardstick. Most photos do not match a given query, so the bulk of their scores shows what
"no match" looks like for this very query, and a score counts as its *distance* from that bulk, in units of its spread.
Two things then make a match:

- the best five of the library lie further out than the best five of as many unrelated photos would; how much further
  is their *excess*. Where it is small, nothing may show what was asked for, and the line of matches rises above all;
- a hit reaches a share of the distance that these five have: what matches best tells how far matches lie.

A logistic curve over the distance from that line is the probability of a match. Its constants, four for texts and four
for photos, were fitted on half of a set of captioned photos (scripts/fit_relevance.py, which also tells how good they
are on others). Hits of higher score never have less of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import IndexFormatError
from searchengine.hits import MATCH as MATCH
from searchengine.index.kernels import inner_products
from searchengine.index.layout import REPAIR
from searchengine.index.protocol import PhotoIndex
from searchengine.vectors import FloatMatrix, UsualScores

SAMPLE_SIZE = 4096
PAIRED = 256  # so many photos of the sample tell how like each other photos are
BEST = 5

# A small library says little about its own bulk, so what is usual counts as this many of its photos.
USUAL_COUNT = 20
# However large the library, its spread for one query is an estimate: half of it is what is usual.
OWN_SPREAD = 0.5
# Of any two photos, where the library is too small to tell; between mini's 0.3 and CLIP's 0.5.
USUAL_LIKENESS = UsualScores(centre=0.4, spread=0.1)
# A score this high is the query itself.
SAME = 1 - 1e-4

# Texts only: a median so many usual spreads above the usual centre means that the bulk of the library matches.
HIGH, BULK_MATCHES = 2.0, 2.55


class Constants(NamedTuple):
    """`share`: of the distance of the best five, that a match reaches. `excess`: that these need. `doubt`: by how much
    the line rises for each unit of excess that lacks. `slope`: of the logistic curve."""

    share: float
    excess: float
    doubt: float
    slope: float


Kind = Literal["text", "image"]

CONSTANTS: dict[Kind, Constants] = {
    "text": Constants(share=0.65, excess=1.75, doubt=3.0, slope=0.8),
    "image": Constants(share=0.4, excess=1.25, doubt=3.0, slope=1.4),
}


class Library(NamedTuple):
    """What queries are held against: unit vectors (n, dim) drawn from `size`, and how like each other they are."""

    sample: FloatMatrix
    size: int
    likeness: UsualScores


class Background:
    """The scores that a query gets from photos at large, by a sample of the index that is drawn once a commit."""

    def __init__(self, index: PhotoIndex, usual: UsualScores) -> None:
        self._index = index
        self._usual = usual
        self._lock = threading.Lock()
        self._version: Hashable = None
        self._library = Library(np.empty((0, index.dim), np.float32), 0, USUAL_LIKENESS)

    def relevance(self, query: FloatMatrix, scores: FloatMatrix, *, kind: Kind | None = None) -> NDArray[np.float32]:
        """Probabilities (n,) that hits with these `scores` (n,) match the unit vector `query` (dim,).

        `kind` tells what the query is: a text, or an image, also one combined with texts; None judges by the scores.
        """
        sample, size, likeness = self._newest()
        return relevance(
            scores, background=inner_products(sample, query), usual=self._usual, likeness=likeness, size=size, kind=kind
        )

    def _newest(self) -> Library:
        snapshot = self._index.snapshot()
        with self._lock:
            if snapshot.version != self._version:
                sample = self._index.sample_vectors(SAMPLE_SIZE)
                if not np.all(np.isfinite(sample)):
                    raise IndexFormatError(
                        f"the index at {self._index.place} holds vectors that are not finite; {REPAIR}"
                    )
                self._library = Library(sample, len(snapshot), likeness_of(sample))
                self._version = snapshot.version
            return self._library


def likeness_of(sample: FloatMatrix) -> UsualScores:
    """Centre and spread of the cosines between any two of some photos, by their unit vectors (n, dim)."""
    # Neighbours in an index are often of one folder, so those that are paired are taken from all of it.
    some = sample[np.linspace(0, len(sample) - 1, PAIRED).astype(np.intp)] if len(sample) > PAIRED else sample
    likeness = (some @ some.T)[np.triu_indices(len(some), 1)]
    centre, spread = _bulk(likeness[likeness < SAME]) or USUAL_LIKENESS
    own = len(some) / (len(some) + USUAL_COUNT)
    return UsualScores(
        own * centre + (1 - own) * USUAL_LIKENESS.centre, own * spread + (1 - own) * USUAL_LIKENESS.spread
    )


def relevance(
    scores: FloatMatrix,
    *,
    background: FloatMatrix,
    usual: UsualScores,
    likeness: UsualScores = USUAL_LIKENESS,
    size: int | None = None,
    kind: Kind | None = None,
) -> NDArray[np.float32]:
    """Probabilities (n,) that photos with `scores` (n,) match a query with the scores `background` (m,) in a sample.

    `usual` is the encoder's, `likeness` what `likeness_of` does. The library holds `size` photos, or m.
    """
    background = background[background < SAME]
    median, spread = _bulk(background) or usual
    kind = kind or _likely_kind(median, usual=usual, likeness=likeness)
    constants, expected = CONSTANTS[kind], likeness if kind == "image" else usual
    own = len(background) / (len(background) + USUAL_COUNT)
    centre, excess = own * median + (1 - own) * expected.centre, -math.inf
    if kind == "text":
        height = (median - usual.centre) / max(usual.spread, 1e-6)
        centre = min(centre, usual.centre + HIGH * usual.spread)
        excess = height - BULK_MATCHES + constants.excess
    unit = max(spread, 1e-6) ** (OWN_SPREAD * own) * max(expected.spread, 1e-6) ** (1 - OWN_SPREAD * own)
    count = min(BEST, len(background))
    best = float(np.mean(np.partition(background, -count)[-count:]) - centre) / unit if count else 0.0
    line = line_of_matches(
        best=best,
        excess=max(excess, best - _expected_best(len(background), count)),
        size=max(1, len(background) if size is None else size),
        constants=constants,
    )
    distance = (np.asarray(scores, dtype=np.float64) - centre) / unit
    log_odds = constants.slope * (distance - line)
    return np.asarray(np.exp(-np.logaddexp(0, -log_odds)), dtype=np.float32)


def line_of_matches(*, best: float, excess: float, size: int, constants: Constants) -> float:
    """The distance at which a photo is a match as likely as not, where the best five of `size` are at `best`.

    A photo alone of its kind must stand out from the furthest that one of `size` unrelated ones would reach.
    """
    line = constants.share * best + constants.doubt * max(0.0, constants.excess - excess)
    return min(line, _expected_best(size, 1) + constants.excess + 0.5)


def _likely_kind(median: float, *, usual: UsualScores, likeness: UsualScores) -> Kind:
    """Photos are more like each other than a text is like them."""
    return "image" if median > usual.centre + 0.6 * (likeness.centre - usual.centre) else "text"


def _bulk(scores: NDArray[np.floating]) -> tuple[float, float] | None:
    """Median and spread of `scores`, None where there are none.

    The spread is taken below the median, where no match can be, so that many matches do not widen it.
    """
    if not len(scores):
        return None
    low, median = np.quantile(scores, (0.1587, 0.5))  # one standard deviation below a normal's mean, and it
    return float(median), float(median - low)


def _expected_best(size: int, count: int) -> float:
    """The mean of the `count` greatest of `size` draws from a standard normal distribution, nearly (Blom 1958)."""
    return sum(_normal_quantile((place + 0.625) / (size + 0.25)) for place in range(count)) / max(count, 1)


def _normal_quantile(tail: float) -> float:
    """What a standard normal draw exceeds with probability `tail`, to 5e-4 (Abramowitz and Stegun 1964, 26.2.23)."""
    if tail > 0.5:
        return -_normal_quantile(1 - tail) if tail < 1 else -math.inf
    t = math.sqrt(-2 * math.log(tail))
    return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
