"""Photos in the tables: which vectors a filter lets through, which photos a vector has, what is known of a photo."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import sqlalchemy as sa

from searchengine.errors import IndexFormatError
from searchengine.filters import Filters
from searchengine.index.filters import CAMERA_INDEX, condition_of, is_named_camera
from searchengine.index.layout import REPAIR
from searchengine.index.schema import images, labels, tags
from searchengine.index.segments import Ids

# How many filters' ids are remembered, at 8 bytes a vector each.
REMEMBERED_FILTERS = 4


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A photo as the index knows it. `width` and `height` in pixels; `taken_at` ISO 8601, camera's local time."""

    id: int
    store: str
    key: str
    size_bytes: int
    mtime_ns: int
    width: int
    height: int
    taken_at: str | None
    latitude: float | None
    longitude: float | None
    camera: str | None
    vector_id: int


# Of `images`, what tables of every version have.
COLUMNS = tuple(images.c[field.name] for field in fields(ImageRow))


def vector_ids(connection: sa.Connection, filters: Filters) -> Ids:
    """The vectors that have at least one photo which passes, rising."""
    condition = condition_of(filters)
    if filters.camera is not None and _has(connection, CAMERA_INDEX):
        condition = sa.and_(condition, is_named_camera(filters.camera))
    (ids,) = _columns(connection, _joined(images.c.vector_id).where(condition))
    ids.sort()
    # Copies of a photo are next to each other now.
    return ids if np.all(ids[1:] > ids[:-1]) else np.unique(ids)


def vectors_in_use(connection: sa.Connection) -> Ids:
    """The vectors that have a photo, rising."""
    (ids,) = _columns(connection, _joined(images.c.vector_id))
    return np.unique(ids)


def photos_of(connection: sa.Connection, vector_ids: Ids, *, filters: Filters | None) -> tuple[Ids, Ids]:
    """The photos of these vectors that pass, in the vectors' order, then by id.

    Returns the photos' ids (n,) and the place (n,) of each one's vector in `vector_ids` (m,), which are distinct.
    """
    query = OF_VECTORS if filters is None else OF_VECTORS.where(condition_of(filters))
    photos, owners = _columns(connection, query, _as_json(vector_ids))
    rising = np.argsort(vector_ids)
    places = rising[np.searchsorted(vector_ids, owners, sorter=rising)]
    order = np.lexsort((photos, places))
    return photos[order], places[order]


def rows(connection: sa.Connection, image_ids: Ids) -> dict[int, ImageRow]:
    """What is known of these photos, by id; one that is gone is left out."""
    found = connection.execute(ROWS, _as_json(image_ids)).all()
    return {row[0]: ImageRow(*row) for row in found}


def keys_of(connection: sa.Connection, vector_ids: Ids, *, filters: Filters | None) -> dict[int, list[tuple[int, str]]]:
    """The photos of each vector that pass, by their ids: id and key. Several times as fast as whole rows."""
    query = sa.select(images.c.vector_id, images.c.id, images.c.key).where(images.c.vector_id.in_(IDS))
    found: dict[int, list[tuple[int, str]]] = {}
    for vector_id, image_id, key in connection.execute(
        query.where(condition_of(filters)).order_by(images.c.id), _as_json(vector_ids)
    ):
        found.setdefault(vector_id, []).append((image_id, key))
    return found


def one(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> ImageRow | None:
    """The only photo that fulfils `condition`, if there is one."""
    row = connection.execute(sa.select(*COLUMNS).where(condition)).one_or_none()
    return None if row is None else ImageRow(*row)


def count(connection: sa.Connection, filters: Filters | None) -> int:
    query = sa.select(sa.func.count()).select_from(images).where(condition_of(filters))
    return int(connection.execute(query).scalar_one())


def tag_counts(connection: sa.Connection, *, vector_id: int | None = None) -> list[tuple[str, int]]:
    """Each label that was given as a tag, and how many photos have it, the most frequent first.

    Of one vector, those that it has, where `vector_id` names it.
    """
    photos = sa.func.count(images.c.id)
    query = (
        sa.select(labels.c.label, photos)
        .outerjoin(tags, tags.c.label_id == labels.c.id)
        .outerjoin(images, images.c.vector_id == tags.c.vector_id)
        .group_by(labels.c.label)
        .order_by(photos.desc(), labels.c.label)
    )
    if vector_id is not None:
        query = query.where(images.c.vector_id == vector_id)
    return [(label, int(number)) for label, number in connection.execute(query)]


class RememberedIds:
    """What the last few filters let through in one committed state, so that the pages of a search share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: Hashable = None
        self._ids: OrderedDict[Filters, Ids] = OrderedDict()

    def get(self, filters: Filters, *, version: Hashable) -> Ids | None:
        with self._lock:
            if version != self._version or filters not in self._ids:
                return None
            self._ids.move_to_end(filters)
            return self._ids[filters]

    def put(self, filters: Filters, ids: Ids, *, version: Hashable) -> None:
        ids.flags.writeable = False
        with self._lock:
            if version != self._version:
                self._ids.clear()
                self._version = version
            self._ids[filters] = ids
            while len(self._ids) > REMEMBERED_FILTERS:
                self._ids.popitem(last=False)


def _has(connection: sa.Connection, sql_index: str) -> bool:
    """Whether the tables have an index; those of an earlier version lack some until the next run."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'index' AND name = ?"
    return connection.exec_driver_sql(query, (sql_index,)).first() is not None


def _joined(*columns: sa.Column[int]) -> sa.Select[Any]:
    """How many rows there are, and each column as one text, which numpy reads several times as fast as Python rows."""
    return sa.select(sa.func.count(), *(sa.func.group_concat(column, ",") for column in columns))


def _columns(
    connection: sa.Connection, query: sa.Select[Any], parameters: dict[str, str] | None = None
) -> tuple[Ids, ...]:
    """Each column of a query by `_joined` as an array. Raises IndexFormatError."""
    count, *texts = connection.execute(query, parameters).one()
    try:
        arrays = tuple(np.fromstring(text or "", dtype=np.int64, sep=",") for text in texts)
    except ValueError:
        arrays = ()
    if [len(array) for array in arrays] != [count] * len(texts):  # numpy stops at what is no number
        raise IndexFormatError(f"the tables of the index hold ids that are no whole numbers; {REPAIR}")
    return arrays


def _as_json(ids: Ids) -> dict[str, str]:
    """One variable however many ids there are: SQLite takes 32,766 at most."""
    return {"ids": json.dumps(ids.tolist())}


# Statements that every search asks are built once: that takes SQLAlchemy longer than SQLite takes to answer them.
IDS = sa.select(sa.func.json_each(sa.bindparam("ids", type_=sa.Text)).table_valued("value").c.value)
OF_VECTORS = _joined(images.c.id, images.c.vector_id).where(images.c.vector_id.in_(IDS))
ROWS = sa.select(*COLUMNS).where(images.c.id.in_(IDS))
