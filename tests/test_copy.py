"""Copying an index: what moves, what stays, what is refused, and what a killed copy leaves."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

import indexer
from indexer.compact import compact
from indexer.copy import CopyReport, compare, copy
from indexer.replicas import local_writing
from indexer.replicas.local import LocalReplica
from indexer.replicas.local_writing import Diverged
from indexer.tags import TaggingRequest, remove_tags, write_tags
from indexer.verify import verify
from indexer.writer import FailedPhoto, IndexWriter, NewPhoto
from searchengine import open_index
from searchengine.errors import IndexFormatError, IndexLocked, IndexNotFound, ModelMismatch, UsageError
from searchengine.index import schema
from searchengine.index.schema import MIGRATIONS
from searchengine.metadata import PhotoMetadata
from searchengine.stores import StoredPhoto
from searchengine.vectors import normalise

ROOT = Path(__file__).parent.parent
OLDER = [f"v{version}" for version in range(1, len(MIGRATIONS))]
STRANGE = b"\xff%'\" \xc3\xa9\n.png"


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, for an index waits for the disk at each commit."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        yield Path(name)


@pytest.fixture
def library(folder: Path) -> Path:
    """A dozen photos, an exact copy, a broken one and a name that is not UTF-8."""
    photos = folder / "photos"
    photos.mkdir()
    for number in range(12):
        painted(number).save(photos / f"{number}.png")
    (photos / "copy.png").write_bytes((photos / "3.png").read_bytes())
    (photos / "broken.png").write_bytes(b"no picture")
    os.rename(photos / "4.png", os.path.join(os.fsencode(photos), STRANGE))
    return photos


def index(photos: Path, folder: Path, *, encoder: FakeEncoder | None = None) -> indexer.Report:
    return indexer.build(folder, [photos], encoder=encoder or FakeEncoder(), isolated=False)


def tag(folder: Path, *labels: str) -> None:
    request = TaggingRequest(labels=labels, templates=["{}"], top=2, min_probability=0.0)
    write_tags(folder, request, encoder=FakeEncoder())


def assert_same(source: Path, copied: Path) -> None:
    """Photo by photo, vectors to the bit, and sound in itself."""
    with LocalReplica(source) as one, LocalReplica(copied) as other:
        assert len(compare(one, other)) == 0
        ids = [image_id for page in one.ids() for image_id in page]
        photos, matrix = one.photos(ids)
        copies, vectors = other.photos(ids)
        assert photos == copies
        assert matrix.tobytes() == vectors.tobytes()
        assert other.identity == one.identity
        assert dict(other.values()) == dict(one.values())
    assert verify(copied).problems == []


def test_a_copy_has_the_same_photos_ids_vectors_tags_failures_and_last_run(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    tag(folder / "a", "dog", "cat", "tree")
    report = copy(folder / "a", folder / "b")
    assert (report.photos, report.added, report.failures, report.sampled) == (13, 13, 1, 13)
    assert_same(folder / "a", folder / "b")
    with open_index(folder / "a") as one, open_index(folder / "b") as other:
        assert other.tags() == one.tags()
        assert list(other.failed_photos()) == list(one.failed_photos())
        assert other.last_run() == one.last_run()
        query = np.float32(one.vector(1))[None]
        for ours, theirs in zip(one.search(query, k=5), other.search(query, k=5), strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_a_second_copy_has_nothing_to_do_and_a_later_one_brings_only_what_changed(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    tag(folder / "a", "dog", "cat", "tree")
    copy(folder / "a", folder / "b")
    again = copy(folder / "a", folder / "b")
    assert (again.added, again.updated, again.deleted, again.unchanged) == (0, 0, 0, 13)
    (library / "5.png").unlink()
    (library / "6.png").rename(library / "moved.png")
    painted(99).save(library / "7.png")
    painted(98).save(library / "new.png")
    index(library, folder / "a")
    report = copy(folder / "a", folder / "b")
    assert (report.added, report.updated, report.deleted, report.unchanged) == (1, 2, 1, 10)
    assert_same(folder / "a", folder / "b")


def test_forgotten_labels_are_forgotten_in_the_copy(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    tag(folder / "a", "dog", "cat", "tree")
    copy(folder / "a", folder / "b")
    tag(folder / "a", "cat", "house")
    remove_tags(folder / "a", ["dog"])
    copy(folder / "a", folder / "b")
    assert_same(folder / "a", folder / "b")


def test_labels_keep_their_tags_whatever_ids_they_have(library: Path, folder: Path) -> None:
    """Ids of labels are given out again: here dog gets that of cat, and a new label that of dog."""
    index(library, folder / "a")
    tag(folder / "a", "dog", "cat")
    copy(folder / "a", folder / "b")
    remove_tags(folder / "a", ["dog", "cat"])
    tag(folder / "a", "house", "dog")
    copy(folder / "a", folder / "b")
    assert_same(folder / "a", folder / "b")
    remove_tags(folder / "a", ["dog", "house"])
    tag(folder / "a", "dog", "house")
    copy(folder / "a", folder / "b")
    assert_same(folder / "a", folder / "b")


def test_the_copy_is_indexed_further_without_giving_out_an_id_twice(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    painted(50).save(library / "last.png")
    index(library, folder / "a")
    (library / "last.png").unlink()
    index(library, folder / "a")  # its id is the highest ever, and no photo has it any more
    copy(folder / "a", folder / "b")
    painted(51).save(library / "new.png")
    report = index(library, folder / "b")
    assert (report.added, report.unchanged) == (1, 13)
    with open_index(folder / "b") as opened:
        new = opened.image_by_key("local", str(library / "new.png"))
        assert new is not None
        assert (new.id, new.vector_id) == (15, 14)


def test_content_that_came_back_under_another_vector_id_replaces_the_old_vector(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    copy(folder / "a", folder / "b")
    (library / "8.png").unlink()
    index(library, folder / "a")
    compact(folder / "a")
    painted(8).save(library / "8.png")
    index(library, folder / "a")
    report = copy(folder / "a", folder / "b")
    assert (report.added, report.deleted) == (1, 1)
    assert_same(folder / "a", folder / "b")


def test_an_index_that_went_its_own_way_cannot_become_a_copy(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    copy(folder / "a", folder / "b")
    for number, name in enumerate("ab"):
        painted(70 + number).save(library / f"of-{name}.png")
        index(library, folder / name)
        (library / f"of-{name}.png").unlink()
    with pytest.raises(Diverged, match=r"cannot become a copy: under the id 13 .* copy into a new folder"):
        copy(folder / "a", folder / "b")
    assert verify(folder / "b").problems == []


def test_an_index_of_other_photos_is_taken_for_a_mistake_unless_replace_says_otherwise(
    library: Path, folder: Path
) -> None:
    index(library, folder / "a")
    others = folder / "others"
    others.mkdir()
    painted(80).save(others / "80.png")
    index(others, folder / "b")
    with pytest.raises(UsageError, match="has 1 photos, and none of them is in .* give --replace"):
        copy(folder / "a", folder / "b")
    with open_index(folder / "b") as opened:
        assert opened.count_images() == 1


def test_another_encoder_is_refused_by_name(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    index(library, folder / "b", encoder=FakeEncoder(name="other"))
    with pytest.raises(ModelMismatch, match="is of the encoder fake .* of other"):
        copy(folder / "a", folder / "b")


def test_an_index_is_not_copied_onto_itself(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    with pytest.raises(UsageError, match="are the same index"):
        copy(folder / "a", folder / "photos" / ".." / "a")


def test_there_must_be_a_source(folder: Path) -> None:
    with pytest.raises(IndexNotFound):
        copy(folder / "a", folder / "b")
    assert not (folder / "b").exists()


def test_a_destination_that_is_being_written_is_refused(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    with IndexWriter(folder / "b", encoder=FakeEncoder()), pytest.raises(IndexLocked):
        copy(folder / "a", folder / "b")


def test_a_damaged_segment_is_not_copied(library: Path, folder: Path) -> None:
    index(library, folder / "a")
    segment = next((folder / "a" / "segments").glob("*.faiss"))
    content = bytearray(segment.read_bytes())
    content[200] ^= 1
    segment.write_bytes(content)
    with pytest.raises(IndexFormatError, match="is damaged"):
        copy(folder / "a", folder / "b")


@pytest.mark.parametrize("version", OLDER)
def test_the_copy_of_an_index_of_an_earlier_version_is_whole(folder: Path, version: str) -> None:
    shutil.copytree(ROOT / "tests" / "indexes" / version / "index", folder / "old")
    report = copy(folder / "old", folder / "new")
    assert report.photos == report.added > 0
    assert verify(folder / "new").problems == []
    with open_index(folder / "old") as old, open_index(folder / "new") as new:
        assert new.count_failures() == old.count_failures()


def test_a_copy_that_is_stopped_goes_on_from_there(
    library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(library, folder / "a")
    monkeypatch.setattr(local_writing.WritableLocalReplica, "photos_per_write", 4)
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        copy(folder / "a", folder / "b", on_progress=lambda done, total: stop.set() if done else None, stop=stop)
    assert verify(folder / "b").problems == []
    report = copy(folder / "a", folder / "b")
    assert (report.added, report.unchanged) == (9, 4)
    assert_same(folder / "a", folder / "b")


def test_the_source_may_be_written_and_compacted_during_a_copy(
    library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(library, folder / "a")
    painted(60).save(library / "later.png")
    index(library, folder / "a")
    monkeypatch.setattr(local_writing.WritableLocalReplica, "photos_per_write", 4)
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.2)  # for which a checkpoint waits for those who read
    done_once: list[int] = []

    def meddle(done: int, total: int) -> None:
        if done and not done_once:
            done_once.append(done)
            (library / "1.png").unlink()
            index(library, folder / "a")
            compact(folder / "a")

    assert copy(folder / "a", folder / "b", on_progress=meddle).photos == 14  # as it was when the copy began
    assert done_once
    assert verify(folder / "b").problems == []
    assert copy(folder / "a", folder / "b").deleted == 1
    assert_same(folder / "a", folder / "b")


# One process that forks: each child copies, and kills itself, as kill -9 does, before or after the n-th call of a step.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import indexer.copy, indexer.segments, indexer.writable
from indexer.replicas import local_writing

local_writing.WritableLocalReplica.photos_per_write = 4

def fatal(function, number, where):
    calls = []
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == number and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

STEPS = {{
    "make": (indexer.writable, "write_identity"),
    "values": (local_writing.WritableLocalReplica, "write_values"),
    "segment": (indexer.segments, "write_rows"),
    "publish": (indexer.segments, "publish"),
    "write": (local_writing.WritableLocalReplica, "write"),
    "remove": (local_writing.WritableLocalReplica, "remove"),
    "finish": (local_writing.WritableLocalReplica, "finish"),
}}
print("ready", flush=True)
for line in sys.stdin:
    source, destination, step, number, where = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        owner, name = STEPS[step]
        setattr(owner, name, fatal(getattr(owner, name), int(number), where))
        indexer.copy.copy(source, destination)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = [
    ("make", 1, "before"),
    ("make", 1, "after"),
    ("values", 1, "after"),
    ("segment", 2, "before"),
    ("publish", 1, "before"),
    ("publish", 2, "after"),
    ("write", 2, "after"),
    ("remove", 1, "after"),
    ("finish", 1, "after"),
]


@pytest.fixture(scope="module")
def killer() -> Iterator[Callable[..., int]]:
    script = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"

        def kill(source: Path, destination: Path, step: str, number: int, where: str) -> int:
            assert process.stdin and process.stdout
            process.stdin.write(f"{source}\t{destination}\t{step}\t{number}\t{where}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield kill
        process.stdin.close()


@pytest.mark.parametrize(("step", "number", "where"), KILLS)
def test_a_copy_that_was_killed_leaves_a_sound_index_and_is_gone_on_with(
    library: Path, folder: Path, killer: Callable[..., int], step: str, number: int, where: str
) -> None:
    index(library, folder / "a")
    tag(folder / "a", "dog", "cat")
    if step == "remove":  # there is something to remove
        copy(folder / "a", folder / "b")
        (library / "2.png").unlink()
        index(library, folder / "a")
    assert killer(folder / "a", folder / "b", step, number, where) == -signal.SIGKILL
    if (folder / "b" / "index.json").exists():
        kinds = {problem.kind for problem in verify(folder / "b").problems}
        assert kinds <= {"orphan"}  # which the next writer deletes
    copy(folder / "a", folder / "b")
    assert_same(folder / "a", folder / "b")


names = st.binary(min_size=1, max_size=5).map(lambda name: "/photos/" + name.decode("utf-8", "surrogateescape"))
facts = st.builds(
    PhotoMetadata,
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    taken_at=st.none() | st.just("2024-05-01T10:00:00"),
    latitude=st.none() | st.floats(-90, 90),
    longitude=st.none() | st.floats(-180, 180),
    camera=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
photo = st.tuples(st.sampled_from(["local", "s3", "zip"]), names, st.integers(0, 5), facts, st.integers(0, 2**62))
# Photos to record, places of photos to remove (modulo), names that fail.
runs = st.lists(st.tuples(st.lists(photo, max_size=5), st.lists(st.integers(0, 50), max_size=2), names), max_size=4)


def record(folder: Path, photos: list[Any], removed: list[int], failed: str) -> None:
    """One run of an indexer; contents are numbers, and each has a vector of its own."""
    with closing(sqlite3.connect(folder / "metadata.sqlite")) as connection:
        known = {row[0] for row in connection.execute("SELECT content_hash FROM vectors")}
        ids = [row[0] for row in connection.execute("SELECT id FROM images ORDER BY id")]
    with IndexWriter(folder, encoder=FakeEncoder(dim=4)) as writer:
        for content in dict.fromkeys(content for _, _, content, _, _ in photos):
            content_hash = bytes([content]) * 32
            if content_hash not in known:
                vector = normalise(np.random.default_rng(content).standard_normal((1, 4)))
                writer.add_vectors([content_hash], vector)
        for store, key, content, metadata, mtime_ns in photos:
            listed = StoredPhoto(key, size_bytes=content, mtime_ns=mtime_ns, etag=f'"{content}"')
            writer.add_photo(
                NewPhoto(store=store, listed=listed, content_hash=bytes([content]) * 32, metadata=metadata)
            )
        writer.remove_photos([ids[place % len(ids)] for place in removed if ids])
        listed = StoredPhoto(failed, size_bytes=1, mtime_ns=2)
        writer.add_failure(FailedPhoto(store="local", listed=listed, reason="broken", damaged=True))
        writer.commit(report={"added": len(photos)}, finished=True)


@settings(max_examples=10)
@given(runs=runs)
def test_whatever_was_indexed_a_copy_and_a_copy_of_it_are_the_same(runs: list[Any]) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(name)
        with IndexWriter(folder / "a", encoder=FakeEncoder(dim=4)) as writer:
            writer.commit(report={}, finished=True)
        for photos, removed, failed in runs:
            record(folder / "a", photos, removed, failed)
            copy(folder / "a", folder / "b", replace=True)  # by steps ...
        copy(folder / "a", folder / "b", replace=True)
        copy(folder / "b", folder / "c")  # ... and at once
        assert_same(folder / "a", folder / "b")
        assert_same(folder / "a", folder / "c")
        report = copy(folder / "a", folder / "c")
        assert report.unchanged == report.photos


def test_the_command_counts_in_json_and_in_words(library: Path, folder: Path, cli: Cli, own_home: None) -> None:
    index(library, folder / "a")
    (counters,) = cli("copy", folder / "a", folder / "b", "--json").lines
    assert counters.keys() == CopyReport().as_dict().keys()
    assert (counters["photos"], counters["added"], counters["model"]) == (13, 13, "fake")
    told = cli("copy", folder / "a", folder / "b")
    assert told.code == 0
    assert told.out.startswith("nothing to do; 13 unchanged\n13 photos agree by their digests")


def test_the_command_fails_as_documented(library: Path, folder: Path, cli: Cli, own_home: None) -> None:
    assert cli("copy", folder / "none", folder / "b").code == 3
    index(library, folder / "a")
    index(library, folder / "other", encoder=FakeEncoder(name="other"))
    assert cli("copy", folder / "a", folder / "a").code == 2
    assert cli("copy", folder / "a", folder / "other").code == 4
