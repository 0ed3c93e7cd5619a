"""What EXIF tells: time, camera, place; and that garbage in it is never an error."""

from __future__ import annotations

import io
from typing import Any

import pytest
from conftest import painted
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base
from PIL.TiffImagePlugin import IFDRational

from searchengine.decode import inspect_bytes
from searchengine.metadata import PhotoMetadata


def metadata_with(
    base: dict[int, Any] | None = None, *, details: dict[int, Any] | None = None, gps: dict[int, Any] | None = None
) -> PhotoMetadata:
    exif = Image.Exif()
    exif.update(base or {})
    exif.get_ifd(IFD.Exif).update(details or {})
    exif.get_ifd(IFD.GPSInfo).update(gps or {})
    buffer = io.BytesIO()
    painted(1).save(buffer, "JPEG", exif=exif.tobytes())
    return inspect_bytes(buffer.getvalue())


def place(latitude: Any, north_south: Any, longitude: Any, east_west: Any) -> tuple[float | None, float | None]:
    gps = {
        GPS.GPSLatitudeRef: north_south,
        GPS.GPSLatitude: latitude,
        GPS.GPSLongitudeRef: east_west,
        GPS.GPSLongitude: longitude,
    }
    found = metadata_with(gps=gps)
    return found.latitude, found.longitude


def test_a_photo_without_exif_has_a_size_and_nothing_else() -> None:
    assert metadata_with() == PhotoMetadata(width=60, height=40)


def test_the_time_of_the_shot_is_iso_8601() -> None:
    found = metadata_with(details={Base.DateTimeOriginal: "2019:07:04 18:05:09"})
    assert found.taken_at == "2019-07-04T18:05:09"


def test_the_time_of_the_shot_is_worth_more_than_that_of_the_last_edit() -> None:
    edited = {Base.DateTime: "2024:01:01 00:00:00"}
    assert metadata_with(edited).taken_at == "2024-01-01T00:00:00"
    for original, taken_at in (
        ("2019:07:04 18:05:09", "2019-07-04T18:05:09"),
        ("    :  :     :  :  ", "2024-01-01T00:00:00"),
    ):
        assert metadata_with(edited, details={Base.DateTimeOriginal: original}).taken_at == taken_at


@pytest.mark.parametrize("time", ["0000:00:00 00:00:00", "2019-07-04", "yesterday", "", "2019:13:41 99:99:99"])
def test_a_time_that_never_was_is_no_time(time: str) -> None:
    assert metadata_with(details={Base.DateTimeOriginal: time}).taken_at is None


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("FUJIFILM", "X-T3", "FUJIFILM X-T3"),
        ("Apple", "", "Apple"),
        ("", "DMC-LX100", "DMC-LX100"),
        ("  Leica \0junk", "Q2\n", "Leica Q2"),
        ("", "", None),
    ],
)
def test_the_camera_is_make_and_model_without_repetition(make: str, model: str, camera: str | None) -> None:
    assert metadata_with({Base.Make: make, Base.Model: model}).camera == camera


@pytest.mark.parametrize(
    ("north_south", "east_west", "latitude_sign", "longitude_sign"),
    [("N", "E", 1, 1), ("S", "E", -1, 1), ("N", "W", 1, -1), ("S", "W", -1, -1), ("s", "w", -1, -1)],
)
def test_the_place_is_in_signed_degrees(
    north_south: str, east_west: str, latitude_sign: int, longitude_sign: int
) -> None:
    latitude, longitude = place((33.0, 51.0, 21.6), north_south, (151.0, 12.0, 36.0), east_west)
    assert latitude == pytest.approx(latitude_sign * 33.856, abs=1e-6)
    assert longitude == pytest.approx(longitude_sign * 151.21, abs=1e-6)


@pytest.mark.parametrize(
    "latitude",
    [
        (91.0, 0.0, 0.0),
        (IFDRational(0, 0), IFDRational(0, 0), IFDRational(0, 0)),
        (IFDRational(1, 0), 0.0, 0.0),
        (10.0, 10.0),
    ],
)
def test_an_impossible_place_is_no_place(latitude: Any) -> None:
    assert place(latitude, "N", (10.0, 0.0, 0.0), "E") == (None, None)


def test_half_a_place_is_no_place() -> None:
    found = metadata_with(gps={GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (10.0, 0.0, 0.0)})
    assert (found.latitude, found.longitude) == (None, None)


def test_a_broken_place_does_not_take_the_rest_along() -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    exif[Base.Model] = "Kiev 88"
    exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitudeRef] = "N"
    block = bytearray(exif.tobytes())
    entry = max(block.find(b"\x88\x25\x00\x04"), block.find(b"\x25\x88\x04\x00"))
    block[entry + 8 : entry + 12] = b"\x7f\x7f\x7f\x7f"  # where the GPS block is said to be
    buffer = io.BytesIO()
    painted(1).save(buffer, "JPEG", exif=bytes(block))
    found = inspect_bytes(buffer.getvalue())
    assert (found.width, found.height, found.camera) == (40, 60, "Kiev 88")


VALID = Image.Exif()
VALID[Base.Make] = "Canon"
VALID[Base.Model] = "EOS"
VALID[Base.Orientation] = 8
VALID.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = "2019:07:04 18:05:09"
VALID.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (1.0, 2.0, 3.0)})
VALID_BYTES = VALID.tobytes()


@given(st.lists(st.tuples(st.integers(6, len(VALID_BYTES) - 1), st.integers(0, 255)), max_size=12))
@settings(max_examples=300)
def test_whatever_is_wrong_with_exif_the_photo_has_a_size(changes: list[tuple[int, int]]) -> None:
    block = bytearray(VALID_BYTES)
    for place_, value in changes:
        block[place_] = value
    buffer = io.BytesIO()
    painted(1).save(buffer, "JPEG", exif=bytes(block))
    found = inspect_bytes(buffer.getvalue())
    assert {found.width, found.height} == {60, 40}
    assert found.camera is None or found.camera.isprintable()
