"""Where photos live. A store can be listed and read, never written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from searchengine.errors import UsageError


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """One listed file: what the crawl needs to see a change without reading it."""

    key: str
    size_bytes: int
    mtime_ns: int


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
    @property
    def name(self) -> str:
        """What the index records as the store of a photo; a (name, key) pair names a photo for good."""

    @property
    def prefix(self) -> str:
        """All keys of this store start with it; the crawl compares only known photos below it."""

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """List the store, or what of it is below `prefix`; a folder that is not there has nothing.

        May break off with StoreUnusable: then nothing there is taken for deleted.
        """

    def files_in(self, folder: str) -> Iterator[StoredPhoto]:
        """A second look at the files directly in `folder`, as `scan` lists them. Raises StoreUnusable."""

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        """The bytes of one photo, all of one moment, with its size and time at that moment.

        Raises ImageError where they cannot be had, or are more than `max_bytes`.
        """

    def head(self, key: str) -> bytes:
        """The first HEAD_BYTES of a file, as far as it has them. Raises ImageError where they cannot be had."""


HEAD_BYTES = 32


def open_store(location: str) -> ImageStore:
    """The store at `location`: a local folder. Raises StoreUnusable, UsageError for an empty one."""
    from searchengine.stores.local import LocalStore

    if not location:
        raise UsageError("the name of a store is empty; give a folder of photos")
    return LocalStore(location)


def open_stores(locations: Iterable[str | os.PathLike[str]]) -> list[ImageStore]:
    """One store for each location; a folder inside another one is listed only once. Raises as `open_store` does."""
    if isinstance(locations, str | bytes | os.PathLike):  # as a sequence, "~/Pictures" would begin with all of "~"
        raise UsageError(f"stores is {locations!r}; it must be a list of folders")
    stores = {store.prefix: store for store in (open_store(os.fspath(location)) for location in locations)}
    return [
        store
        for prefix, store in stores.items()
        if not any(prefix != other and prefix.startswith(other) for other in stores)
    ]


def read_photo(store: str, key: str, *, max_bytes: int) -> bytes:
    """The bytes of a photo that the index knows by its `store` name and `key`. Raises ImageError."""
    from searchengine.stores.local import read_local

    return read_local(key, max_bytes=max_bytes)


def device_of(store: str, prefix: str) -> int | None:
    """The file system of what is at `prefix`, or would be if it were there. None where that cannot be told."""
    from searchengine.stores.local import local_device

    return local_device(prefix)


def is_there(store: str, key: str) -> bool:
    """Whether there is a file of that name; also where that cannot be told."""
    from searchengine.stores.local import is_there_locally

    return is_there_locally(key)
