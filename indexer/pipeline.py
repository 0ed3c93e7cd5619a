"""scan -> read, hash, decode (threads) -> batches -> encoder (threads) -> writer: bring an index up to date.

At most `4 * batch_size + workers` photos are under way at a time and crops are small, so memory does not grow with the
library. A file that cannot be used costs that file alone and is recorded with its reason. With an engine, its workers
read, decode and encode (indexer/engines/).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from indexer.copies import Copies
from indexer.crawl import Change, Crawl
from indexer.encoding import Batch, Encoded, EncodedBefore, EncoderThreads, Encoding, Outcome
from indexer.engines import Engine
from indexer.engines.crew import Crew
from indexer.reading import Decoded, Failed, Known, KnownContent, PhotoReader
from indexer.report import OnProgress, OnSkip, Progress, Report, StageClock
from indexer.scope import Globs, parts_of
from indexer.writer import FailedPhoto, IndexWriter, NewPhoto
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import SearchEngineError, UsageError
from searchengine.index.layout import IndexPaths
from searchengine.metadata import PhotoMetadata
from searchengine.stores import ImageStore, StoredPhoto, Unlistable, open_stores
from searchengine.vectors import Encoder

COMMIT_EVERY_PHOTOS = 1000
COMMIT_EVERY_SECONDS = 20.0


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
    isolated: bool = True,
    engine: Engine | None = None,
    retry_failed: bool = False,
    within: Sequence[str] | None = None,
    on_progress: OnProgress = lambda progress: None,
    on_skip: OnSkip = lambda key, reason: None,
    stop: threading.Event | None = None,
) -> Report:
    """Bring the index in the folder `index` up to date with `stores` (local folders); make it if there is none.

    `isolated` decodes in processes of their own, so that a photo that crashes a decoder costs that photo alone; without
    it, threads of this process decode. `engine` has workers of its own read, decode and encode; its encoder must be the
    same as `encoder`. `retry_failed` reads files again that failed before. `within` names folders, by their real
    paths; then only what is below them is looked at.

    Raises UsageError, StoreUnusable, IndexUnusable and its kin, ModelMismatch. Once `stop` is set, the run commits what
    is done and raises KeyboardInterrupt; the next run takes up from there.
    """
    if batch_size < 1 or (workers or 0) < 0:
        raise UsageError(f"batch_size is {batch_size}, workers {workers}; give at least 1, or workers 0 for all cores")
    parts = parts_of(open_stores(stores), within)
    globs = Globs(include=tuple(include), exclude=tuple(exclude))
    with IndexWriter(index, encoder=encoder) as writer:
        crawl = Crawl(parts=parts, globs=globs, engine=writer.engine, retry_failed=retry_failed)
        run = _Run(
            crawl=crawl,
            writer=writer,
            encoder=encoder,
            workers=workers,
            batch_size=batch_size,
            limits=limits,
            isolated=isolated,
            engine=engine,
            on_progress=on_progress,
            on_skip=on_skip,
            stop=stop or threading.Event(),
        )
        return run.update()


class _Run:
    """The state of one `build`: what is under way between the stages."""

    def __init__(
        self,
        *,
        crawl: Crawl,
        writer: IndexWriter,
        encoder: Encoder,
        workers: int | None,
        batch_size: int,
        limits: DecodeLimits,
        isolated: bool,
        engine: Engine | None,
        on_progress: OnProgress,
        on_skip: OnSkip,
        stop: threading.Event,
    ) -> None:
        self.crawl = crawl
        self.copies = Copies(writer.engine)
        self.writer = writer
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.on_skip = on_skip
        self.stop = stop
        self.report = Report(model=encoder.name)
        self.started = time.monotonic()
        self.encoder = encoder
        self.workers = workers
        self.limits = limits
        self.isolated = isolated
        self.engine = engine
        self.clock = StageClock(workers=workers or os.cpu_count() or 1)
        self.encoding: Encoding = EncodedBefore() if engine else EncoderThreads(encoder, clock=self.clock)
        self.known = KnownContent(IndexPaths(writer.folder).database)
        self.to_encode: list[Decoded | Encoded] = []
        self.waiting: list[Known] = []
        self.recorded: list[tuple[str, str]] = []  # names of photos that the next commit adds or updates
        self.moved_rows: set[int] = set()  # rows that the next commit gives a new name
        self.last_moved: dict[bytes, int] = {}  # content -> the last of these rows that had it
        self.embedded = 0
        self.last_commit = self.started

    def update(self) -> Report:
        with closing(self.known), closing(self.encoding):
            with self.clock.working("list"):
                self.crawl.list_stores(stop=self.stop)
            self._stop_if_asked()
            self.crawl.remember_mounts()
            for store, part in self.crawl.unlistable:
                self._tell_unlistable(store, part)
            self._read_changes()
            self._forget_gone()
            self._finish()
        return self.report

    def _tell_unlistable(self, store: ImageStore, part: Unlistable) -> None:
        self.report.unlistable += 1
        reason = f"cannot be listed: {part.reason}; what the index knows of it stays"
        self.on_skip(part.prefix, reason)
        listed = StoredPhoto(part.prefix, size_bytes=0, mtime_ns=0)
        self.writer.add_failure(FailedPhoto(store=store.name, listed=listed, reason=reason, damaged=False))

    def _read_changes(self) -> None:
        total = self.crawl.count_known(self.report)
        self.on_progress(Progress(done=0, total=total))
        self.clock.restart()
        with closing(self._outcomes(total)) as outcomes:
            for done, outcome in enumerate(outcomes, start=1):
                self._take(outcome)
                self._stop_if_asked()
                if done % self.batch_size == 0 or done == total:
                    self.on_progress(Progress(done=done, total=total, busiest=self.clock.busiest()))
        self._stop_if_asked()
        self._encode_the_rest()

    def _outcomes(self, total: int) -> Generator[Outcome, None, None]:
        """What becomes of each of `total` changes. Where that breaks off, what is done is committed."""
        outcomes: Iterator[Outcome]
        if self.engine:
            crew = Crew(
                self.engine,
                encoder=self.encoder,
                known=self.known,
                workers=self.workers,
                batch_size=self.batch_size,
                limits=self.limits,
                isolated=self.isolated,
                clock=self.clock,
            )
            outcomes = crew.read_all(self.crawl.changes(), total=total, stop=self.stop)
        else:
            reader = PhotoReader(
                known=self.known,
                image_size=self.encoder.image_size,
                limits=self.limits,
                workers=self.clock.workers,
                ahead=self.batch_size + self.clock.workers,
                isolated=self.isolated,
                clock=self.clock,
            )
            outcomes = reader.read_all(self.crawl.changes(), stop=self.stop)
        try:
            yield from outcomes
        except SearchEngineError:
            self._encode_the_rest()
            self._commit()
            raise

    def _forget_gone(self) -> None:
        for page in self.crawl.gone():
            gone = [image_id for image_id in page if image_id not in self.moved_rows]
            self.writer.remove_photos(gone)
            self.report.deleted += len(gone)
            self._commit_if_due()
            self._stop_if_asked()
        for names in self.crawl.gone_failures():
            self.writer.forget_failures(names)
            self._commit_if_due()

    def _stop_if_asked(self) -> None:
        if self.stop.is_set():
            self._encode_the_rest()
            self._finish()
            raise KeyboardInterrupt

    def _take(self, outcome: Outcome) -> None:
        match outcome:
            case Failed(change=change, reason=reason, damaged=damaged):
                self.report.failed += 1
                self.on_skip(change.listed.key, reason)
                self.writer.add_failure(
                    FailedPhoto(store=change.store.name, listed=change.listed, reason=reason, damaged=damaged)
                )
            case Decoded() | Encoded() if outcome.content_hash in self.known:
                ((change, content_hash, metadata),) = Batch(decoded=[outcome]).new  # its twin was under way elsewhere
                self.waiting.append(Known(change=change, content_hash=content_hash, metadata=metadata))
            case Decoded() | Encoded():
                self.known.add(outcome.content_hash)
                self.to_encode.append(outcome)
            case Known():
                self.waiting.append(outcome)
        if len(self.to_encode) >= self.batch_size or len(self.waiting) >= COMMIT_EVERY_PHOTOS:
            self._encode()
        self._record_batches(self.encoding.take_back(wait=False))
        self._commit_if_due()

    def _commit_if_due(self) -> None:
        due = time.monotonic() - self.last_commit > COMMIT_EVERY_SECONDS
        if self.writer.pending >= COMMIT_EVERY_PHOTOS or (due and self.writer.pending):
            self._commit()

    def _encode(self) -> None:
        """Hand what is decoded to the encoder, and record what that has done meanwhile."""
        batch = Batch(decoded=self.to_encode, waiting=self.waiting)
        self.to_encode, self.waiting = [], []
        self._record_batches(self.encoding.hand_over(batch))

    def _encode_the_rest(self) -> None:
        self._encode()
        self._record_batches(self.encoding.take_back())

    def _record_batches(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._record_batch(batch)

    def _record_batch(self, batch: Batch) -> None:
        """Queue vectors and rows for the next commit."""
        if batch.decoded:
            self.embedded += len(batch.decoded)
            self.writer.add_vectors(batch.hashes, batch.embeddings)
        for change, content_hash, metadata in batch.new:
            self._record(change, content_hash, metadata, moved_from=None)
        for known in batch.waiting:
            moved_from = None
            if not known.change.known:
                after = self.last_moved.get(known.content_hash, 0)
                moved_from = self.crawl.former_row_of(known.content_hash, after=after)
            self._record(known.change, known.content_hash, known.metadata, moved_from=moved_from)

    def _record(self, change: Change, content_hash: bytes, metadata: PhotoMetadata, *, moved_from: int | None) -> None:
        self.writer.add_photo(
            NewPhoto(
                store=change.store.name,
                listed=change.listed,
                content_hash=content_hash,
                metadata=metadata,
                moved_from=moved_from,
            )
        )
        if moved_from is not None:
            self.moved_rows.add(moved_from)
            self.last_moved[content_hash] = moved_from
            self.report.moved += 1
            return
        self.recorded.append((change.store.name, change.listed.key))
        if change.known:
            self.report.updated += 1
        else:
            self.report.added += 1

    def _finish(self) -> None:
        self._commit()
        self.report.duplicates = self.copies.count()
        self._commit(finished=True)

    def _commit(self, *, finished: bool = False) -> None:
        self.report.seconds = time.monotonic() - self.started
        self.report.images_per_second = self.embedded / max(self.report.seconds, 1e-9)
        self.report.seconds_by_stage = {stage: round(seconds, 3) for stage, seconds in self.clock.seconds().items()}
        with self.clock.working("write"):
            self.writer.commit(report=self.report.as_dict(), finished=finished)
            self.copies.note(self.recorded)
        self.known.keep_pending({*Batch(decoded=self.to_encode).hashes, *self.encoding.hashes_under_way})
        self.recorded.clear()
        self.moved_rows.clear()  # they have their new names now
        self.last_moved.clear()
        self.last_commit = time.monotonic()
