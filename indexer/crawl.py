"""What changed in a store since the index last saw it: a listing held against the known rows, in SQL.

The listing goes into a temporary table, never into memory, so a store of any size takes the same room.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from searchengine.decode import EXTENSIONS
from searchengine.index.filters import starts_with
from searchengine.index.schema import Key, encode_key, failures, images, vectors
from searchengine.stores import ImageStore, StoredPhoto, Unlistable

ROWS_PER_INSERT = 5000

_scratch = sa.MetaData()

listing = sa.Table(
    "listing",
    _scratch,
    sa.Column("key", Key, primary_key=True),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.Integer, nullable=False),
    prefixes=["TEMPORARY"],
    sqlite_with_rowid=False,
)


@dataclass(frozen=True, kw_only=True)
class Globs:
    """Patterns over a file's name or its path below the folder, where ``*`` crosses folders; case does not matter.

    A path is matched with and without a slash before it, so that ``*/screenshots/*`` means the topmost folder too.

    With `include`, a run looks only at files that match one; the others stay in the index as they are.
    Files that match an `exclude` are left out of the index.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def excludes(self, path: str) -> bool:
        return _matches(path, self.exclude)

    def includes(self, path: str) -> bool:
        return not self.include or _matches(path, self.include)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A listed file that the index does not know as it is now."""

    listed: StoredPhoto
    known: bool
    """Whether the index has a photo of that name: then this is an update, otherwise an addition."""


@dataclass(kw_only=True)
class Crawl:
    """One store, listed into a temporary table of the index's own connection."""

    store: ImageStore
    globs: Globs
    engine: sa.Engine
    scanned: int = 0
    unlistable: list[Unlistable] = field(default_factory=list)

    def list_store(self) -> None:
        """Fill the temporary table. Raises StoreUnusable."""
        with self.engine.begin() as connection:
            _scratch.drop_all(connection)
            _scratch.create_all(connection, checkfirst=False)
        rows: list[tuple[bytes, int, int]] = []
        for item in self.store.scan():
            if isinstance(item, Unlistable):
                self.unlistable.append(item)
                continue
            if not self._wanted(item.key):
                continue
            rows.append((encode_key(item.key), item.size_bytes, item.mtime_ns))
            if len(rows) == ROWS_PER_INSERT:
                self._insert(rows)
        self._insert(rows)

    def count_unchanged(self) -> int:
        return self._count(sa.and_(*_same_as(images, self.store.name)))

    def count_still_failing(self) -> int:
        return self._count(sa.and_(*_same_as(failures, self.store.name)))

    def changes(self) -> Iterator[Change]:
        """Files to read: new or changed ones, less those that failed before and have not changed since."""
        name = self.store.name
        known = sa.exists().where(images.c.store == name, images.c.key == listing.c.key)
        query = sa.select(listing, known).where(
            ~sa.exists().where(*_same_as(images, name)), ~sa.exists().where(*_same_as(failures, name))
        )
        for keys in self._pages(query):
            for key, size_bytes, mtime_ns, is_known in keys:
                yield Change(listed=StoredPhoto(key, size_bytes, mtime_ns), known=bool(is_known))

    def former_row_of(self, content_hash: bytes, *, taken: Container[int]) -> int | None:
        """The id, not one of `taken`, of a known photo with this content whose file is gone: the one that moved."""
        query = (
            sa.select(images.c.id, images.c.key)
            .join(vectors, vectors.c.id == images.c.vector_id)
            .where(vectors.c.content_hash == content_hash, *self._not_listed(images))
            .order_by(images.c.id)
        )
        return next((row.id for row in self._rows(query) if row.id not in taken and self._is_gone(row.key)), None)

    def gone(self) -> list[int]:
        """Ids of known photos whose files the store no longer lists, though it could list their folders."""
        query = sa.select(images.c.id, images.c.key).where(*self._not_listed(images))
        return [row.id for row in self._rows(query) if self._is_gone(row.key)]

    def gone_failures(self) -> list[tuple[str, str]]:
        """Names of failed files that are gone, or that are what the index knew before they failed."""
        names = sa.select(failures.c.store, failures.c.key)
        unchanged = sa.exists().where(listing.c.key == failures.c.key, *_same_as(images, self.store.name))
        gone = [row for row in self._rows(names.where(*self._not_listed(failures))) if self._is_gone(row.key)]
        as_before = self._rows(names.where(failures.c.store == self.store.name, unchanged))
        return [(row.store, row.key) for row in (*gone, *as_before)]

    def has_other_photo(self, content_hash: bytes, *, key: str) -> bool:
        """Whether the index has a photo of this content under another name than `key` in this store."""
        query = (
            sa.select(images.c.id)
            .join(vectors, vectors.c.id == images.c.vector_id)
            .where(vectors.c.content_hash == content_hash)
            .where(sa.or_(images.c.store != self.store.name, images.c.key != key))
            .limit(1)
        )
        return bool(self._rows(query))

    def _not_listed(self, table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            table.c.store == self.store.name,
            starts_with(table.c.key, self.store.prefix),
            ~sa.exists().where(listing.c.key == table.c.key),
        )

    def _is_gone(self, key: str) -> bool:
        """Not listed, and neither because its folder could not be, nor because this run does not look at it."""
        if any(key == part.prefix or key.startswith(os.path.join(part.prefix, "")) for part in self.unlistable):
            return False
        path = key.removeprefix(self.store.prefix)
        return self.globs.excludes(path) or self.globs.includes(path)

    def _wanted(self, key: str) -> bool:
        if os.path.splitext(key)[1].lower() not in EXTENSIONS:
            return False
        if not self.globs.include and not self.globs.exclude:
            return True
        path = key.removeprefix(self.store.prefix)
        return self.globs.includes(path) and not self.globs.excludes(path)

    def _insert(self, rows: list[tuple[bytes, int, int]]) -> None:
        if rows:
            with self.engine.begin() as connection:
                # Past SQLAlchemy, whose handling of parameters would take longer than listing the files does.
                connection.exec_driver_sql("INSERT INTO listing (key, size_bytes, mtime_ns) VALUES (?, ?, ?)", rows)
            self.scanned += len(rows)
            rows.clear()

    def _count(self, condition: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(listing).where(sa.exists().where(condition))
        return int(self._rows(query)[0][0])

    def _rows(self, query: sa.Executable) -> Sequence[Any]:
        with self.engine.begin() as connection:
            return connection.execute(query).all()

    def _pages(self, query: sa.Select[Any]) -> Iterator[Sequence[Any]]:
        """The rows of `query` by key, in pages: no cursor stays open while the writer commits."""
        last = b""
        while True:
            after = sa.type_coerce(listing.c.key, sa.LargeBinary) > last
            page = self._rows(query.where(after).order_by(listing.c.key).limit(ROWS_PER_INSERT))
            if not page:
                return
            last = encode_key(page[-1].key)
            yield page


def _same_as(table: sa.Table, store: str) -> tuple[sa.ColumnElement[bool], ...]:
    """The row of `table` for a listed file, unchanged by size and time."""
    return (
        table.c.store == store,
        table.c.key == listing.c.key,
        table.c.size_bytes == listing.c.size_bytes,
        table.c.mtime_ns == listing.c.mtime_ns,
    )


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    lowered = path.lower()
    names = (os.path.basename(lowered), lowered, f"/{lowered}")
    return any(fnmatch.fnmatchcase(name, pattern.lower()) for name in names for pattern in patterns)
