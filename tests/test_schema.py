"""Indexes of every earlier version are read as they are and migrated without loss; newer ones are refused.

tests/indexes/vN/ holds an index as the program of version N made it, and its photos; tests/indexes/make.py made it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import sqlalchemy as sa
from commandline import Cli
from fakes import FakeEncoder
from test_crawl import all_rows, counters, touch

from indexer.pipeline import build
from indexer.plan import plan
from searchengine.errors import IndexFormatError
from searchengine.index import schema
from searchengine.index.filters import Filters
from searchengine.index.layout import FORMAT_VERSION
from searchengine.index.reader import Index
from searchengine.index.schema import MIGRATIONS, connect_for_writing, migrate
from searchengine.search import Searcher

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "indexes"
OLDER = [f"v{version}" for version in range(1, len(MIGRATIONS))]
MADE_IN = "/photos/"
MAKE_ONE = "make one before the next migration: PYTHONPATH=.:tests python tests/indexes/make.py tests/indexes/vN"

# name -> (id, vector id) of every photo in a stored index, as tests/indexes/make.py makes them.
PHOTOS = {
    "2024/copy.png": (1, 1),
    "2024/red.png": (7, 1),
    "beach.jpg": (4, 4),
    "grün.webp": (5, 7),
    "moved/new name.png": (3, 3),
    "new.png": (8, 8),
    "\udcff.png": (6, 6),
}


def stored_index(version: str, tmp_path: Path) -> Path:
    """A copy: SQLite makes files beside its own even where it only reads."""
    return Path(shutil.copytree(STORED / version / "index", tmp_path / "index"))


@pytest.fixture(params=OLDER)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return stored_index(request.param, tmp_path)


@pytest.fixture(params=OLDER)
def moved_in(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An old index whose photos are in tmp_path/photos, with the times that it knows."""
    index, photos = stored_index(request.param, tmp_path), tmp_path / "photos"
    with closing(sqlite3.connect(index / "metadata.sqlite")) as connection, connection:
        for table in ("images", "failures"):
            for key, mtime_ns in connection.execute(f"SELECT key, mtime_ns FROM {table}").fetchall():
                name = os.fsdecode(key).removeprefix(MADE_IN)
                path = photos / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes_of(request.param, name))
                os.utime(path, ns=(mtime_ns, mtime_ns))
                connection.execute(f"UPDATE {table} SET key = ? WHERE key = ?", (os.fsencode(path), key))
    return index


def bytes_of(version: str, name: str) -> bytes:
    for file in (STORED / version / "photos").iterdir():
        if unquote_to_bytes(file.name) == os.fsencode(name):
            return file.read_bytes()
    raise AssertionError(f"the photo {name!r} of {version} is not stored")


def known(index: Path, folder: str) -> dict[str, tuple[int, int]]:
    with Index(index) as opened:
        return {row.key.removeprefix(folder): (row.id, row.vector_id) for row in all_rows(opened)}


def bits(index: Path) -> dict[int, bytes]:
    with Index(index) as opened:
        return {int(i): opened.vector(int(i)).tobytes() for segment in opened.snapshot().segments for i in segment.ids}


