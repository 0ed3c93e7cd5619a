"""Ranker: what is asked for -> photos in their order, by ids, scores and probabilities. `Searcher` makes them hits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from searchengine.errors import ModelMismatch, QueryError
from searchengine.filters import Filters
from searchengine.index.protocol import PhotoIndex
from searchengine.index.snapshot import DEPTHS
from searchengine.pictures import Picture, picture_of
from searchengine.prompts import query_vectors
from searchengine.ranking import Ranked
from searchengine.relevance import Background, Kind
from searchengine.vectors import Encoder, FloatMatrix, check_unit_rows, normalise

if TYPE_CHECKING:
    from searchengine.query_tree import Query
    from searchengine.vectors import ImageSource

Found = TypeVar("Found")
TextVectors = Callable[[Sequence[str]], FloatMatrix]

MAX_QUERY_CHARACTERS = 100_000

# Ranks come from FAISS and photos from SQLite; a commit between the two makes a search start over, so that it sees the
# index as it was before or after. Commits are many seconds apart, so a second attempt nearly always does.
ATTEMPTS = 5

# Half weight keeps the wanted side in charge where the two share content ("dog on a beach" less "people on a beach").
NEGATIVE_WEIGHT = 0.5


class Ranker:
    """Ranks the photos of one index with the encoder that made it. Raises ModelMismatch for any other encoder.

    What is ranked within `of_one_state` is of one committed state; there the first j photos do not depend on `count`.

    `text_vectors` stands in for `query_vectors` with this encoder: for those who remember the vectors of texts.
    `depths` are those of `Snapshot.rank`: whoever always ranks a thousand photos saves the searches for fewer.
    """

    def __init__(
        self,
        index: PhotoIndex,
        encoder: Encoder,
        *,
        text_vectors: TextVectors | None = None,
        depths: Sequence[int] = DEPTHS,
    ) -> None:
        if encoder.fingerprint != index.identity.fingerprint:
            raise ModelMismatch(
                f"the index at {index.place} was made by encoder {index.identity.encoder} "
                f"({index.identity.fingerprint[:12]}), not by {encoder.name} ({encoder.fingerprint[:12]}); "
                "search it with its own, or index again with this one"
            )
        self.index = index
        self.encoder = encoder
        self._background = Background(index, encoder.usual_scores)
        self._depths = depths
        self._query_vectors = text_vectors or (lambda texts: query_vectors(texts, encoder=encoder))

    def of_one_state(self, look: Callable[[], Found]) -> Found:
        """What `look` finds by means of this ranker and its index, in one committed state."""
        for _ in range(ATTEMPTS):
            version = self.index.snapshot().version
            found = look()
            if self.index.snapshot().version == version:
                break
        return found

    def rank_query(
        self,
        query: Query,
        *,
        images: Sequence[ImageSource | Picture | int] = (),
        without: Sequence[str] = (),
        count: int,
        filters: Filters | None = None,
    ) -> Ranked:
        """The `count` best photos, or all there are, as `Searcher.search_query` tells. Raises QueryError."""
        from searchengine.boolean import Combination
        from searchengine.composition import Composition
        from searchengine.query_filters import narrowed
        from searchengine.query_tree import Vector, shows_pictures

        asked, filters = narrowed(query, filters)
        if asked is None:
            raise QueryError("the query holds nothing but filters; say what the photos show, too")
        parts = Composition(asked, text_vectors=self.text_vectors, picture=self.picture)
        known = parts.vector_ids
        if isinstance(asked, Vector):
            pictures = [self.picture(image) for image in images]
            known |= {picture.vector_id for picture in pictures if picture.vector_id is not None}
            vector = self.combined([parts.vector(asked), *(picture.vector for picture in pictures)], without)
            kind: Kind = "image" if pictures or shows_pictures(asked) else "text"
            return self.rank_vectors(vector[None], count=count, filters=filters, without=known, kind=kind)[0]
        if images or without:
            raise QueryError(
                "pictures and texts given beside the query (--like, --not) add to a description, but this query joins "
                "conditions; write them into it, such as AND ./x.jpg AND NOT fruit"
            )
        combination = Combination(asked, parts, self.index, self._background, filters=filters, without=known)
        return combination.best(count)

    def rank_combined(
        self,
        *,
        texts: Sequence[str] = (),
        images: Sequence[ImageSource | Picture | int] = (),
        without: Sequence[str] = (),
        count: int,
        filters: Filters | None = None,
    ) -> Ranked:
        """The same for what `Searcher.search_combined` asks for. Raises QueryError."""
        pictures = [self.picture(image) for image in images]
        vector = self.combined([*self.text_vectors(texts), *(picture.vector for picture in pictures)], without)
        known = [picture.vector_id for picture in pictures if picture.vector_id is not None]
        kind: Kind = "image" if pictures else "text"
        return self.rank_vectors(vector[None], count=count, filters=filters, without=known, kind=kind)[0]

    def rank_vectors(
        self,
        vectors: FloatMatrix,
        *,
        count: int,
        filters: Filters | None = None,
        without: Collection[int] = (),
        kind: Kind | None = None,
    ) -> list[Ranked]:
        """The same for each of the unit vectors (q, dim), as `Searcher.search_vectors` tells. Raises UsageError."""
        queries = check_unit_rows(np.asarray(vectors), dim=self.index.dim)
        found = self.index.nearest_photos(queries, count=count, filters=filters, without=without, depths=self._depths)
        return [
            Ranked(photos, scores, self._background.relevance(query, scores, kind=kind))
            for query, (photos, scores) in zip(queries, found, strict=True)
        ]

    def combined(self, wanted: Sequence[FloatMatrix], without: Sequence[str]) -> FloatMatrix:
        """The mean of unit vectors (dim,), less what `without` describes, as a unit vector. Raises QueryError."""
        if not wanted:
            raise QueryError("the query is empty; give a text or an image")
        if len(wanted) == 1 and not without:
            return wanted[0]
        total = np.mean(wanted, axis=0)
        if without:
            total = total - NEGATIVE_WEIGHT * np.mean(self.text_vectors(without), axis=0)
        combined: FloatMatrix = normalise(total[None])[0]
        return combined

    def text_vectors(self, texts: Sequence[str]) -> FloatMatrix:
        """One unit vector a query text, (n, dim). Raises QueryError for one that is empty or too long."""
        for text in texts:
            if not text.strip():
                raise QueryError("the query is empty; describe what the photo shows")
            if len(text) > MAX_QUERY_CHARACTERS:
                raise QueryError(
                    f"the query has {len(text):,} characters, more than {MAX_QUERY_CHARACTERS:,}; shorten it"
                )
        return self._query_vectors(texts)

    def picture(self, image: ImageSource | Picture | int) -> Picture:
        """Its vector, from the index if it is indexed; an int is a photo's id there. Raises QueryError."""
        return image if isinstance(image, Picture) else picture_of(image, index=self.index, encoder=self.encoder)
