"""Photos by a list of their places (searchengine/stores/lists.py).

A place is a path, a URL or ARCHIVE!/member; one that is relative counts from the list's folder. What the list says of a
photo's size and tag (or time) is believed; where it says neither, the place is asked.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from searchengine.errors import ImageError, SearchEngineError, StoreUnusable, UsageError
from searchengine.stores import (
    INSIDE,
    MANIFEST,
    TARS,
    ZIPS,
    KnownStores,
    Listed,
    Mount,
    StoredPhoto,
    Unlistable,
    home_of,
    is_url,
)
from searchengine.stores.addresses import canonical
from searchengine.stores.contents import Entry, Outdated
from searchengine.stores.lists import Row, rows_of, size_of, tag_of, time_ns_of
from searchengine.stores.local import local_device
from searchengine.stores.ranged import RangedFile
from searchengine.stores.recorded import Recorded
from searchengine.text import printable

LOOKS_AT_ONCE = 32
LOOKS_AHEAD = 1024
READS_AT_ONCE = 16


class ManifestStore(Recorded):
    prefix = ""
    reads_at_once = READS_AT_ONCE

    def __init__(self, location: str, *, must_exist: bool = True, stores: KnownStores | None = None) -> None:
        """Raises NotThere, StoreUnusable, UsageError."""
        super().__init__(location, stores=stores)
        self.name = MANIFEST + self.place
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the name of the list {printable(location)} is not UTF-8; rename it") from None
        if must_exist:
            self._current(anew=True)

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """The places that are there. One that cannot be looked at is Unlistable."""
        _, contents = self._current(anew=True)
        listed, found = 0, 0
        mounts = _Mounts()
        try:
            for entry, item in self._looked_at(contents.below(prefix or "")):
                listed += 1
                if item is not None:
                    found += 1
                    if isinstance(item, StoredPhoto) and not _is_told(entry):
                        yield from mounts.new(entry.name)
                    yield item
        except Outdated:
            raise StoreUnusable(f"{printable(self.place)} changed while it was being listed") from None
        if not found:
            told = f"none of the {listed:,} places in it is there" if listed else "it lists nothing"
            raise StoreUnusable(
                f"{printable(self.place)}: {told}; check the list (relative places count from its folder)"
            )
        if contents.trouble:
            yield Unlistable("", contents.trouble)

    def look(self, key: str) -> StoredPhoto | None:
        told = self._told(key)
        return self._stores.at(key).look(key) if told is None else told

    def is_gone(self, key: str) -> bool:
        """From the list, or from its place."""
        try:
            _, entry = self._find(key)
            return entry is None or self.look(key) is None
        except (ImageError, StoreUnusable):
            return False

    def is_there(self, key: str) -> bool:
        return self._stores.at(key).is_there(key)

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        try:
            stored, data = self._stores.at(key).read(key, max_bytes=max_bytes)
        except StoreUnusable as error:  # that one place; the others may be elsewhere
            raise ImageError(f"cannot be read: {error}") from None
        told = self._told(key)
        if told is not None and told.size_bytes != len(data):
            raise ImageError(f"has {len(data):,} bytes, but the list says {told.size_bytes:,}; correct the list")
        return told or stored, data

    def head(self, key: str) -> bytes:
        try:
            return self._stores.at(key).head(key)
        except StoreUnusable as error:
            raise ImageError(f"cannot be read: {error}") from None

    # -- what is asked of the places ---------------------------------------------------------------------------

    def _looked_at(self, entries: Iterator[Entry]) -> Iterator[tuple[Entry, StoredPhoto | Unlistable | None]]:
        """Places far away are asked by many at once, and so may come later than others."""
        under_way: deque[tuple[Entry, Future[StoredPhoto | Unlistable | None]]] = deque()
        with ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="look") as pool:
            try:
                for entry in entries:
                    if entry.trouble is not None or _is_told(entry) or not is_url(entry.name):
                        yield entry, self._ask(entry)
                        continue
                    under_way.append((entry, pool.submit(self._ask, entry)))
                    if len(under_way) >= LOOKS_AHEAD:
                        first, future = under_way.popleft()
                        yield first, future.result()
                for entry, future in under_way:
                    yield entry, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, entry: Entry) -> StoredPhoto | Unlistable | None:
        if entry.trouble is not None:
            return Unlistable(entry.name, entry.trouble)
        if _is_told(entry):
            return _stored(entry)
        try:
            return self._stores.at(entry.name).look(entry.name)
        except (ImageError, StoreUnusable) as error:
            return Unlistable(entry.name, str(error))

    def _told(self, key: str) -> StoredPhoto | None:
        """What the list says of a photo, if it says enough, and is there."""
        with suppress(SearchEngineError):
            _, entry = self._find(key)
            if entry is not None and entry.trouble is None and _is_told(entry):
                return _stored(entry)
        return None

    # -- what the list says ------------------------------------------------------------------------------------

    def _entries(self, file: RangedFile, state: str) -> Iterator[Entry]:
        return (self._entry(row) for row in rows_of(file, place=self.place))

    def _entry(self, row: Row) -> Entry:
        try:
            key = _key(row.place, self.place)
        except (UsageError, ValueError) as error:
            return Entry(_without_secrets(row.place), trouble=str(error))
        try:
            return Entry(key, size_of(row), time_ns_of(row) or 0, tag_of(row))
        except ValueError as error:
            return Entry(key, trouble=str(error))  # under its name, so that what is known of it stays


def _is_told(entry: Entry) -> bool:
    return entry.size_bytes is not None and bool(entry.etag or entry.mtime_ns)


def _stored(entry: Entry) -> StoredPhoto:
    return StoredPhoto(entry.name, entry.size_bytes or 0, entry.mtime_ns, entry.etag)


def _key(place: str, of_list: str) -> str:
    """The place by itself. Raises UsageError for one with credentials, ValueError for one that can be none."""
    if is_url(place) or is_url(of_list):
        return canonical(place if is_url(place) else _beside(of_list, place))
    path = os.path.join(os.path.dirname(of_list), place)
    archive, inside, member = path.partition(INSIDE)
    if inside and archive.lower().endswith(ZIPS + TARS):
        return os.path.realpath(archive) + inside + member
    return os.path.abspath(path)


def _beside(url: str, place: str) -> str:
    """A place that counts from the folder of `url`, and never leads out of its bucket or host."""
    if place.startswith("/"):
        raise ValueError("a list at a URL cannot name files of this machine")
    host = home_of(url)
    path = posixpath.join("/", posixpath.dirname(url.removeprefix(host)), place)
    # Only where it must be: two slashes in a row may mean something.
    return host + (posixpath.normpath(path) if {".", ".."} & set(place.split("/")) else path).lstrip("/")


def _without_secrets(place: str) -> str:
    """For a place that is refused, and named in the index for that."""
    return re.sub(r"[?#].*", "", re.sub(r"^([a-z0-9+.-]+://).*@", r"\1", place, flags=re.I | re.S), flags=re.S)


class _Mounts:
    """Which file systems the photos of this machine are on, each told once."""

    def __init__(self) -> None:
        self._told: set[Mount] = set()
        self._last_folder = ""

    def new(self, key: str) -> Iterator[Mount]:
        archive = home_of(key)
        folder = os.path.dirname(key if archive == os.path.abspath(os.sep) else archive)
        if not os.path.isabs(folder) or folder == self._last_folder:
            return
        self._last_folder = folder
        device = local_device(folder)
        while (above := os.path.dirname(folder)) != folder and local_device(above) == device:
            folder = above
        if device is not None and Mount(os.path.join(folder, ""), device) not in self._told:
            self._told.add(Mount(os.path.join(folder, ""), device))
            yield Mount(os.path.join(folder, ""), device)
