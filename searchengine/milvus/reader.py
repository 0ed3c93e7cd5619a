"""The read-only view of an index in Milvus: what `PhotoIndex` promises, with the scores of an index on disk.

Vectors are searched by Milvus and scored here (nearest.py); filters are expressions (expressions.py).

What Milvus answers is always of its newest state. Which that is, `snapshot` asks a row of NAME_state: whoever puts
several answers together, or remembers one, asks before and after. Where the model was changed, the old vectors are in
a collection that is gone, so none is ever compared with a query of the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from searchengine.errors import IndexUnusable, ModelMismatch
from searchengine.filters import Filters
from searchengine.index.photos import ImageRow, RememberedIds
from searchengine.index.protocol import Effort
from searchengine.index.sampling import lasting_sample
from searchengine.index.schema import encode_key
from searchengine.index.segments import Ids
from searchengine.index.snapshot import DEPTHS
from searchengine.index.table import NO_ROWS
from searchengine.milvus.connection import ANSWER_SECONDS, Connection, MilvusPlace
from searchengine.milvus.expressions import EVERY, among, expression_of, literal
from searchengine.milvus.facts import Facts
from searchengine.milvus.nearest import Nearest
from searchengine.milvus.passing import FIELDS, Passing, plain
from searchengine.milvus.schema import MAX_HITS, ROW_FIELDS, State, draw_at, escaped, unescaped
from searchengine.milvus.snapshot import MilvusSnapshot
from searchengine.milvus.vectors import IDS_AT_A_TIME, FetchedVectors
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, check_unit_rows

ROWS_AT_A_TIME = 4096  # of a walk through a collection

# A query of several conditions compares up to so many photos one by one; more than the second number it never does.
COMPARED_AT_ONCE, COMPARED_AT_MOST = 4096, 200_000
CONDITION_DEPTHS = (DEPTHS[-1], MAX_HITS)


class MilvusIndex:
    """Open for reading; `close` it, or use it as a context manager. Searches from several threads are safe."""

    def __init__(self, place: str) -> None:
        """Raises UsageError, IndexNotFound, IndexUnusable."""
        self._connection = Connection(MilvusPlace.parse(place))
        try:
            self.place = self._connection.place.shown
            self._facts = Facts(self._connection)
            state = self._facts.open()
            self.identity = state.identity
            self._passing = Passing()
            self._remembered = RememberedIds()
            self._lock = threading.Lock()
            self._snapshot = self._load(state)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()
        self._passing.close()

    @property
    def dim(self) -> int:
        return self.identity.dim

    def snapshot(self) -> MilvusSnapshot:
        """The newest committed state. Raises ModelMismatch where the vectors of another encoder are there now."""
        state = self._facts.state()
        if state.identity != self.identity:
            raise ModelMismatch(
                f"the index at {self.place} was replaced by one of encoder {printable(state.identity.encoder)}; open "
                f"it again, with that encoder in {state.identity.precision}"
            )
        with self._lock:
            if self._snapshot.state != state:
                self._snapshot = self._load(state)
            return self._snapshot

    def _load(self, state: State) -> MilvusSnapshot:
        self._connection.load(state.collection)
        with self._connection.errors_named():
            built = self._connection.client.describe_index(state.collection, "embedding", timeout=ANSWER_SECONDS)
        return MilvusSnapshot(
            self._connection,
            state,
            index_type=str((built or {}).get("index_type")),
            # Not those of the state before: a copy of another index may have taken its place, and its ids.
            fetched=FetchedVectors(dim=self.dim),
            passing=self._passing,
        )

    def nearest_photos(
        self,
        queries: FloatMatrix,
        *,
        count: int,
        filters: Filters | None = None,
        without: Collection[int] = (),
        depths: Sequence[int] = DEPTHS,
    ) -> list[tuple[Ids, FloatMatrix]]:
        queries = check_unit_rows(np.asarray(queries), dim=self.dim)
        snapshot = self._snapshot
        searching = snapshot.searching(filters, without=without)
        with self._of_this_encoder():
            if snapshot.is_exact:
                found = searching.nearest(queries, k=count)
            else:
                found = [searching.ranked(query, k=count, depths=depths) for query in queries]
        return [self._photos(one, count, filters) for one in found]

    def nearest_vectors(self, query: FloatMatrix, *, k: int, filters: Filters | None = None) -> tuple[FloatMatrix, Ids]:
        with self._of_this_encoder():
            (found,) = self._snapshot.searching(filters).nearest(query[None], k=k)
        return found.scores, found.ids

    def effort(self, filters: Filters | None) -> Effort:
        photos = self.count_images(filters) if filters else self._snapshot.state.images
        return Effort(
            depths=() if photos <= COMPARED_AT_ONCE else CONDITION_DEPTHS, compares_all=photos <= COMPARED_AT_MOST
        )

    def _photos(self, found: Nearest, count: int, filters: Filters | None) -> tuple[Ids, FloatMatrix]:
        """The photos of the nearest vectors with the scores of these."""
        if found.photos is None:
            photos, places = self.photos_of(found.ids, filters=filters)
        else:
            photos = np.array([photo for some in found.photos for photo in some], np.int64)
            places = np.repeat(np.arange(len(found.ids)), [len(some) for some in found.photos])
        return photos[:count], found.scores[places[:count]]

    def vector_ids(self, filters: Filters) -> Ids:
        version = self.snapshot().version
        known = self._remembered.get(filters, version=version)
        if known is not None:
            return known
        pages = self._walk(expression_of(filters).text, ("vector_id",), filters=filters)
        parts = [np.array([entity["vector_id"] for entity in page], np.int64) for page in pages]
        ids = np.unique(np.concatenate([NO_ROWS, *parts]))
        self._remembered.put(filters, ids, version=version)
        return ids

    def photos_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> tuple[Ids, Ids]:
        found = list(self._of_vectors(vector_ids, (), filters=filters))
        photos = np.array([entity["id"] for entity in found], np.int64)
        owners = np.array([entity["vector_id"] for entity in found], np.int64)
        rising = np.argsort(vector_ids)
        places = rising[np.searchsorted(vector_ids, owners, sorter=rising)]
        order = np.lexsort((photos, places))
        return photos[order], places[order]

    def images(self, image_ids: Ids) -> dict[int, ImageRow]:
        rows: dict[int, ImageRow] = {}
        for start in range(0, len(image_ids), IDS_AT_A_TIME):
            some = among("id", image_ids[start : start + IDS_AT_A_TIME].tolist())
            rows |= {entity["id"]: _image_row(entity) for entity in self._query(some, ROW_FIELDS)}
        return rows

    def images_of(self, vector_ids: Sequence[int], *, filters: Filters | None = None) -> dict[int, list[ImageRow]]:
        found: dict[int, list[ImageRow]] = {}
        for entity in self._of_vectors(np.unique(np.asarray(vector_ids, np.int64)), ROW_FIELDS, filters=filters):
            found.setdefault(entity["vector_id"], []).append(_image_row(entity))
        return {vector: sorted(rows, key=lambda row: row.id) for vector, rows in found.items()}

    def keys_of(self, vector_ids: Ids, *, filters: Filters | None = None) -> dict[int, list[tuple[int, str]]]:
        found: dict[int, list[tuple[int, str]]] = {}
        for entity in self._of_vectors(vector_ids, ("key",), filters=filters):
            found.setdefault(entity["vector_id"], []).append((entity["id"], unescaped(entity["key"])))
        return {vector: sorted(photos) for vector, photos in found.items()}

    def image(self, image_id: int) -> ImageRow | None:
        return self.images(np.array([image_id], np.int64)).get(image_id)

    def image_by_key(self, store: str, key: str) -> ImageRow | None:
        wanted = f"key == {literal(escaped(key))} and store == {literal(escaped(store))}"
        found = self._query(wanted, ROW_FIELDS)
        return _image_row(found[0]) if found else None

    def vector_id_by_content(self, content_hash: bytes) -> int | None:
        found = self._query(f"content_hash == {literal(content_hash.hex())}", ("vector_id",), limit=1)
        return int(found[0]["vector_id"]) if found else None

    def vector(self, vector_id: int) -> FloatMatrix:
        found: FloatMatrix = self._snapshot.table.gather(np.array([vector_id], np.int64))[0]
        if not np.all(np.isfinite(found)):
            raise KeyError(vector_id)
        return found

    def sample_vectors(self, size: int) -> FloatMatrix:
        """Those of the least draws: at first as many as it should take, by the share that they are of all."""
        snapshot = self._snapshot
        share = 1.25 * size / max(1, len(snapshot))
        while True:
            wanted = f"draw < {draw_at(share)}" if share < 1 else EVERY
            with self._of_this_encoder():
                drawn = snapshot.table.fetch(wanted)
            if len(drawn) >= size or share >= 1:
                break
            share *= 2
        ids = np.sort(np.fromiter(drawn, np.int64))
        ids = ids[np.sort(lasting_sample(ids, size))]
        return np.array([drawn[number] for number in ids.tolist()], np.float32).reshape(-1, self.dim)

    def count_images(self, filters: Filters | None = None) -> int:
        expression = expression_of(filters)
        if expression.is_exact:
            with self._of_this_encoder():
                return self._connection.count(self._collection, expression.text)
        return sum(len(page) for page in self._walk(expression.text, (), filters=filters))

    def count_failures(self) -> int:
        return self._facts.count_failures()

    def failed_photos(self) -> Iterator[tuple[str, str, str]]:
        yield from sorted(self._facts.failures(), key=lambda failure: encode_key(failure[1]))

    def tags(self, *, vector_id: int | None = None) -> list[tuple[str, int]]:
        if vector_id is None:
            found = self._facts.labels()
        else:
            photos = self._query(among("vector_id", [vector_id]), ("tags",))
            found = [(unescaped(label), len(photos)) for label in (photos[0]["tags"] if photos else ())]
        return sorted(found, key=lambda label: (-label[1], label[0]))

    def last_run(self) -> dict[str, Any] | None:
        return self._facts.last_run()

    def size_bytes(self) -> int | None:
        if not self._connection.place.is_file:
            return None
        total = 0
        for file in Path(self._connection.place.uri).rglob("*"):
            with suppress(OSError):  # a file of Milvus that it deleted just now
                total += file.stat().st_size if file.is_file() else 0
        return total

    @property
    def _collection(self) -> str:
        return self._snapshot.state.collection

    def _query(
        self, expression: str, output_fields: Sequence[str], *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        with self._of_this_encoder():
            return self._connection.query(self._collection, expression, output_fields, limit=limit)

    def _of_vectors(
        self, vector_ids: Ids, output_fields: Sequence[str], *, filters: Filters | None
    ) -> Iterator[dict[str, Any]]:
        """The photos of some vectors that pass, in any order."""
        expression = expression_of(filters)
        for start in range(0, len(vector_ids), IDS_AT_A_TIME):
            some = among("vector_id", vector_ids[start : start + IDS_AT_A_TIME].tolist())
            for page in self._walk(expression.and_(some).text, output_fields, filters=filters):
                yield from page

    def _walk(
        self, expression: str, output_fields: Sequence[str], *, filters: Filters | None
    ) -> Iterator[list[dict[str, Any]]]:
        """The photos that fulfil it and pass, by pages; what passes is asked where an expression cannot tell."""
        is_exact = expression_of(filters).is_exact
        names = sorted({"id", "vector_id", *output_fields, *(() if is_exact else FIELDS)})
        with self._of_this_encoder():
            for page in self._connection.iterate(self._collection, expression, names, batch_size=ROWS_AT_A_TIME):
                if not is_exact and filters:
                    passing = self._passing.among(page, filters)
                    page = [entity for entity in page if entity["id"] in passing]
                yield page

    @contextmanager
    def _of_this_encoder(self) -> Iterator[None]:
        """Where its collection is gone, another encoder's has taken its place: raises ModelMismatch."""
        try:
            yield
        except IndexUnusable:
            self.snapshot()
            raise


def _image_row(entity: dict[str, Any]) -> ImageRow:
    return ImageRow(**plain(entity, ROW_FIELDS))
