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

import numpy as np
import pytest
from conftest import QUICK, painted
from fakes import FakeEncoder
from test_crawl import all_rows, assert_like_new, checked, state
from test_reader import add, can_mount, random_rows

from indexer.pipeline import build
from indexer.writer import IndexWriter
from searchengine.errors import IndexFormatError, IndexLocked, IndexUnusable, ModelMismatch
from searchengine.index.layout import publish
from searchengine.index.reader import Index

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
import faiss
import indexer.pipeline, indexer.writer
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
    "migrate": (indexer.writer, "migrate"),
    "write_identity": (indexer.writer, "write_identity"),
    "write_segment": (faiss, "write_index"),
    "publish": (indexer.writer, "publish"),
    "replace": (os, "replace"),
    "record": (indexer.writer, "_record_photos"),
    "commit": (indexer.writer.IndexWriter, "commit"),
    "none": (os, "getppid"),
}}[step]
setattr(owner, name, fatal(getattr(owner, name)))
print("ready", flush=True)
index, photos = sys.argv[1] + "/index", sys.argv[1] + "/photos"
indexer.pipeline.build(index, [photos], encoder=FakeEncoder(), batch_size=4, workers=2)
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
    report = checked(build(quick / "index", [quick / "photos"], encoder=encoder, batch_size=4))
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
    checked(build(quick / "index", [quick / "photos"], encoder=FakeEncoder()))
    assert_like_new(quick)


def test_a_segment_that_no_row_names_is_harmless(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder())
    segments = quick / "index" / "segments"
    (segments / "00000002.faiss").write_bytes(b"garbage of a killed run")
    (segments / "00000003.faiss.tmp").write_bytes(b"more")
    painted(77).save(quick / "photos" / "new.png")
    assert build(quick / "index", [quick / "photos"], encoder=FakeEncoder()).added == 1
    is_sound(quick / "index")
    assert_like_new(quick)


def test_a_second_writer_is_told_who_the_first_is(quick: Path) -> None:
    folder = quick / "index"
    with IndexWriter(folder, encoder=FakeEncoder()):
        with pytest.raises(IndexLocked, match=rf"process {os.getpid()} on .*, since 20.*; wait for it"):
            build(folder, [quick / "photos"], encoder=FakeEncoder())
    build(folder, [quick / "photos"], encoder=FakeEncoder())


def test_two_processes_that_write_at_once_do_not_mix(quick: Path) -> None:
    processes = [child(quick) for _ in range(3)]
    outcomes = []
    for process in processes:
        _, complaint = process.communicate(timeout=60)
        outcomes.append(process.returncode)
        assert process.returncode == 0 or "IndexLocked" in complaint, complaint
    assert 0 in outcomes
    checked(build(quick / "index", [quick / "photos"], encoder=FakeEncoder()))
    assert_like_new(quick)


def test_the_lock_of_a_killed_writer_is_free(quick: Path) -> None:
    with child(quick, "commit", 1, "before") as process:
        process.communicate(timeout=60)
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder())


def test_an_index_belongs_to_its_encoder(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder())
    before = state(quick / "index")
    with pytest.raises(ModelMismatch, match="made by encoder fake .*not by other .*use --model fake"):
        build(quick / "index", [quick / "photos"], encoder=FakeEncoder(name="other"))
    changed = FakeEncoder()
    changed.fingerprint = "f" * 64
    with pytest.raises(ModelMismatch, match="its weights have changed since"):
        build(quick / "index", [quick / "photos"], encoder=changed)
    assert state(quick / "index") == before


def test_a_newer_format_is_refused_before_anything_is_written(quick: Path) -> None:
    build(quick / "index", [quick / "photos"], encoder=FakeEncoder())
    card = quick / "index" / "index.json"
    card.write_text(card.read_text().replace('"format_version": 1', '"format_version": 2'))
    # As a newer program might have left it, with tables that only look older.
    with sqlite3.connect(quick / "index" / "metadata.sqlite") as connection:
        connection.execute("PRAGMA user_version = 0")
    connection.close()
    with pytest.raises(IndexFormatError, match="has format 2, this program knows up to 1; upgrade"):
        build(quick / "index", [quick / "photos"], encoder=FakeEncoder())


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
        build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder())
        before = state(disk / "index")
        for number in range(2, 40):
            paint(f"photos/{number}.png", number)
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * (free - 4096))
        with pytest.raises(IndexUnusable, match="cannot be written: .*free space"):
            build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder(dim=16))
        assert state(disk / "index") == before
        (disk / "ballast").unlink()
        assert build(disk / "index", [tmp_path / "photos"], encoder=FakeEncoder()).added == 38
        assert_like_new_on(disk, tmp_path)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def assert_like_new_on(disk: Path, tmp_path: Path) -> None:
    build(tmp_path / "fresh", [tmp_path / "photos"], encoder=FakeEncoder())
    assert state(disk / "index") == state(tmp_path / "fresh")


@pytest.mark.parametrize("step", ["write_index", "publish", "sql"])
def test_a_write_that_fails_leaves_the_last_commit(quick: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder = quick / "index"
    build(folder, [quick / "photos"], encoder=FakeEncoder())
    before = state(folder)
    painted(55).save(quick / "photos" / "new.png")

    def fail(*_: Any, **__: Any) -> None:
        if step == "write_index":
            raise RuntimeError("write error: 0 != 1\nNo space left on device")
        if step == "sql":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "sql":
            patch.setattr("indexer.crawl.Crawl._rows", fail)
        else:
            patch.setattr("faiss.write_index" if step == "write_index" else "indexer.writer.publish", fail)
        with pytest.raises(IndexUnusable, match="cannot be written.*everything committed so far is safe"):
            build(folder, [quick / "photos"], encoder=FakeEncoder())
    assert state(folder) == before
    assert build(folder, [quick / "photos"], encoder=FakeEncoder()).added == 1


def test_an_index_cannot_be_where_a_file_is(quick: Path) -> None:
    (quick / "file").write_text("x")
    for place in (quick / "file", quick / "file" / "index"):
        with pytest.raises(IndexUnusable):
            build(place, [quick / "photos"], encoder=FakeEncoder())


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
