"""scan -> read, hash, decode (threads) -> batches -> encoder -> writer: bring an index up to date with its stores.

At most `3 * batch_size + workers` photos are under way at a time and crops are small, so memory does not grow with the
library. A file that cannot be used costs that file alone and is recorded with its reason.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from indexer.crawl import Change, Crawl, Globs
from indexer.reading import Decoded, Failed, Known, KnownContent, PhotoReader
from indexer.writer import FailedPhoto, IndexWriter, NewPhoto
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import IndexNotFound, IndexUnusable, UsageError
from searchengine.index.layout import IndexPaths, index_folder, read_identity
from searchengine.index.schema import connect_for_reading, migrate
from searchengine.metadata import PhotoMetadata
from searchengine.stores import ImageStore, open_store
from searchengine.text import printable
from searchengine.vectors import Encoder

COMMIT_EVERY_PHOTOS = 2000
COMMIT_EVERY_SECONDS = 20.0


@dataclass(kw_only=True)
class Report:
    """What a run did: scanned = added + updated + moved + unchanged + failed.

    `duplicates` counts those of the added and updated photos that are exact copies of other photos in the index.
    `images_per_second` is the rate at which photos were embedded.
    """

    scanned: int = 0
    added: int = 0
    updated: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    duplicates: int = 0
    failed: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    model: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: `done` of `total` files that are new or changed."""

    done: int
    total: int


OnProgress = Callable[[Progress], None]
OnSkip = Callable[[str, str], None]  # (key, reason)


def build(
    index: str | os.PathLike[str],
    stores: Sequence[str | os.PathLike[str]],
    *,
    encoder: Encoder,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    batch_size: int = 32,
    limits: DecodeLimits = DEFAULT_LIMITS,
    on_progress: OnProgress = lambda progress: None,
    on_skip: OnSkip = lambda key, reason: None,
    stop: threading.Event | None = None,
) -> Report:
    """Bring the index in the folder `index` up to date with `stores` (local folders); make it if there is none.

    Raises UsageError, StoreUnusable, IndexUnusable and its kin, ModelMismatch. Once `stop` is set, the run commits what
    is done and raises KeyboardInterrupt; the next run takes up from there.
    """
    if batch_size < 1 or (workers or 0) < 0:
        raise UsageError(f"batch_size is {batch_size}, workers {workers}; give at least 1, or workers 0 for all cores")
    opened = _open_stores(stores)
    globs = Globs(include=tuple(include), exclude=tuple(exclude))
    with IndexWriter(index, encoder=encoder) as writer:
        run = _Run(
            writer=writer,
            encoder=encoder,
            workers=workers or os.cpu_count() or 1,
            batch_size=batch_size,
            limits=limits,
            on_progress=on_progress,
            on_skip=on_skip,
            stop=stop or threading.Event(),
        )
        return run.update(opened, globs)


