"""Figures of retrieval: ranks, Recall@K, median rank, average precision, and how sure they are.

Intervals are 95 % percentile intervals of the bootstrap (Efron 1979). What is drawn anew are photos, each with all its
captions, because captions of one photo are not independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from searchengine.vectors import FloatMatrix

Ranks = NDArray[np.float64]
Owners = NDArray[np.integer]
Interval = tuple[float, float]

RECALL_AT = (1, 5, 10)
ROWS_PER_BLOCK = 1024
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """`recall[k]` is the share of queries with a right answer among the first k; ranks count from 1.

    `intervals` has those of each figure, by its name in `as_dict`; none where they were not asked for.
    """

    recall: dict[int, float]
    median_rank: float
    intervals: dict[str, Interval] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        return {f"recall@{k}": share for k, share in self.recall.items()} | {"median_rank": self.median_rank}


def text_to_image(texts: FloatMatrix, images: FloatMatrix, owner: Owners) -> Retrieval:
    """The right answer of text i is image `owner[i]`. `texts` (m, dim), `images` (n, dim), `owner` (m,)."""
    return retrieval(ranks_of_images(texts, images, owner))


def image_to_text(texts: FloatMatrix, images: FloatMatrix, owner: Owners) -> Retrieval:
    """The right answers of an image are its own texts; the first of them counts."""
    return retrieval(ranks_of_texts(texts, images, owner))


def ranks_of_images(texts: FloatMatrix, images: FloatMatrix, owner: Owners) -> Ranks:
    """For each text (m,) the rank of its image."""
    ranks = []
    for start in range(0, len(texts), ROWS_PER_BLOCK):
        scores = texts[start : start + ROWS_PER_BLOCK] @ images.T
        own = owner[start : start + ROWS_PER_BLOCK]
        ranks.append(_ranks(scores, own[:, None] == np.arange(len(images))))
    return np.concatenate(ranks)


def ranks_of_texts(texts: FloatMatrix, images: FloatMatrix, owner: Owners) -> Ranks:
    """For each image (n,) the rank of the best of its own texts."""
    ranks = []
    for start in range(0, len(images), ROWS_PER_BLOCK):
        scores = images[start : start + ROWS_PER_BLOCK] @ texts.T
        ranks.append(_ranks(scores, np.arange(start, start + len(scores))[:, None] == owner))
    return np.concatenate(ranks)


def retrieval(ranks: Ranks, *, owner: Owners | None = None) -> Retrieval:
    """The figures of some ranks (m,); with intervals, if `owner` (m,) tells the number of the photo of each."""
    figures = {f"recall@{k}": float((ranks <= k).mean()) for k in RECALL_AT}
    return Retrieval(
        recall={k: figures[f"recall@{k}"] for k in RECALL_AT},
        median_rank=float(np.median(ranks)),
        intervals={} if owner is None else _intervals(ranks, owner),
    )


def average_precision(scores: FloatMatrix, shown: NDArray[np.bool_]) -> float:
    """The mean of the precisions at the ranks of all photos that are right: `scores` (n,), `shown` bool (n,).

    Of equal scores the wrong ones come first, so that a constant scores badly.
    """
    order = np.lexsort((shown, -scores))
    right = np.cumsum(shown[order])
    return float(np.mean((right / np.arange(1, len(right) + 1))[shown[order]]))


def _ranks(scores: FloatMatrix, is_own: NDArray[np.bool_]) -> Ranks:
    """Rank of the first right answer in each row of `scores` (q, n); `is_own` (q, n) tells which are right.

    Where scores are equal it is the mean rank over all their orders, so that a constant scores badly: among n equals of
    which r are right, the first right one comes at (n + 1) / (r + 1).
    """
    best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    better = (scores > best).sum(axis=1)
    equal = (scores == best).sum(axis=1)
    right = ((scores == best) & is_own).sum(axis=1)
    ranks: Ranks = better + (equal + 1) / (right + 1)
    return ranks


def _intervals(ranks: Ranks, owner: Owners, *, seed: int = 0) -> dict[str, Interval]:
    order = np.argsort(ranks, kind="stable")
    ranks, owner = ranks[order], owner[order]
    photos = int(owner.max()) + 1
    found = np.searchsorted(ranks, RECALL_AT, side="right")  # how many ranks are so low
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(0, photos, photos), minlength=photos)
        upto = np.concatenate([[0], np.cumsum(times[owner])])  # how many of the drawn ranks come before each
        total = upto[-1]
        middle = np.searchsorted(upto, ((total - 1) // 2, total // 2), side="right") - 1
        rows.append([*(upto[found] / total), ranks[middle].mean()])
    low, high = np.quantile(rows, (0.025, 0.975), axis=0)
    names = [*(f"recall@{k}" for k in RECALL_AT), "median_rank"]
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
