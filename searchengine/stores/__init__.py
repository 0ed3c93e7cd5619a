"""Where photos live. A store can be listed and read, never written."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from searchengine.errors import ImageError, SearchEngineError, StoreUnusable, UsageError
from searchengine.text import printable


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """One listed file: what the crawl needs to see a change without reading it."""

    key: str
    size_bytes: int
    mtime_ns: int
    etag: str | None = None
    """What the store says changes with the content (an entity tag, a version, a checksum), where it says any."""


@dataclass(frozen=True, slots=True)
class Unlistable:
    """A file or folder that could not be listed: neither `prefix` nor what is below it may be taken for deleted."""

    prefix: str
    reason: str


@dataclass(frozen=True, slots=True)
class Mount:
    """What is below `prefix` is on the file system `device`, as far as no other mount says otherwise."""

    prefix: str
    device: int


Listed = StoredPhoto | Unlistable | Mount


class ImageStore(Protocol):
    """Threads may share one."""

    @property
    def name(self) -> str:
        """What the index records as the store of a photo; a (name, key) pair names a photo for good."""

    @property
    def prefix(self) -> str:
        """All keys of this store start with it; the crawl compares only known photos below it."""

    @property
    def reads_at_once(self) -> int:
        """How many reads are worth having under way at once, beside those that decoding waits for; 0 for a disk."""

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """List the store, or what of it is below `prefix`; a folder that is not there has nothing.

        May break off with StoreUnusable: then nothing there is taken for deleted.
        """

    def look(self, key: str) -> StoredPhoto | None:
        """What a listing says of one file, hidden or not; None where there is none.

        Raises ImageError, StoreUnusable where that cannot be told.
        """

    def is_gone(self, key: str) -> bool:
        """Of a known photo that was not in a whole listing: whether it is gone for sure."""

    def is_there(self, key: str) -> bool:
        """Whether there is a file of that name; also where that cannot be told."""

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        """The bytes of one photo, all of one moment, with its size, time and tag at that moment.

        Raises ImageError where they cannot be had, or are more than `max_bytes`, StoreUnusable where nothing in the
        store can be had any more.
        """

    def head(self, key: str) -> bytes:
        """The first HEAD_BYTES of a file, as far as it has them. Raises ImageError where they cannot be had."""


HEAD_BYTES = 32
INSIDE = "!/"
"""Between the name of an archive and that of a file in it, as in Java's URLs: /photos/2023.zip!/beach/1.jpg"""

ZIPS = (".zip", ".cbz")
TARS = (".tar",)
COMPRESSED_TARS = tuple(f".{name}" for name in "tar.gz tgz tar.bz2 tbz2 tar.xz txz tar.zst tzst tar.lz4".split())
MANIFESTS = (".csv", ".parquet", ".txt")
LOCAL = "local"
MANIFEST = "manifest:"
"""The name of a list of photos as a store is this and its own place; its keys are the photos' own places."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.ASCII | re.IGNORECASE)
_ARCHIVE = re.compile(r"(.*?\.(?:zip|cbz|tar))!/", re.IGNORECASE | re.DOTALL)


def open_store(location: str, *, must_exist: bool = True, stores: KnownStores | None = None) -> ImageStore:
    """The store at `location`: a folder, an archive, a list of photos, or a URL of any of them.

    Unless it `must_exist`, one that is not there now is opened all the same, but for a folder of this machine. An
    archive or a list asks what is far away by way of `stores`.
    Raises StoreUnusable, UsageError for a location that can be none.
    """
    if not location:
        raise UsageError("the name of a store is empty; give a folder of photos")
    # A folder may be called holiday.zip.
    lowered = "" if not is_url(location) and os.path.isdir(os.path.expanduser(location)) else location.lower()
    if lowered.endswith(ZIPS):
        from searchengine.stores.zip import ZipStore

        return ZipStore(location, must_exist=must_exist, stores=stores)
    if lowered.endswith(TARS):
        from searchengine.stores.tar import TarStore

        return TarStore(location, must_exist=must_exist, stores=stores)
    if lowered.endswith(COMPRESSED_TARS):
        raise StoreUnusable(
            f"{printable(location)} is compressed as a whole, so that no photo in it can be read by itself; "
            "decompress it to a .tar, or unpack it"
        )
    if lowered.endswith(MANIFESTS):
        from searchengine.stores.manifest import ManifestStore

        return ManifestStore(location, must_exist=must_exist, stores=stores)
    if is_url(location):
        from searchengine.stores.remote import RemoteStore

        return RemoteStore(location, must_exist=must_exist)
    from searchengine.stores.local import LocalStore

    return LocalStore(location)


def open_stores(locations: Iterable[str | os.PathLike[str]]) -> list[ImageStore]:
    """One store for each location, and for each archive or list that a pattern stands for (stores/expand.py).

    A folder inside another one is listed only once. Raises as `open_store` does.
    """
    if isinstance(locations, str | bytes | os.PathLike):  # as a sequence, "~/Pictures" would begin with all of "~"
        raise UsageError(f"stores is {locations!r}; it must be a list of folders")
    from searchengine.stores.expand import expanded

    known = KnownStores()  # one for all, so that shards by the thousand share their connections
    opened = (
        open_store(place, stores=known)
        for location in locations
        for place in expanded(os.fspath(location), stores=known)
    )
    stores = {(store.name, store.prefix): store for store in opened}
    # By their beginnings, each looked up: of thousands of shards, not every one is held against every other.
    return [store for (name, prefix), store in stores.items() if not _has_above(name, prefix, stores)]


def _has_above(name: str, prefix: str, stores: Container[tuple[str, str]]) -> bool:
    above = (prefix[: position + 1] for position, character in enumerate(prefix[:-1]) if character in "/" + os.sep)
    return any((name, folder) in stores for folder in above)


def is_url(location: str) -> bool:
    """Whether it begins with a scheme, as in s3://bucket/folder."""
    return bool(_URL.match(location))


