"""Filters as people write them: a name and a value, `--after 2024-05` or `after:2024-05`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Any

from searchengine.errors import UsageError
from searchengine.filters import ORIENTATIONS, Filters
from searchengine.text import printable


def date_of(text: str) -> str:
    """The first instant of a year, month, day, or a time itself, in ISO 8601. Raises UsageError."""
    for form in ("%Y", "%Y-%m", "%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(text, form).isoformat()
        except ValueError:
            continue
    relative = {"today": date.today(), "yesterday": date.today() - timedelta(days=1)}.get(text.lower())
    if relative is None:
        raise UsageError(f"{_shown(text)} is no date; write 2024, 2024-05, 2024-05-31 or today")
    return datetime(relative.year, relative.month, relative.day).isoformat()


def circle_of(text: str) -> tuple[float, float, float]:
    """Latitude, longitude, both in degrees, and radius in km. Raises UsageError."""
    try:
        latitude, longitude, radius_km = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{_shown(text)} is not LAT,LON,KM such as 48.86,2.35,10") from None
    if not (abs(latitude) <= 90 and abs(longitude) <= 180 and 0 <= radius_km < math.inf):
        raise UsageError(f"{_shown(text)} is no place on Earth with a radius in km")
    return latitude, longitude, radius_km


def size_bytes_of(text: str, *, units: str = "KMG") -> int:
    """Bytes: a number, or one with a letter of `units`, each 1,024 times the one before. Raises UsageError."""
    match = re.fullmatch(rf"(\d{{1,12}}(?:\.\d{{1,6}})?)\s*([{units}]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise UsageError(f"{_shown(text)} is no size; write 300K, 2.5M or 1G")
    return round(float(match[1]) * 2.0 ** (10 * f" {units}".index(match[2].upper() or " ")))


def pixels_of(text: str) -> int:
    """Raises UsageError."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < 1:
        raise UsageError(f"{_shown(text)} is no number of pixels, 1 or more")
    return int(text)


def orientation_of(text: str) -> str:
    """Raises UsageError."""
    if text not in ORIENTATIONS:
        raise UsageError(f"{_shown(text)} is no shape; write {', '.join(ORIENTATIONS)}")
    return text


# Name of the condition -> field of `Filters`, and how its value is read.
CONDITIONS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "after": ("after", date_of),
    "before": ("before", date_of),
    "under": ("under", str),
    "camera": ("camera", str),
    "tag": ("tag", str),
    "near": ("near", circle_of),
    "min-side": ("min_side", pixels_of),
    "orientation": ("orientation", orientation_of),
    "min-size": ("min_size_bytes", size_bytes_of),
    "max-size": ("max_size_bytes", size_bytes_of),
}


def filters_of(name: str, value: str) -> Filters:
    """The filter `name` of `CONDITIONS` with a value as it was written. Raises UsageError."""
    field, read = CONDITIONS[name]
    return Filters(**{field: read(value)})


def _shown(text: str) -> str:
    return printable(repr(text))
