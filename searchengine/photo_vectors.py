"""Vectors of files: from the index where it has their content, computed otherwise, and stored nowhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from searchengine.decode import DEFAULT_LIMITS, DecodeLimits, decode_bytes
from searchengine.errors import ImageError, ModelMismatch
from searchengine.stores import KnownStores
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, PixelBatch

if TYPE_CHECKING:
    from searchengine.index.protocol import PhotoIndex


@dataclass(frozen=True)
class PhotoVector:
    """`content_hash` is the sha256 of the file, `vector` float32 (dim,), unit."""

    content_hash: bytes
    vector: FloatMatrix


def vectors_of(
    paths: Iterable[str],
    *,
    encoder: Encoder,
    index: PhotoIndex | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    batch_size: int = 32,
    workers: int | None = None,
) -> Generator[tuple[str, PhotoVector | ImageError], None, None]:
    """For each path, URL or ARCHIVE!/member, in order, its vector, or the error that tells why it has none.

    Threads read and decode a batch at a time; `paths` is read no faster, so it may be of any length. Raises
    ModelMismatch if `index` is of another encoder.
    """
    if index is not None and index.identity.fingerprint != encoder.fingerprint:
        raise ModelMismatch(
            f"the index at {index.place} was made by encoder {printable(index.identity.encoder)}, not "
            f"by {printable(encoder.name)}; use its own encoder, or no index"
        )

    stores = KnownStores()

    def read(path: str) -> PhotoVector | tuple[bytes, PixelBatch] | ImageError:
        try:
            data = stores.read_at(path, max_bytes=limits.max_file_bytes)
            content_hash = hashlib.sha256(data).digest()
            stored = None if index is None else _stored(index, content_hash)
            if stored is not None:
                return PhotoVector(content_hash, stored)
            return content_hash, decode_bytes(data, image_size=encoder.image_size, limits=limits).pixels
        except ImageError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="read") as pool:
        while batch := list(islice(remaining, batch_size)):
            outcomes = list(pool.map(read, batch))
            crops = [outcome[1] for outcome in outcomes if isinstance(outcome, tuple)]
            computed = iter(encoder.encode_pixels(np.stack(crops)) if crops else ())
            for path, outcome in zip(batch, outcomes, strict=True):
                yield path, PhotoVector(outcome[0], next(computed)) if isinstance(outcome, tuple) else outcome


def _stored(index: PhotoIndex, content_hash: bytes) -> FloatMatrix | None:
    vector_id = index.vector_id_by_content(content_hash)
    try:
        return None if vector_id is None else index.vector(vector_id)
    except KeyError:  # a compaction has dropped it since
        return None
