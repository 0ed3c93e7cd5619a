"""Groups of the same photo: copies to the byte, and near copies (recompressed, resized, cropped, brightened).

Copies to the byte share one vector. Near copies are found among the nearest neighbours of each vector, so where there
is an `ann/` nothing is compared with everything; union-find joins pairs into components.

No one cosine tells near copies everywhere: where a library holds many photos of a kind, different ones come as near as
a copy does elsewhere. So, unless a threshold is given, a pair must stand out: its distance is at most half of that from
either photo to its ninth neighbour (Lowe 2004, section 7.1, tells true matches by such a ratio). In a larger family of
copies the ninth neighbour is a copy too; there it is enough to differ by next to nothing.

A family of thousands of copies is not looked at pair by pair (components.py).

A chain of near copies may join photos that are not alike. So each component is taken apart: its best photo keeps those
that are near copies of itself, the best of the rest keeps its own, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchengine.components import Components, join_crowds
from searchengine.errors import UsageError
from searchengine.filters import Filters
from searchengine.index import exact
from searchengine.index.photos import ImageRow
from searchengine.index.protocol import PhotoIndex, PhotoSnapshot
from searchengine.index.segments import Ids
from searchengine.index.table import NO_ROWS, NO_SCORES
from searchengine.vectors import FloatMatrix

# With the photo itself that makes ten, the first depth of a search where there is an `ann/`.
NEIGHBOURS = 9

# Shares of a squared distance, 2 - 2 * cosine: of the one to the ninth neighbour; of the usual one between photos that
# have nothing to do with each other, at most and surely. Chosen on edited photos (scripts/quality_duplicates.py).
STANDS_OUT = 0.5**2
AT_MOST = 1 / 8
SURELY = 1 / 30

# Usual cosines between photos that have nothing to do with each other, for libraries too small to tell; others: CLIP's.
USUAL_COSINES = {"mini": 0.27}
USUAL_COSINE = 0.55
TELLING_SAMPLE, SAMPLE = 100, 1000

ROUNDING = 1e-6  # by as much the cosine of two equal vectors may differ from 1
ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class DuplicateGroup:
    """Photos of the same, best first: most pixels, then most bytes, then the oldest.

    `similarities` are their cosines with the best one, 1.0 for a copy to the byte.
    """

    photos: tuple[ImageRow, ...]
    similarities: tuple[float, ...]

    @property
    def similarity(self) -> float:
        """The least of them."""
        return min(self.similarities)


def exact_duplicates(index: PhotoIndex, *, filters: Filters | None = None) -> list[DuplicateGroup]:
    """The groups of photos that pass `filters` and are copies to the byte, in the order of their best photos' paths."""
    ids = _vector_ids(index, index.snapshot(), filters)
    copied = ids[_are_copied(index, ids, filters)]
    return _in_order(
        _group(copies, {vector: 1.0})
        for vector, copies in index.images_of(copied.tolist(), filters=filters).items()
        if len(copies) > 1  # else the others went between the two readings
    )


