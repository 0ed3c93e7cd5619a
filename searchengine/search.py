"""Searcher: a text, an image, a vector or an indexed photo -> the photos nearest to it, best first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from searchengine.errors import ModelMismatch, QueryError, UsageError
from searchengine.filters import Filters
from searchengine.hits import Hit as Hit
from searchengine.index.photos import ImageRow
from searchengine.index.reader import Index
from searchengine.index.segments import Ids
from searchengine.pictures import Picture, picture_of
from searchengine.prompts import query_vectors
from searchengine.relevance import Background, Kind
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, check_unit_rows, normalise

if TYPE_CHECKING:
    from searchengine.query_tree import Query
    from searchengine.vectors import ImageSource

MAX_QUERY_CHARACTERS = 100_000

# Ranks come from FAISS and photos from SQLite; a commit between the two makes a search start over, so that it sees the
# index as it was before or after. Commits are many seconds apart, so a second attempt nearly always does.
ATTEMPTS = 5

# Half weight keeps the wanted side in charge where the two share content ("dog on a beach" less "people on a beach").
NEGATIVE_WEIGHT = 0.5


class Searcher:
    """Searches one index with the encoder that made it. Raises ModelMismatch for any other encoder."""

    def __init__(self, index: Index, encoder: Encoder) -> None:
        if encoder.fingerprint != index.identity.fingerprint:
            raise ModelMismatch(
                f"the index at {printable(str(index.folder))} was made by encoder {index.identity.encoder} "
                f"({index.identity.fingerprint[:12]}), not by {encoder.name} ({encoder.fingerprint[:12]}); "
                "search it with its own, or index again with this one"
            )
        self.index = index
        self.encoder = encoder
        self._background = Background(index, encoder.usual_scores)

    def search(self, text: str, *, k: int = 10, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """The k photos that `text` describes best, whatever it holds; for operators there is `search_query`.

        Raises QueryError for an empty or over-long text.
        """
        return self.search_many([text], k=k, offset=offset, filters=filters)[0]

    def search_many(
        self, texts: Sequence[str], *, k: int = 10, offset: int = 0, filters: Filters | None = None
    ) -> list[list[Hit]]:
        """For each text what `search` finds, with one call of the encoder and one pass over the vectors."""
        return self.search_vectors(self._text_vectors(texts), k=k, offset=offset, filters=filters, kind="text")

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
        pictures = [self._picture(image) for image in images]
        vector = self._combined([*self._text_vectors(texts), *(picture.vector for picture in pictures)], without)
        known = [picture.vector_id for picture in pictures if picture.vector_id is not None]
        kind: Kind = "image" if pictures else "text"
        return self.search_vector(vector, k=k, offset=offset, filters=filters, without=known, kind=kind)

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
        from searchengine.boolean import Combination, narrowed
        from searchengine.composition import Composition
        from searchengine.query import Vector, parse
        from searchengine.query_tree import shows_pictures

        _check_page(k, offset)
        asked, filters = narrowed(parse(query) if isinstance(query, str) else query, filters)
        if asked is None:
            raise QueryError("the query holds nothing but filters; say what the photos show, too")
        parts = Composition(asked, text_vectors=self._text_vectors, picture=self._picture)
        known = parts.vector_ids
        if isinstance(asked, Vector):
            pictures = [self._picture(image) for image in images]
            known |= {picture.vector_id for picture in pictures if picture.vector_id is not None}
            vector = self._combined([parts.vector(asked), *(picture.vector for picture in pictures)], without)
            kind: Kind = "image" if pictures or shows_pictures(asked) else "text"
            return self.search_vector(vector, k=k, offset=offset, filters=filters, without=known, kind=kind)
        if images or without:
            raise QueryError(
                "pictures and texts given beside the query (--like, --not) add to a description, but this query joins "
                "conditions; write them into it, such as AND ./x.jpg AND NOT fruit"
            )
        for _ in range(ATTEMPTS):
            version = self.index.snapshot().version
            combination = Combination(asked, parts, self.index, self._background, filters=filters, without=known)
            ranked = combination.best(offset + k)[offset:]
            rows = self.index.images(np.unique(ranked.photos))
            if self.index.snapshot().version == version:
                break
        return [
            _hit(rank, score, relevance, rows[photo])
            for rank, (photo, score, relevance) in enumerate(ranked, start=offset + 1)
            if photo in rows
        ]

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
        queries = check_unit_rows(np.asarray(vectors), dim=self.index.dim)
        for _ in range(ATTEMPTS):
            version = self.index.snapshot().version
            pages, rows = self._pages(queries, k=k, offset=offset, filters=filters, without=without)
            if self.index.snapshot().version == version:
                break
        return [
            [
                _hit(rank, score, relevance, rows[photo])
                for rank, (photo, score, relevance) in enumerate(
                    zip(photos.tolist(), scores.tolist(), relevances.tolist(), strict=True), start=offset + 1
                )
                if photo in rows
            ]
            for photos, scores, relevances in (
                (photos, scores, self._background.relevance(query, scores, kind=kind))
                for query, (photos, scores) in zip(queries, pages, strict=True)
            )
        ]

    def _pages(
        self, queries: FloatMatrix, *, k: int, offset: int, filters: Filters | None, without: Collection[int]
    ) -> tuple[list[tuple[Ids, FloatMatrix]], dict[int, ImageRow]]:
        """For each query the photos' ids and scores, best first, and what is known of all these photos."""
        among = self.index.vector_ids(filters) if filters else None
        excluded = np.fromiter(without, np.int64)
        ranked = [
            (scores[usable], ids[usable])
            for scores, ids in self._ranked(queries, k=offset + k + len(excluded), among=among)
            for usable in [~np.isin(ids, excluded)]
        ]
        vectors = np.unique(np.concatenate([excluded[:0], *(ids for _, ids in ranked)]))
        photos, places = self.index.photos_of(vectors, filters=filters)
        starts = np.searchsorted(places, np.arange(len(vectors) + 1))
        pages = []
        for scores, ids in ranked:
            place = np.searchsorted(vectors, ids)
            counts = starts[place + 1] - starts[place]
            # The photos of each vector are a run in `photos`: of each run its first place, then one more a photo.
            ends = np.cumsum(counts)
            which = np.repeat(starts[place] - (ends - counts), counts) + np.arange(counts.sum())
            page = slice(offset, offset + k)
            pages.append((photos[which[page]], np.repeat(scores, counts)[page]))
        return pages, self.index.images(np.unique(np.concatenate([excluded[:0], *(found for found, _ in pages)])))

    def _ranked(self, queries: FloatMatrix, *, k: int, among: Ids | None) -> list[tuple[FloatMatrix, Ids]]:
        """For each query the scores and ids of its nearest vectors; the first j are the same for every k >= j."""
        if self.index.snapshot().ann is None:
            return list(zip(*self.index.search(queries, k=k, among=among), strict=True))
        return [self.index.rank(query, k=k, among=among) for query in queries]

    def text_vector(self, text: str) -> FloatMatrix:
        """The unit vector (dim,) of a query text."""
        vector: FloatMatrix = self._text_vectors([text])[0]
        return vector

    def image_vector(self, image: ImageSource | int) -> FloatMatrix:
        """The unit vector (dim,) of an image, from the index if it is indexed; an int is a photo's id there.

        Raises QueryError.
        """
        return self._picture(image).vector

    def combine(
        self,
        *,
        texts: Sequence[str] = (),
        images: Sequence[ImageSource | int] = (),
        without: Sequence[str] = (),
    ) -> FloatMatrix:
        """One unit vector for several conditions: the mean of `texts` and `images`, less what `without` describes."""
        return self._combined([*self._text_vectors(texts), *map(self.image_vector, images)], without)

    def _combined(self, wanted: Sequence[FloatMatrix], without: Sequence[str]) -> FloatMatrix:
        if not wanted:
            raise QueryError("the query is empty; give a text or an image")
        if len(wanted) == 1 and not without:
            return wanted[0]
        total = np.mean(wanted, axis=0)
        if without:
            total = total - NEGATIVE_WEIGHT * np.mean(self._text_vectors(without), axis=0)
        combined: FloatMatrix = normalise(total[None])[0]
        return combined

    def _text_vectors(self, texts: Sequence[str]) -> FloatMatrix:
        for text in texts:
            if not text.strip():
                raise QueryError("the query is empty; describe what the photo shows")
            if len(text) > MAX_QUERY_CHARACTERS:
                raise QueryError(
                    f"the query has {len(text):,} characters, more than {MAX_QUERY_CHARACTERS:,}; shorten it"
                )
        return query_vectors(texts, encoder=self.encoder)

    def _picture(self, image: ImageSource | int) -> Picture:
        """Raises QueryError."""
        return picture_of(image, index=self.index, encoder=self.encoder)


def _check_page(k: int, offset: int) -> None:
    if k < 1 or offset < 0:
        raise UsageError(f"k is {k} and offset {offset}; k must be at least 1, offset at least 0")


def _hit(rank: int, score: float, relevance: float, row: ImageRow) -> Hit:
    return Hit(
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