def version_of(index: Path) -> int:
    with closing(sqlite3.connect(f"file:{index}/metadata.sqlite?mode=ro", uri=True)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def tables(database: Path) -> dict[str, str]:
    """name -> definition of all tables and indexes, however they were written down."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    return {name: re.sub(r"\s+", " ", sql or "").replace('"', "").replace("( ", "(").lower() for name, sql in rows}


@pytest.fixture
def new_tables(tmp_path: Path) -> dict[str, str]:
    migrated(tmp_path / "new.sqlite")
    return tables(tmp_path / "new.sqlite")


def migrated(database: Path) -> None:
    engine = connect_for_writing(database)
    try:
        migrate(engine, database)
    finally:
        engine.dispose()


def test_every_version_has_a_stored_index_so_that_none_is_forgotten() -> None:
    stored = sorted(folder.name for folder in STORED.iterdir() if folder.is_dir() and folder.name.startswith("v"))
    assert stored == sorted(OLDER), MAKE_ONE
    for version in OLDER:
        with closing(sqlite3.connect(f"file:{STORED / version}/index/metadata.sqlite?immutable=1", uri=True)) as tables:
            assert f"v{tables.execute('PRAGMA user_version').fetchone()[0]}" == version


def test_an_old_index_is_read_as_it_is(old: Path) -> None:
    before = version_of(old)
    assert known(old, MADE_IN) == PHOTOS
    with Index(old) as index:
        (beach,) = (row for row in all_rows(index) if row.key.endswith("beach.jpg"))
        assert (beach.width, beach.height, beach.taken_at, beach.camera) == (60, 40, "2023-05-06T07:08:09", "Leica M6")
        assert (beach.latitude, beach.longitude) == (48.5, -2.25)
        assert [key for _, key, _ in index.failed_photos()] == ["/photos/broken.jpg"]
        assert index.count_images(Filters(camera="leica")) == 1
        assert index.last_run() is not None
    assert version_of(old) == before < len(MIGRATIONS)


def test_an_old_index_on_a_read_only_disk_can_be_searched(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (old, *old.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    access = os.access  # permissions do not bind root, who runs these tests in a container
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    before = sorted(old.rglob("*"))
    with Index(old) as index:
        hits = Searcher(index, FakeEncoder()).similar(PHOTOS["new.png"][0], k=10)
        assert len(hits) == len(PHOTOS) - 1
    assert sorted(old.rglob("*")) == before


def test_searches_in_an_old_index_find_what_its_vectors_say(old: Path) -> None:
    with Index(old) as index:
        searcher = Searcher(index, FakeEncoder())
        hits = searcher.search_vector(index.vector(PHOTOS["new.png"][1]), k=3)
        assert (hits[0].id, hits[0].path) == (PHOTOS["new.png"][0], "/photos/new.png")
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        ids = {hit.id for hit in searcher.search("anything", k=50)}
        assert ids == {id_ for id_, _ in PHOTOS.values()}


def test_a_dry_run_on_an_old_index_tells_without_migrating_it(moved_in: Path, tmp_path: Path) -> None:
    before = version_of(moved_in)
    (tmp_path / "photos" / "new.png").unlink()
    assert counters(plan(moved_in, [tmp_path / "photos"])) == {"unchanged": len(PHOTOS) - 1, "failed": 1, "deleted": 1}
    assert version_of(moved_in) == before


def test_a_run_migrates_an_old_index_and_keeps_every_id_and_vector(moved_in: Path, tmp_path: Path) -> None:
    before = bits(moved_in)
    encoder = FakeEncoder()
    report = build(moved_in, [tmp_path / "photos"], encoder=encoder, isolated=False)
    assert counters(report) == {"unchanged": len(PHOTOS), "failed": 1}
    assert encoder.batches == []
    assert version_of(moved_in) == len(MIGRATIONS)
    assert known(moved_in, f"{tmp_path}/photos/") == PHOTOS
    assert bits(moved_in) == before


def test_what_changes_after_a_migration_is_taken_up_where_the_old_program_left_off(
    moved_in: Path, tmp_path: Path
) -> None:
    photos, encoder = tmp_path / "photos", FakeEncoder()
    touch(photos / "beach.jpg")
    (photos / "2024" / "red.png").rename(photos / "moved" / "red again.png")
    (photos / "new.png").unlink()
    report = build(moved_in, [photos], encoder=encoder, isolated=False)
    changed = {"updated": 1, "moved": 1, "deleted": 1, "failed": 1}
    assert counters(report) == changed | {"unchanged": len(PHOTOS) - 3}
    assert encoder.batches == []
    expected = PHOTOS | {"moved/red again.png": PHOTOS["2024/red.png"]}
    del expected["2024/red.png"], expected["new.png"]
    assert known(moved_in, f"{photos}/") == expected


def test_the_tables_of_a_migrated_index_are_those_of_a_new_one(old: Path, new_tables: dict[str, str]) -> None:
    migrated(old / "metadata.sqlite")
    assert tables(old / "metadata.sqlite") == new_tables


def test_the_migrations_make_the_tables_that_the_code_declares(new_tables: dict[str, str], tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'declared.sqlite'}")
    for table in schema.metadata.tables.values():
        for column in table.columns:
            column.system = False  # a later migration's, which is declared all the same
    try:
        schema.metadata.create_all(engine)
    finally:
        schema.images.c.etag.system = schema.failures.c.etag.system = True
    engine.dispose()
    assert tables(tmp_path / "declared.sqlite") == new_tables


STEPS = range(len(MIGRATIONS))


@pytest.mark.parametrize("step", STEPS)
def test_a_migration_that_fails_half_way_leaves_the_version_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    database = tmp_path / "metadata.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", MIGRATIONS[:step])
        migrated(database)
    before = tables(database)

    def half(connection: sa.Connection) -> None:
        MIGRATIONS[step](connection)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*MIGRATIONS[:step], half, *MIGRATIONS[step + 1 :]))
        with pytest.raises(sqlite3.OperationalError):
            migrated(database)
    assert tables(database) == before
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (step,)
    migrated(database)
    assert tables(database) != before


# Migrates, and kills itself as kill -9 does at the n-th statement, before or after it.
CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import sqlalchemy as sa
from searchengine.index.schema import connect_for_writing, migrate

database, number, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
engine = connect_for_writing(database)
seen = 0

@sa.event.listens_for(engine, "before_cursor_execute" if where == "before" else "after_cursor_execute")
def count(*_):
    global seen
    seen += 1
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)

migrate(engine, database)
print(seen)
"""


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_migration_killed_at_any_statement_leaves_a_whole_version(
    tmp_path: Path, new_tables: dict[str, str], where: str
) -> None:
    killed = 0
    for number in range(1, 50):
        index = stored_index("v1", tmp_path / str(number))
        command = [sys.executable, "-c", CHILD.format(root=str(ROOT)), index / "metadata.sqlite", str(number), where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        assert ("mounts" in tables(index / "metadata.sqlite")) == (version_of(index) >= 2)
        assert known(index, MADE_IN) == PHOTOS
        migrated(index / "metadata.sqlite")
        assert tables(index / "metadata.sqlite") == new_tables
        assert known(index, MADE_IN) == PHOTOS
    assert killed >= 5


def newer_tables(index: Path) -> str:
    with closing(sqlite3.connect(index / "metadata.sqlite")) as connection, connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    return f"tables of version {len(MIGRATIONS) + 1}, this program knows up to {len(MIGRATIONS)}; upgrade searchengine"


def newer_format(index: Path) -> str:
    card = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(card | {"format_version": FORMAT_VERSION + 1, "unheard of": [1]}))
    return f"format {FORMAT_VERSION + 1}, this program knows up to {FORMAT_VERSION}; upgrade searchengine"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for those by which processes that use an index know of each other."""
    own = ("lock", "metadata.sqlite-shm", "metadata.sqlite-wal")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in own
    }


@pytest.fixture(params=[newer_tables, newer_format])
def newer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An index of a newer program, and what is to be said of it; whoever refuses it must leave it as it was."""
    index = stored_index("v1", tmp_path)
    make_newer: Callable[[Path], str] = request.param
    message = make_newer(index)
    before = contents(index)
    yield index, message
    assert contents(index) == before


def test_a_newer_index_is_refused_by_readers(newer: tuple[Path, str]) -> None:
    index, message = newer
    with pytest.raises(IndexFormatError, match=message), Index(index) as opened:
        opened.search(np.ones((1, 16), np.float32) / 4, k=1)


def test_a_newer_index_is_refused_by_writers(newer: tuple[Path, str], photos: Path) -> None:
    index, message = newer
    with pytest.raises(IndexFormatError, match=message):
        build(index, [photos], encoder=FakeEncoder(), isolated=False)


def test_a_newer_index_is_refused_by_a_dry_run(newer: tuple[Path, str], photos: Path) -> None:
    index, message = newer
    with pytest.raises(IndexFormatError, match=message):
        plan(index, [photos])


COMMANDS: list[list[str]] = [["status"], ["verify"], ["verify", "--repair"], ["compact"]]


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_newer_index_is_refused_by_every_command_with_the_remedy(
    newer: tuple[Path, str], cli: Cli, command: list[str]
) -> None:
    index, message = newer
    outcome = cli(*command, "--index", index)
    assert (outcome.code, outcome.out) == (3, "")
    assert message in outcome.err
