"""Small pictures of hits, for the contact sheet, the page and the terminal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from searchengine.decode import DEFAULT_LIMITS, thumbnail
from searchengine.errors import SearchEngineError
from searchengine.stores import KnownStores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from searchengine.hits import Hit

READS_AT_ONCE = 8


def thumbnails_of(hits: Sequence[Hit], *, max_side_px: int) -> Iterator[Image.Image | None]:
    """One for each hit, in order; None where the photo cannot be shown now: it was deleted, or its disk is away."""
    stores = KnownStores()

    def read(hit: Hit) -> Image.Image | None:
        try:
            data = stores.read(hit.store, hit.path, max_bytes=DEFAULT_LIMITS.max_file_bytes)
            return thumbnail(data, max_side_px=max_side_px)
        except SearchEngineError:
            return None

    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="thumbnails") as pool:
        for first in range(0, len(hits), READS_AT_ONCE):
            yield from pool.map(read, hits[first : first + READS_AT_ONCE])
