"""One writer, one commit point: killed, crowded, on a full disk, the index is what the last commit said."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from conftest import QUICK, painted
from fakes import FakeEncoder
from test_crawl import all_rows, assert_like_new, checked, state
from test_reader import add, can_mount, random_rows

from indexer.lock import LockedIndex
from indexer.pipeline import build
from indexer.segments import delete_orphans
from indexer.writer import IndexWriter
from searchengine.errors import IndexFormatError, IndexLocked, IndexUnusable, ModelMismatch
from searchengine.index.layout import IndexPaths, publish
from searchengine.index.reader import Index
from searchengine.index.schema import connect_for_writing

ROOT = Path(__file__).parent.parent
Paint = Callable[..., Path]


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder where commits need not wait for the disk, with thirty photos, some of them broken."""
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        (Path(folder) / "photos").mkdir()
        for number in range(30):
            painted(number % 25).save(Path(folder) / "photos" / f"{number:02}.png")
        for number in range(3):
            (Path(folder) / "photos" / f"{number * 10:02}-bad.jpg").write_bytes(b"broken" * number)
        yield Path(folder)


# Runs a build that kills itself, as kill -9 does, before or after the n-th call of a step of a commit.
CHILD = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from fakes import FakeEncoder
import indexer.pipeline, indexer.segments, indexer.writable, indexer.writer
import searchengine.index.layout as layout
import searchengine.index.schema as schema

step, number, where = sys.argv[2], int(sys.argv[3]), sys.argv[4]
indexer.pipeline.COMMIT_EVERY_PHOTOS = 5
calls = 0

def fatal(function):
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == number and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

