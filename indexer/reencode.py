"""Change the model of an index while it serves: make all its vectors anew beside it, then put them in its place.

The new vectors gather in `next/`, an ordinary index without photos, by the content of the photos. Searches and runs of
`index` go on meanwhile. Whatever ends a run, what it committed there is kept, and the next run of the same model goes
on from it. Once nothing is lacking, the index is locked, what was added to it meanwhile is embedded too, and one commit
changes the model (`takeover.py`). Photos keep their ids, and their vectors theirs.

Only contents are embedded that the index has: what else lies in its folders is for `index` to find. Where no photo has
a content any more, its photos are treated as `index` would treat them: what changed is embedded as it is now, what is
broken or gone leaves the index and is listed among the failures. A photo that could only not be read (its disk is
away, or its whole folder) holds the change up, unless it is to be dropped.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import sqlalchemy as sa

from indexer.ann import DEFAULT_RECALL, update_ann
from indexer.filling import Filling
from indexer.lacking import Lacking
from indexer.leftovers import CANCEL, discard_next, finish_change, is_taken_over
from indexer.lock import LockedIndex
from indexer.mounts import recorded_device
from indexer.report import OnProgress, OnSkip, ReencodeReport
from indexer.segments import delete_orphans
from indexer.takeover import take_over
from indexer.writer import FailedPhoto, IndexWriter, NextCommit
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import IndexFormatError, IndexNotFound, IndexUnusable, UsageError
from searchengine.index.ann import AnnParameters
from searchengine.index.layout import IndexIdentity, IndexPaths, index_folder, read_card, read_identity
from searchengine.index.schema import ANN_ROW, migrate
from searchengine.stores import KnownStores, device_of
from searchengine.text import printable
from searchengine.vectors import Encoder


def reencode(
    index: str | os.PathLike[str],
    *,
    encoder: Encoder,
    workers: int | None = None,
    batch_size: int = 32,
    limits: DecodeLimits = DEFAULT_LIMITS,
    isolated: bool = True,
    drop_unreadable: bool = False,
    on_progress: OnProgress = lambda progress: None,
    on_skip: OnSkip = lambda key, reason: None,
    stop: threading.Event | None = None,
) -> ReencodeReport:
    """Make `encoder` the one of the index in the folder `index`; there is nothing to do where it is that already.

    `drop_unreadable` lets photos go that cannot be read now; `index` takes them in again when they can be. Takes disk
    for the new vectors twice over beside the old ones, until it ends. Once `stop` is set, what is done is committed,
    and KeyboardInterrupt raised.

    Raises IndexNotFound, IndexUnusable and its kin, UsageError while a change to another model is under way.
    """
    if batch_size < 1 or (workers or 0) < 0:
        raise UsageError(f"batch_size is {batch_size}, workers {workers}; give at least 1, or workers 0 for all cores")
    paths = IndexPaths(index_folder(index))
    identity = read_identity(paths.folder)
    wanted = IndexIdentity(
        encoder=encoder.name, fingerprint=encoder.fingerprint, dim=encoder.dim, precision=encoder.precision
    )
    if is_taken_over(paths, identity) or read_card(paths.folder) != identity:
        with LockedIndex(paths.folder) as locked:
            finish_change(paths)
            delete_orphans(locked.engine, paths)
    report = ReencodeReport(model=encoder.name, fingerprint=encoder.fingerprint)
    if identity.fingerprint == wanted.fingerprint:
        return report
    _refuse_another(paths, wanted)
    with ExitStack() as held:
        with _what_was_begun():
            writer = held.enter_context(IndexWriter(paths.next.folder, encoder=encoder))
        if read_identity(paths.folder).fingerprint == wanted.fingerprint:  # another process did it just now
            held.close()
            with LockedIndex(paths.folder):
                finish_change(paths)
            return report
        lacking = held.enter_context(_looking_at(paths))
        filling = Filling(
            writer=writer,
            lacking=lacking,
            encoder=encoder,
            report=report,
            workers=workers or os.cpu_count() or 1,
            batch_size=batch_size,
            limits=limits,
            isolated=isolated,
            on_progress=on_progress,
            stop=stop or threading.Event(),
        )
        held.enter_context(closing(filling))
        filling.fill()
        with LockedIndex(paths.folder) as locked, locked.disk_errors():
            migrate(locked.engine, paths.database)
            locked.begin_run()
            filling.fill()  # what came while the index was not locked
            with locked.engine.begin() as connection:
                batch = _fates(filling, connection, drop_unreadable=drop_unreadable, on_skip=on_skip)
                before = connection.execute(sa.select(*ANN_ROW)).first()
                if report.unreadable:
                    locked.end_run(connection)
                    return report
            report.vectors = take_over(locked, lacking, wanted, batch)
            report.swapped = True
            held.close()
            finish_change(paths)
            if before is not None:
                _build_ann(locked, wanted, recorded=before.parameters)
            report.seconds = time.monotonic() - filling.started
    return report


def cancel(index: str | os.PathLike[str]) -> bool:
    """Drop the vectors of a change of the model that is under way; whether there was one.

    Raises IndexNotFound, IndexLocked while it goes on, IndexUnusable.
    """
    paths = IndexPaths(index_folder(index))
    read_identity(paths.folder)
    if not paths.next.folder.is_dir():
        return False
    with LockedIndex(paths.folder) as locked, locked.disk_errors():
        finish_change(paths)  # where it was killed just after its commit, only `next/` has the card of the index
        if not paths.next.folder.is_dir() or is_taken_over(paths, read_identity(paths.folder)):
            return False
        with LockedIndex(paths.next.folder):  # nobody fills it
            discard_next(paths)
    return True


def _refuse_another(paths: IndexPaths, wanted: IndexIdentity) -> None:
    """Raises UsageError where a change to another model has begun, IndexFormatError where that cannot be told."""
    shown = printable(str(paths.folder))
    try:
        with _what_was_begun():
            begun = read_card(paths.next.folder)
    except IndexNotFound:
        return
    if begun.fingerprint != wanted.fingerprint:
        raise UsageError(
            f"the index at {shown} is on its way to encoder {printable(begun.encoder)} in {begun.precision}; "
            f"finish that with --model {printable(begun.encoder)}, or drop what it has done with: {CANCEL}"
        )


@contextmanager
def _what_was_begun() -> Iterator[None]:
    """Where `next/` is broken, the way out is not that of an index."""
    try:
        yield
    except IndexFormatError as error:
        what = str(error).partition(";")[0]
        raise IndexFormatError(
            f"{what}; run `searchengine verify --repair` and this again, or drop what was begun with: {CANCEL}"
        ) from None


@contextmanager
def _looking_at(paths: IndexPaths) -> Iterator[Lacking]:
    try:
        with closing(Lacking(paths)) as lacking:
            yield lacking
    except sqlite3.Error as error:
        raise IndexUnusable(
            f"the tables of the index at {printable(str(paths.folder))} cannot be read ({error}); run `searchengine "
            "verify`"
        ) from None


def _fates(filling: Filling, connection: sa.Connection, *, drop_unreadable: bool, on_skip: OnSkip) -> NextCommit:
    """What becomes of the photos whose content nobody has any more; counted, and told."""
    batch, report = NextCommit(), filling.report
    for photo in filling.lacking.lost():
        store, listed = photo.store.name, photo.listed
        if photo.name in filling.changed:
            batch.photos.append(filling.changed[photo.name])
            report.updated += 1
            continue
        outcome = filling.unusable[photo.name]
        gone = not outcome.damaged and _is_gone(connection, store, listed.key)
        reason = f"gone when its vector was to be made anew by {filling.encoder.name}" if gone else outcome.reason
        on_skip(listed.key, reason)
        if gone:
            report.deleted += 1
        elif outcome.damaged or drop_unreadable:
            report.failed += 1
        else:
            report.unreadable += 1
            continue
        batch.removed.append(photo.image_id)
        found = outcome.change.listed
        batch.failures.append(FailedPhoto(store=store, listed=found, reason=reason, damaged=outcome.damaged))
    return batch


def _is_gone(connection: sa.Connection, store: str, key: str) -> bool:
    """Whether a photo was deleted for sure: its folder is there, on the file system that was recorded.

    Where the folder is gone too, the library may be elsewhere now, which `index` finds out.
    """
    stores = KnownStores()
    if stores.is_there(store, key) or not stores.is_there(store, os.path.dirname(key)):
        return False
    recorded = recorded_device(connection, store, key)
    return recorded is not None and recorded == device_of(store, key)


def _build_ann(locked: LockedIndex, identity: IndexIdentity, *, recorded: str) -> None:
    """Of the kind that the old vectors had, as far as that can be told and the new ones can have it."""
    kind, recall = "auto", DEFAULT_RECALL
    with suppress(TypeError, ValueError, RecursionError):
        before = AnnParameters(**json.loads(recorded))
        kind, recall = before.kind, before.recall_target
    with suppress(UsageError):
        update_ann(
            locked,
            identity,
            kind=kind,
            memory_bytes=None,
            recall=recall,
            rebuild=True,
            on_progress=lambda done, total: None,
        )
