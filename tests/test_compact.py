"""Merging segments: the same vectors under the same ids in fewer files, at every instant a whole index."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from conftest import QUICK
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crawl import all_rows
from test_reader import add, can_mount, random_rows
from torture_faults import Calls, Child, Kill

import indexer.compact
from indexer.compact import compact
from indexer.verify import verify
from indexer.writer import IndexWriter
from searchengine.errors import IndexFormatError, IndexLocked, IndexNotFound, IndexUnusable
from searchengine.index.reader import Index

ROOT = Path(__file__).parent.parent
DIM = 16


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where commits need not wait for the disk; a segment is full with fifty vectors."""
    monkeypatch.setattr(indexer.compact, "SEGMENT_BYTES", 50 * 4 * DIM)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        yield Path(folder)


def library(folder: Path, sizes: list[int], *, removed: list[int] | None = None) -> Path:
    """An index with one segment a size, less the photos `removed`."""
    rows, first = random_rows(sum(sizes), DIM), 0
    with IndexWriter(folder, encoder=FakeEncoder(dim=DIM)) as writer:
        for size in sizes:
            add(writer, rows[first : first + size], first=first)
            first += size
        writer.remove_photos(removed or [])
        writer.commit(report={}, finished=True)
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """key -> ids of the photo and its vector, and the vector's bits."""
    with Index(folder) as index:
        segments = index.snapshot().segments
        vectors = {int(i): row.tobytes() for part in segments for i, row in zip(part.ids, part.matrix, strict=True)}
        return {row.key: (row.id, row.vector_id, vectors[row.vector_id]) for row in all_rows(index)}


def counts(folder: Path) -> list[int]:
    with Index(folder) as index:
        return [len(segment.ids) for segment in index.snapshot().segments]


def found(folder: Path) -> Any:
    with Index(folder) as index:
        scores, ids = index.search(random_rows(5, DIM, seed=9), k=20)
        return scores.tolist(), ids.tolist()


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    removed=st.sets(st.integers(1, 240), max_size=120),
    again=st.integers(0, 30),
)
@settings(max_examples=10)
def test_compacting_changes_nothing_that_can_be_seen(sizes: list[int], removed: set[int], again: int) -> None:
    """Bits, ids and hits are what they were; no dead vector is left, and a second time there is nothing to do."""
    full = 50
    with tempfile.TemporaryDirectory(dir=QUICK) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer.compact, "SEGMENT_BYTES", full * 4 * DIM)
        folder = library(Path(name) / "index", sizes, removed=[i for i in removed if i <= sum(sizes)])
        for turn in range(2):
            before, hits = contents(folder), found(folder)
            compact(folder)
            assert contents(folder) == before
            assert found(folder) == hits
            assert sum(counts(folder)) == len(before)
            assert len(counts(folder)) <= -(-len(before) // full)
            assert verify(folder).problems == []
            files = sorted(file.name for file in (folder / "segments").iterdir())
            assert compact(folder).merged == 0
            assert sorted(file.name for file in (folder / "segments").iterdir()) == files
            if again:
                with IndexWriter(folder, encoder=FakeEncoder(dim=DIM)) as writer:
                    add(writer, random_rows(again, DIM, seed=3), first=1000 * (turn + 1))


def test_full_segments_without_dead_vectors_are_left_as_they_are(quick: Path) -> None:
    folder = library(quick / "index", [10, 50, 10, 50], removed=[75])
    before = {file.name: file.stat().st_ino for file in (folder / "segments").iterdir()}
    done = compact(folder)
    assert (done.merged, done.written, done.dropped) == (3, 2, 1)
    after = {file.name: file.stat().st_ino for file in (folder / "segments").iterdir()}
    assert after["00000002.faiss"] == before["00000002.faiss"]
    assert sorted(counts(folder)) == [19, 50, 50]


def test_an_index_of_which_every_photo_is_gone_becomes_empty_and_gives_out_no_id_twice(quick: Path) -> None:
    folder = library(quick / "index", [5, 5], removed=list(range(1, 11)))
    assert compact(folder).dropped == 10
    assert counts(folder) == []
    assert not list((folder / "segments").iterdir())
    with IndexWriter(folder, encoder=FakeEncoder(dim=DIM)) as writer:
        add(writer, random_rows(1, DIM), first=100)
    assert [ids[:2] for ids in contents(folder).values()] == [(11, 11)]
    assert verify(folder).ok


def test_a_reader_keeps_what_it_has_mapped_and_sees_the_new_segments(quick: Path) -> None:
    folder = library(quick / "index", [20, 20], removed=[3])
    with Index(folder) as index:
        old = index.snapshot()
        rows = [segment.matrix.copy() for segment in old.segments]
        assert compact(folder).dropped == 1
        for segment, before in zip(old.segments, rows, strict=True):
            np.testing.assert_array_equal(segment.matrix, before)
        assert [len(segment.ids) for segment in index.snapshot().segments] == [39]


def test_a_damaged_segment_is_refused_not_given_a_new_sha256(quick: Path) -> None:
    folder = library(quick / "index", [20, 20])
    segment = folder / "segments" / "00000002.faiss"
    content = bytearray(segment.read_bytes())
    content[200] ^= 1
    segment.write_bytes(content)
    with pytest.raises(IndexFormatError, match="00000002.faiss is damaged; run `searchengine verify --repair`"):
        compact(folder)
    assert counts(folder) == [20, 20]
    assert sorted(file.name for file in (folder / "segments").iterdir()) == ["00000001.faiss", "00000002.faiss"]


def test_a_writer_and_a_compaction_do_not_mix(quick: Path) -> None:
    folder = library(quick / "index", [5, 5])
    with IndexWriter(folder, encoder=FakeEncoder(dim=DIM)), pytest.raises(IndexLocked, match="wait for it"):
        compact(folder)
    with pytest.raises(IndexNotFound):
        compact(quick / "none")
    assert not (quick / "none").exists()


def test_room_of_deleted_rows_is_given_back(quick: Path) -> None:
    folder = library(quick / "index", [500], removed=list(range(2, 501)))
    database = folder / "metadata.sqlite"
    before = database.stat().st_size
    assert compact(folder).freed_bytes > before / 2
    assert database.stat().st_size < before / 2
    assert compact(folder).freed_bytes == 0


def calls_of(work: Any, folder: Path) -> int:
    """How many calls `work` makes that may leave a disk half written."""

    def count() -> int:
        calls = Calls(folder.parent / "note")
        calls.watch()
        work(folder)
        return sum(calls.names.values())

    code, number = Child(count, log=folder.parent / "log").wait(seconds=30)
    assert code == 0, (folder.parent / "log").read_text()
    return int(number)


def kill_at(number: int, work: Any, folder: Path) -> int:
    """Do `work` in a process that is killed at its call of that number; the exit status."""

    def run() -> None:
        Calls(folder.parent / "note", Kill(number)).watch()
        work(folder)

    return Child(run, log=folder.parent / "log").wait(seconds=30)[0]


def test_killed_at_any_call_the_index_is_what_it_was(quick: Path) -> None:
    original = library(quick / "original", [20, 20, 50, 5], removed=[3, 4])
    before, hits = contents(original), found(original)
    shutil.copytree(original, quick / "index")
    total = calls_of(compact, quick / "index")
    assert total > 30
    for number in range(1, total + 1, 2):
        shutil.rmtree(quick / "index")
        shutil.copytree(original, quick / "index")
        assert kill_at(number, compact, quick / "index") == -signal.SIGKILL, (quick / "log").read_text()
        assert contents(quick / "index") == before
        assert [p for p in verify(quick / "index").problems if p.kind != "orphan"] == []
        compact(quick / "index")
        assert verify(quick / "index").problems == []
        assert contents(quick / "index") == before
        assert sum(counts(quick / "index")) == len(before)
    assert found(quick / "index") == hits


@pytest.mark.skipif(not can_mount(), reason="a small disk can be mounted only by root, where mounting is allowed")
def test_however_little_room_is_left_nothing_is_lost(tmp_path: Path, quick: Path) -> None:
    original = library(quick / "index", [20, 20, 60, 5], removed=[3, 4])
    before = contents(original)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    outcomes = []
    try:
        for pages in range(0, 60, 2):
            shutil.copytree(original, disk / "index")
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * pages))
            try:
                outcomes.append(compact(disk / "index").merged > 0)
            except IndexUnusable as error:
                assert "free space" in str(error)
                assert "/project/" not in str(error)
                outcomes.append(False)
            (disk / "ballast").unlink()
            assert contents(disk / "index") == before, pages
            assert [p for p in verify(disk / "index").problems if p.kind != "orphan"] == []
            compact(disk / "index")
            assert verify(disk / "index").ok
            shutil.rmtree(disk / "index")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert {True, False} == set(outcomes)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_DATA, as Linux counts it")
