"""Conditions on photos that a search can be narrowed to: when, where, under which folder, by which camera, how large.

As SQL they are in searchengine/index/filters.py.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from searchengine.errors import UsageError
from searchengine.stores import INSIDE, TARS, ZIPS, is_url
from searchengine.text import printable

if TYPE_CHECKING:
    import sqlalchemy as sa

Orientation = Literal["landscape", "portrait", "square"]
ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)

ARCHIVES = ZIPS + TARS

MAX_TAGS = 10_000  # a statement of SQLite takes 32,766 values

_MOMENT = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?)?)?)?", re.ASCII)


@dataclass(frozen=True, kw_only=True, eq=False)
class Filters:
    """All given conditions must hold. A photo without the fact that is asked for does not match.

    `after` and `before` are ISO 8601 dates or times, or beginnings of them: after <= taken_at < before. `under` is a
    folder, an archive, a folder in one (ARCHIVE!/folder), or a URL of any of them, by whatever store the photos came; a
    path is made absolute at once, with links followed. `camera` is a part of the camera's name, in any case. `near` is
    (latitude, longitude, radius in km), in degrees and along the Earth's surface. `min_side` is in pixels, of the
    shorter side. `orientation` is that of the upright photo. `tag` is a label that `classify --write-tags` gave, or
    several labels, all of which a photo must have. `where` is any condition over the columns of
    `searchengine.index.schema.images`, as SQLAlchemy has it: ``Filters(where=images.c.width > 2 * images.c.height)``.
    What it lets through is remembered until the next commit, so it must depend on the columns alone.

    Raises UsageError for a value that makes no sense.
    """

    after: str | None = None
    before: str | None = None
    under: str | None = None
    camera: str | None = None
    near: tuple[float, float, float] | None = None
    min_side: int | None = None
    orientation: Orientation | None = None
    min_size_bytes: int | None = None
    max_size_bytes: int | None = None
    tag: str | tuple[str, ...] | None = None
    where: sa.ColumnElement[bool] | None = None

    def __post_init__(self) -> None:
        for name in ("after", "before"):
            moment = getattr(self, name)
            if moment is not None and not (isinstance(moment, str) and _MOMENT.fullmatch(moment)):
                raise UsageError(f"{name} is {printable(repr(moment))}; write 2024, 2024-05-31 or 2024-05-31T18:30:00")
        for name in ("under", "camera"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or "\0" in text):
                raise UsageError(f"{name} is {printable(repr(text))}; it must be a text without NUL characters")
        if self.camera is not None and not _is_utf8(self.camera):
            raise UsageError(f"camera is {printable(repr(self.camera))}; give a part of the name of a camera")
        if self.under is not None:
            try:
                object.__setattr__(self, "under", _place(self.under))
            except ValueError:
                raise UsageError(f"under is {printable(repr(self.under))}; no folder can have that name") from None
        if self.tag is not None:
            labels = tuple(self.tag) if isinstance(self.tag, list | tuple) else (self.tag,)
            if not all(isinstance(label, str) and _is_utf8(label) for label in labels):
                raise UsageError(f"tag is {printable(repr(self.tag))}; give a label, or several")
            if len(labels) > MAX_TAGS:
                raise UsageError(f"there are {len(labels):,} tags to have at once; give {MAX_TAGS:,} at most")
            object.__setattr__(self, "tag", labels or None)
        if isinstance(self.near, list):
            object.__setattr__(self, "near", tuple(self.near))
        if self.near is not None and not _is_circle(self.near):
            raise UsageError(
                f"near is {printable(repr(self.near))}; give (latitude, longitude, radius in km), in degrees"
            )
        if self.orientation is not None and self.orientation not in ORIENTATIONS:
            raise UsageError(f"orientation is {printable(repr(self.orientation))}; use {', '.join(ORIENTATIONS)}")
        for name in ("min_side", "min_size_bytes", "max_size_bytes"):
            number = getattr(self, name)
            if number is not None and not (isinstance(number, int) and 0 <= number < 2**63):
                raise UsageError(f"{name} is {number}; it must be 0 or more")

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filters) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        """`where` equals only itself: SQLAlchemy's == between expressions is one more expression."""
        return (*(getattr(self, field.name) for field in fields(self) if field.name != "where"), id(self.where))


def prefixes_under(under: str) -> tuple[str, ...]:
    """With what the keys of the photos begin that are below `Filters.under`: with any of these, in any store."""
    folder = under if under.endswith("/") else f"{under}{'/' if is_url(under) else os.sep}"
    return (folder, under + INSIDE) if under.lower().endswith(ARCHIVES) else (folder,)


def _place(under: str) -> str:
    """As keys have it, without a separator at its end but where it is all. Raises ValueError."""
    place = under.removesuffix("!") if under.lower().endswith(tuple(f"{name}!" for name in ARCHIVES)) else under
    if is_url(place):
        scheme, _, rest = place.partition("://")
        return f"{scheme.lower()}://{rest.rstrip('/')}".removesuffix("!")
    archive, inside, member = place.partition(INSIDE)
    path = os.path.realpath(os.path.expanduser(archive))
    return path + inside + member.rstrip("/") if member else path


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _is_circle(near: tuple[float, float, float]) -> bool:
    if not isinstance(near, tuple) or len(near) != 3 or not all(isinstance(part, int | float) for part in near):
        return False
    latitude, longitude, radius_km = near
    return abs(latitude) <= 90 and abs(longitude) <= 180 and 0 <= radius_km < math.inf
