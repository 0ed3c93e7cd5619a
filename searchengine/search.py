"""Searcher: a text, an image, a vector or an indexed photo -> the photos nearest to it, best first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from searchengine.errors import UsageError
from searchengine.filters import Filters
from searchengine.hits import Hit as Hit
from searchengine.index.protocol import PhotoIndex
from searchengine.index.table import NO_ROWS
from searchengine.ranker import Ranker
from searchengine.ranking import Ranked
from searchengine.relevance import Kind
from searchengine.vectors import Encoder, FloatMatrix

if TYPE_CHECKING:
    from searchengine.query_tree import Query
    from searchengine.vectors import ImageSource


class Searcher:
    """Searches one index with the encoder that made it. Raises ModelMismatch for any other encoder."""

    def __init__(self, index: PhotoIndex, encoder: Encoder) -> None:
        self.index = index
        self.encoder = encoder
        self.ranker = Ranker(index, encoder)

    def search(self, text: str, *, k: int = 10, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """The k photos that `text` describes best, whatever it holds; for operators there is `search_query`.

        Raises QueryError for an empty or over-long text.
        """
        return self.search_many([text], k=k, offset=offset, filters=filters)[0]

    def search_many(
        self, texts: Sequence[str], *, k: int = 10, offset: int = 0, filters: Filters | None = None
    ) -> list[list[Hit]]:
        """For each text what `search` finds, with one call of the encoder and one pass over the vectors."""
        return self.search_vectors(self.ranker.text_vectors(texts), k=k, offset=offset, filters=filters, kind="text")

    def search_image(
        self, image: ImageSource, *, k: int = 10, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        """The k photos most like `image`; if it is indexed itself, it is left out. Raises QueryError."""
        return self.search_combined(images=[image], k=k, offset=offset, filters=filters)

    def search_images(
        self, images: Sequence[ImageSource | int], *, k: int = 10, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        """The k photos most like all `images` together: like the mean of their vectors.

        An int is the id of an indexed photo. Those of `images` that are indexed, and their exact copies, are left out.
        """
        return self.search_combined(images=images, k=k, offset=offset, filters=filters)

    def similar(self, image_id: int, *, k: int = 10, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """The k photos most like the indexed photo `image_id`, less that photo and its exact copies."""
        return self.search_combined(images=[int(image_id)], k=k, offset=offset, filters=filters)

    def search_combined(
        self,
        *,
        texts: Sequence[str] = (),
        images: Sequence[ImageSource | int] = (),
        without: Sequence[str] = (),
        k: int = 10,
        offset: int = 0,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """The k photos nearest to what `combine` makes of the same; none of `images`, nor an exact copy of one."""
        _check_page(k, offset)

        def rank() -> Ranked:
            return self.ranker.rank_combined(
                texts=texts, images=images, without=without, count=offset + k, filters=filters
            )

        return self._page(rank, offset=offset)

    def search_query(
        self,
        query: str | Query,
        *,
        images: Sequence[ImageSource | int] = (),
        without: Sequence[str] = (),
        k: int = 10,
        offset: int = 0,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """The k photos that a query in the language of docs/query.md asks for; plain text is searched as by `search`.

        Pictures in the query, and exact copies of them, are left out. To one that is a single vector, `images` and
        `without` add as in `search_combined`. With AND, OR, NOT, `relevance` is made of those of the parts, for
        AND as their geometric mean; photos come in its order, and `score` is the cosine to the sum of what is wanted.
        Raises QueryError, for an expression with the column of what is wrong.
        """
        from searchengine.query import parse

        _check_page(k, offset)
        asked = parse(query) if isinstance(query, str) else query

        def rank() -> Ranked:
            return self.ranker.rank_query(asked, images=images, without=without, count=offset + k, filters=filters)

        return self._page(rank, offset=offset)

    def search_vector(
        self,
        vector: FloatMatrix,
        *,
        k: int = 10,
        offset: int = 0,
        filters: Filters | None = None,
        without: Collection[int] = (),
        kind: Kind | None = None,
    ) -> list[Hit]:
        """The k photos nearest to a unit vector of shape (dim,), after the first `offset`; see `search_vectors`."""
        queries = np.asarray(vector)[None]
        return self.search_vectors(queries, k=k, offset=offset, filters=filters, without=without, kind=kind)[0]

    def search_vectors(
        self,
        vectors: FloatMatrix,
        *,
        k: int = 10,
        offset: int = 0,
        filters: Filters | None = None,
        without: Collection[int] = (),
        kind: Kind | None = None,
    ) -> list[list[Hit]]:
        """For each of the unit vectors (q, dim) the k nearest photos, after the first `offset`.

        `without` holds ids of vectors whose photos are left out; `kind`, on which relevance depends, is what the
        vectors are, where that is known. Photos of equal score come in the order of their vectors' ids, then their own.
        A page is exact for the committed state that it saw, and pages of one state never overlap nor lose a photo; as
        long as `index.snapshot().version` stays the same, so does the state.
        Raises UsageError for vectors that are not of this index's kind, k < 1 or offset < 0.
        """
        _check_page(k, offset)

        def look() -> list[list[Hit]]:
            ranked = self.ranker.rank_vectors(vectors, count=offset + k, filters=filters, without=without, kind=kind)
            return self.hits(*(one[offset:] for one in ranked), first_rank=offset + 1)

        return self.ranker.of_one_state(look)

    def hits(self, *ranked: Ranked, first_rank: int = 1) -> list[list[Hit]]:
        """What the index knows of photos, their ranks from `first_rank` on; those that are gone are left out."""
        rows = self.index.images(np.unique(np.concatenate([NO_ROWS, *(one.photos for one in ranked)])))
        return [one.hits(rows, ranks=count(first_rank)) for one in ranked]

    def _page(self, rank: Callable[[], Ranked], *, offset: int) -> list[Hit]:
        return self.ranker.of_one_state(lambda: self.hits(rank()[offset:], first_rank=offset + 1))[0]

    def text_vector(self, text: str) -> FloatMatrix:
        """The unit vector (dim,) of a query text."""
        vector: FloatMatrix = self.ranker.text_vectors([text])[0]
        return vector

    def image_vector(self, image: ImageSource | int) -> FloatMatrix:
        """The unit vector (dim,) of an image, from the index if it is indexed; an int is a photo's id there.

        Raises QueryError.
        """
        return self.ranker.picture(image).vector

    def combine(
        self,
        *,
        texts: Sequence[str] = (),
        images: Sequence[ImageSource | int] = (),
        without: Sequence[str] = (),
    ) -> FloatMatrix:
        """One unit vector for several conditions: the mean of `texts` and `images`, less what `without` describes."""
        return self.ranker.combined([*self.ranker.text_vectors(texts), *map(self.image_vector, images)], without)


def _check_page(k: int, offset: int) -> None:
    if k < 1 or offset < 0:
        raise UsageError(f"k is {k} and offset {offset}; k must be at least 1, offset at least 0")