def test_memory_is_that_of_one_segment(quick: Path) -> None:
    """40 MiB of vectors become segments of 2 MiB, in a process that may take 16 MiB more than it has when it begins."""
    rows = random_rows(2_500, 4096)
    with IndexWriter(quick / "index", encoder=FakeEncoder(dim=4096)) as writer:
        for first in range(0, 2_500, 125):
            add(writer, rows[first : first + 125], first=first)
        writer.remove_photos(list(range(1, 2_500, 7)))
        writer.commit(report={}, finished=True)
    script = textwrap.dedent("""
        import re, resource, sys
        import indexer.compact
        indexer.compact.SEGMENT_BYTES = 2 * 2**20
        taken = 1024 * int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (taken + 16 * 2**20,) * 2)
        print(indexer.compact.compact(sys.argv[1]).merged)
    """)
    command = [sys.executable, "-c", script, quick / "index"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout == "20\n", done.stderr
    assert verify(quick / "index").ok


def test_the_command_needs_no_encoder_and_answers_as_status_does(quick: Path, own_home: None, cli: Cli) -> None:
    folder = library(quick / "index", [5, 5], removed=[1])
    outcome = cli("compact", "--index", folder, "--json")
    assert outcome.code == 0
    assert outcome.lines == cli("status", "--index", folder, "--json").lines
    assert (outcome.lines[0]["vectors"], outcome.lines[0]["segments"]) == (9, 1)
    assert cli("compact", "--index", folder).out == "nothing to do\n"
    library(quick / "other", [5, 5])
    assert cli("compact", "--index", quick / "other").out.startswith("2 segments became 1, 0 vectors of no photo")
    assert cli("compact", "--index", quick / "none").code == 3
    assert json.loads(cli("status", "--index", folder, "--json").out)["size_bytes"] > 0


def test_an_index_with_a_lost_segment_is_not_compacted(quick: Path) -> None:
    folder = library(quick / "index", [5, 5])
    compact(folder)
    (segment,) = (folder / "segments").iterdir()
    segment.unlink()
    with pytest.raises(IndexFormatError, match="is missing; run `searchengine verify --repair`"):
        compact(folder)


def test_an_index_that_has_lost_its_tables_gets_no_empty_ones(quick: Path) -> None:
    folder = library(quick / "index", [5])
    for file in folder.glob("metadata.sqlite*"):
        file.unlink()
    with pytest.raises(IndexFormatError, match="has lost its metadata.sqlite; restore it"):
        compact(folder)
    assert not list(folder.glob("metadata.sqlite*"))
