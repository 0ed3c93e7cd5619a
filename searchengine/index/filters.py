"""Conditions on photos that a search can be narrowed to: when, where, under which folder, by which camera."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import sqlalchemy as sa

from searchengine.index.schema import encode_key, images

EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG


@dataclass(frozen=True, kw_only=True)
class Filters:
    """All given conditions must hold. A photo without the fact that is asked for does not match.

    `after` and `before` are ISO 8601 dates or times: after <= taken_at < before. `under` is a folder.
    `camera` is a part of the camera's name, in any case. `near` is (latitude, longitude, radius in km).
    """

    after: str | None = None
    before: str | None = None
    under: str | None = None
    camera: str | None = None
    near: tuple[float, float, float] | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def condition(self) -> sa.ColumnElement[bool]:
        """The same as SQL over the table `images`."""
        conditions: list[sa.ColumnElement[bool]] = [sa.true()]
        if self.after is not None:
            conditions.append(images.c.taken_at >= self.after)
        if self.before is not None:
            conditions.append(images.c.taken_at < self.before)
        if self.under is not None:
            conditions.append(
                starts_with(images.c.key, os.path.join(os.path.realpath(os.path.expanduser(self.under)), ""))
            )
        if self.camera is not None:
            conditions.append(images.c.camera.icontains(self.camera, autoescape=True))
        if self.near is not None:
            conditions.append(_distance_km(*self.near[:2]) <= self.near[2])
        return sa.and_(*conditions)


def starts_with(column: sa.Column[str], prefix: str) -> sa.ColumnElement[bool]:
    """A range over the raw bytes, which an index on the column can serve."""
    start = encode_key(prefix)
    # The prefixes here end in a separator, never in 0xff, so the next possible prefix always exists.
    end = start[:-1] + bytes([start[-1] + 1])
    raw = sa.type_coerce(column, sa.LargeBinary)
    return sa.and_(raw >= start, raw < end)


def _distance_km(latitude: float, longitude: float) -> sa.ColumnElement[float]:
    """Great-circle distance by the haversine formula."""
    half_latitude = sa.func.radians(images.c.latitude - latitude) / 2
    half_longitude = sa.func.radians(images.c.longitude - longitude) / 2
    square = sa.func.pow(sa.func.sin(half_latitude), 2) + sa.func.cos(sa.func.radians(latitude)) * sa.func.cos(
        sa.func.radians(images.c.latitude)
    ) * sa.func.pow(sa.func.sin(half_longitude), 2)
    return 2 * EARTH_RADIUS_KM * sa.func.asin(sa.func.sqrt(sa.func.min(1.0, square)))
