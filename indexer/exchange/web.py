"""Photos of the web: a list may name thousands of hosts, and some are gone by the time it is read."""

from __future__ import annotations

from searchengine.errors import ImageError, StoreUnusable
from searchengine.stores import ImageStore, StoredPhoto

WEB = ("http", "https")


class WebHost:
    """Reads photos of one host. Where it does not answer, that costs its photos alone, and it is not asked again."""

    def __init__(self, store: ImageStore) -> None:
        self.name = store.name
        self.reads_at_once = store.reads_at_once
        self._store = store
        self._trouble = ""

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        """As `ImageStore.read`, but raises ImageError only."""
        if self._trouble:
            raise ImageError(self._trouble)
        try:
            return self._store.read(key, max_bytes=max_bytes)
        except StoreUnusable as error:
            self._trouble = f"cannot be read: {error}"
            raise ImageError(self._trouble) from None
