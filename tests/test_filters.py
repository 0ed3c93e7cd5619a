"""Filters: each leaves what a look at every photo leaves; what makes no sense is refused; ids are remembered."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from fakes import FakeEncoder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from indexer.pipeline import build
from searchengine.cli.options import filter_options, parse_size
from searchengine.errors import IndexFormatError, UsageError
from searchengine.filters import ORIENTATIONS, Filters
from searchengine.index import photos
from searchengine.index.filters import CAMERA_INDEX, EARTH_RADIUS_KM
from searchengine.index.reader import Index
from searchengine.index.schema import connect_for_writing, images, migrate, segments, vectors

Paint = Callable[..., Path]
Photo = dict[str, Any]

# -- against a look at every photo -----------------------------------------------------------------------------------

# Where circles on the Earth go wrong: the poles, the date line, the Greenwich meridian.
LATITUDES = st.one_of(st.floats(-90, 90), st.sampled_from([-90.0, -89.999, 0.0, 60.0, 89.999, 90.0]))
LONGITUDES = st.one_of(st.floats(-180, 180), st.sampled_from([-180.0, -179.999, -0.001, 0.0, 179.999, 180.0]))
RADII_KM = st.one_of(st.floats(0, 20_100), st.sampled_from([0.0, 0.5, 100.0, 10_007.6, 20_015.2, 50_000.0]))
MOMENTS = st.datetimes().map(lambda moment: moment.replace(microsecond=0).isoformat())
NAMES = st.text("aBö%_\\'\"; ", min_size=1, max_size=4)
FOLDERS = st.lists(st.sampled_from(["a", "ab", "b", "ö", "a'b", "%", "\udcff"]), max_size=3)
SIDES = st.integers(1, 4)

PLACE = st.one_of(st.just((None, None)), st.tuples(LATITUDES, LONGITUDES))
PHOTO = st.fixed_dictionaries(
    {
        "folder": FOLDERS,
        "size_bytes": st.integers(0, 3),
        "width": SIDES,
        "height": SIDES,
        "taken_at": st.none() | MOMENTS,
        "place": PLACE,
        "camera": st.none() | NAMES,
        "vector_id": st.integers(1, 12),
    }
)
# A condition of the library's user: as SQL, and as a look at one photo has it.
ANY_CONDITION = st.sampled_from(
    [
        (images.c.width > 2 * images.c.height, lambda photo: photo["width"] > 2 * photo["height"]),
        (images.c.camera.is_(None), lambda photo: photo["camera"] is None),
        (
            sa.or_(images.c.size_bytes == 1, images.c.id <= 2),
            lambda photo: photo["size_bytes"] == 1 or photo["id"] <= 2,
        ),
        (images.c.id.in_([1, 3, 5]), lambda photo: photo["id"] in (1, 3, 5)),
    ]
)


def absent_or(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), values)


def folder_path(parts: list[str]) -> str:
    return "/" + "/".join(parts)


def distance_km(one: tuple[float, float], other: tuple[float, float]) -> float:
    """By the angle between two vectors from the centre of the Earth: not the formula that is tested."""

    def vector(place: tuple[float, float]) -> np.ndarray:
        latitude, longitude = map(math.radians, place)
        return np.array(
            [math.cos(latitude) * math.cos(longitude), math.cos(latitude) * math.sin(longitude), math.sin(latitude)]
        )

    a, b = vector(one), vector(other)
    return EARTH_RADIUS_KM * math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b))


def lower(text: str) -> str:
    """As SQLite has it: ASCII alone has cases."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def passes(photo: Photo, filters: Filters, condition: Callable[[Photo], bool]) -> bool | None:
    """None where rounding decides: on the edge of a circle."""
    taken_at, camera, (latitude, longitude) = photo["taken_at"], photo["camera"], photo["place"]
    shape = ORIENTATIONS[(photo["width"] <= photo["height"]) + (photo["width"] == photo["height"])]
    if filters.near is not None and latitude is not None:
        difference = distance_km((latitude, longitude), filters.near[:2]) - filters.near[2]
        if abs(difference) < 1e-3:
            return None
    return all(
        (
            filters.after is None or (taken_at is not None and taken_at >= filters.after),
            filters.before is None or (taken_at is not None and taken_at < filters.before),
            filters.under is None or photo["key"].startswith(os.path.join(filters.under, "")),
            filters.camera is None or (camera is not None and lower(filters.camera) in lower(camera)),
            filters.near is None or (latitude is not None and difference <= 0),
            filters.min_side is None or min(photo["width"], photo["height"]) >= filters.min_side,
            filters.orientation is None or shape == filters.orientation,
            filters.min_size_bytes is None or photo["size_bytes"] >= filters.min_size_bytes,
            filters.max_size_bytes is None or photo["size_bytes"] <= filters.max_size_bytes,
            filters.where is None or condition(photo),
        )
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> sa.Engine:
    database = tmp_path_factory.mktemp("tables") / "metadata.sqlite"
    engine = connect_for_writing(database)
    migrate(engine, database)
    with engine.begin() as connection:
        connection.execute(segments.insert().values(id=1, file="1", count=12, sha256=""))
        for number in range(1, 13):
            connection.execute(vectors.insert().values(id=number, content_hash=b"%d" % number, segment_id=1))
        connection.exec_driver_sql(f"CREATE INDEX IF NOT EXISTS {CAMERA_INDEX} ON images (camera, vector_id)")
    return engine


def inserted(connection: sa.Connection, drawn: list[Photo]) -> list[Photo]:
    """Rows of the table, as dictionaries with `id` and `key`."""
    everything = [
        {**photo, "id": number, "key": os.path.join(folder_path(photo["folder"]), f"{number}.jpg")}
        for number, photo in enumerate(drawn, start=1)
    ]
    columns = ("id", "key", "size_bytes", "width", "height", "taken_at", "camera", "vector_id")
    for photo in everything:
        latitude, longitude = photo["place"]
        values = {name: photo[name] for name in columns}
        row = values | {"store": "local", "mtime_ns": 0, "latitude": latitude, "longitude": longitude}
        connection.execute(images.insert().values(row))
    return everything


@given(
    drawn=st.lists(PHOTO, max_size=12),
    conditions=st.fixed_dictionaries(
        {
            "after": absent_or(MOMENTS | st.sampled_from(["2000", "1999-12", "2000-02-29"])),
            "before": absent_or(MOMENTS | st.sampled_from(["2000", "1999-12", "2000-02-29"])),
            "under": absent_or(FOLDERS.map(folder_path)),
            "camera": absent_or(NAMES),
            "near": absent_or(st.tuples(LATITUDES, LONGITUDES, RADII_KM)),
            "min_side": absent_or(SIDES),
            "orientation": absent_or(st.sampled_from(ORIENTATIONS)),
            "min_size_bytes": absent_or(st.integers(0, 3)),
            "max_size_bytes": absent_or(st.integers(0, 3)),
        }
    ),
    where=absent_or(ANY_CONDITION),
    is_migrated=st.booleans(),
)
@settings(max_examples=200)
def test_a_filter_leaves_what_a_look_at_every_photo_leaves(
    tables: sa.Engine, drawn: list[Photo], conditions: Any, where: Any, is_migrated: bool
) -> None:
    filters = Filters(**conditions, where=where and where[0])
    with tables.connect() as connection:
        if not is_migrated:
            connection.exec_driver_sql(f"DROP INDEX {CAMERA_INDEX}")
        everything = inserted(connection, drawn)
        verdicts = {photo["id"]: passes(photo, filters, where and where[1]) for photo in everything}
        if None in verdicts.values():
            return
        left = [photo for photo in everything if verdicts[photo["id"]]]
        found = photos.vector_ids(connection, filters)
        assert found.tolist() == sorted({photo["vector_id"] for photo in left})
        assert photos.count(connection, filters) == len(left)
        backwards = found[::-1]
        ids, places = photos.photos_of(connection, backwards, filters=filters)
        expected = sorted(left, key=lambda photo: (-photo["vector_id"], photo["id"]))
        assert ids.tolist() == [photo["id"] for photo in expected]
        assert backwards[places].tolist() == [photo["vector_id"] for photo in expected]
        rows = photos.rows(connection, ids)
        assert {row.id: row.key for row in rows.values()} == {photo["id"]: photo["key"] for photo in left}
        connection.rollback()


@given(
    centre=st.tuples(LATITUDES, LONGITUDES),
    radius_km=RADII_KM,
    bearing=st.sampled_from([0.0, math.pi / 2, math.pi, 1.5 * math.pi]) | st.floats(0, 2 * math.pi),
    part=st.sampled_from([0.0, 0.5, 0.999, 1.001, 1.5]),
)
@example(centre=(89.9, 0.0), radius_km=100.0, bearing=0.0, part=0.999)
@example(centre=(50.0, 0.0), radius_km=100.0, bearing=math.pi / 2, part=0.999)
@example(centre=(-17.8, 179.999), radius_km=0.5, bearing=math.pi / 2, part=0.999)
@settings(max_examples=300)
def test_a_circle_has_the_places_that_lie_in_it_over_poles_and_the_date_line(
    tables: sa.Engine, centre: tuple[float, float], radius_km: float, bearing: float, part: float
) -> None:
    """A photo is put at a known distance from the centre, in any direction."""
    angle = min(part * radius_km / EARTH_RADIUS_KM, math.pi)
    latitude, longitude = map(math.radians, centre)
    sine = math.sin(latitude) * math.cos(angle) + math.cos(latitude) * math.sin(angle) * math.cos(bearing)
    there = math.asin(max(-1.0, min(1.0, sine)))
    turn = math.atan2(
        math.sin(bearing) * math.sin(angle) * math.cos(latitude), math.cos(angle) - math.sin(latitude) * sine
    )
    place = (math.degrees(there), (math.degrees(longitude + turn) + 540) % 360 - 180)
    distance = distance_km(centre, place)
    if abs(distance - radius_km) < 1e-3:
        return
    photo = {"folder": [], "size_bytes": 1, "width": 1, "height": 1, "taken_at": None, "camera": None, "vector_id": 7}
    with tables.connect() as connection:
        inserted(connection, [photo | {"place": place}])
        found = photos.vector_ids(connection, Filters(near=(*centre, radius_km))).tolist()
        connection.rollback()
    assert found == ([7] if distance < radius_km else [])


def test_ids_that_are_no_numbers_are_told_and_not_left_out(tables: sa.Engine) -> None:
    drawn = [
        {"folder": [], "size_bytes": 1, "width": 1, "height": 1, "taken_at": None, "camera": None, "vector_id": number}
        for number in (1, 2, 3)
    ]
    with tables.connect() as connection:
        inserted(connection, [photo | {"place": (None, None)} for photo in drawn])
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        connection.exec_driver_sql("UPDATE images SET vector_id = 'damaged' WHERE id = 2")
        with pytest.raises(IndexFormatError, match="no whole numbers"):
            photos.vector_ids(connection, Filters(min_side=1))
        connection.rollback()


# -- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("after", "yesterday"),
        ("after", ""),
        ("before", "2024-5-1"),
        ("before", "2024-05-31 10:00"),
        ("near", (91.0, 0.0, 1.0)),
        ("near", (0.0, 181.0, 1.0)),
        ("near", (0.0, 0.0, -1.0)),
        ("near", (0.0, 0.0, math.nan)),
        ("near", (0.0, math.nan, 1.0)),
        ("near", (0.0, 0.0)),
        ("min_side", -1),
        ("min_size_bytes", -1),
        ("max_size_bytes", 2**63),
        ("orientation", "upside down"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Filters(**{name: value})


def test_a_folder_is_meant_as_seen_from_where_the_filter_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    filters = Filters(under="link/../link")
    monkeypatch.chdir("/")
    assert filters.under == str((tmp_path / "real").resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Filters(under="~/real") == filters


def test_filters_without_a_condition_are_false_and_alike() -> None:
    assert not Filters()
    assert Filters(min_side=0)
    assert Filters(camera="x") == Filters(camera="x") != Filters(camera="y")
    wide = images.c.width > images.c.height
    assert Filters(where=wide) == Filters(where=wide)
    assert Filters(where=wide) != Filters(where=images.c.width > images.c.height) != Filters()
    assert len({Filters(where=wide), Filters(where=wide), Filters()}) == 2
    assert Filters() != "a filter"


# -- on the command line ---------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> Filters | str:
    """What the options make, or the message of the error."""
    seen: list[Filters] = []

    @click.command()
    @filter_options
    def command(filters: Filters) -> None:
        seen.append(filters)

    outcome = CliRunner().invoke(command, arguments)
    assert outcome.exit_code == (0 if seen else 2)
    return seen[0] if seen else outcome.output


def test_the_options_make_the_filters_that_they_name() -> None:
    assert parsed() == Filters()
    assert parsed("--min-side", "1080", "--orientation", "portrait") == Filters(min_side=1080, orientation="portrait")
    assert parsed("--min-size", "300K", "--max-size", "2.5MB") == Filters(
        min_size_bytes=307_200, max_size_bytes=2_621_440
    )
    assert parsed("--after", "2024-05", "--under", "/x", "--near", "48.86,2.35,10") == Filters(
        after="2024-05-01T00:00:00", under="/x", near=(48.86, 2.35, 10)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--min-side", "0"),
        ("--min-side", "wide"),
        ("--orientation", "diagonal"),
        ("--min-size", "big"),
        ("--max-size", "-1"),
        ("--max-size", "1e9"),
        ("--near", "48.86,2.35"),
        ("--after", "soon"),
    ],
)
def test_an_option_that_makes_no_sense_is_wrong_usage(arguments: tuple[str, str]) -> None:
    message = parsed(*arguments)
    assert isinstance(message, str)
    assert arguments[0] in message


@given(st.integers(0, 10**12))
def test_a_number_of_bytes_is_itself(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)[:12], "--min-size") == int(str(size_bytes)[:12])


@given(st.text(max_size=6))
def test_no_size_crashes_the_parser(text: str) -> None:
    try:
        assert (parse_size(text, "--min-size") or 0) >= 0
    except click.BadParameter as error:
        assert "300K" in error.message


# -- remembered ------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, paint: Paint) -> Iterator[Index]:
    for number in range(6):
        paint(f"photos/{number % 2}/{number}.png", number)
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    with Index(tmp_path / "index") as opened:
        yield opened


def test_a_filter_is_asked_of_the_tables_once_until_the_next_commit(
    index: Index, tmp_path: Path, paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Filters] = []
    ask = photos.vector_ids

    def counted(connection: sa.Connection, filters: Filters) -> Any:
        asked.append(filters)
        return ask(connection, filters)

    monkeypatch.setattr(photos, "vector_ids", counted)
    filters = Filters(under=str(tmp_path / "photos" / "1"))
    assert [len(index.vector_ids(filters)) for _ in range(3)] == [3, 3, 3]
    assert len(index.vector_ids(Filters(under=str(tmp_path / "photos")))) == 6
    assert len(asked) == 2
    paint("photos/1/new.png", 99)
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    assert len(index.vector_ids(filters)) == 4
    assert len(asked) == 3


def test_remembered_ids_cannot_be_changed_by_who_gets_them(index: Index) -> None:
    ids = index.vector_ids(Filters(min_side=1))
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 7


def test_only_the_last_few_filters_are_remembered(index: Index) -> None:
    version = index.snapshot().version
    for side in range(1, 20):
        index.vector_ids(Filters(min_side=side))
    remembered = [
        side for side in range(1, 20) if index._remembered.get(Filters(min_side=side), version=version) is not None
    ]
    assert remembered == [16, 17, 18, 19]


def test_tables_that_cannot_be_read_are_told(index: Index) -> None:
    with sqlite3.connect(index.folder / "metadata.sqlite") as connection:
        connection.execute("ALTER TABLE images RENAME TO pictures")
    with pytest.raises(IndexFormatError, match="verify --repair"):
        index.vector_ids(Filters(camera="x"))
