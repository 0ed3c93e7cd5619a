"""Photos in the order in which they are found, and the hits that they become with what the index knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchengine.hits import Hit
from searchengine.index.photos import ImageRow
from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix


@dataclass(frozen=True)
class Ranked:
    """Photos, best first: their ids, scores, and the probabilities that they match, each (n,)."""

    photos: Ids
    scores: FloatMatrix
    probabilities: NDArray[np.floating]

    @classmethod
    def none(cls) -> Ranked:
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, places: slice | NDArray[np.generic]) -> Ranked:
        return Ranked(self.photos[places], self.scores[places], self.probabilities[places])

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        return zip(self.photos.tolist(), self.scores.tolist(), self.probabilities.tolist(), strict=True)

    def __add__(self, others: Ranked) -> Ranked:
        return Ranked(*(np.concatenate(both) for both in zip(vars(self).values(), vars(others).values(), strict=True)))

    def hits(self, rows: Mapping[int, ImageRow], *, ranks: Iterable[int]) -> list[Hit]:
        """One hit a photo, by its rank, less those of which there is no row: they are gone since."""
        return [
            Hit(
                rank=rank,
                score=score,
                relevance=relevance,
                id=row.id,
                store=row.store,
                path=row.key,
                taken_at=row.taken_at,
                width=row.width,
                height=row.height,
            )
            for rank, (photo, score, relevance) in zip(ranks, self, strict=False)
            if (row := rows.get(photo)) is not None
        ]