def plan(
    index: str | os.PathLike[str],
    stores: Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Report:
    """What `build` would find, told from the listing alone: a moved photo counts as one added and one deleted."""
    opened = _open_stores(stores)
    globs = Globs(include=tuple(include), exclude=tuple(exclude))
    report = Report()
    started = time.monotonic()
    with _tables_as_they_are(index_folder(index)) as engine:
        for store in opened:
            crawl = Crawl(store=store, globs=globs, engine=engine)
            crawl.list_store()
            _count_known(report, crawl)
            for change in crawl.changes():
                report.updated += change.known
                report.added += not change.known
            report.deleted += len(crawl.gone())
    report.seconds = time.monotonic() - started
    return report


@contextmanager
def _tables_as_they_are(folder: Path) -> Iterator[sa.Engine]:
    """The tables of an index that may not be there yet, on a connection that can write nothing but temporary tables."""
    try:
        read_identity(folder)
    except IndexNotFound:
        engine = sa.create_engine("sqlite://", poolclass=StaticPool)
        migrate(engine, folder)
    else:
        engine = connect_for_reading(IndexPaths(folder).database, poolclass=StaticPool)
    try:
        yield engine
    except sa.exc.DBAPIError as error:
        raise IndexUnusable(
            f"the tables of the index at {printable(str(folder))} cannot be read ({error.orig}); check the disk and "
            "permissions, restore the index, or index again"
        ) from error
    finally:
        engine.dispose()


class _Run:
    """The state of one `build`: what is under way between the stages."""

    def __init__(
        self,
        *,
        writer: IndexWriter,
        encoder: Encoder,
        workers: int,
        batch_size: int,
        limits: DecodeLimits,
        on_progress: OnProgress,
        on_skip: OnSkip,
        stop: threading.Event,
    ) -> None:
        self.writer = writer
        self.encoder = encoder
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.on_skip = on_skip
        self.stop = stop
        self.report = Report(model=encoder.name)
        self.started = time.monotonic()
        self.known = KnownContent(IndexPaths(writer.folder).database)
        self.reader = PhotoReader(
            known=self.known,
            image_size=encoder.image_size,
            limits=limits,
            workers=workers,
            ahead=2 * batch_size + workers,
        )
        self.to_encode: list[Decoded] = []
        self.waiting: list[Known] = []
        self.recorded: set[bytes] = set()  # contents of photos that the next commit will hold
        self.moved_rows: set[int] = set()
        self.embedded = 0
        self.last_commit = self.started

    def update(self, stores: Sequence[ImageStore], globs: Globs) -> Report:
        with closing(self.known):
            for store in stores:
                self._update_store(Crawl(store=store, globs=globs, engine=self.writer.engine))
            self._commit(finished=True)
        return self.report

    def _update_store(self, crawl: Crawl) -> None:
        crawl.list_store()
        for part in crawl.unlistable:
            self.on_skip(part.prefix, f"cannot be listed: {part.reason}; what the index knows of it stays")
        total = _count_known(self.report, crawl)
        self.on_progress(Progress(done=0, total=total))
        with closing(self.reader.read_all(crawl.store, crawl.changes())) as outcomes:
            for done, outcome in enumerate(outcomes, start=1):
                self._take(outcome, crawl)
                self._stop_if_asked(crawl)
                if done % self.batch_size == 0 or done == total:
                    self.on_progress(Progress(done=done, total=total))
        self._encode(crawl)
        gone = [image_id for image_id in crawl.gone() if image_id not in self.moved_rows]
        self.writer.remove_photos(gone)
        self.writer.forget_failures(crawl.gone_failures())
        self.report.deleted += len(gone)

    def _stop_if_asked(self, crawl: Crawl) -> None:
        if self.stop.is_set():
            self._encode(crawl)
            self._commit(finished=True)
            raise KeyboardInterrupt

    def _take(self, outcome: Decoded | Known | Failed, crawl: Crawl) -> None:
        match outcome:
            case Failed(change=change, reason=reason, damaged=damaged):
                self.report.failed += 1
                self.on_skip(change.listed.key, reason)
                self.writer.add_failure(
                    FailedPhoto(store=crawl.store.name, listed=change.listed, reason=reason, damaged=damaged)
                )
            case Decoded(content_hash=content_hash) if content_hash in self.known:
                # Its twin was under way in another thread when this one looked.
                self.waiting.append(
                    Known(change=outcome.change, content_hash=content_hash, metadata=outcome.photo.metadata)
                )
            case Decoded(content_hash=content_hash):
                self.known.add(content_hash)
                self.to_encode.append(outcome)
            case Known():
                self.waiting.append(outcome)
        if len(self.to_encode) >= self.batch_size or len(self.waiting) >= COMMIT_EVERY_PHOTOS:
            self._encode(crawl)
        due = time.monotonic() - self.last_commit > COMMIT_EVERY_SECONDS
        if self.writer.pending >= COMMIT_EVERY_PHOTOS or (due and self.writer.pending):
            self._commit()

    def _encode(self, crawl: Crawl) -> None:
        """Embed what is decoded, then record it, and the photos that waited for the same content."""
        batch, self.to_encode = self.to_encode, []
        waiting, self.waiting = self.waiting, []
        if batch:
            embeddings = self.encoder.encode_pixels(np.stack([decoded.photo.pixels for decoded in batch]))
            self.embedded += len(batch)
            self.writer.add_vectors([decoded.content_hash for decoded in batch], embeddings)
        for decoded in batch:
            self._record(crawl, decoded.change, decoded.content_hash, decoded.photo.metadata, moved_from=None)
        for known in waiting:
            moved_from = None
            if not known.change.known:
                moved_from = crawl.former_row_of(known.content_hash, taken=self.moved_rows)
            if moved_from is None and self._is_copy(crawl, known):
                self.report.duplicates += 1
            self._record(crawl, known.change, known.content_hash, known.metadata, moved_from=moved_from)

    def _is_copy(self, crawl: Crawl, known: Known) -> bool:
        """Its content is that of another photo, not just its own from before, or that of a photo long deleted."""
        return known.content_hash in self.recorded or crawl.has_other_photo(
            known.content_hash, key=known.change.listed.key
        )

    def _record(
        self, crawl: Crawl, change: Change, content_hash: bytes, metadata: PhotoMetadata, *, moved_from: int | None
    ) -> None:
        self.writer.add_photo(
            NewPhoto(
                store=crawl.store.name,
                listed=change.listed,
                content_hash=content_hash,
                metadata=metadata,
                moved_from=moved_from,
            )
        )
        self.recorded.add(content_hash)
        if moved_from is not None:
            self.moved_rows.add(moved_from)
            self.report.moved += 1
        elif change.known:
            self.report.updated += 1
        else:
            self.report.added += 1

    def _commit(self, *, finished: bool = False) -> None:
        self.report.seconds = time.monotonic() - self.started
        self.report.images_per_second = self.embedded / max(self.report.seconds, 1e-9)
        self.writer.commit(report=self.report.as_dict(), finished=finished)
        self.known.keep_pending({decoded.content_hash for decoded in self.to_encode})
        self.recorded.clear()
        self.last_commit = time.monotonic()


def _open_stores(locations: Iterable[str | os.PathLike[str]]) -> list[ImageStore]:
    """One store for each location; a folder inside another one is listed only once."""
    if isinstance(locations, str | bytes | os.PathLike):  # as a sequence, "~/Pictures" would begin with all of "~"
        raise UsageError(f"stores is {locations!r}; it must be a list of folders")
    stores = {store.prefix: store for store in (open_store(os.fspath(location)) for location in locations)}
    return [
        store
        for prefix, store in stores.items()
        if not any(prefix != other and prefix.startswith(other) for other in stores)
    ]


def _count_known(report: Report, crawl: Crawl) -> int:
    """Count what need not be read; return the number of files that are new or changed."""
    unchanged, still_failing = crawl.count_unchanged(), crawl.count_still_failing()
    report.scanned += crawl.scanned
    report.unchanged += unchanged
    report.failed += still_failing
    return crawl.scanned - unchanged - still_failing
