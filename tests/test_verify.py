"""Checking an index: each kind of damage is told, and after a repair and a run the index is like a new one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import calls_of, contents, kill_at, library
from test_crawl import state, touch
from test_reader import add, can_mount, random_rows

import indexer.compact
from indexer.compact import compact
from indexer.pipeline import build
from indexer.verify import Verification, verify
from indexer.writer import IndexWriter
from searchengine.errors import IndexFormatError, IndexLocked, IndexNotFound
from searchengine.index.reader import Index

STORED = Path(__file__).parent / "indexes"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Photos and an index of them: three segments, a dead vector, a copy, a failure."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        yield indexed(Path(name))


def indexed(folder: Path) -> Path:
    (folder / "photos" / "sub").mkdir(parents=True)
    for start in (0, 4, 8):
        for number in range(start, start + 4):
            painted(number).save(folder / "photos" / f"{number:02}.png")
        update(folder)
    painted(1).save(folder / "photos" / "sub" / "copy.png")
    (folder / "photos" / "sub" / "broken.jpg").write_bytes(b"broken")
    (folder / "photos" / "05.png").unlink()
    update(folder)
    return folder


def update(folder: Path) -> Any:
    return build(folder / "index", [folder / "photos"], encoder=FakeEncoder(), workers=1, isolated=False)


def like_new(folder: Path) -> None:
    """A run makes just what is missing, and the index is as if made from scratch."""
    update(folder)
    with tempfile.TemporaryDirectory(dir=QUICK) as fresh:
        build(Path(fresh) / "index", [folder / "photos"], encoder=FakeEncoder(), workers=1, isolated=False)
        assert state(folder / "index") == state(Path(fresh) / "index")
    assert verify(folder / "index", stores=True).problems == []


def told(result: Verification) -> list[str]:
    return [f"{problem.kind}: {problem.object}: {problem.message}" for problem in result.problems]


def sql(folder: Path, *statements: str) -> None:
    """Change the tables behind SQLite's back: no foreign keys are checked."""
    with closing(sqlite3.connect(folder / "index" / "metadata.sqlite", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def segment(folder: Path, number: int = 1) -> Path:
    return folder / "index" / "segments" / f"{number:08d}.faiss"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def forge(folder: Path, ids: list[int], rows: np.ndarray) -> None:
    """Another first segment, with a row that fits it."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(rows.shape[1]))
    index.add_with_ids(np.ascontiguousarray(rows, np.float32), np.array(ids))
    faiss.write_index(index, str(segment(folder)))
    sha256 = hashlib.sha256(segment(folder).read_bytes()).hexdigest()
    sql(folder, f"UPDATE segments SET sha256 = '{sha256}', count = {len(ids)} WHERE id = 1")


def first_rows(folder: Path) -> np.ndarray:
    with Index(folder / "index") as index:
        return index.snapshot().segments[0].matrix.copy()


def forge_long_vector(folder: Path) -> None:
    rows = first_rows(folder)
    rows[1] *= 1.01
    rows[2, 0] = np.nan
    forge(folder, [1, 2, 3, 4], rows)


def test_a_sound_index_has_no_problems(folder: Path) -> None:
    assert verify(folder / "index", stores=True) == Verification(problems=[], repaired=[])
    before = state(folder / "index")
    assert verify(folder / "index", stores=True, repair=True) == Verification(problems=[], repaired=[])
    assert state(folder / "index") == before


def test_where_there_is_no_index_that_is_said(tmp_path: Path) -> None:
    for repair in (False, True):
        with pytest.raises(IndexNotFound):
            verify(tmp_path, repair=repair)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", sorted(folder.name for folder in STORED.glob("v*")))
def test_an_index_of_an_earlier_version_is_sound(tmp_path: Path, version: str) -> None:
    shutil.copytree(STORED / version / "index", tmp_path / "index")
    assert told(verify(tmp_path / "index")) == []


Damage = Callable[[Path], object]

# What is done to the index; what is told of it; how many photos a repair drops.
DAMAGES: dict[str, tuple[Damage, str, int]] = {
    "a segment is lost": (lambda f: segment(f).unlink(), "segment: segments/00000001.faiss: is missing", 5),
    "a bit of a vector": (lambda f: flip(segment(f), 200), "segment: .*1.faiss: is damaged", 5),
    "a bit of a header": (lambda f: flip(segment(f), 1), "segment: .*1.faiss: is damaged", 5),
    "a cut segment": (lambda f: os.truncate(segment(f), 100), "segment: .*1.faiss: is damaged", 5),
    "another kind of file": (
        lambda f: (
            faiss.write_index(faiss.IndexFlatIP(16), str(segment(f))),
            sql(f, f"UPDATE segments SET sha256 = '{hashlib.sha256(segment(f).read_bytes()).hexdigest()}' WHERE id=1"),
        ),
        "segment: .*1.faiss: is no segment of an index",
        5,
    ),
    "a wrong count": (
        lambda f: sql(f, "UPDATE segments SET count = 3 WHERE id = 1"),
        "segment: .*: holds 4 vectors, but 3 are recorded",
        0,
    ),
    "a wrong sha256": (
        lambda f: sql(f, f"UPDATE segments SET sha256 = '{'0' * 64}' WHERE id = 1"),
        "segment: .*1.faiss: is damaged",
        5,
    ),
    "a wrong file name": (
        lambda f: sql(f, "UPDATE segments SET file = '../../secret.faiss' WHERE id = 1"),
        "segments: the table segments: 1 of its rows name no file",
        5,
    ),
    "vectors that are not unit": (forge_long_vector, "segment: .*: holds 2 vectors whose length is not 1", 3),
    "an id twice": (
        lambda f: forge(f, [1, 2, 3, 3], random_rows(4, 16)),
        "segment: .*: holds several vectors of one id",
        5,
    ),
    "ids of another segment": (
        lambda f: forge(f, [1, 2, 3, 7], first_rows(f)),
        "segment: .*: (lacks|holds) 1 (of its vectors|vectors that are not in the tables)",
        1,
    ),
    "a vector's row is lost": (
        lambda f: sql(f, "DELETE FROM vectors WHERE id = 1"),
        "images: the table images: 1 of its rows have no vector",
        1,
    ),
    "a segment's row is lost": (
        lambda f: sql(f, "DELETE FROM segments WHERE id = 2"),
        "vectors: the table vectors: 4 of its rows name a segment that is not known",
        3,
    ),
    "a short hash": (
        lambda f: sql(f, "UPDATE vectors SET content_hash = x'00' WHERE id = 3"),
        "vectors: the table vectors: 1 of its rows have no sha256",
        1,
    ),
    "facts that cannot be": (
        lambda f: sql(
            f,
            "UPDATE images SET width = 'wide' WHERE id = 1",
            "UPDATE images SET taken_at = 'yesterday' WHERE id = 2",
            "UPDATE images SET camera = CAST(x'ff' AS TEXT) WHERE id = 3",
            "UPDATE images SET latitude = 91 WHERE id = 4",
        ),
        "images: the table images: 4 of its rows hold facts that cannot be",
        4,
    ),
    "a failure without a reason": (
        lambda f: sql(f, "UPDATE failures SET reason = CAST(x'ff' AS TEXT)"),
        "failures: the table failures: 1 of its rows hold",
        0,
    ),
    "a report that is none": (
        lambda f: sql(f, "UPDATE runs SET report = '{' WHERE id = 1"),
        "runs: the table runs: 1 of its rows hold",
        0,
    ),
    "ids that would be given out again": (
        lambda f: sql(f, "UPDATE sqlite_sequence SET seq = 2 WHERE name = 'vectors'"),
        "vectors: the table vectors: its ids would go on from 2, though it has an id 12",
        0,
    ),
    "an orphan segment": (
        lambda f: segment(f, 9).write_bytes(b"garbage"),
        "orphan: segments/00000009.faiss: belongs to nobody",
        0,
    ),
    "unfinished files": (
        lambda f: segment(f, 9).with_suffix(".faiss.tmp").write_bytes(b"garbage"),
        "orphan: segments/00000009.faiss.tmp: belongs to nobody",
        0,
    ),
    "an unfinished card": (
        lambda f: (f / "index" / "index.json.tmp").write_bytes(b"{"),
        "orphan: index.json.tmp: belongs to nobody",
        0,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_repaired_and_a_run_makes_just_what_was_lost(folder: Path, name: str) -> None:
    damage, message, lost = DAMAGES[name]
    before = state(folder / "index")
    damage(folder)
    found = verify(folder / "index")
    assert not found.ok
    assert any(re.match(message, line) for line in told(found)), told(found)
    assert all(problem.remedy for problem in found.problems)
    assert told(verify(folder / "index")) == told(found), "a check changes nothing"
    repaired = verify(folder / "index", repair=True)
    assert told(repaired) == []
    assert repaired.repaired
    assert verify(folder / "index").ok
    kept = state(folder / "index")["photos"]
    assert len(kept) == len(before["photos"]) - lost
    assert kept.items() <= before["photos"].items()
    like_new(folder)


def edit(folder: Path, table: str, old: bytes, new: bytes) -> None:
    """Change bytes of a table, and not those of its indexes."""
    with closing(sqlite3.connect(folder / "index" / "metadata.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
    database = folder / "index" / "metadata.sqlite"
    content = bytearray(database.read_bytes())
    place = content.index(old, 4096 * (root - 1), 4096 * root)
    content[place : place + len(old)] = new
    database.write_bytes(content)


def hash_of(name: str, folder: Path) -> bytes:
    return hashlib.sha256((folder / "photos" / name).read_bytes()).digest()


def test_a_row_of_which_an_index_disagrees_is_not_trusted(folder: Path) -> None:
    """Which of the two is wrong cannot be told, so the photo is read again."""
    edit(folder, "vectors", hash_of("02.png", folder), bytes(32))
    edit(folder, "images", b"03.png", b"99.png")
    found = verify(folder / "index")
    assert [problem.kind for problem in found.problems] == ["tables"]
    assert "missing from index" in found.problems[0].message
    repaired = verify(folder / "index", repair=True)
    assert told(repaired) == []
    assert (folder / "index" / "metadata.sqlite.damaged").is_file()
    assert {os.path.basename(key) for key in state(folder / "index")["photos"]}.isdisjoint(
        {"02.png", "03.png", "99.png"}
    )
    like_new(folder)


@pytest.mark.parametrize("table", ["images", "vectors", "failures", "runs", "segments", "sqlite_autoindex_images_1"])
def test_a_page_that_is_lost_costs_what_was_on_it(folder: Path, table: str) -> None:
    with closing(sqlite3.connect(folder / "index" / "metadata.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
    database = folder / "index" / "metadata.sqlite"
    content = bytearray(database.read_bytes())
    content[4096 * (root - 1) : 4096 * root] = b"\xab" * 4096
    database.write_bytes(content)
    assert [problem.kind for problem in verify(folder / "index").problems] == ["tables"]
    repaired = verify(folder / "index", repair=True)
    if table == "vectors":  # without them nothing tells which vector is whose
        assert [problem.kind for problem in repaired.problems] == ["tables"]
        assert "delete the index folder" in repaired.problems[0].remedy
        shutil.rmtree(folder / "index")
    else:
        assert told(repaired) == []
    like_new(folder)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (17, 1), (18, 3), (19, 3), (59, 2), (63, 0), (63, 1), (36, 1)])
def test_a_damaged_header_of_the_tables_is_mended(folder: Path, place: int, value: int) -> None:
    """Its magic, the size of pages, the versions of its format, its encoding, our own version, its free pages."""
    before = state(folder / "index")
    database = folder / "index" / "metadata.sqlite"
    content = bytearray(database.read_bytes())
    content[place] = value
    database.write_bytes(content)
    assert [problem.kind for problem in verify(folder / "index").problems] == ["tables"]
    assert told(verify(folder / "index", repair=True)) == []
    assert state(folder / "index") == before
    like_new(folder)


def test_a_reader_sees_repaired_tables_without_opening_them_again(folder: Path) -> None:
    with Index(folder / "index") as index:
        assert index.count_images() == 12
        edit(folder, "images", b"03.png", b"99.png")
        assert verify(folder / "index", repair=True).ok
        assert index.count_images() == 11
        assert len(index.snapshot()) > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "identity: index.json: is missing"),
        (lambda f: (f / "index.json").write_bytes(b"{"), "identity: index.json: .*is damaged"),
        (
            lambda f: (f / "index.json").write_text((f / "index.json").read_text().replace('"fake"', '"fate"')),
            "identity: index.json: .*is damaged: it does not say what was written",
        ),
        (lambda f: (f / "metadata.sqlite").unlink(), "tables: metadata.sqlite: is missing"),
        (lambda f: (f / "metadata.sqlite").write_bytes(b""), "tables: metadata.sqlite: "),
        (lambda f: (f / "metadata.sqlite").write_bytes(b"x" * 9999), "tables: metadata.sqlite: .*not a database"),
    ],
)
def test_what_cannot_be_mended_is_told_with_what_must_be_done(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    index = folder / "index"
    damage(index)
    before = {file: file.read_bytes() for file in index.rglob("*.*") if file.suffix in {".json", ".faiss"}}
    for repair in (False, True):
        result = verify(index, repair=repair)
        assert len(result.problems) == 1
        assert re.match(message, told(result)[0])
        assert "delete the index folder and index again" in result.problems[0].remedy
    assert {file: file.read_bytes() for file in before} == before


def test_what_a_repair_could_not_mend_is_not_to_be_repaired_again(folder: Path) -> None:
    os.truncate(folder / "index" / "metadata.sqlite", 5000)
    assert "verify --repair" in verify(folder / "index").problems[0].remedy
    (problem,) = verify(folder / "index", repair=True).problems
    assert "verify --repair" not in problem.remedy
    assert "delete the index folder and index again" in problem.remedy


def test_a_newer_index_is_not_touched(folder: Path) -> None:
    sql(folder, "PRAGMA user_version = 99")
    for repair in (False, True):
        with pytest.raises(IndexFormatError, match="version 99.*upgrade searchengine"):
            verify(folder / "index", repair=repair)


def test_photos_are_held_against_what_was_indexed(folder: Path) -> None:
    photos = folder / "photos"
    touch(photos / "00.png")
    touch(photos / "03.png")
    flip(photos / "03.png", 100)
    (photos / "01.png").unlink()
    times = (photos / "02.png").stat()
    flip(photos / "02.png", 100)
    os.utime(photos / "02.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(photos / "sub")
    assert told(verify(folder / "index")) == []
    found = verify(folder / "index", stores=True)
    assert told(found) == [
        f"photo: {photos}/01.png: is gone",
        f"photo: {photos}/02.png: has the size and time that were indexed, but another content",
        f"photo: {photos}/03.png: changed since it was indexed",
        f"photo: {photos}/sub/copy.png: is gone",
    ]
    assert ["searchengine index" in p.remedy for p in found.problems] == [True] * 4
    assert "failing" in found.problems[1].remedy
    repaired = verify(folder / "index", stores=True, repair=True)
    assert [mended.problem.object for mended in repaired.repaired] == [f"{photos}/01.png", f"{photos}/sub/copy.png"]
    assert told(repaired) == [line for line in told(found) if "is gone" not in line]
    update(folder)
    assert len(told(verify(folder / "index", stores=True))) == 1


@pytest.mark.parametrize("keep", [False, True], ids=["an empty mount point", "one that holds something"])
def test_where_a_disk_is_not_mounted_nothing_is_dropped(folder: Path, keep: bool) -> None:
    sql(folder, "UPDATE mounts SET device = 77")  # as if the photos had been on another disk
    before = state(folder / "index")
    (folder / "photos").rename(folder / "elsewhere")
    for make in (lambda: None, (folder / "photos").mkdir):  # the mount point goes with its disk, or stays
        make()
        if keep and (folder / "photos").exists():
            (folder / "photos" / ".keep").touch()
        result = verify(folder / "index", stores=True, repair=True)
        assert result.repaired == []
        (problem,) = result.problems
        assert told(result) == [
            f"photo: {folder}/photos/: the disk with 12 photos that the index knows is not mounted here"
        ]
        assert "mount it" in problem.remedy
    assert state(folder / "index") == before


def test_photos_of_a_folder_that_is_gone_from_its_disk_can_be_forgotten(folder: Path) -> None:
    shutil.rmtree(folder / "photos")
    assert len(verify(folder / "index", stores=True).problems) == 12
    assert len(verify(folder / "index", stores=True, repair=True).repaired) == 12
    assert verify(folder / "index", stores=True).ok


def test_a_photo_that_cannot_be_read_is_told_with_its_reason(folder: Path) -> None:
    result = verify(folder / "index", stores=True, max_file_bytes=10)
    assert len(result.problems) == 12
    assert all("larger than the limit of 10 bytes" in problem.message for problem in result.problems)


def test_what_a_living_writer_has_just_written_is_no_orphan(folder: Path) -> None:
    with IndexWriter(folder / "index", encoder=FakeEncoder()):
        segment(folder, 9).write_bytes(b"being written")
        notices: list[str] = []
        assert verify(folder / "index", on_notice=notices.append).ok
        assert notices == ["files that belong to nobody were not looked for: another process is writing"]
        with pytest.raises(IndexLocked):
            verify(folder / "index", repair=True)
    notices.clear()
    assert [problem.kind for problem in verify(folder / "index", on_notice=notices.append).problems] == ["orphan"]
    assert notices == []


@pytest.mark.skipif(not can_mount(), reason="a read-only disk can be mounted only by root, where mounting is allowed")
def test_on_a_read_only_disk_no_lock_is_needed(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        shutil.copytree(folder / "index", disk / "index")
        (disk / "index" / "segments" / "00000009.faiss").write_bytes(b"garbage")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert [problem.kind for problem in verify(disk / "index", stores=True).problems] == ["orphan"]
        for repair in (compact, lambda index: verify(index, repair=True)):
            with pytest.raises(Exception, match="cannot be written"):
                repair(disk / "index")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_false_alarm_while_others_write_and_compact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer.compact, "SEGMENT_BYTES", 40 * 4 * 16)
    rows = random_rows(300, 16)
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        index = Path(name) / "index"
        with IndexWriter(index, encoder=FakeEncoder()) as writer:
            add(writer, rows[:10])
        wrong: list[str] = []
        checks = 0
        done = threading.Event()

        def check() -> None:
            nonlocal checks
            while not done.is_set():
                wrong.extend(told(verify(index)))
                checks += 1

        thread = threading.Thread(target=check)
        thread.start()
        try:
            for number in range(1, 25):
                with IndexWriter(index, encoder=FakeEncoder()) as writer:
                    writer.remove_photos([number * 10])
                    add(writer, rows[number * 10 : number * 10 + 10], first=number * 10)
                compact(index)
        finally:
            done.set()
            thread.join()
        assert wrong == []
        assert checks > 3


def repair(index: Path) -> None:
    verify(index, repair=True)


@pytest.mark.parametrize("what", ["rows and files", "tables"])
def test_killed_at_any_call_of_a_repair_the_next_one_goes_on(what: str) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(name)
        index = library(folder / "original", [5, 5, 5], removed=[7])
        before = contents(index)
        shutil.copytree(index, folder / "index")
        if what == "tables":
            edit(folder, "images", b"/photos/3.jpg", b"/photos/8.jpX")
        else:
            flip(segment(folder, 1), 200)
            segment(folder, 9).write_bytes(b"garbage")
            sql(folder, "DELETE FROM vectors WHERE id = 12")
        shutil.copytree(folder / "index", folder / "damaged")
        total = calls_of(repair, folder / "index")
        assert verify(folder / "index").ok
        expected = contents(folder / "index")
        assert expected.items() <= before.items()
        step = 9
        for number in range(1, total + 1, step):
            shutil.rmtree(folder / "index")
            shutil.copytree(folder / "damaged", folder / "index")
            assert kill_at(number, repair, folder / "index") == -signal.SIGKILL, (folder / "log").read_text()
            assert told(verify(folder / "index", repair=True)) == [], number
            assert contents(folder / "index") == expected, number


@pytest.mark.skipif(not can_mount(), reason="a small disk can be mounted only by root, where mounting is allowed")
@pytest.mark.parametrize("what", ["rows and files", "tables"])
def test_however_little_room_is_left_a_repair_breaks_nothing(folder: Path, tmp_path: Path, what: str) -> None:
    if what == "tables":
        edit(folder, "images", b"03.png", b"99.png")
    else:
        flip(segment(folder, 1), 200)
        sql(folder, "DELETE FROM vectors WHERE id = 6")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    outcomes = set()
    try:
        for pages in range(0, 150, 6):
            shutil.copytree(folder / "index", disk / "index")
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * pages))
            try:
                outcomes.add(verify(disk / "index", repair=True).ok)
            except Exception as error:
                assert "cannot be written" in str(error), error
                outcomes.add(False)
            (disk / "ballast").unlink()
            assert told(verify(disk / "index", repair=True)) == [], pages
            shutil.rmtree(disk / "index")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert outcomes == {True, False}


# Recorded once and derived from nothing else in the index: a changed bit there is told only by the photos.
FACTS = {
    "images": {"size_bytes", "mtime_ns", "width", "height", "latitude", "longitude", "camera"},
    "failures": {"size_bytes", "mtime_ns", "reason"},
    "runs": {"started_at", "finished_at", "process", "report"},
    "mounts": {"device"},
}


def rows_of(index: Path) -> dict[str, list[Any]]:
    """All rows, without FACTS."""
    rows = {}
    with closing(sqlite3.connect(f"file:{index}/metadata.sqlite?mode=ro", uri=True)) as connection:
        for table in ("segments", "vectors", "images", "failures", "runs", "mounts"):
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            columns = [name for name in names if name not in FACTS.get(table, ())] or ["1"]
            rows[table] = connection.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid").fetchall()
    return rows


@pytest.fixture(scope="module")
def pristine() -> Iterator[tuple[Path, dict[str, Path]]]:
    """A folder as `folder` makes it, and copies of its index: closed, and as a killed process leaves it, with a log."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = indexed(Path(name))
        shutil.copytree(folder / "index", folder / "closed")
        with Index(folder / "index") as index:
            index.snapshot()
            painted(50).save(folder / "photos" / "new.png")
            update(folder)
            shutil.copytree(folder / "index", folder / "killed")
        assert (folder / "killed" / "metadata.sqlite-wal").stat().st_size
        yield folder, {"closed": folder / "closed", "killed": folder / "killed"}


@given(
    kind=st.sampled_from(["closed", "killed"]),
    which=st.integers(0, 99),
    place=st.floats(0, 0.9999),
    bit=st.integers(0, 7),
)
@settings(max_examples=60)
def test_a_changed_bit_anywhere_is_told_or_of_no_account(
    pristine: tuple[Path, dict[str, Path]], kind: str, which: int, place: float, bit: int
) -> None:
    folder, copies = pristine
    index = folder / "index"
    shutil.rmtree(index)
    shutil.copytree(copies[kind], index)
    before = rows_of(copies[kind])
    files = sorted(file for file in index.rglob("*") if file.is_file() and file.stat().st_size)
    file = files[which % len(files)]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        found = verify(index)
    except IndexFormatError as error:
        assert "upgrade searchengine" in str(error)  # the version itself became a later one
        return
    if found.ok:
        assert file.name == "metadata.sqlite-wal" or rows_of(index) == before  # what is lost of a log was not committed
    else:
        repaired = verify(index, repair=True)
        if not repaired.ok:
            assert "delete the index folder and index again" in repaired.problems[0].remedy
            shutil.rmtree(index)
    update(folder)
    assert verify(index).ok
    names = {os.path.basename(key) for key in state(index)["photos"]}
    assert names == {path.name for path in (folder / "photos").rglob("*.png")}


def test_the_command_says_what_is_wrong_and_exits_like_grep(folder: Path, own_home: None, cli: Cli) -> None:
    verify_it = ["verify", "--index", folder / "index"]
    assert cli("verify", "--index", folder / "none").code == 3
    outcome = cli(*verify_it, "--stores", "--json")
    assert (outcome.code, outcome.lines) == (0, [{"ok": True, "problems": [], "repaired": []}])
    segment(folder).unlink()
    outcome = cli(*verify_it)
    assert (outcome.code, outcome.err) == (1, "")
    lines = outcome.out.splitlines()
    assert re.match("segments/00000001.faiss: is missing; run `searchengine verify --repair`", lines[0])
    assert lines[-1] == "problems: 1"
    [answer] = cli(*verify_it, "--json").lines
    assert answer["ok"] is False
    assert set(answer["problems"][0]) == {"kind", "object", "message", "remedy"}
    outcome = cli(*verify_it, "--repair", "--json")
    assert (outcome.code, outcome.lines[0]["ok"], len(outcome.lines[0]["repaired"])) == (0, True, 1)
    assert "photos to index again: 5" in outcome.lines[0]["repaired"][0]["done"]
    assert cli(*verify_it, "--repair").out == "no problems\n"
    segment(folder, 7).write_bytes(b"")
    outcome = cli(*verify_it, "--repair")
    assert outcome.out.splitlines()[-1] == "no problems, repaired: 1"
    assert outcome.code == 0
