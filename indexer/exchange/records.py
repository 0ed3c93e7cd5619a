"""What is told of a photo, and of what made its vector, by the names that every format gives to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from indexer.replicas.rows import PhotoRow
from searchengine.errors import UsageError
from searchengine.index.layout import METRIC, PRECISIONS, IndexIdentity
from searchengine.text import printable

Record = dict[str, Any]
"""One photo by the names below. Of another program's files it may lack any, and hold anything under the others."""

# As many as are in memory at a time, each with its vector.
PHOTOS_AT_ONCE = 4096

# Of a photo, by the names that `PhotoRow` has for them.
FACTS = (
    "size_bytes",
    "mtime_ns",
    "etag",
    "width",
    "height",
    "taken_at",
    "latitude",
    "longitude",
    "camera",
)
# Where a photo is, by the names that others give to it; the first that a record has is taken.
PLACES = ("path", "image_path", "url")
NAMES = ("id", "store", *PLACES, "content_hash", *FACTS, "tags")

_IDENTITY = ("encoder", "precision", "fingerprint", "dim", "metric")


def record_of(photo: PhotoRow) -> Record:
    """`path` is the photo's key, whatever its store; `content_hash` is in hex; `tags` has the probability of each."""
    return {
        "id": photo.id,
        "store": photo.store,
        "path": photo.key,
        "content_hash": photo.content_hash.hex(),
        **{name: getattr(photo, name) for name in FACTS},
        "tags": dict(photo.tags),
    }


def identity_as_json(identity: IndexIdentity) -> str:
    fields = asdict(identity)
    return json.dumps({name: fields[name] for name in _IDENTITY}, indent=2)


def identity_from_json(text: str | bytes, *, place: str) -> IndexIdentity:
    """Raises UsageError, which calls the file `place`, where it does not say what made the vectors."""
    try:
        fields = json.loads(text)
        identity = IndexIdentity(**{name: fields[name] for name in _IDENTITY})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unknown(place) from None
    texts = (identity.encoder, identity.fingerprint)
    if (
        not all(isinstance(text, str) and text for text in texts)
        or identity.precision not in PRECISIONS
        or type(identity.dim) is not int
        or identity.dim < 1
        or identity.metric != METRIC
    ):
        raise _unknown(place)
    return identity


def _unknown(place: str) -> UsageError:
    return UsageError(f"{printable(place)} does not say which encoder made the vectors; export them again")
