"""What searches ask of an index, wherever it is: in a folder (reader.py), or in Milvus (searchengine/milvus/reader.py).

Rows are a table's own numbers for its vectors: places in the segments of a folder, ids in Milvus.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from searchengine.index.segments import Ids
from searchengine.index.table import Rows
from searchengine.vectors import FloatMatrix

if TYPE_CHECKING:
    from searchengine.filters import Filters
    from searchengine.index.layout import IndexIdentity
    from searchengine.index.photos import ImageRow


class Vectors(Protocol):
    """The vectors of one committed state."""

    @property
    def living_ids(self) -> Ids:
        """The ids (n,) of those that have a photo, rising."""

    def rows_of(self, ids: Ids) -> Rows:
        """The rows of those of `ids` that there are, in their order."""

    def ids_of(self, rows: Rows) -> Ids: ...

    def gather(self, rows: Rows) -> FloatMatrix:
        """A copy of some vectors, float32 (n, dim)."""

    def scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        """Inner products (n,) of `query` (dim,) with some vectors, within the rounding of float32."""

    def exact_scores(self, query: FloatMatrix, rows: Rows) -> FloatMatrix:
        """The same computed in float64 and rounded once: a vector's score does not depend on how it was found."""


class PhotoSnapshot(Protocol):
    """One committed state. `version` differs after each commit."""

    @property
    def version(self) -> Hashable: ...

    @property
    def table(self) -> Vectors: ...

    @property
    def segments(self) -> Sequence[object]:
        """The files that hold the vectors; none in Milvus."""

    def __len__(self) -> int:
        """How many vectors have a photo."""

    def search(self, queries: FloatMatrix, *, k: int, among: Ids | None = None) -> tuple[FloatMatrix, Ids]:
        """For each of `queries` (q, dim) scores (q, k'), falling, and ids (q, k') of the nearest vectors."""


class Effort(NamedTuple):
    """So many of the nearest to each condition are looked at first; whether all vectors may be compared after that."""

    depths: tuple[int, ...]
    compares_all: bool


class PhotoIndex(Protocol):
    """Open for reading. Searches from several threads are safe, and each sees the newest committed state.

    `place` is where the index is, fit to be shown. Every method may raise IndexUnusable, and ModelMismatch once the
    vectors of another encoder have taken the place of those that were there.
    """

    @property
    def place(self) -> str: ...

    @property
    def identity(self) -> IndexIdentity: ...

    @property
    def dim(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...

    def snapshot(self) -> PhotoSnapshot: ...

    def nearest_photos(
        self,
        queries: FloatMatrix,
        *,
        count: int,
        filters: Filters | None = None,
        without: Collection[int] = (),
        depths: Sequence[int] = ...,
    ) -> list[tuple[Ids, FloatMatrix]]:
        """For each of `queries`, unit rows (q, dim), ids and scores of the `count` nearest photos, or of all there are.

        Photos must pass `filters`, and their vectors be none of `without`. Those of equal score come in the order of
        their vectors' ids, then of their own. The first j do not depend on `count`, at the same `depths`.
        """

    def nearest_vectors(self, query: FloatMatrix, *, k: int, filters: Filters | None = None) -> tuple[FloatMatrix, Ids]:
        """Scores and ids of the vectors nearest to one query (dim,), of those with a photo that passes."""

    def effort(self, filters: Filters | None) -> Effort:
        """How a query of several conditions is best answered among the photos that pass."""

    def vector_ids(self, filters: Filters) -> Ids:
        """Ids of the vectors that have at least one photo which passes, rising."""

    def photos_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> tuple[Ids, Ids]:
        """The photos of some vectors (m,), all different, that pass: in the vectors' order, then by id.

        Returns their ids (n,), and for each the place (n,) of its vector in `vector_ids`.
        """

    def images(self, image_ids: Ids) -> dict[int, ImageRow]:
        """These photos (n,), by id; one that is gone is left out."""

    def images_of(self, vector_ids: Sequence[int], *, filters: Filters | None = None) -> dict[int, list[ImageRow]]:
        """The photos of each vector that pass, in the order of their ids."""

    def keys_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> dict[int, list[tuple[int, str]]]:
        """The photos of each vector that pass, in the order of their ids: id and key."""

    def image(self, image_id: int) -> ImageRow | None: ...

    def image_by_key(self, store: str, key: str) -> ImageRow | None: ...

    def vector_id_by_content(self, content_hash: bytes) -> int | None:
        """Of the vector of a photo with this sha256."""

    def vector(self, vector_id: int) -> FloatMatrix:
        """The stored vector, float32 (dim,). Raises KeyError where it is gone."""

    def sample_vectors(self, size: int) -> FloatMatrix:
        """At most `size` vectors of photos, float32 (n, dim), drawn by their ids (sampling.py), in their order."""

    def count_images(self, filters: Filters | None = None) -> int: ...

    def count_failures(self) -> int: ...

    def failed_photos(self) -> Iterator[tuple[str, str, str]]:
        """(store, key, reason) of each photo that could not be used, by key."""

    def tags(self, *, vector_id: int | None = None) -> list[tuple[str, int]]:
        """Each label that `classify --write-tags` gave, to `vector_id` or to any, with its photos: the most first."""

    def last_run(self) -> dict[str, Any] | None:
        """The newest run that committed: when it started and ended, and its counters."""

    def size_bytes(self) -> int | None:
        """What the index takes on disk; None where only a server knows."""


def open_index(place: str | os.PathLike[str]) -> PhotoIndex:
    """The index at `place`: a folder, or an address in Milvus. Raises IndexNotFound, IndexFormatError, UsageError."""
    from searchengine.milvus import is_milvus

    if is_milvus(place):
        from searchengine.milvus.reader import MilvusIndex

        return MilvusIndex(os.fspath(place))
    from searchengine.index.reader import Index

    return Index(place)
