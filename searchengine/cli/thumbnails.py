"""Small pictures of hits, for the contact sheet, the page and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from searchengine.decode import DEFAULT_LIMITS, thumbnail
from searchengine.errors import ImageError
from searchengine.stores import read_photo

if TYPE_CHECKING:
    from PIL import Image

    from searchengine.hits import Hit


def thumbnail_of(hit: Hit, *, max_side_px: int) -> Image.Image | None:
    """None where the photo cannot be shown any more: it was deleted, or its disk is away."""
    try:
        data = read_photo(hit.store, hit.path, max_bytes=DEFAULT_LIMITS.max_file_bytes)
        return thumbnail(data, max_side_px=max_side_px)
    except ImageError:
        return None
