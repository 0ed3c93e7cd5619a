"""Searcher: a text, an image, a vector or an indexed photo -> the photos nearest to it, best first."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from searchengine.decode import DEFAULT_LIMITS
from searchengine.errors import ImageError, ModelMismatch, QueryError, UsageError
from searchengine.index.filters import Filters
from searchengine.index.reader import ImageRow, Index
from searchengine.relevance import Background
from searchengine.stores.local import read_local
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, check_unit_rows, normalise

if TYPE_CHECKING:
    from searchengine.vectors import ImageSource

MAX_QUERY_CHARACTERS = 100_000

# Ranks come from FAISS and photos from SQLite; a commit between the two makes a search start over, so that it sees the
# index as it was before or after. Commits are many seconds apart, so a second attempt nearly always does.
ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One photo found. `rank` counts from 1; `score` is the cosine to the query, higher is better.

    `relevance` in [0, 1] tells how surely the photo is a match; from `relevance.MATCH` on it counts as one.
    """

    rank: int
    score: float
    relevance: float
    id: int
    store: str
    path: str
    taken_at: str | None
    width: int
    height: int


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
        """The k photos that `text` describes best. Raises QueryError for an empty or over-long text."""
        return self.search_vector(self.text_vector(text), k=k, offset=offset, filters=filters)

    def search_image(
        self, image: ImageSource, *, k: int = 10, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        """The k photos most like `image`; if it is indexed itself, it is left out. Raises QueryError."""
        known = self._vector_id_of(image)
        vector = self._encode_image(image) if known is None else self.index.vector(known)
        return self.search_vector(vector, k=k, offset=offset, filters=filters, without=known)

    def similar(self, image_id: int, *, k: int = 10, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """The k photos most like the indexed photo `image_id`, less that photo and its exact copies."""
        row = self.index.image(int(image_id)) if 0 < image_id < 2**63 else None
        if row is None:
            raise QueryError(f"the index has no photo with id {image_id}; ids are in the results of a search")
        vector = self.index.vector(row.vector_id)
        return self.search_vector(vector, k=k, offset=offset, filters=filters, without=row.vector_id)

    def search_vector(
        self,
        vector: FloatMatrix,
        *,
        k: int = 10,
        offset: int = 0,
        filters: Filters | None = None,
        without: int | None = None,
    ) -> list[Hit]:
        """The k photos nearest to a unit vector of shape (dim,), after the first `offset`.

        Photos of equal score come in the order of their vectors' ids, then their own, so pages never overlap.
        """
        if k < 1 or offset < 0:
            raise UsageError(f"k is {k} and offset {offset}; k must be at least 1, offset at least 0")
        query = check_unit_rows(np.asarray(vector)[None], dim=self.index.dim)
        for _ in range(ATTEMPTS):
            version = self.index.snapshot().version
            rows = self._ranked(query, k=offset + k, filters=filters, without=without)[offset:]
            if self.index.snapshot().version == version:
                break
        relevances = self._background.relevance(query[0], np.asarray([score for score, _ in rows], np.float32))
        return [
            _hit(rank, score, float(relevance), row)
            for rank, ((score, row), relevance) in enumerate(zip(rows, relevances, strict=True), start=offset + 1)
        ]

    def _ranked(
        self, query: FloatMatrix, *, k: int, filters: Filters | None, without: int | None
    ) -> list[tuple[float, ImageRow]]:
        """The k best photos with their scores, for a query of shape (1, dim)."""
        among = self.index.vector_ids(filters) if filters else None
        scores, ids = self.index.search(query, k=k + (without is not None), among=among)
        found = [(float(s), int(i)) for s, i in zip(scores[0], ids[0], strict=True) if i >= 0 and i != without]
        photos = self.index.images_of([vector_id for _, vector_id in found], filters=filters)
        return [(score, row) for score, vector_id in found for row in photos.get(vector_id, ())][:k]

    def text_vector(self, text: str) -> FloatMatrix:
        """The unit vector (dim,) of a query text."""
        if not text.strip():
            raise QueryError("the query is empty; describe what the photo shows")
        if len(text) > MAX_QUERY_CHARACTERS:
            raise QueryError(f"the query has {len(text):,} characters, more than {MAX_QUERY_CHARACTERS:,}; shorten it")
        vector: FloatMatrix = self.encoder.encode_texts([text])[0]
        return vector

    def image_vector(self, image: ImageSource) -> FloatMatrix:
        """The unit vector (dim,) of an image, from the index if it is indexed. Raises QueryError."""
        known = self._vector_id_of(image)
        return self._encode_image(image) if known is None else self.index.vector(known)

    def combine(
        self, *, texts: Sequence[str] = (), images: Sequence[ImageSource] = (), without: Sequence[str] = ()
    ) -> FloatMatrix:
        """One unit vector for several conditions: the sum of `texts` and `images`, less what `without` describes."""
        wanted = [self.text_vector(text) for text in texts] + [self.image_vector(image) for image in images]
        if not wanted:
            raise QueryError("the query is empty; give a text or an image")
        total = np.mean(wanted, axis=0)
        if without:
            unwanted = [self.text_vector(text) for text in without]
            total = total - NEGATIVE_WEIGHT * np.mean(unwanted, axis=0)
        combined: FloatMatrix = normalise(total[None])[0]
        return combined

    def _vector_id_of(self, image: ImageSource) -> int | None:
        """The id of the vector of a file whose content is indexed, under whatever name."""
        if not isinstance(image, str | os.PathLike):
            return None
        try:
            data = read_local(os.fspath(image), max_bytes=DEFAULT_LIMITS.max_file_bytes)
        except ImageError as error:
            raise _unusable(image, error) from None
        return self.index.vector_id_by_content(hashlib.sha256(data).digest())

    def _encode_image(self, image: ImageSource) -> FloatMatrix:
        try:
            vector: FloatMatrix = self.encoder.encode_images([image])[0]
        except ImageError as error:
            raise _unusable(image, error) from None
        return vector


# Half weight keeps the wanted side in charge where the two share content ("dog on a beach" less "people on a beach").
NEGATIVE_WEIGHT = 0.5


def _unusable(image: ImageSource, error: ImageError) -> QueryError:
    shown = printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "given"
    reason = str(error).removeprefix(f"{shown}: ")
    return QueryError(f"the image {shown} cannot be a query: {reason}; use another picture")


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
