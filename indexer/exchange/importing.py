"""Photos with their vectors out of files, into an index. What the index has already stays as it is."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from indexer.crawl import Change
from indexer.exchange import Source, open_source
from indexer.exchange.arrivals import Arrival, Facts, Moved, arrival_of, placeholder, placeholder_hash
from indexer.exchange.imported_tags import ImportedTags
from indexer.exchange.trust import compare, identity_for, unit_rows
from indexer.exchange.web import WEB, WebHost
from indexer.reading import Failed, Known, KnownContent, Outcome, PhotoReader
from indexer.report import Report
from indexer.writer import IndexWriter, NewPhoto
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import StoreUnusable, UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.index.schema import encode_key, open_read_only
from searchengine.stores import ImageStore, KnownStores, StoredPhoto
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix

OnProgress = Callable[[int, int], None]
OnSkip = Callable[[str, str], None]  # (key, reason)

COMMIT_EVERY_PHOTOS = 32_768
COMMIT_EVERY_SECONDS = 20.0

KNOWN = """
    SELECT vectors.content_hash FROM images JOIN vectors ON vectors.id = images.vector_id
    WHERE images.store = ? AND images.key = ?
"""


@dataclass(kw_only=True)
class ImportReport:
    """photos = added + known, of which those were in the index under their names.

    Of the added ones, `read` were read for what the files do not tell, and `unread` have only their place.
    `vectors` were new to the index; `compared` photos were embedded to see that the encoder is the right one.
    """

    photos: int = 0
    added: int = 0
    known: int = 0
    vectors: int = 0
    read: int = 0
    unread: int = 0
    compared: int = 0
    model: str = ""
    fingerprint: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_photos(
    index: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    encoder: Encoder | None = None,
    root: str | os.PathLike[str] | None = None,
    moved: Moved | None = None,
    read: bool = True,
    workers: int | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    isolated: bool = True,
    on_progress: OnProgress = lambda done, total: None,
    on_skip: OnSkip = lambda key, reason: None,
    stop: threading.Event | None = None,
) -> ImportReport:
    """Take the photos of an export in `folder` into the index in the folder `index`; make it if there is none.

    `encoder` made the vectors; None where the files say what did. Paths that are not absolute are below `root`, as a
    rule `folder`; what `moved` since the export is named by where it is now. Photos of which the files do not tell
    content, size and time are read for that, unless `read` is false. One that is not read keeps its place, with a hash
    of its name as that of its content, and is read by the first `indexer.build` that finds it.

    Raises UsageError for files that are damaged, belong to no export, hold vectors that are not of length 1, or do not
    say what made them; ModelMismatch where another encoder did; StoreUnusable; IndexUnusable and its kin. Once `stop`
    is set, what is done is committed, and KeyboardInterrupt raised; the next import skips what is known.
    """
    place = Path(os.path.abspath(os.path.expanduser(folder)))
    if not place.is_dir():
        raise UsageError(f"there is no folder {printable(str(place))}; give the one that holds the exported files")
    source = open_source(place)
    identity = identity_for(source.identity, encoder, place=place)
    with (
        IndexWriter(index, encoder=identity) as writer,
        closing(KnownContent(writer.paths.database)) as contents,
        closing(open_read_only(writer.paths.database)) as tables,
    ):
        return _Import(
            writer=writer,
            contents=contents,
            tables=tables,
            source=source,
            identity=identity,
            place=place,
            moved=moved,
            root=Path(os.path.abspath(os.path.expanduser(root))) if root else place,
            doubted=encoder if source.identity is None and read else None,
            read=read,
            workers=workers or os.cpu_count() or 1,
            limits=limits,
            isolated=isolated,
            on_progress=on_progress,
            on_skip=on_skip,
            stop=stop or threading.Event(),
        ).run()


class _Everything:
    """Takes every content for known, so that photos are hashed and looked at, and not decoded."""

    def __contains__(self, content_hash: object) -> bool:
        return True


@dataclass(kw_only=True)
class _Import:
    """The state of one import. `doubted`: the encoder, where only the user says that it made the vectors."""

    writer: IndexWriter
    contents: KnownContent
    tables: sqlite3.Connection
    source: Source
    identity: IndexIdentity
    place: Path
    root: Path
    moved: Moved | None
    doubted: Encoder | None
    read: bool
    workers: int
    limits: DecodeLimits
    isolated: bool
    on_progress: OnProgress
    on_skip: OnSkip
    stop: threading.Event
    stores: KnownStores = field(default_factory=KnownStores)
    report: ImportReport = field(default_factory=ImportReport)
    uncommitted: set[tuple[str, str]] = field(default_factory=set)
    hosts: dict[ImageStore, ImageStore] = field(default_factory=dict)

    def run(self) -> ImportReport:
        self.report.model, self.report.fingerprint = self.identity.encoder, self.identity.fingerprint
        self.tags = ImportedTags(fingerprint=self.identity.fingerprint)
        self.started = self.last_commit = time.monotonic()
        self.on_progress(0, self.source.photos)
        for records, matrix in self.source.chunks():
            first = self.report.photos
            vectors = unit_rows(matrix, identity=self.identity, place=self.place, first=first)
            arrivals = [self._arrival(record, number=first + row + 1) for row, record in enumerate(records)]
            if self.doubted is not None and not self.report.compared:
                self.report.compared = compare(
                    arrivals, vectors, encoder=self.doubted, stores=self.stores, limits=self.limits, stop=self.stop
                )
            try:
                self._take(arrivals, vectors)
            except StoreUnusable:  # a bucket that does not answer any more
                self._commit(finished=True)
                raise
            if self.stop.is_set():
                self._commit(finished=True)
                raise KeyboardInterrupt
        self._commit(finished=True)
        return self.report

    def _arrival(self, record: dict[str, Any], *, number: int) -> Arrival:
        try:
            return arrival_of(record, root=self.root, moved=self.moved)
        except UsageError as error:
            raise UsageError(f"{printable(str(self.place))}, photo {number:,}: {error}") from None

    def _take(self, arrivals: Sequence[Arrival], vectors: FloatMatrix) -> None:
        """Queue those that are new, as far as they were read before `stop` was set; commit from time to time."""
        new: list[int] = []
        for place, arrival in enumerate(arrivals):
            if not self._is_known(arrival):
                new.append(place)
                self.uncommitted.add((arrival.store, arrival.key))
        self.report.known += len(arrivals) - len(new)
        self.report.photos += len(arrivals) - len(new)
        places: list[int] = []
        hashes: list[bytes] = []
        try:
            with closing(self._facts_of([arrivals[place] for place in new])) as facts:
                for place, found in zip(new, facts, strict=False):
                    if found.content_hash not in self.contents:
                        self.contents.add(found.content_hash)
                        hashes.append(found.content_hash)
                        places.append(place)
                    self._record(arrivals[place], found)
        finally:
            if places:
                self.writer.add_vectors(hashes, vectors[places])
                self.report.vectors += len(places)
        due = time.monotonic() - self.last_commit > COMMIT_EVERY_SECONDS
        if self.writer.pending >= COMMIT_EVERY_PHOTOS or due:
            self._commit()

    def _is_known(self, arrival: Arrival) -> bool:
        """Whether the index, or a row before this one, has a photo of that name, and not just its place."""
        if (arrival.store, arrival.key) in self.uncommitted:
            return True
        row = self.tables.execute(KNOWN, (encode_key(arrival.store), encode_key(arrival.key))).fetchone()
        return row is not None and row[0] != placeholder_hash(arrival.store, arrival.key)

    def _record(self, arrival: Arrival, facts: Facts) -> None:
        photo = NewPhoto(
            store=arrival.store, listed=facts.listed, content_hash=facts.content_hash, metadata=facts.metadata
        )
        self.writer.add_photo(photo)
        self.tags.add(facts.content_hash, arrival.tags)
        self.report.photos += 1
        self.report.added += 1
        self.on_progress(self.report.photos, self.source.photos)

    def _facts_of(self, arrivals: Sequence[Arrival]) -> Generator[Facts, None, None]:
        """What is known of each, in their order, as far as it was read before `stop` was set."""
        lacking = [arrival for arrival in arrivals if arrival.facts is None]
        with closing(self._outcomes(lacking if self.read else [])) as outcomes:
            for arrival in arrivals:
                if arrival.facts is not None:
                    yield arrival.facts
                    continue
                outcome = next(outcomes, None)
                if outcome is None and self.read:
                    return
                yield self._facts_from(outcome, arrival)

    def _facts_from(self, outcome: Outcome | None, arrival: Arrival) -> Facts:
        if isinstance(outcome, Known):
            self.report.read += 1
            return Facts(content_hash=outcome.content_hash, listed=outcome.change.listed, metadata=outcome.metadata)
        if isinstance(outcome, Failed):
            self.on_skip(arrival.key, outcome.reason)
        self.report.unread += 1
        return placeholder(arrival.store, arrival.key)

    def _outcomes(self, arrivals: Sequence[Arrival]) -> Generator[Outcome, None, None]:
        """What came of reading each; none is read where there are none."""
        if not arrivals:
            return
        reader = PhotoReader(
            known=_Everything(),
            image_size=1,
            limits=self.limits,
            workers=self.workers,
            ahead=2 * self.workers,
            isolated=self.isolated,
        )
        changes = (
            Change(store=self._store_of(each), listed=StoredPhoto(each.key, 0, 0), known=False) for each in arrivals
        )
        yield from reader.read_all(changes, stop=self.stop)

    def _store_of(self, arrival: Arrival) -> ImageStore:
        store = self.stores.of(arrival.store, arrival.key)
        if arrival.store not in WEB:
            return store
        if store not in self.hosts:
            self.hosts[store] = cast(ImageStore, WebHost(store))  # a reader asks no more of a store
        return self.hosts[store]

    def _commit(self, *, finished: bool = False) -> None:
        self.last_commit = time.monotonic()
        self.report.seconds = self.last_commit - self.started
        counters = Report(
            scanned=self.report.photos,
            added=self.report.added,
            unchanged=self.report.known,
            seconds=self.report.seconds,
            model=self.report.model,
        )
        self.writer.commit(report=counters.as_dict(), finished=finished, with_photos=self.tags.record)
        self.contents.keep_pending(set())
        self.uncommitted.clear()
