"""The texts, pictures and weighted sums of a query as unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from searchengine.errors import QueryError
from searchengine.pictures import Picture
from searchengine.query_tree import Image, Photo, Query, Sum, Text, Vector, leaves_of
from searchengine.vectors import FloatMatrix, normalise

# A sum that is this short, compared to its weights, is what rounding left of nothing.
CANCELLED = 1e-6


class Composition:
    """What the parts of one query became. All its texts are encoded in one call, each picture is looked up once."""

    def __init__(
        self,
        query: Query,
        *,
        text_vectors: Callable[[Sequence[str]], FloatMatrix],
        picture: Callable[[str | int], Picture],
    ) -> None:
        leaves = dict.fromkeys(leaves_of(query))
        texts = [leaf for leaf in leaves if isinstance(leaf, Text)]
        pictures: dict[Vector, Picture] = {leaf: picture(leaf.path) for leaf in leaves if isinstance(leaf, Image)}
        pictures |= {leaf: picture(leaf.id) for leaf in leaves if isinstance(leaf, Photo)}
        self._vectors: dict[Vector, FloatMatrix] = {leaf: found.vector for leaf, found in pictures.items()}
        self._vectors |= zip(texts, text_vectors([leaf.text for leaf in texts]), strict=True)
        # Of the pictures that are indexed.
        self.vector_ids = {found.vector_id for found in pictures.values() if found.vector_id is not None}

    def vector(self, part: Vector) -> FloatMatrix:
        """The unit vector (dim,) of a text, a picture or a sum. Raises QueryError for a sum that is nothing."""
        if isinstance(part, Sum):
            return combined([(term.weight, self.vector(term.part)) for term in part.terms])
        return self._vectors[part]


def combined(terms: Sequence[tuple[float, FloatMatrix]]) -> FloatMatrix:
    """The unit vector (dim,) along the weighted sum of unit vectors (dim,). Raises QueryError where that is nothing."""
    total = np.sum([weight * vector.astype(np.float64) for weight, vector in terms], axis=0)
    if np.linalg.norm(total) <= CANCELLED * sum(abs(weight) for weight, _ in terms):
        raise QueryError("the parts of the query cancel each other, so nothing is left to look for; change a weight")
    unit: FloatMatrix = normalise(total[None])[0]
    return unit