def is_store(location: str) -> bool:
    """Whether it holds photos, rather than being one: a folder, an archive, a list, or a URL not named like a photo."""
    if not is_url(location):
        return location.lower().endswith(ZIPS + TARS + MANIFESTS) or os.path.isdir(os.path.expanduser(location))
    from searchengine.formats import EXTENSIONS

    return os.path.splitext(location.partition("?")[0])[1].lower() not in EXTENSIONS


class KnownStores:
    """The stores of the photos that an index knows, by their names, each opened when it is first needed.

    Threads may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[str, ImageStore] = {}

    def of(self, name: str, key: str) -> ImageStore:
        """What reads this photo. Where its store cannot be had, that gives the reason as each photo's ImageError."""
        store = self._open(_home_of(name, key))
        return replace(store, name=name) if isinstance(store, Unreachable) else store

    def at(self, place: str) -> ImageStore:
        """What reads the photo that is named by itself: a path, a URL, ARCHIVE!/member."""
        return self._open(home_of(place))

    def read(self, name: str, key: str, *, max_bytes: int) -> bytes:
        """The bytes of a photo. Raises ImageError."""
        return _read(self.of(name, key), key, max_bytes=max_bytes)

    def read_at(self, place: str, *, max_bytes: int) -> bytes:
        """The bytes of a photo that is named by itself. Raises ImageError."""
        return _read(self.at(place), place, max_bytes=max_bytes)

    def is_there(self, name: str, key: str) -> bool:
        """Whether there is a file of that name; also where that cannot be told."""
        return self.of(name, key).is_there(key)

    def _open(self, location: str) -> ImageStore:
        with self._lock:
            if location not in self._opened:
                self._opened[location] = _open_known(location, self)
            return self._opened[location]


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A store that cannot be had now: everything in it is there, as far as can be told, and nothing can be read."""

    name: str
    prefix: str
    reason: str
    reads_at_once: int = 0

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        raise StoreUnusable(self.reason)

    def look(self, key: str) -> StoredPhoto | None:
        raise ImageError(f"cannot be read: {self.reason}")

    def is_gone(self, key: str) -> bool:
        return False

    def is_there(self, key: str) -> bool:
        return True

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        raise ImageError(f"cannot be read: {self.reason}")

    def head(self, key: str) -> bytes:
        raise ImageError(f"cannot be read: {self.reason}")


def _read(store: ImageStore, key: str, *, max_bytes: int) -> bytes:
    try:
        return store.read(key, max_bytes=max_bytes)[1]
    except StoreUnusable as error:
        raise ImageError(f"cannot be read: {error}") from None


def _open_known(location: str, stores: KnownStores) -> ImageStore:
    try:
        return open_store(location, must_exist=False, stores=stores)
    except SearchEngineError as error:
        return Unreachable("", location, str(error))


def _home_of(name: str, key: str) -> str:
    """The location of a store that reads `key`."""
    if name.startswith(MANIFEST):
        return name.removeprefix(MANIFEST)
    if name == LOCAL:
        return os.path.abspath(os.sep)
    # The name of a file in a bucket may look like that of one in an archive.
    return _host_of(key) if key.startswith(f"{name}://") else home_of(key)


def home_of(key: str) -> str:
    """The location of a store that reads `key`, told from the key alone."""
    archive = _ARCHIVE.match(key)
    if archive:
        return archive[1]
    return _host_of(key) if is_url(key) else os.path.abspath(os.sep)


def _host_of(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/"


def device_of(store: str, prefix: str) -> int | None:
    """The file system of what is at `prefix`, or would be if it were there. None where that cannot be told.

    Of what is in an archive, that of the archive.
    """
    from searchengine.stores.local import local_device

    archive = None if store == LOCAL else _ARCHIVE.match(prefix)
    place = archive[1] if archive else prefix
    return local_device(place) if os.path.isabs(place) else None
