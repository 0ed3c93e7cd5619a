"""What a photo tells about itself: size, time, camera, place. Garbage in EXIF is ignored, never an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap width and height


@dataclass(frozen=True, kw_only=True)
class PhotoMetadata:
    """`width` and `height` in pixels, as displayed; `taken_at` ISO 8601, local time of the camera; degrees WGS 84."""

    width: int
    height: int
    taken_at: str | None = None
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None


def read_metadata(image: Image.Image, *, size: tuple[int, int]) -> PhotoMetadata:
    """Read the EXIF block of an opened picture whose full size, as stored, is `size` (EXIF 2.32, CIPA DC-008).

    Raises MemoryError.
    """
    width, height = size
    block = _block(lambda: image.getexif())
    # Pillow turns TIFFs by itself, and tells their size as displayed.
    if image.format != "TIFF" and read_orientation(image) in SIDEWAYS:
        width, height = height, width
    details = _block(lambda: block.get_ifd(IFD.Exif))
    place = _place(_block(lambda: block.get_ifd(IFD.GPSInfo)))
    return PhotoMetadata(
        width=width,
        height=height,
        taken_at=_time(_value(details, Base.DateTimeOriginal)) or _time(_value(block, Base.DateTime)),
        camera=_camera(_value(block, Base.Make), _value(block, Base.Model)),
        latitude=place[0] if place else None,
        longitude=place[1] if place else None,
    )


def read_orientation(image: Image.Image) -> int:
    """1 to 8 (EXIF 2.32, 4.6.4 A); 1, as it is stored, where EXIF does not tell."""
    orientation = _value(_block(lambda: image.getexif()), Base.Orientation)
    return int(orientation) if orientation in range(1, 9) else 1


# Pillow parses blocks and values when they are asked for, and raises many kinds of error on damaged ones. Each is
# asked for alone, so that a broken one does not take the others along. Want of memory is no damage.


def _block(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except MemoryError:
        raise
    except Exception:
        return {}


def _value(block: Any, tag: int) -> Any:
    try:
        return block.get(tag)
    except MemoryError:
        raise
    except Exception:
        return None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return ""
    return "".join(c for c in value.split("\0")[0] if c.isprintable()).strip()[:200]


def _time(value: Any) -> str | None:
    try:
        return datetime.strptime(_text(value)[:19], "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return None


def _camera(make: Any, model: Any) -> str | None:
    make_text, model_text = _text(make), _text(model)
    if make_text and not model_text.lower().startswith(make_text.lower()):
        model_text = f"{make_text} {model_text}"
    return model_text.strip() or None


def _place(gps: Any) -> tuple[float, float] | None:
    latitude = _degrees(_value(gps, GPS.GPSLatitude), _value(gps, GPS.GPSLatitudeRef), negative="S", limit=90)
    longitude = _degrees(_value(gps, GPS.GPSLongitude), _value(gps, GPS.GPSLongitudeRef), negative="W", limit=180)
    return None if latitude is None or longitude is None else (latitude, longitude)


def _degrees(value: Any, reference: Any, *, negative: str, limit: float) -> float | None:
    try:
        degrees, minutes, seconds = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    angle = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(angle) or not 0 <= angle <= limit:
        return None
    return -angle if _text(reference).upper() == negative else angle