owner, name = {{
    "migrate": (indexer.writable, "migrate"),
    "write_identity": (indexer.writable, "write_identity"),
    "write_segment": (indexer.segments, "write_rows"),
    "publish": (indexer.segments, "publish"),
    "replace": (os, "replace"),
    "record": (indexer.writer, "record_photos"),
    "commit": (indexer.writer.IndexWriter, "commit"),
    "none": (os, "getppid"),
}}[step]
setattr(owner, name, fatal(getattr(owner, name)))
print("ready", flush=True)
index, photos = sys.argv[1] + "/index", sys.argv[1] + "/photos"
indexer.pipeline.build(index, [photos], encoder=FakeEncoder(), batch_size=4, workers=2, isolated=False)
"""


def child(folder: Path, step: str = "none", number: int = 0, where: str = "before") -> subprocess.Popen[str]:
    script = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script, str(folder), step, str(number), where]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def is_sound(index: Path) -> int:
    """Every row has its vector, every named segment is there; the number of photos."""
    with Index(index) as opened:
        rows = all_rows(opened)
        for row in rows:
            assert opened.vector(row.vector_id).shape == (16,)
        return len(rows)


STEPS = [
    ("migrate", 1, "before"),
    ("migrate", 1, "after"),
    ("write_identity", 1, "before"),
    ("replace", 1, "before"),
    ("write_identity", 1, "after"),
    ("write_segment", 1, "before"),
    ("write_segment", 2, "after"),
    ("publish", 1, "before"),
    ("replace", 3, "before"),
    ("publish", 2, "after"),
    ("record", 1, "before"),
    ("record", 3, "after"),
    ("commit", 2, "before"),
    ("commit", 2, "after"),
]


@pytest.mark.parametrize(("step", "number", "where"), STEPS)
def test_killed_at_any_step_of_a_commit_the_next_run_goes_on(quick: Path, step: str, number: int, where: str) -> None:
    with child(quick, step, number, where) as process:
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, complaint
    done = is_sound(quick / "index") if (quick / "index" / "index.json").exists() else 0
    encoder = FakeEncoder()
    report = checked(build(quick / "index", [quick / "photos"], encoder=encoder, batch_size=4, isolated=False))
    assert report.unchanged == done
    assert_like_new(quick)


def test_killed_at_any_moment_nothing_committed_is_lost(quick: Path) -> None:
    moments = random.Random(1)
    known = 0
    for attempt in range(6):
        with child(quick) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.12))
            process.kill()
        if (quick / "index" / "index.json").exists():
            now = is_sound(quick / "index")
            assert now >= known, attempt
            known = now
    checked(build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False))
    assert_like_new(quick)


def test_a_segment_that_no_row_names_is_harmless(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    segments = quick / "index" / "segments"
    (segments / "00000002.faiss").write_bytes(b"garbage of a killed run")
    (segments / "00000003.faiss.tmp").write_bytes(b"more")
    painted(77).save(quick / "photos" / "new.png")
    assert build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False).added == 1
    is_sound(quick / "index")
    assert_like_new(quick)


def test_what_a_killed_writer_left_is_deleted_by_the_next(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    segments = quick / "index" / "segments"
    garbage = [segments / "00000007.faiss", segments / "00000008.faiss.tmp", quick / "index" / "index.json.tmp"]
    others = [segments / "notes.txt", quick / "index" / "my.tmp"]
    for file in (*garbage, *others):
        file.write_bytes(b"x")
    with Index(quick / "index"):
        pass
    assert all(file.exists() for file in garbage), "a reader deletes nothing"
    with IndexWriter(quick / "index", encoder=FakeEncoder()):
        assert not any(file.exists() for file in garbage)
    assert all(file.exists() for file in others), "what this program does not make is the user's"
    is_sound(quick / "index")


def test_segments_that_damaged_tables_have_lost_are_not_deleted(quick: Path) -> None:
    """Garbage is only what whole tables do not name."""
    folder = quick / "index"
    build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    paths = IndexPaths(folder)
    (paths.segments / "00000009.faiss").write_bytes(b"x")
    with sqlite3.connect(paths.database) as connection:
        root = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name LIKE 'sqlite_auto%segments%'"
        ).fetchone()
    connection.close()
    content = bytearray(paths.database.read_bytes())
    place = content.index(b"00000001.faiss", 4096 * (root[0] - 1), 4096 * root[0])
    content[place] ^= 1
    paths.database.write_bytes(content)
    engine = connect_for_writing(paths.database)
    delete_orphans(engine, paths)
    engine.dispose()
    assert len(list(paths.segments.iterdir())) == 2


def test_a_commit_reaches_the_disk_in_this_order(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment's content, its name, its folder; only then the transaction that names it."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'), quick)}")
        fsync(descriptor)

    def recorded_replace(source: Any, target: Any) -> None:
        calls.append(f"rename {os.path.relpath(source, quick)} {os.path.relpath(target, quick)}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.replace", recorded_replace)
    with IndexWriter(quick / "index", encoder=FakeEncoder()) as writer:
        made, calls[:] = calls.copy(), []
        driver: Any = writer.engine.raw_connection().driver_connection
        driver.set_trace_callback(lambda statement: calls.append(statement.partition(" ")[0]))
        add(writer, random_rows(2, 16))
        driver.set_trace_callback(None)
        assert driver.execute("PRAGMA synchronous").fetchone() == (2,)  # SQLite syncs its log before COMMIT returns
        assert driver.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert made[:2] == ["fsync .", "fsync index"], "the folders that were made have their names on disk"
    kept = [call for call in calls if call.split()[0] in {"fsync", "rename", "BEGIN", "COMMIT", "INSERT"}]
    segment = "index/segments/00000001.faiss"
    first = ["BEGIN", f"fsync {segment}.tmp", f"rename {segment}.tmp {segment}", "fsync index/segments", "INSERT"]
    assert kept[:5] == first
    assert kept[-1] == "COMMIT"
    assert kept.count("COMMIT") == 1


def test_a_commit_of_nothing_does_nothing_and_one_of_5000_removals_is_fast(quick: Path) -> None:
    with IndexWriter(quick / "index", encoder=FakeEncoder()) as writer:
        add(writer, random_rows(1, 16))
        with writer.engine.begin() as connection:
            more = "INSERT INTO images (store, key, size_bytes, mtime_ns, width, height, vector_id) "
            names = [(b"/photos/more/%d" % number,) for number in range(4999)]
            connection.exec_driver_sql(more + "VALUES (x'6c6f63616c', ?, 1, 1, 1, 1, 1)", names)
        with Index(quick / "index") as index:
            assert index.count_images() == 5000
            before = index.snapshot()
            for _ in range(1000):
                writer.commit(report={"added": 1})
            assert index.snapshot() is before
            writer.remove_photos(list(range(1, 5001)))
            started = time.monotonic()
            writer.commit(report={})
            assert time.monotonic() - started < 1
            assert index.count_images() == 0


def test_a_second_writer_is_told_who_the_first_is(quick: Path) -> None:
    folder = quick / "index"
    with IndexWriter(folder, encoder=FakeEncoder()):
        with pytest.raises(IndexLocked, match=rf"process {os.getpid()} on .*, since 20.*; wait for it"):
            build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_a_dead_process_is_not_named_as_the_holder(quick: Path) -> None:
    """A killed run, and then one that holds the lock but has not signed yet."""
    folder = quick / "index"
    with child(quick, "commit", 1, "before") as process:
        process.communicate(timeout=60)
    with LockedIndex(folder), pytest.raises(IndexLocked) as locked:
        build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    assert "another process is writing" in str(locked.value)
    assert "process " not in str(locked.value).replace("another process", "")
    # One on another machine may live.
    with sqlite3.connect(folder / "metadata.sqlite") as connection:
        connection.execute(f"UPDATE runs SET process = 'process {process.pid} on elsewhere'")
    connection.close()
    with LockedIndex(folder), pytest.raises(IndexLocked, match=f"process {process.pid} on elsewhere, since 20"):
        build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_two_processes_that_write_at_once_do_not_mix(quick: Path) -> None:
    processes = [child(quick) for _ in range(3)]
    outcomes = []
    for process in processes:
        _, complaint = process.communicate(timeout=60)
        outcomes.append(process.returncode)
        assert process.returncode == 0 or "IndexLocked" in complaint, complaint
    assert 0 in outcomes
    checked(build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False))
    assert_like_new(quick)


def test_the_lock_of_a_killed_writer_is_free(quick: Path) -> None:
    with child(quick, "commit", 1, "before") as process:
        process.communicate(timeout=60)
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_an_index_belongs_to_its_encoder(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    before = state(quick / "index")
    with pytest.raises(ModelMismatch, match="made by encoder fake .*not by other .*use --model fake"):
        build(quick / "index", [quick / "photos"], encoder=FakeEncoder(name="other"), isolated=False)
    changed = FakeEncoder()
    changed.fingerprint = "f" * 64
    with pytest.raises(ModelMismatch, match="its weights have changed since"):
        build(quick / "index", [quick / "photos"], encoder=changed, isolated=False)
    assert state(quick / "index") == before


def test_a_newer_format_is_refused_before_anything_is_written(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    card = quick / "index" / "index.json"
    card.write_text(card.read_text().replace('"format_version": 1', '"format_version": 2'))
    # As a newer program might have left it, with tables that only look older.
    with sqlite3.connect(quick / "index" / "metadata.sqlite") as connection:
        connection.execute("PRAGMA user_version = 0")
    connection.close()
    with pytest.raises(IndexFormatError, match="has format 2, this program knows up to 1; upgrade"):
        build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_an_encoder_that_breaks_the_contract_is_stopped(quick: Path) -> None:
    for wrong in (np.ones((4, 16), np.float32), np.full((4, 16), np.nan, np.float32), random_rows(4, 8)):
        with IndexWriter(quick / "index", encoder=FakeEncoder()) as writer, pytest.raises(Exception, match="vector"):
            writer.add_vectors([b"1", b"2", b"3", b"4"], wrong)


@pytest.mark.skipif(not can_mount(), reason="a small disk can be mounted only by root, where mounting is allowed")
def test_a_full_disk_ends_the_run_with_the_last_commit_intact(tmp_path: Path, paint: Paint) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        paint("photos/a.png", 1)
        build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
        before = state(disk / "index")
        for number in range(2, 40):
            paint(f"photos/{number}.png", number)
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * (free - 4096))
        with pytest.raises(IndexUnusable, match="cannot be written: .*free space"):
            build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(dim=16), isolated=False)
        assert state(disk / "index") == before
        (disk / "ballast").unlink()
        assert build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False).added == 38
        assert_like_new_on(disk, tmp_path)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(not can_mount(), reason="a small disk can be mounted only by root, where mounting is allowed")
def test_however_little_room_is_left_the_last_commit_is_intact(tmp_path: Path, paint: Paint) -> None:
    """From no page to what a run needs, so that the disk is full at each write of a commit in turn."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    outcomes = []
    try:
        paint("photos/a.png", 1)
        build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
        before = state(tmp_path / "index")
        for number in range(2, 12):
            paint(f"photos/{number}.png", number)
        for pages in range(0, 40, 3):
            shutil.copytree(tmp_path / "index", disk / "index")
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * pages))
            try:
                outcomes.append(
                    build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False).added
                )
            except IndexUnusable as error:
                outcomes.append(0)
                assert "cannot be written" in str(error)
                assert "/project/" not in str(error), "FAISS names its source files"
            (disk / "ballast").unlink()
            if not outcomes[-1]:
                assert state(disk / "index") == before
                assert build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False).added == 10
            assert_like_new_on(disk, tmp_path)
            shutil.rmtree(tmp_path / "fresh")
            shutil.rmtree(disk / "index")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert set(outcomes) == {0, 10}


