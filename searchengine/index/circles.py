"""The box around a circle on the Earth, which is cheap to test before the distance itself."""

from __future__ import annotations

import math
from typing import NamedTuple

EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG

# Bounds of a circle are drawn this much wider than they are computed, so that rounding loses no photo on its edge.
SLACK_DEGREES = 1e-6


class Box(NamedTuple):
    """In degrees. `meridians`: ranges, any of which will do; None where a pole lies within, and so all of them."""

    south: float
    north: float
    meridians: tuple[tuple[float, float], ...] | None


def box_around(latitude: float, longitude: float, radius_km: float) -> Box:
    """https://janmatuschek.de/LatitudeLongitudeBoundingCoordinates, section 3."""
    reach = math.degrees(radius_km / EARTH_RADIUS_KM) + SLACK_DEGREES
    south, north = latitude - reach, latitude + reach
    if abs(latitude) + reach >= 90:
        return Box(south, north, None)
    ratio = math.sin(math.radians(reach)) / math.cos(math.radians(latitude))
    width = math.degrees(math.asin(min(1.0, ratio))) + SLACK_DEGREES
    west, east = longitude - width, longitude + width
    meridians = [(west, east)]
    # Beyond the date line, longitudes go on from the other end.
    if west < -180:
        meridians.append((west + 360, math.inf))
    if east > 180:
        meridians.append((-math.inf, east - 360))
    return Box(south, north, tuple(meridians))
