"""Filters as SQL over the table `images`."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from searchengine.filters import Filters as Filters
from searchengine.filters import prefixes_under
from searchengine.index.circles import EARTH_RADIUS_KM, box_around
from searchengine.index.schema import encode_key, images, labels, tags

CAMERA_INDEX = "ix_images_camera"


def condition_of(filters: Filters | None) -> sa.ColumnElement[bool]:
    """True for the photos that pass."""
    given = filters or Filters()
    shorter = sa.func.min(images.c.width, images.c.height)
    shapes = {
        "landscape": images.c.width > images.c.height,
        "portrait": images.c.width < images.c.height,
        "square": images.c.width == images.c.height,
    }
    conditions: list[sa.ColumnElement[bool]] = [sa.true()]
    if given.after is not None:
        conditions.append(images.c.taken_at >= given.after)
    if given.before is not None:
        conditions.append(images.c.taken_at < given.before)
    if given.under is not None:
        # With the stores, the unique index on both serves each range.
        prefixes = prefixes_under(given.under)
        below = (sa.and_(images.c.store.in_(_stores()), starts_with(images.c.key, prefix)) for prefix in prefixes)
        conditions.append(sa.or_(*below))
    if given.camera is not None:
        conditions.append(images.c.camera.icontains(given.camera, autoescape=True))
    if given.near is not None:
        conditions.append(_within(*given.near))
    if given.min_side is not None:
        conditions.append(shorter >= given.min_side)
    if given.orientation is not None:
        conditions.append(shapes[given.orientation])
    if given.min_size_bytes is not None:
        conditions.append(images.c.size_bytes >= given.min_size_bytes)
    if given.max_size_bytes is not None:
        conditions.append(images.c.size_bytes <= given.max_size_bytes)
    if given.tag is not None:
        conditions.append(_has_tags(given.tag))
    if given.where is not None:
        conditions.append(given.where)
    return sa.and_(*conditions)


def is_named_camera(part: str) -> sa.ColumnElement[bool]:
    """The photos of the few cameras whose names contain `part`, found by `CAMERA_INDEX`.

    Going from each name to the next on the index takes a step a camera, where a look at each photo takes one a photo
    (a "loose index scan"; https://sqlite.org/lang_with.html for the recursion).
    """
    photos = images.alias()
    names = sa.select(sa.func.min(photos.c.camera).label("name")).cte("cameras", recursive=True)
    following = sa.select(sa.func.min(photos.c.camera)).where(photos.c.camera > names.c.name)
    names = names.union_all(sa.select(following.scalar_subquery()).where(names.c.name.is_not(None)))
    return images.c.camera.in_(sa.select(names.c.name).where(names.c.name.icontains(part, autoescape=True)))


def _stores() -> sa.Select[tuple[str]]:
    """The names of all stores, as those of cameras are found."""
    photos = images.alias()
    names = sa.select(sa.func.min(photos.c.store).label("name")).cte(recursive=True)
    following = sa.select(sa.func.min(photos.c.store)).where(photos.c.store > names.c.name)
    names = names.union_all(sa.select(following.scalar_subquery()).where(names.c.name.is_not(None)))
    return sa.select(names.c.name)


def _has_tags(wanted: Collection[str]) -> sa.ColumnElement[bool]:
    """All of them, by counting: of a thousand conditions one after the other SQLite makes a tree that is too deep."""
    names = set(wanted)
    tagged = sa.select(tags.c.vector_id).join(labels, labels.c.id == tags.c.label_id).where(labels.c.label.in_(names))
    if len(names) > 1:
        tagged = tagged.group_by(tags.c.vector_id).having(sa.func.count() == len(names))
    return images.c.vector_id.in_(tagged)


def starts_with(column: sa.Column[str], prefix: str) -> sa.ColumnElement[bool]:
    """A range over the raw bytes, which an index on the column can serve."""
    if not prefix:
        return sa.true()
    start = encode_key(prefix)
    # The prefixes here end in a separator, never in 0xff, so the next possible prefix always exists.
    end = start[:-1] + bytes([start[-1] + 1])
    raw = sa.type_coerce(column, sa.LargeBinary)
    return sa.and_(raw >= start, raw < end)


def _within(latitude: float, longitude: float, radius_km: float) -> sa.ColumnElement[bool]:
    """At most `radius_km` away along a great circle: a box that is cheap to test, then the haversine formula."""
    box = box_around(latitude, longitude, radius_km)
    near: list[sa.ColumnElement[bool]] = [images.c.latitude.between(box.south, box.north)]
    if box.meridians is not None:
        near.append(sa.or_(*(images.c.longitude.between(west, east) for west, east in box.meridians)))
    return sa.and_(*near, _distance_km(latitude, longitude) <= radius_km)


def _distance_km(latitude: float, longitude: float) -> sa.ColumnElement[float]:
    """Great-circle distance by the haversine formula."""
    half_latitude = sa.func.radians(images.c.latitude - latitude) / 2
    half_longitude = sa.func.radians(images.c.longitude - longitude) / 2
    square = sa.func.pow(sa.func.sin(half_latitude), 2) + sa.func.cos(sa.func.radians(latitude)) * sa.func.cos(
        sa.func.radians(images.c.latitude)
    ) * sa.func.pow(sa.func.sin(half_longitude), 2)
    return 2 * EARTH_RADIUS_KM * sa.func.asin(sa.func.sqrt(sa.func.min(1.0, square)))
