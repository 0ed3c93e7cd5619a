"""Whether an index in Milvus is what was published there, and what its staging index says."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexer.checks.problems import Problem
from indexer.copy import compare
from indexer.replicas.local import LocalReplica
from indexer.replicas.milvus import MilvusReplica, is_whole, read_state
from indexer.replicas.rows import digest_of, name_hash
from indexer.replicas.staged import Standing, read_standing, staging_folder
from searchengine.errors import IndexNotFound
from searchengine.milvus.connection import Connection, MilvusPlace
from searchengine.text import printable
from searchengine.vectors import UNIT_TOLERANCE

MEND = "run `searchengine verify --repair` on a machine that has indexed into it, then `searchengine index` as before"
PUBLISH = "run `searchengine index` as before, which publishes what is missing"

OnProgress = Callable[[int, int], None]


def check_milvus(address: str, *, root: Path, on_progress: OnProgress = lambda done, total: None) -> list[Problem]:
    """Reads all of the index at `address`, and compares it with the staging index below `root` if that is as new.

    Raises IndexNotFound, IndexUnusable.
    """
    place = MilvusPlace.parse(address)
    with closing(Connection(place)) as connection:
        state = read_state(connection)
        if state is None:
            raise IndexNotFound(f"there is no index at {place.shown}; make one with: searchengine index FOLDER")
        replica = MilvusReplica(connection, state.identity)
        seen = _read(replica, on_progress)
        problems = [problem for _, problem in seen.damaged]
        counts = f"{seen.photos:,} photos with {seen.vectors:,} vectors, where {state.images:,} with {state.vectors:,}"
        if not is_whole(state):
            message = f"has {counts} were published: a publication has begun and not ended"
            problems.append(_problem("tables", state.collection, message))
        elif (seen.photos, seen.vectors) != (state.images, state.vectors):
            problems.append(_problem("tables", state.collection, f"has {counts} were published"))
        if seen.names != seen.photos:
            message = f"has {seen.photos - seen.names:,} photos under names that others have, too"
            problems.append(_problem("tables", state.collection, message))
        folder = staging_folder(place, root)
        if (folder / "published.sqlite").exists():
            standing = read_standing(folder / "published.sqlite")
            if standing == Standing(state.commit, state.commit):
                problems += _compare_with_staging(replica, folder / "index")
    return problems


def damaged_ids(replica: MilvusReplica) -> list[int]:
    """Of the photos that are not what was published."""
    return [image_id for image_id, _ in _read(replica, lambda done, total: None).damaged]


@dataclass(kw_only=True)
class _Seen:
    """What a look at all photos gave: ids and problems of damaged ones; numbers of photos, of different vectors and
    different names."""

    damaged: list[tuple[int, Problem]]
    photos: int
    vectors: int
    names: int


def _read(replica: MilvusReplica, on_progress: OnProgress) -> _Seen:
    damaged: list[tuple[int, Problem]] = []
    vector_ids, names = array("q"), array("Q")
    total = replica.count()
    for digests, photos, matrix in replica.everything():
        for digest, photo, vector in zip(digests, photos, matrix, strict=True):
            if digest_of(photo, vector) != digest:
                message = "its facts or its vector are not those that were published"
            elif abs(float(np.linalg.norm(vector)) - 1) > UNIT_TOLERANCE:
                message = "its vector is not of length 1"
            else:
                message = ""
            if message:
                damaged.append((photo.id, _problem("photo", printable(photo.key), message, MEND)))
            vector_ids.append(photo.vector_id)
            names.append(int(name_hash(photo.store, photo.key)[:16], 16))
        on_progress(len(names), total)
    return _Seen(
        damaged=damaged,
        photos=len(names),
        vectors=len(np.unique(np.frombuffer(vector_ids, np.int64))),
        names=len(np.unique(np.frombuffer(names, np.uint64))),
    )


def _compare_with_staging(replica: MilvusReplica, folder: Path) -> Iterator[Problem]:
    with LocalReplica(folder) as staging:
        found = compare(staging, replica)
    # What is newer in the staging index, no problem has.
    if found.updated or found.surplus:
        count, shown = len(found.updated) + len(found.surplus), printable(str(folder))
        message = f"{count:,} photos are not as in the staging index {shown}"
        yield _problem("tables", replica.shown, message)


def _problem(kind: str, what: str, message: str, remedy: str = PUBLISH) -> Problem:
    return Problem(kind=kind, object=what, message=message, remedy=remedy)
