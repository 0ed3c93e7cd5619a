"""Where photos live. A store can be listed and read, never written."""

from __future__ import annotations

from collections.abc import Iterator
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


class ImageStore(Protocol):
    @property
    def name(self) -> str:
        """What the index records as the store of a photo; a (name, key) pair names a photo for good."""

    @property
    def prefix(self) -> str:
        """All keys of this store start with it; the crawl compares only known photos below it."""

    def scan(self) -> Iterator[StoredPhoto | Unlistable]:
        """List the photos below `prefix`. Raises StoreUnusable where nothing at all can be listed."""

    def read(self, key: str, *, max_bytes: int) -> bytes:
        """The bytes of one photo. Raises ImageError where they cannot be had, or are more than `max_bytes`."""


def open_store(location: str) -> ImageStore:
    """The store at `location`: a local folder. Raises StoreUnusable, UsageError for an empty one."""
    from searchengine.stores.local import LocalStore

    if not location:
        raise UsageError("the name of a store is empty; give a folder of photos")
    return LocalStore(location)


def read_photo(store: str, key: str, *, max_bytes: int) -> bytes:
    """The bytes of a photo that the index knows by its `store` name and `key`. Raises ImageError."""
    from searchengine.stores.local import read_local

    return read_local(key, max_bytes=max_bytes)