def near_duplicates(
    index: PhotoIndex,
    *,
    threshold: float | None = None,
    filters: Filters | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[DuplicateGroup]:
    """The groups of copies and near copies among the photos that pass `filters`, by their best photos' paths.

    Every photo of a group has a cosine of at least `threshold` with the best one; without a threshold it stands out, as
    told above. Exact without an `ann/`; with one, a pair is missed where its search misses it. Raises UsageError for a
    threshold that is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(f"the threshold is {threshold:g}; give a cosine above 0 and at most 1, such as 0.95")
    snapshot = index.snapshot()
    ids = _vector_ids(index, snapshot, filters)
    if threshold is None:
        usual = _usual_cosine(index)
        floor, certain = 1 - AT_MOST * (1 - usual), 1 - SURELY * (1 - usual)
    else:
        usual, floor, certain = threshold, threshold - ROUNDING, threshold - ROUNDING
    nearness = _Nearness(floor=floor, certain=certain, ninth=np.full(len(ids), usual))
    parts = Components(len(ids))
    among = ids if filters else None
    near, crowded = [(NO_ROWS, NO_ROWS, NO_SCORES)], [NO_ROWS]
    for (first, second, scores), some in _neighbours(snapshot, ids, nearness, among=among, on_progress=on_progress):
        kept = scores >= floor
        near.append((first[kept], second[kept], scores[kept]))
        crowded.append(some)
    first, second, scores = (np.concatenate(part) for part in zip(*near, strict=True))
    holds = nearness.holds(first, second, scores)
    parts.unite(first[holds], second[holds])
    join_crowds(snapshot, ids, parts, np.concatenate(crowded), certain=certain, among=among)
    return _in_order(_taken_apart(index, snapshot, ids, parts, nearness, filters))


@dataclass(frozen=True)
class _Nearness:
    """What makes a near copy. `ninth` (n,): each vector's cosine with its ninth neighbour, or the usual one if higher.

    With a threshold `floor` is `certain`, and the ninth neighbour counts for nothing.
    """

    floor: float
    certain: float
    ninth: NDArray[np.float64]

    def holds(self, first: Ids, second: Ids, scores: FloatMatrix) -> NDArray[np.bool_]:
        stands_out = 1 - scores <= STANDS_OUT * (1 - np.maximum(self.ninth[first], self.ninth[second]))
        near: NDArray[np.bool_] = (scores >= self.certain) | ((scores >= self.floor) & stands_out)
        return near


def _neighbours(
    snapshot: PhotoSnapshot,
    ids: Ids,
    nearness: _Nearness,
    *,
    among: Ids | None,
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[tuple[Ids, Ids, FloatMatrix], Ids]]:
    """Pairs (m,), (m,) of places in `ids`, with their cosines (m,): of each vector with its nearest ones.

    Sets `nearness.ninth`. Beside them the crowded ones: those of which the last of the nearest is certainly a copy.
    """
    rows = snapshot.table.rows_of(ids)
    for start in range(0, len(ids), ROWS_PER_BLOCK):
        on_progress(start, len(ids))
        vectors = snapshot.table.gather(rows[start : start + ROWS_PER_BLOCK])
        sound = np.isfinite(vectors).all(axis=1)  # others are damage, which `verify` tells
        some = start + np.flatnonzero(sound)
        scores, found = snapshot.search(vectors[sound], k=NEIGHBOURS + 1, among=among)
        crowded = NO_ROWS
        if found.shape[1] > NEIGHBOURS:
            nearness.ninth[some] = np.maximum(nearness.ninth[some], scores[:, -1])
            crowded = some[scores[:, -1] >= nearness.certain]
        places = np.searchsorted(ids, found)
        other = places != some[:, None]
        yield (np.repeat(some, other.sum(1)), places[other], scores[other]), crowded
    on_progress(len(ids), len(ids))


def _taken_apart(
    index: PhotoIndex,
    snapshot: PhotoSnapshot,
    ids: Ids,
    parts: Components,
    nearness: _Nearness,
    filters: Filters | None,
) -> Iterator[DuplicateGroup]:
    """The groups: each with all photos of its vectors, and no near copy of the best photo left to another."""
    roots = parts.roots(np.arange(len(ids)))
    several = (np.bincount(roots, minlength=1)[roots] > 1) | _are_copied(index, ids, filters)
    places = np.flatnonzero(several)
    copies = index.images_of(ids[places].tolist(), filters=filters)
    components: dict[int, list[int]] = {}
    for place in places:
        if int(ids[place]) in copies:
            components.setdefault(int(roots[place]), []).append(int(place))
    for component in components.values():
        left = np.array(sorted(component, key=lambda place: _worth(copies[int(ids[place])][0])))
        rows = snapshot.table.rows_of(ids[left])
        while len(left):
            best = snapshot.table.gather(rows[:1])[0]
            near = snapshot.table.scores(best, rows) >= nearness.floor - exact.ROUNDING
            near[0] = True
            scores = snapshot.table.exact_scores(best, rows[near])
            holds = nearness.holds(np.full(len(scores), left[0]), left[near], scores)
            holds[0] = True
            near[near] = holds
            cosines = dict(zip(ids[left[near]].tolist(), scores[holds].tolist(), strict=True))
            cosines[int(ids[left[0]])] = 1.0
            photos = [photo for vector in cosines for photo in copies[vector]]
            if len(photos) > 1:
                yield _group(photos, cosines)
            left, rows = left[~near], rows[~near]


def _group(photos: Sequence[ImageRow], cosines: dict[int, float]) -> DuplicateGroup:
    best_first = sorted(photos, key=_worth)
    return DuplicateGroup(tuple(best_first), tuple(min(1.0, cosines[photo.vector_id]) for photo in best_first))


def _worth(photo: ImageRow) -> tuple[int, int, int, int]:
    """Sorts the best photo first."""
    return -photo.width * photo.height, -photo.size_bytes, photo.mtime_ns, photo.id


def _in_order(groups: Iterable[DuplicateGroup]) -> list[DuplicateGroup]:
    return sorted(groups, key=lambda group: (group.photos[0].store, group.photos[0].key))


def _vector_ids(index: PhotoIndex, snapshot: PhotoSnapshot, filters: Filters | None) -> Ids:
    """The vectors of `snapshot` that have a photo which passes, rising."""
    ids = snapshot.table.living_ids
    return ids[np.isin(ids, index.vector_ids(filters))] if filters else ids


def _are_copied(index: PhotoIndex, ids: Ids, filters: Filters | None) -> NDArray[np.bool_]:
    """Whether each of the vectors (n,) has several photos that pass."""
    _, places = index.photos_of(ids, filters=filters)
    copied: NDArray[np.bool_] = np.bincount(places, minlength=len(ids)) > 1
    return copied


def _usual_cosine(index: PhotoIndex) -> float:
    """The median between photos of the library, or what is usual for its encoder where these are too few to tell."""
    sample = index.sample_vectors(SAMPLE)
    sample = sample[np.isfinite(sample).all(axis=1)]
    if len(sample) < TELLING_SAMPLE:
        return USUAL_COSINES.get(index.identity.encoder, USUAL_COSINE)
    return float(np.median((sample @ sample.T)[np.triu_indices(len(sample), 1)]))
