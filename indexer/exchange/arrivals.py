"""Photos that come from files: which they are, and what the files, or the photos themselves, tell of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from indexer.exchange.records import PLACES, Record
from searchengine.errors import UsageError
from searchengine.index.schema import encode_key
from searchengine.metadata import PhotoMetadata
from searchengine.stores import INSIDE, LOCAL, MANIFEST, ZIPS, StoredPhoto, home_of, is_url
from searchengine.text import printable

MAX_INTEGER = 2**63 - 1  # of SQLite
MAX_PLACE_BYTES = 2**15
# What must be known of a photo, else it has to be read.
NEEDED = ("content_hash", "size_bytes", "mtime_ns", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an index knows of a photo: its content and what the store and its own EXIF block tell."""

    content_hash: bytes
    listed: StoredPhoto
    metadata: PhotoMetadata


@dataclass(frozen=True)
class Moved:
    """What was below `old` when it was exported is below `new` now: folders, archives or URLs of them."""

    old: str
    new: str

    def place_of(self, place: str) -> str | None:
        """Where a photo is now; None for one that was not there."""
        old, new = self.old.rstrip("/"), self.new.rstrip("/")
        below = place.startswith((f"{old}/", f"{old}{INSIDE}"))
        return new + place[len(old) :] if below else None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A photo by its name. `facts` are None where the files lack some, and it has to be read."""

    store: str
    key: str
    facts: Facts | None
    tags: Mapping[str, float]


def arrival_of(record: Record, *, root: Path, moved: Moved | None = None) -> Arrival:
    """The photo that `record` tells of; a place that is not absolute is below `root`.

    Of a record that does not tell all that is needed, the place alone counts: who knows what others call `store`.
    Raises UsageError for what cannot be; it tells name and value.
    """
    complete = all(record.get(name) is not None for name in NEEDED)
    places = [record[name] for name in PLACES if record.get(name) is not None]
    place: Any = places[0] if places else None
    if not all(_is_name(other) for other in places or [None]):
        raise _wrong(PLACES[0], place, "the path of a photo, or its URL")
    if not complete:  # others call a photo by the key of a sample, too
        place = next((other for other in places if is_url(other) or os.path.exists(root / other)), place)
    store = _text(record, "store") if complete else None
    if moved is not None and (elsewhere := moved.place_of(place)) and not (store or "").startswith(MANIFEST):
        store, place = None, elsewhere
    if store is None:
        store, key = named(place, root=root)
    else:
        key = _canonical(place) if is_url(place) else place
        if store == LOCAL and not os.path.isabs(key):
            raise _wrong(PLACES[0], key, "absolute, as those of the store local are")
    return Arrival(
        store=store,
        key=key,
        facts=_facts(record, key=key) if complete else None,
        tags=_tags(record.get("tags")) if complete else {},
    )


def _is_name(place: object) -> bool:
    try:
        return isinstance(place, str) and "\0" not in place and 0 < len(encode_key(place)) <= MAX_PLACE_BYTES
    except UnicodeEncodeError:
        return False


def named(place: str, *, root: Path) -> tuple[str, str]:
    """The store and the key of the photo at a place: a path, a URL, or ARCHIVE!/MEMBER."""
    archive, inside, member = place.partition(INSIDE)
    if is_url(place):
        key = _canonical(place)
    else:
        folder, name = os.path.split(os.path.join(root, os.path.expanduser(archive)))
        key = os.path.join(os.path.realpath(folder), name) + inside + member  # as a folder that is listed has it
    home = home_of(key)
    if inside and home != key and not home.endswith("/"):
        return ("zip" if home.lower().endswith(ZIPS) else "tar"), key
    return (key.partition("://")[0] if is_url(key) else LOCAL), key


def placeholder_hash(store: str, key: str) -> bytes:
    """What stands for the content of a photo that could not be read: a sha256 of its name, which no file will have."""
    return hashlib.sha256(f"not read\0{store}\0{key}".encode("utf-8", "surrogateescape")).digest()


def placeholder(store: str, key: str) -> Facts:
    """So the next `index` that finds the photo reads it, for no file has that size and time."""
    return Facts(
        content_hash=placeholder_hash(store, key),
        listed=StoredPhoto(key, 0, 0),
        metadata=PhotoMetadata(width=0, height=0),
    )


def _facts(record: Record, *, key: str) -> Facts:
    text = record["content_hash"]
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text, re.ASCII):
        raise _wrong("content_hash", text, "a sha256 in hex")
    return Facts(
        content_hash=bytes.fromhex(text),
        listed=StoredPhoto(
            key,
            _integer(record, "size_bytes", least=0),
            _integer(record, "mtime_ns", least=-MAX_INTEGER),
            _text(record, "etag"),
        ),
        metadata=PhotoMetadata(
            width=_integer(record, "width", least=0),
            height=_integer(record, "height", least=0),
            taken_at=_time(record, "taken_at"),
            camera=_text(record, "camera"),
            latitude=_degrees(record, "latitude", most=90),
            longitude=_degrees(record, "longitude", most=180),
        ),
    )


def _text(record: Record, name: str) -> str | None:
    value = record.get(name)
    if value is not None and not (isinstance(value, str) and _is_utf8(value)):
        raise _wrong(name, value, "a text")
    return value


def _integer(record: Record, name: str, *, least: int) -> int:
    value = record[name]
    if type(value) is not int or not least <= value <= MAX_INTEGER:
        raise _wrong(name, value, f"a whole number from {least} on")
    return value


def _time(record: Record, name: str) -> str | None:
    """The camera's local time, in the one of the ways to write it that filters compare by."""
    text = _text(record, name)
    try:
        return text and datetime.fromisoformat(text).replace(tzinfo=None).isoformat()
    except ValueError:
        raise _wrong(name, text, "a time in ISO 8601") from None


def _degrees(record: Record, name: str, *, most: int) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not -most <= value <= most:  # nor is NaN
        raise _wrong(name, value, f"degrees between {-most} and {most}")
    return float(value)


def _tags(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("tags", value, "labels, each with its probability")
    for label, share in value.items():
        if not (isinstance(label, str) and label and _is_utf8(label)):
            raise _wrong("tags", label, "labels that are texts")
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise _wrong("tags", share, "probabilities between 0 and 1")
    return {label: float(share) for label, share in value.items()}


def _canonical(url: str) -> str:
    """Raises UsageError for a URL with a secret in it."""
    from searchengine.stores.addresses import canonical

    return canonical(url)


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _wrong(name: str, value: object, wanted: str) -> UsageError:
    shown = printable(repr(value))
    return UsageError(f"{name} is {shown[:200]}; it must be {wanted}")
