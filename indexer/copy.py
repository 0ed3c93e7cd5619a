"""`copy`: make one index the same as another, wherever the two are: in folders, in Milvus.

Photos are compared by id and digest; only those that differ move, so a copy that was killed is gone on with by asking
for it again, and a second copy brings what is new. Ids, tags, failures and what made the vectors stay as they are. What
is derived is left behind: `ann/`, vectors of no photo, a change of the model that is under way.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from indexer.replicas import Differences, Replica, Values, WritableReplica, kind_of, replica_at
from searchengine.errors import IndexNotFound, IndexUnusable, ModelMismatch, UsageError
from searchengine.index.layout import IndexIdentity, index_folder, read_identity
from searchengine.milvus import is_milvus
from searchengine.text import printable

OnProgress = Callable[[int, int], None]

# Photos that are read back from a new copy and compared with the source, vectors byte for byte.
SAMPLE = 1000
# A source that is written meanwhile is looked at again so often.
ROUNDS = 5
GROWING = ("counters", "last_run")  # values that every index has of its own, which a copy never takes away


@dataclass(kw_only=True)
class CopyReport:
    """`photos` that the source has = `added` + `updated` + `unchanged`; `deleted` ones only the destination had.

    `sampled` photos were read back and compared with the source, vectors byte for byte; of all, the digests agree.
    """

    photos: int = 0
    added: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    failures: int = 0
    sampled: int = 0
    model: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def copy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    replace: bool = False,
    on_progress: OnProgress = lambda done, total: None,
    stop: threading.Event | None = None,
) -> CopyReport:
    """Make the index `destination`, a folder or an address in Milvus, the same as `source`; make it if there is none.

    Photos that only the destination has leave it. Where it has photos, and none of them is in the source, it is taken
    for another index by mistake, and refused unless `replace`. Once `stop` is set, what was written is kept, and
    KeyboardInterrupt raised. Raises IndexNotFound, IndexUnusable and its kin, IndexLocked, ModelMismatch where the two
    are of different encoders, UsageError.
    """
    if _normal(source) == _normal(destination):
        raise UsageError(f"source and destination are the same index: {printable(_normal(source))}")
    with replica_at(source, whole=True) as origin:
        _check_encoders(origin, destination)
        with _open_for_writing(destination, origin.identity) as target:
            return make_same(origin, target, replace=replace, on_progress=on_progress, stop=stop)


def make_same(
    source: Replica,
    target: WritableReplica,
    *,
    differences: Differences | None = None,
    replace: bool = False,
    verified: bool = True,
    on_progress: OnProgress = lambda done, total: None,
    stop: threading.Event | None = None,
) -> CopyReport:
    """What `copy` does, between two indexes that are open. Raises as it does, and IndexUnusable where they disagree.

    Where the `differences` are known, only what they name is written, and of that only is a sample read back. Where not
    `verified`, nothing is compared in the end, as of a source that is not whole.
    """
    started = time.monotonic()
    report = CopyReport(model=source.identity.encoder)
    for _ in range(ROUNDS):
        known = _move(source, target, report, differences, replace, on_progress, stop or threading.Event())
        if not source.has_changed():
            break
        replace = True
    else:
        raise IndexUnusable(f"the index at {source.shown} is written again and again; copy it when that has ended")
    report.unchanged = max(0, report.photos - report.added - report.updated)
    if verified:
        _verify(source, target, report, known)
    report.seconds = time.monotonic() - started
    return report


def _move(
    source: Replica,
    target: WritableReplica,
    report: CopyReport,
    differences: Differences | None,
    replace: bool,
    on_progress: OnProgress,
    stop: threading.Event,
) -> Differences | None:
    """Make the target the same. Returns what differed, where it is known that nothing else can differ now."""
    wanted = source.values()
    with target.view() as view:
        found = compare(source, view) if differences is None else differences
        known = view.values()
        if not replace:
            _refuse_strangers(source, view, found)
    report.photos = len(found.added) + len(found.updated) + len(found.same)
    report.failures = sum(kind_of(name) == "failure" for name in wanted)
    new = {name: value for name, value in wanted.items() if not _is_kept(name, value, known)}
    gone = {name: value for name, value in known.items() if name not in wanted and name not in GROWING}
    if new or gone:
        target.write_values(new, forgotten=gone)
    done, total = 0, len(found)
    on_progress(done, total)
    for ids, count in ((found.added, "added"), (found.updated, "updated"), (found.surplus, "deleted")):
        for page in _pages(ids, target.photos_per_write):
            if stop.is_set():
                raise KeyboardInterrupt
            if ids is found.surplus:
                target.remove(page)
            else:
                target.write(*source.photos(page))
            done += len(page)
            setattr(report, count, getattr(report, count) + len(page))
            on_progress(done, total)
    target.finish(vectors=source.count_vectors())
    nothing_was_done = not (len(found) or new or gone)
    return found if nothing_was_done else differences


def _refuse_strangers(source: Replica, view: Replica, found: Differences) -> None:
    """Raises UsageError where an index has photos, and none with the content that its id has in the source."""
    others = len(found.updated) + len(found.surplus)
    if found.same or not others:
        return
    some = found.updated[:SAMPLE]
    here, there = ({(photo.id, photo.content_hash) for photo in side.photos(some)[0]} for side in (source, view))
    if not here & there:
        raise UsageError(
            f"the index at {view.shown} has {others:,} photos, and none of them is in {source.shown}; give --replace "
            "if it is to be made the same, or another destination"
        )


def compare(source: Replica, view: Replica) -> Differences:
    """How `view` differs from `source`, by ids and digests, in one pass over both."""
    found = Differences()
    if not view.count():  # then digests need not be computed
        for page in source.ids():
            found.added.extend(page)
        return found
    wanted, known = _flat(source.digests()), _flat(view.digests())
    here, there = next(wanted, None), next(known, None)
    while here or there:
        if there is None or (here and here[0] < there[0]):
            assert here is not None
            found.added.append(here[0])
            here = next(wanted, None)
        elif here is None or there[0] < here[0]:
            found.surplus.append(there[0])
            there = next(known, None)
        else:
            if here[1] == there[1]:
                found.same.append(here[0])
            else:
                found.updated.append(here[0])
            here, there = next(wanted, None), next(known, None)
    return found


def _verify(source: Replica, target: WritableReplica, report: CopyReport, known: Differences | None) -> None:
    """Raises IndexUnusable where the target is not the same: number, digests and values, and a sample byte for byte.

    Where it is `known` what differed, the sample is of that, and other digests are not compared again.
    """
    with target.view() as view:
        if known is None:
            found = compare(source, view)
            left, ids = len(found), found.same
        else:
            left = abs(source.count() - view.count())
            ids = known.added + known.updated or known.same
        values, wanted = view.values(), source.values()
        others = [name for name, value in wanted.items() if not _is_kept(name, value, values)]
        others += [name for name in values if name not in wanted and name not in GROWING]
        sample = np.sort(np.random.default_rng(len(ids)).permutation(len(ids))[:SAMPLE])
        some = [ids[place] for place in sample]
        (photos, matrix), (copies, copied) = source.photos(some), view.photos(some)
        if not left and not others and photos == copies and matrix.tobytes() == copied.tobytes():
            report.sampled = len(some)
            return
        raise IndexUnusable(
            f"the copy at {view.shown} is not the same as {source.shown}: {left:,} photos and {len(others):,} other "
            "facts differ; end what else writes there, and copy again"
        )


def _is_kept(name: str, value: dict[str, Any], known: Values) -> bool:
    """Whether an index that knows `known` need not be told that value."""
    if name == "counters":  # the destination may have given out higher ids
        return all(known.get(name, {}).get(table, -1) >= highest for table, highest in value.items())
    return known.get(name) == value


def _flat(pages: Iterator[Sequence[tuple[int, str]]]) -> Iterator[tuple[int, str]]:
    for page in pages:
        yield from page


def _pages(ids: array[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _normal(place: str | os.PathLike[str]) -> str:
    if is_milvus(place):
        from searchengine.milvus.connection import MilvusPlace

        return MilvusPlace.parse(os.fspath(place)).shown
    return str(index_folder(place))


def _open_for_writing(
    place: str | os.PathLike[str], identity: IndexIdentity
) -> AbstractContextManager[WritableReplica]:
    if is_milvus(place):
        from indexer.replicas.milvus_writing import open_for_writing

        return open_for_writing(os.fspath(place), identity)
    from indexer.replicas.local_writing import WritableLocalReplica

    return WritableLocalReplica(place, identity=identity)


def _check_encoders(source: Replica, destination: str | os.PathLike[str]) -> None:
    """Raises ModelMismatch."""
    try:
        if is_milvus(destination):
            from indexer.replicas.milvus import open_replica

            with open_replica(os.fspath(destination)) as there:
                known, shown = there.identity, there.shown
        else:
            folder = index_folder(destination)
            known, shown = read_identity(folder), printable(str(folder))
    except IndexNotFound:
        return
    if known != source.identity:
        raise ModelMismatch(
            f"the index at {source.shown} is of the encoder {source.identity.encoder} in {source.identity.precision} "
            f"({source.identity.fingerprint[:12]}), that at {shown} of {known.encoder} in {known.precision} "
            f"({known.fingerprint[:12]}), and an index holds vectors of one encoder; copy to another place, or change "
            "the model of one of them with: searchengine reencode"
        )
