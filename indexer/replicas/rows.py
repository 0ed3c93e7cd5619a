"""A photo of an index with all that is known of it, and the digest by which two indexes tell whether they agree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from operator import attrgetter

from searchengine.vectors import FloatMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoRow:
    """As the tables have it (searchengine/index/schema.py). `tags`: label and probability each, by label."""

    id: int
    vector_id: int
    content_hash: bytes
    store: str
    key: str
    size_bytes: int
    mtime_ns: int
    etag: str | None
    width: int
    height: int
    taken_at: str | None
    latitude: float | None
    longitude: float | None
    camera: str | None
    tags: tuple[tuple[str, float], ...] = ()


FACTS = attrgetter(*(field.name for field in fields(PhotoRow) if field.name != "content_hash"))


def digest_of(photo: PhotoRow, vector: FloatMatrix) -> str:
    """A sha256 over everything that is known of a photo, and over its vector, float32 (dim,), byte for byte."""
    facts = (photo.content_hash.hex(), *FACTS(photo))
    digest = hashlib.sha256(json.dumps(facts).encode("ascii"))  # escapes keep names that are no UTF-8
    digest.update(vector.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def name_hash(*names: str) -> str:
    """Of a store and a key: fit for the name of a value, however long they are."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
