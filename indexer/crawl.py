"""What changed in the stores since the index last saw them: a listing held against the known rows, in SQL.

The listing goes into a temporary table, never into memory, so a library of any size takes the same room.

A known photo that is not listed is gone only if it would have been listed were it there: not below a folder that could
not be listed, nor where a disk used to be mounted, nor outside of what the run looks at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from indexer.mounts import changed_mounts, record_mounts, recorded_device
from indexer.report import Report
from indexer.scope import Globs, Part
from searchengine.errors import ImageError, StoreUnusable
from searchengine.formats import is_photo
from searchengine.index.filters import starts_with
from searchengine.index.schema import Key, encode_key, failures, images, vectors
from searchengine.stores import ImageStore, KnownStores, Mount, StoredPhoto, Unlistable, device_of

ROWS_PER_INSERT = 5000
ROWS_PER_PAGE = 1000  # a page is held while its photos are read
ROWS_OF_ONE_CONTENT = 100

ListedRow = tuple[bytes, bytes, int, int, str | None]

_scratch = sa.MetaData()

listing = sa.Table(
    "listing",
    _scratch,
    sa.Column("store", Key, primary_key=True),
    sa.Column("key", Key, primary_key=True),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.Integer, nullable=False),
    sa.Column("etag", sa.Text),
    prefixes=["TEMPORARY"],
    sqlite_with_rowid=False,
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A listed file that the index does not know as it is now."""

    store: ImageStore
    listed: StoredPhoto
    known: bool
    """Whether the index has a photo of that name: then this is an update, otherwise an addition."""


