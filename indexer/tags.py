"""Tags: labels that zero-shot classification gave to the photos of an index, kept in its tables, to be searched by.

A tagging is what was asked for: labels, templates, how many and how probable. It belongs to vectors, so copies share
their tags, a moved photo keeps them, and a photo whose content changed has none of the old. The same tagging again only
looks at vectors that are newer than it. A label belongs to one tagging: where a new one has it, too, it replaces what
the older one said of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from indexer.compact import check_tables_are_there
from indexer.lock import LockedIndex, now
from indexer.writable import check_same_encoder, identity_of
from searchengine.errors import IndexFormatError, UsageError
from searchengine.index.layout import RESTORE, read_identity
from searchengine.index.reader import Index
from searchengine.index.schema import labels, migrate, taggings
from searchengine.index.table import VectorTable
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix
from searchengine.zeroshot import check_labels, class_vectors, classify_stored

VECTORS_PER_COMMIT = 65_536


@dataclass(frozen=True, kw_only=True)
class TaggingRequest:
    """The labels that each photo gets: the `top` likeliest of `labels`, if their probability is `min_probability`."""

    labels: Sequence[str]
    templates: Sequence[str]
    top: int
    min_probability: float


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """What was done: so many vectors were looked at, because no such tagging had seen them."""

    classified: int


def write_tags(
    index: str | os.PathLike[str],
    request: TaggingRequest,
    *,
    encoder: Encoder,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tagged:
    """Tag the photos of the index in the folder `index` from their stored vectors.

    Commits every VECTORS_PER_COMMIT vectors; ended in between, the next call goes on from there. Raises IndexNotFound,
    IndexFormatError, IndexLocked, IndexUnusable, ModelMismatch for the encoder of another index, UsageError.
    """
    _check(request)
    classes = class_vectors(encoder, request.labels, templates=request.templates)
    with _writing(index) as locked:
        _check_encoder(locked, encoder)
        with Index(locked.folder) as opened:
            table = opened.snapshot().table
        with locked.engine.begin() as connection:
            tagging_id, through_id = _continued(connection, request, encoder) or _begun(connection, request, encoder)
            rows = connection.execute(sa.select(labels.c.label, labels.c.id).where(labels.c.tagging_id == tagging_id))
            label_ids = {row.label: row.id for row in rows}
        classified = _tag(
            locked,
            table,
            request,
            tagging_id=tagging_id,
            after_id=through_id,
            label_ids=np.array([label_ids[label] for label in request.labels]),
            classes=classes,
            logit_scale=encoder.logit_scale,
            on_progress=on_progress,
        )
    return Tagged(classified=classified)


def remove_tags(index: str | os.PathLike[str], names: Sequence[str]) -> int:
    """Forget these labels and which photos have them; how many of them the index knew.

    Raises IndexNotFound, IndexFormatError, IndexLocked, IndexUnusable.
    """
    names = check_labels(names)
    with _writing(index) as locked, locked.engine.begin() as connection:
        return _forget(connection, names)


def _check(request: TaggingRequest) -> None:
    check_labels(request.labels)
    for label in request.labels:
        try:
            label.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the label {printable(repr(label))} is not UTF-8, so it cannot be a tag") from None
    if request.top < 1 or not 0 <= request.min_probability <= 1:
        raise UsageError(
            f"top is {request.top} and min_probability {request.min_probability}; they must be at least 1, and "
            "between 0 and 1"
        )


@contextmanager
def _writing(index: str | os.PathLike[str]) -> Iterator[LockedIndex]:
    """An index that is there, of this version, held by this process. Raises IndexNotFound, IndexFormatError."""
    locked = LockedIndex(index)
    read_identity(locked.folder)
    if not locked.paths.database.is_file():
        raise IndexFormatError(f"the index at {printable(str(locked.folder))} has lost its metadata.sqlite; {RESTORE}")
    with locked, locked.disk_errors():
        check_tables_are_there(locked)
        migrate(locked.engine, locked.paths.database)
        locked.begin_run()
        yield locked
        with locked.engine.begin() as connection:
            locked.end_run(connection)


def _check_encoder(locked: LockedIndex, encoder: Encoder) -> None:
    check_same_encoder(read_identity(locked.folder), identity_of(encoder), folder=locked.folder)


def _continued(connection: sa.Connection, request: TaggingRequest, encoder: Encoder) -> tuple[int, int] | None:
    """The same tagging, if there is one and no newer one took a label from it: its id, and how far it is."""
    same = sa.and_(
        taggings.c.fingerprint == encoder.fingerprint,
        taggings.c.top == request.top,
        taggings.c.min_probability == request.min_probability,
    )
    asked = (sa.type_coerce(column, sa.Text).label(column.name) for column in (taggings.c.labels, taggings.c.templates))
    for row in connection.execute(sa.select(taggings.c.id, taggings.c.through_id, *asked).where(same)).all():
        own = set(connection.execute(sa.select(labels.c.label).where(labels.c.tagging_id == row.id)).scalars())
        with suppress(TypeError, ValueError, RecursionError):  # a damaged one is none
            templates, names = json.loads(row.templates), json.loads(row.labels)
            if templates == list(request.templates) and own == set(request.labels) == set(names):
                return int(row.id), int(row.through_id)
    return None


def _begun(connection: sa.Connection, request: TaggingRequest, encoder: Encoder) -> tuple[int, int]:
    _forget(connection, request.labels)
    row = {
        "made_at": now(),
        "fingerprint": encoder.fingerprint,
        "labels": list(request.labels),
        "templates": list(request.templates),
        "top": request.top,
        "min_probability": request.min_probability,
        "through_id": 0,
    }
    tagging_id = int(connection.execute(sa.insert(taggings).values(row)).inserted_primary_key[0])  # type: ignore[index]
    connection.execute(sa.insert(labels), [{"label": label, "tagging_id": tagging_id} for label in request.labels])
    return tagging_id, 0


def _forget(connection: sa.Connection, names: Sequence[str]) -> int:
    """Delete labels, their tags with them, and the taggings that have no label left."""
    before = connection.execute(sa.select(sa.func.count()).select_from(labels)).scalar_one()
    connection.execute(sa.delete(labels).where(labels.c.label == sa.bindparam("name")), [{"name": n} for n in names])
    connection.execute(sa.delete(taggings).where(taggings.c.id.not_in(sa.select(labels.c.tagging_id))))
    return int(before - connection.execute(sa.select(sa.func.count()).select_from(labels)).scalar_one())


def _tag(
    locked: LockedIndex,
    table: VectorTable,
    request: TaggingRequest,
    *,
    tagging_id: int,
    after_id: int,
    label_ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    classes: FloatMatrix,
    logit_scale: float,
    on_progress: Callable[[int, int], None],
) -> int:
    """Tag the vectors with ids above `after_id`, in the order of their ids; how many those are."""
    ids = np.sort(table.ids[table.ids > after_id])
    for start in range(0, len(ids), VECTORS_PER_COMMIT):
        some = ids[start : start + VECTORS_PER_COMMIT]
        rows = table.rows_of(some)
        with locked.engine.begin() as connection:
            blocks = classify_stored(table, rows, class_vectors=classes, logit_scale=logit_scale, top=request.top)
            for vector_ids, found in blocks:
                photos, places = np.nonzero(found.probabilities >= request.min_probability)
                values = zip(
                    vector_ids[photos].tolist(),
                    label_ids[found.labels[photos, places]].tolist(),
                    found.probabilities[photos, places].tolist(),
                    strict=True,
                )
                if len(photos):
                    # Past SQLAlchemy, whose handling of parameters would take longer than the rows.
                    connection.exec_driver_sql("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", list(values))
            reached = {"through_id": int(some[-1])}
            connection.execute(sa.update(taggings).where(taggings.c.id == tagging_id).values(reached))
        on_progress(start + len(some), len(ids))
    return len(ids)