@pytest.mark.skipif(not can_mount(), reason="a read-only disk can be mounted only by root, where mounting is allowed")
def test_on_a_read_only_disk_that_is_said_and_nothing_changes(tmp_path: Path, paint: Paint) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        paint("photos/a.png", 1)
        build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
        shutil.copytree(disk / "index", tmp_path / "copy")
        before = state(tmp_path / "copy")  # what reads it leaves no file open on the disk
        paint("photos/b.png", 2)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for place in (disk / "index", disk / "other"):
            with pytest.raises(IndexUnusable, match="cannot be written: .*fix permissions"):
                build(place, [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
        shutil.copytree(disk / "index", tmp_path / "after")
        assert state(tmp_path / "after") == before
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def assert_like_new_on(disk: Path, tmp_path: Path) -> None:
    build(tmp_path / "fresh", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    assert state(disk / "index") == state(tmp_path / "fresh")


@pytest.mark.parametrize("step", ["write_rows", "publish", "sql"])
def test_a_write_that_fails_leaves_the_last_commit(quick: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder = quick / "index"
    build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    before = state(folder)
    painted(55).save(quick / "photos" / "new.png")

    def fail(*_: Any, **__: Any) -> None:
        if step == "sql":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "sql":
            patch.setattr("indexer.crawl.Crawl._rows", fail)
        else:
            patch.setattr(f"indexer.segments.{step}", fail)
        with pytest.raises(IndexUnusable, match="cannot be written.*everything committed so far is safe"):
            build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    assert state(folder) == before
    assert build(folder, [quick / "photos"], encoder=FakeEncoder(), isolated=False).added == 1


def test_an_index_cannot_be_where_a_file_is(quick: Path) -> None:
    (quick / "file").write_text("x")
    for place in (quick / "file", quick / "file" / "index"):
        with pytest.raises(IndexUnusable):
            build(place, [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_a_file_is_published_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.tmp").write_text("new")
    publish(tmp_path / "a.tmp", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a.tmp").exists()


def test_ids_of_photos_that_are_gone_are_not_given_out_again(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "index", encoder=FakeEncoder()) as writer:
        add(writer, random_rows(3, 16))
        writer.remove_photos([2, 3])
        writer.commit(report={})
        add(writer, random_rows(1, 16, seed=1), first=3)
        writer.commit(report={}, finished=True)
    with Index(tmp_path / "index") as index:
        assert sorted(row.id for row in all_rows(index)) == [1, 4]


def test_a_reader_sees_thirty_commits_one_by_one_and_none_by_half() -> None:
    """Each commit replaces all ten photos; a reader in another thread must always find ten, of one commit."""
    rows = random_rows(300, 16)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        with IndexWriter(folder, encoder=FakeEncoder()) as writer:
            add(writer, rows[:10])
            seen: set[int] = set()
            wrong: list[Any] = []
            done = threading.Event()

            def read() -> None:
                with Index(folder) as index:
                    while not done.is_set():
                        _, ids = index.search(rows[:1], k=20)
                        found = sorted(int(i) for i in ids[0] if i >= 0)
                        if len(found) != 10 or found[-1] - found[0] != 9 or found[0] % 10 != 1:
                            wrong.append(found)
                        seen.add(found[0] if found else -1)

            thread = threading.Thread(target=read)
            thread.start()
            try:
                for number in range(1, 30):
                    batch = rows[number * 10 : number * 10 + 10]
                    writer.remove_photos(list(range(number * 10 - 9, number * 10 + 1)))
                    add(writer, batch, first=number * 10)
                    time.sleep(0.01)
            finally:
                done.set()
                thread.join()
        assert wrong == []
        assert len(seen) > 3


def test_tables_that_another_program_holds_are_told_as_such(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchengine.index.schema.BUSY_SECONDS", 0.2)
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    other = sqlite3.connect(quick / "index" / "metadata.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(IndexUnusable, match="another program holds its metadata.sqlite; end that"):
        build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
    other.close()
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)


def test_a_writer_waits_for_one_that_only_looks(quick: Path) -> None:
    """`verify` holds the lock for a moment."""
    lock = filelock.FileLock(quick / "index" / "lock", thread_local=False)
    (quick / "index").mkdir()
    lock.acquire()
    threading.Timer(0.3, lambda: lock.release(force=True)).start()
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder(), isolated=False)