@dataclass(kw_only=True)
class Crawl:
    """The parts of some stores, listed into a temporary table of the index's own connection."""

    parts: Sequence[Part]
    globs: Globs
    engine: sa.Engine
    retry_failed: bool = False
    scanned: int = 0
    ignored: int = 0
    unlistable: list[tuple[ImageStore, Unlistable]] = field(default_factory=list)
    _mounts: list[tuple[Part, Mount]] = field(default_factory=list)
    _untold: set[tuple[str, str]] = field(default_factory=set)
    """Stores, each with a name or a prefix of which this listing tells nothing."""
    _known_stores: KnownStores = field(default_factory=KnownStores)

    def list_stores(self, *, stop: threading.Event) -> None:
        """Fill the temporary table, until `stop` is set."""
        with self.engine.begin() as connection:
            _scratch.drop_all(connection)
            _scratch.create_all(connection, checkfirst=False)
        for part in self.parts:
            self._list(part, stop)
            if stop.is_set():
                return
        self.scanned = int(self._rows(sa.select(sa.func.count()).select_from(listing))[0][0])
        for part in self.parts:
            self._find_missing_mounts(part)

    def remember_mounts(self) -> None:
        """Record the file systems that this listing passed through, before any photo found there is recorded."""
        with self.engine.begin() as connection:
            for part in self.parts:
                found = {mount.prefix: mount.device for at, mount in self._mounts if at is part}
                keep = {prefix for store, prefix in self._untold if store == part.store.name}
                record_mounts(connection, part, found=found, keep=keep)

    def count_known(self, report: Report) -> int:
        """Count what need not be read; return the number of files that are new or changed."""
        unchanged = self._count(sa.and_(*_same_as(images)))
        still_failing = 0 if self.retry_failed else self._count(sa.and_(*_same_as(failures)))
        report.scanned += self.scanned
        report.ignored += self.ignored
        report.unchanged += unchanged
        report.failed += still_failing
        return self.scanned - unchanged - still_failing

    def changes(self) -> Iterator[Change]:
        """Files to read: new or changed ones, less those that failed before and have not changed since."""
        known = sa.exists().where(images.c.store == listing.c.store, images.c.key == listing.c.key)
        query = sa.select(listing, known).where(~sa.exists().where(*_same_as(images)))
        if not self.retry_failed:
            query = query.where(~sa.exists().where(*_same_as(failures)))
        for page in self._pages(query, listing):
            for store, key, size_bytes, mtime_ns, etag, is_known in page:
                listed = StoredPhoto(key, size_bytes, mtime_ns, etag)
                yield Change(store=self._store_of(store, key), listed=listed, known=bool(is_known))

    def _store_of(self, name: str, key: str) -> ImageStore:
        """Of two buckets, say, that which was listed."""
        return next(part.store for part in self.parts if part.store.name == name and key.startswith(part.prefix))

    def former_row_of(self, content_hash: bytes, *, after: int) -> int | None:
        """The first id beyond `after` of a known photo with this content whose file is gone: one that moved."""
        last = after
        while True:
            query = (
                sa.select(images.c.id, images.c.store, images.c.key)
                .join(vectors, vectors.c.id == images.c.vector_id)
                .where(vectors.c.content_hash == content_hash, images.c.id > last, ~_is_listed(images))
                .order_by(images.c.id)
                .limit(ROWS_OF_ONE_CONTENT)
            )
            page = self._rows(query)
            if not page:
                return None
            for row in page:
                if self._is_gone_anywhere(row.store, row.key):
                    return int(row.id)
            last = page[-1].id

    def gone(self) -> Iterator[list[int]]:
        """Pages of ids of known photos whose files are no longer there."""
        for part in self.parts:
            query = sa.select(images.c.store, images.c.key, images.c.id).where(*_below(images, part))
            for page in self._pages(query.where(~_is_listed(images)), images):
                yield [row.id for row in page if self._is_gone(part, row.key)]

    def gone_failures(self) -> Iterator[list[tuple[str, str]]]:
        """Pages of names of failed files that are gone, or that are what the index knew before they failed."""
        names = sa.select(failures.c.store, failures.c.key)
        for part in self.parts:
            for page in self._pages(names.where(*_below(failures, part), ~_is_listed(failures)), failures):
                yield [(row.store, row.key) for row in page if self._is_gone(part, row.key)]
            as_before = sa.exists().where(
                listing.c.store == failures.c.store, listing.c.key == failures.c.key, *_same_as(images)
            )
            for page in self._pages(names.where(*_below(failures, part), as_before), failures):
                yield [(row.store, row.key) for row in page]

    # -- listing -----------------------------------------------------------------------------------------------

    def _list(self, part: Part, stop: threading.Event) -> None:
        rows: list[ListedRow] = []
        store = encode_key(part.store.name)
        try:
            for item in part.store.scan(part.prefix):
                if stop.is_set():
                    return
                match item:
                    case StoredPhoto(key, size_bytes, mtime_ns, etag):
                        if self._wanted(part.store, key):
                            rows.append((store, encode_key(key), size_bytes, mtime_ns, etag))
                            if len(rows) == ROWS_PER_INSERT:
                                self._insert(rows)
                    case Unlistable():
                        self._tells_nothing(part.store, item)
                    case Mount():
                        self._mounts.append((part, item))
        except StoreUnusable as error:
            self._tells_nothing(part.store, Unlistable(part.prefix, str(error)))
        self._insert(rows)

    def _find_missing_mounts(self, part: Part) -> None:
        with self.engine.begin() as connection:
            for prefix, mounts_below in changed_mounts(connection, part):
                known = sa.select(images.c.key).where(*_below(images, Part(store=part.store, prefix=prefix)))
                known = known.where(*(~starts_with(images.c.key, other) for other in mounts_below))
                found = connection.execute(known.where(_is_listed(images)).limit(1)).first()
                if (
                    (part.store.name, prefix) not in self._untold
                    and not found
                    and any(self._is_looked_at(part.store, key) for (key,) in connection.execute(known))
                ):
                    reason = "the disk that was there is not mounted (--exclude forgets what was on it)"
                    self._tells_nothing(part.store, Unlistable(prefix, reason))

    def _tells_nothing(self, store: ImageStore, part: Unlistable) -> None:
        self.unlistable.append((store, part))
        # The name of an entry that could not be looked at may be that of a folder.
        self._untold |= {(store.name, part.prefix), (store.name, os.path.join(part.prefix, ""))}

    def _wanted(self, store: ImageStore, key: str) -> bool:
        if not self._is_looked_at(store, key):
            return False
        try:
            wanted = is_photo(store, key)
        except ImageError:
            self._untold.add((store.name, key))
            return False
        self.ignored += not wanted
        return wanted

    def _is_looked_at(self, store: ImageStore, key: str) -> bool:
        if not self.globs.include and not self.globs.exclude:
            return True
        path = key.removeprefix(store.prefix)
        return self.globs.includes(path) and not self.globs.excludes(path)

    def _insert(self, rows: list[ListedRow]) -> None:
        if rows:
            with self.engine.begin() as connection:
                # Past SQLAlchemy, whose handling of parameters would take longer than listing the files does.
                # A folder that is being changed may list a name twice.
                connection.exec_driver_sql("INSERT OR REPLACE INTO listing VALUES (?, ?, ?, ?, ?)", rows)
            rows.clear()

    # -- what is gone ------------------------------------------------------------------------------------------

    def _is_gone(self, part: Part, key: str) -> bool:
        """Of a photo in `part` that was not listed: whether it is not there, or shall not be in the index."""
        path = key.removeprefix(part.store.prefix)
        if self.globs.excludes(path):
            return True
        # One that could not be listed, and is in `failures` for that; of a list of photos, that is all of it.
        is_folder = key.endswith(os.sep) or not key
        if self._is_untold(part.store, key) or not (is_folder or self.globs.includes(path)):
            return False
        if is_folder or part.store.is_gone(key):
            return True
        return not self._wanted(part.store, key) and not self._is_untold(part.store, key)

    def _is_gone_anywhere(self, store: str, key: str) -> bool:
        for part in self.parts:
            if part.store.name == store and key.startswith(part.prefix):
                return self._is_gone(part, key)
        # Outside of what this run looks at, its file system must be there to tell that it is not on it.
        with self.engine.begin() as connection:
            device = recorded_device(connection, store, key)
        is_there = self._known_stores.is_there
        return device is not None and not is_there(store, key) and device_of(store, key) == device

    def _is_untold(self, store: ImageStore, key: str) -> bool:
        if not self._untold:
            return False
        above = (key[: position + 1] for position, character in enumerate(key) if character == os.sep)
        return any((store.name, prefix) in self._untold for prefix in ("", key, *above))

    # -- SQL ---------------------------------------------------------------------------------------------------

    def _count(self, condition: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(listing).where(sa.exists().where(condition))
        return int(self._rows(query)[0][0])

    def _rows(self, query: sa.Executable) -> Sequence[Any]:
        with self.engine.begin() as connection:
            return connection.execute(query).all()

    def _pages(self, query: sa.Select[Any], table: sa.Table) -> Iterator[Sequence[Any]]:
        """The rows of `query` by store and key of `table`, in pages: no cursor stays open while the writer commits."""
        name = sa.tuple_(*(sa.type_coerce(column, sa.LargeBinary) for column in (table.c.store, table.c.key)))
        last = (b"", b"")
        while True:
            page = self._rows(query.where(name > last).order_by(table.c.store, table.c.key).limit(ROWS_PER_PAGE))
            if not page:
                return
            last = (encode_key(page[-1].store), encode_key(page[-1].key))
            yield page


def _same_as(table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
    """The row of `table` for a listed file, unchanged by size and time, and by its tag where its store gives any."""
    columns = ("store", "key", "size_bytes", "mtime_ns")
    same_tag = table.c.etag.is_not_distinct_from(listing.c.etag)
    return *(table.c[column] == listing.c[column] for column in columns), same_tag


def _is_listed(table: sa.Table) -> sa.ColumnElement[bool]:
    return sa.exists().where(listing.c.store == table.c.store, listing.c.key == table.c.key)


def _below(table: sa.Table, part: Part) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.store == part.store.name, starts_with(table.c.key, part.prefix)
