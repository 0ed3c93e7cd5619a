"""What every encoder does with the images and texts that it is given, before its towers see them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from searchengine.errors import ImageError, UsageError
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, PixelBatch

if TYPE_CHECKING:
    from searchengine.vectors import ImageSource

IMAGES_PER_BATCH = 32


def check_is_list(items: Sequence[Any], name: str) -> None:
    """Raises UsageError for a single text or path, which is a sequence too, of its letters."""
    if isinstance(items, str | bytes):
        raise UsageError(f"{name} is {items[:40]!r}; give a list, even of one")


def encode_in_batches(encoder: Encoder, images: Sequence[ImageSource]) -> FloatMatrix:
    """Unit rows, float32 (n, dim), for PIL images or paths. Raises ImageError that names the image."""
    check_is_list(images, "images")
    rows = [np.empty((0, encoder.dim), dtype=np.float32)]
    for start in range(0, len(images), IMAGES_PER_BATCH):
        crops = [_crop(image, encoder.image_size) for image in images[start : start + IMAGES_PER_BATCH]]
        rows.append(encoder.encode_pixels(np.stack(crops)))
    return np.concatenate(rows)


def _crop(image: ImageSource, image_size: int) -> PixelBatch:
    from PIL import Image

    from searchengine.decode import crop_pixels, decode_file

    if isinstance(image, Image.Image):
        return crop_pixels(image, image_size=image_size)
    try:
        return decode_file(image, image_size=image_size)
    except ImageError as error:
        raise ImageError(f"{printable(os.fspath(image))}: {error}") from None
