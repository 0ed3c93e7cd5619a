"""Another model for an index that goes on serving: one or the other at any instant, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder
from safetensors import safe_open
from safetensors.numpy import save_file
from test_crawl import all_rows, hashes, ids, state

import indexer.filling
import indexer.reencode
import indexer.takeover
import indexer.verify
from indexer.compact import compact
from indexer.lock import LockedIndex
from indexer.pipeline import build
from indexer.reencode import cancel, reencode
from indexer.report import ReencodeReport
from indexer.verify import verify
from searchengine.errors import IndexFormatError, IndexLocked, IndexNotFound, ModelMismatch, UsageError
from searchengine.index.layout import read_card, read_identity
from searchengine.index.model_change import model_change
from searchengine.index.reader import Index
from searchengine.models.mini import parts
from searchengine.search import Searcher
from searchengine.vectors import FloatMatrix, PixelBatch

ROOT = Path(__file__).parent.parent
PHOTOS, CONTENTS = 30, 25


class Old(FakeEncoder):
    def __init__(self) -> None:
        super().__init__(name="old", dim=16)


class New(FakeEncoder):
    """Another dimension, and vectors that are not those of the old one."""

    def __init__(self, *, name: str = "new", dim: int = 24) -> None:
        super().__init__(name=name, dim=dim)

    @property
    def embedded(self) -> int:
        return sum(self.batches)


@pytest.fixture
def library() -> Iterator[Path]:
    """`photos`, thirty of them with twenty-five contents, and their `index` by `Old`."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for number in range(PHOTOS):
            painted(number % CONTENTS).save(folder / "photos" / f"{number:02}.png")
        index(folder)
        yield folder


def index(folder: Path, encoder: FakeEncoder | None = None) -> Any:
    return build(folder / "index", [folder / "photos"], encoder=encoder or Old(), batch_size=4, isolated=False)


def change(folder: Path, encoder: New | None = None, **options: Any) -> ReencodeReport:
    return reencode(folder / "index", encoder=encoder or New(), isolated=False, **{"batch_size": 4} | options)


def assert_like_new(folder: Path) -> None:
    """The index says what one says that `New` made from scratch, and is sound."""
    with tempfile.TemporaryDirectory(dir=QUICK) as fresh:
        build(Path(fresh, "index"), [folder / "photos"], encoder=New(), isolated=False)
        expected = state(Path(fresh, "index"))
    found = state(folder / "index")
    assert found["photos"] == expected["photos"]
    for key, vector in expected["vectors"].items():
        np.testing.assert_allclose(as_vector(found["vectors"][key]), as_vector(vector), atol=1e-6)
    assert read_identity(folder / "index").encoder == "new"
    assert verify(folder / "index", stores=True).problems == []
    left = {file.name for file in (folder / "index").iterdir()}
    assert left <= {"index.json", "lock", "metadata.sqlite", "metadata.sqlite-shm", "metadata.sqlite-wal", "segments"}


def as_vector(data: bytes) -> FloatMatrix:
    return np.frombuffer(data, np.float32)


def test_an_index_gets_another_model_and_its_photos_keep_their_ids(library: Path) -> None:
    before, segments = ids(library / "index"), set((library / "index" / "segments").iterdir())
    encoder = New()
    report = change(library, encoder)
    assert report.swapped
    assert (report.vectors, report.embedded, report.resumed) == (CONTENTS, CONTENTS, 0)
    assert encoder.embedded == CONTENTS, "copies are embedded once"
    assert ids(library / "index") == before
    assert not segments & set((library / "index" / "segments").iterdir())
    assert_like_new(library)
    assert index(library, New()).unchanged == PHOTOS
    again = change(library, encoder)
    assert (again.swapped, again.embedded, encoder.embedded) == (False, 0, CONTENTS)


def test_it_goes_back_again_and_changes_the_precision_too(library: Path) -> None:
    vectors = state(library / "index")["vectors"]
    change(library)
    reencode(library / "index", encoder=Old(), isolated=False)
    assert state(library / "index")["vectors"] == vectors
    rounded = Old()
    rounded.precision, rounded.fingerprint = "int8", "1" * 64
    assert reencode(library / "index", encoder=rounded, isolated=False).swapped
    assert read_identity(library / "index").precision == "int8"


def test_the_old_encoder_is_refused_from_then_on_with_the_way_back(library: Path) -> None:
    change(library)
    with pytest.raises(ModelMismatch, match=r"--model new, .* change the model .*: searchengine reencode --model old"):
        index(library)


def test_the_index_serves_and_grows_while_its_photos_are_embedded(library: Path) -> None:
    """While the first batch is being embedded, photos come, go and move, and every search finds what it found."""

    class Busy(New):
        def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
            if not self.batches:
                with Index(library / "index") as opened:
                    assert Searcher(opened, Old()).similar(1, k=3)
                painted(77).save(library / "photos" / "came.png")
                (library / "photos" / "08.png").unlink()
                (library / "photos" / "09.png").rename(library / "photos" / "moved.png")
                report = index(library)
                assert (report.added, report.deleted, report.moved) == (1, 1, 1)
            return super().encode_pixels(pixels)

    before = ids(library / "index")
    encoder = Busy()
    assert change(library, encoder).vectors == CONTENTS  # one more, and one less
    after = ids(library / "index")
    assert after["moved.png"] == before["09.png"]
    assert after["came.png"] == PHOTOS + 1
    assert_like_new(library)


def test_photos_that_changed_broke_or_went_end_as_a_run_would_leave_them(library: Path) -> None:
    before = ids(library / "index")
    photos = library / "photos"
    painted(88).save(photos / "10.png")  # to a content that is new
    shutil.copyfile(photos / "12.png", photos / "11.png")  # to one that is known
    (photos / "13.png").write_bytes(b"broken")
    (photos / "14.png").unlink()
    (photos / "01.png").unlink()  # of this and the next, 26.png and 27.png are copies
    painted(99).save(photos / "02.png")
    told: dict[str, str] = {}
    report = change(library, on_skip=lambda key, reason: told.update({Path(key).name: reason}))
    assert (report.swapped, report.updated, report.deleted, report.failed, report.unreadable) == (True, 2, 1, 1, 0)
    assert sorted(told) == ["13.png", "14.png"]
    after = ids(library / "index")
    assert before.items() - after.items() == {("13.png", before["13.png"]), ("14.png", before["14.png"])}
    with Index(library / "index") as opened:
        failed = {Path(key).name: reason for _, key, reason in opened.failed_photos()}
        searcher = Searcher(opened, New())
        assert searcher.search_image(painted(88), k=1)[0].path.endswith("10.png")
        assert (
            opened.vector(opened.image(after["11.png"]).vector_id).tobytes()
            == opened.vector(opened.image(after["12.png"]).vector_id).tobytes()
        )  # type: ignore[union-attr]
    assert failed == told
    report = index(library, New())
    assert (report.deleted, report.updated, report.added) == (1, 1, 0), "01.png and 02.png are left to `index`"
    shutil.rmtree(library / "photos" / "nothing", ignore_errors=True)
    assert_like_new(library)


def test_photos_that_cannot_be_read_hold_the_change_up_until_they_can_or_may_go(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk is away: what is known of it must not be lost with it."""
    away = library / "photos" / "05.png"
    content = away.read_bytes()
    away.unlink()
    monkeypatch.setattr("indexer.reencode.device_of", lambda store, key: -1)
    before = state(library / "index")
    report = change(library)
    assert (report.swapped, report.unreadable, report.embedded) == (False, 1, CONTENTS - 1)
    assert state(library / "index") == before
    assert index(library) is not None  # it is the old one's still

    away.write_bytes(content)
    index(library)
    encoder = New()
    report = change(library, encoder)
    assert (report.swapped, report.resumed, encoder.embedded) == (True, CONTENTS - 1, 1)
    assert_like_new(library)

    away.unlink()
    report = reencode(library / "index", encoder=Old(), isolated=False, drop_unreadable=True)
    assert (report.swapped, report.failed, report.unreadable) == (True, 1, 0)
    with Index(library / "index") as opened:
        assert [(Path(key).name, "cannot be read" in reason) for _, key, reason in opened.failed_photos()] == [
            ("05.png", True)
        ]
    away.write_bytes(content)
    assert index(library).added == 1, "it is tried again, as what could not be read always is"


def test_a_library_that_is_not_where_it_was_is_not_taken_for_deleted(library: Path) -> None:
    before = ids(library / "index")
    (library / "photos").rename(library / "elsewhere")
    report = change(library)
    assert (report.swapped, report.deleted, report.unreadable) == (False, 0, PHOTOS)
    assert ids(library / "index") == before
    assert build(library / "index", [library / "elsewhere"], encoder=Old(), isolated=False).moved == PHOTOS
    assert change(library).swapped
    assert ids(library / "index") == before


def test_a_run_that_is_stopped_keeps_what_it_has_done(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    first = New()
    with pytest.raises(KeyboardInterrupt):
        change(library, first, stop=stop, workers=1, on_progress=lambda progress: progress.done >= 8 and stop.set())
    assert 8 <= first.embedded < CONTENTS
    assert read_identity(library / "index").encoder == "old"
    under_way = model_change(library / "index")
    assert under_way is not None
    assert (under_way.model, under_way.vectors) == ("new", first.embedded)
    second = New()
    report = change(library, second)
    assert (report.resumed, report.embedded) == (first.embedded, second.embedded)
    assert first.embedded + second.embedded == CONTENTS
    assert model_change(library / "index") is None
    assert_like_new(library)


# One process that forks: each child kills itself, as kill -9 does, before or after a call of a step.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import indexer.filling, indexer.leftovers, indexer.reencode, indexer.segments
import indexer.takeover, indexer.writable, indexer.writer
import searchengine.index.layout as layout
from test_model_change import New

indexer.filling.COMMIT_EVERY_PHOTOS = 5

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
    "write the card": (indexer.writable, "write_identity"),
    "write a segment": (indexer.segments, "write_rows"),
    "commit": (indexer.writer.IndexWriter, "commit"),
    "merge": (indexer.takeover, "write_full_segments"),
    "record": (indexer.takeover, "record_photos"),
    "name": (indexer.takeover, "name_in_place_of"),
    "tidy": (indexer.takeover, "delete_orphans"),
    "replace the card": (indexer.leftovers, "write_identity"),
    "discard": (indexer.leftovers, "discard_next"),
    "delete": (os, "unlink"),
}}
print("ready", flush=True)
for line in sys.stdin:
    folder, step, number, where = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        owner, name = STEPS[step]
        setattr(owner, name, fatal(getattr(owner, name), int(number), where))
        indexer.reencode.reencode(folder + "/index", encoder=New(), batch_size=4, workers=2, isolated=False)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = [
    ("write the card", 1, "before", "old"),
    ("write the card", 1, "after", "old"),
    ("write a segment", 2, "before", "old"),
    ("write a segment", 3, "after", "old"),
    ("commit", 2, "before", "old"),
    ("commit", 2, "after", "old"),
    ("merge", 1, "before", "old"),
    ("merge", 1, "after", "old"),
    ("record", 1, "after", "old"),
    ("name", 1, "after", "old"),
    ("tidy", 1, "before", "new"),
    ("tidy", 1, "after", "new"),
    ("replace the card", 1, "after", "new"),
    ("discard", 1, "before", "new"),
    ("discard", 1, "after", "new"),
]


@pytest.fixture(scope="module")
def killer() -> Iterator[Callable[[Path, str, int, str], int]]:
    script = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"

        def kill(folder: Path, step: str, number: int, where: str) -> int:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{folder}\t{step}\t{number}\t{where}\n")
            return int(process.stdout.readline())

        yield kill
        process.stdin.close()


@pytest.mark.parametrize(("step", "number", "where", "serves"), STEPS)
def test_killed_at_any_step_the_one_model_serves_or_the_other(
    library: Path, killer: Callable[[Path, str, int, str], int], step: str, number: int, where: str, serves: str
) -> None:
    before = ids(library / "index")
    assert killer(library, step, number, where) == signal.SIGKILL
    identity = read_identity(library / "index")
    assert identity.encoder == serves
    with Index(library / "index") as opened:
        encoder = New() if serves == "new" else Old()
        assert len(Searcher(opened, encoder).search("anything", k=100)) == PHOTOS
    staged = model_change(library / "index")
    encoder = New()
    report = change(library, encoder)
    if serves == "old":
        assert report.swapped
        assert report.resumed == (staged.vectors if staged else 0)
        assert encoder.embedded == CONTENTS - report.resumed, "what was committed is not made again"
        assert report.resumed == CONTENTS or step not in {"merge", "record", "name"}
    assert read_card(library / "index").encoder == "new"
    assert ids(library / "index") == before
    assert_like_new(library)


@pytest.mark.parametrize("by", ["index", "compact", "verify"])
def test_what_a_killed_change_left_to_do_any_writer_does(
    library: Path, killer: Callable[[Path, str, int, str], int], by: str
) -> None:
    assert killer(library, "tidy", 1, "before") == signal.SIGKILL
    assert [problem.kind for problem in verify(library / "index").problems] == ["change", "orphan"]
    assert read_card(library / "index").encoder == "old", "the tables are the commit, and the card follows"
    if by == "index":
        index(library, New())
    elif by == "compact":
        compact(library / "index")
    else:
        assert {repair.problem.kind for repair in verify(library / "index", repair=True).repaired} == {
            "change",
            "orphan",
        }
    assert_like_new(library)


# Searches without end, as a server does: opens the index again when its model has changed, and survives nothing else.
SERVER = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from searchengine.errors import ModelMismatch
from searchengine.index.reader import Index
from searchengine.search import Searcher
from test_model_change import New, Old

index = Index(sys.argv[1])
searcher, seen = Searcher(index, Old()), []
print("ready", flush=True)
while True:
    try:
        hits = searcher.search("a dog", k=100)
    except ModelMismatch as error:
        assert "open it again, with that encoder" in str(error)
        index.close()
        index = Index(sys.argv[1])
        searcher = Searcher(index, New())
        continue
    assert len(hits) == 30, len(hits)
    if searcher.encoder.name not in seen:
        seen.append(searcher.encoder.name)
        print(searcher.encoder.name, time.time(), flush=True)
"""


def test_a_process_that_has_the_index_open_follows_within_a_second(library: Path) -> None:
    script = SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(library / "index")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline().startswith("old ")
        change(library)
        changed = time.time()
        name, when = process.stdout.readline().split()
        assert name == "new"
        assert float(when) < changed + 1
        process.kill()


def test_an_open_searcher_says_what_to_do_and_the_rest_of_the_index_goes_on(library: Path) -> None:
    with Index(library / "index") as opened:
        searcher = Searcher(opened, Old())
        expected = [hit.path for hit in searcher.search("a dog")]
        assert expected
        change(library)
        with pytest.raises(
            ModelMismatch, match="replaced by one of encoder new; open it again, with that encoder in fp32"
        ):
            searcher.search("a dog")
        assert opened.count_images() == PHOTOS


def test_two_models_at_a_time_are_one_too_many(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        change(library, stop=stopped)
    with pytest.raises(UsageError, match="on its way to encoder new in fp32; finish that with --model new, or drop"):
        change(library, New(name="third"))
    assert cancel(library / "index")
    assert not cancel(library / "index")
    assert not (library / "index" / "next").exists()
    third = New(name="third")
    assert change(library, third).resumed == 0
    assert read_identity(library / "index").encoder == "third"
    with pytest.raises(IndexNotFound):
        cancel(library / "nowhere")
    with pytest.raises(IndexNotFound):
        reencode(library / "nowhere", encoder=New())


def test_neither_a_second_process_nor_a_writer_gets_between(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.lock.LOCK_SECONDS", 0.1)

    class Crowded(New):
        def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
            if not self.batches:
                with pytest.raises(IndexLocked):
                    change(library)
                with pytest.raises(IndexLocked):
                    cancel(library / "index")
            return super().encode_pixels(pixels)

    change(library, Crowded())
    assert_like_new(library)


def test_a_writer_that_holds_the_index_delays_only_the_last_step(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.lock.LOCK_SECONDS", 0.1)
    with LockedIndex(library / "index"), pytest.raises(IndexLocked):
        change(library)
    encoder = New()
    assert change(library, encoder).swapped
    assert encoder.embedded == 0


def test_damage_to_what_is_half_made_is_found_and_only_that_is_made_again(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.filling, "COMMIT_EVERY_PHOTOS", 5)
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        change(library, stop=stop, workers=1, on_progress=lambda progress: progress.done >= 16 and stop.set())
    assert verify(library / "index").ok, "half made is not broken"
    staged = sorted((library / "index" / "next" / "segments").iterdir())
    content = bytearray(staged[0].read_bytes())
    content[-30] ^= 1
    staged[0].write_bytes(content)
    (problem,) = verify(library / "index").problems
    assert problem.object == f"next/segments/{staged[0].name}"
    assert "reencode" in problem.remedy
    before = state(library / "index")
    with pytest.raises(IndexFormatError, match=r"is damaged; run `searchengine verify --repair`, then .*reencode"):
        change(library)
    assert state(library / "index") == before, "the old model serves on"
    assert verify(library / "index", repair=True).ok
    encoder = New()
    report = change(library, encoder)
    assert 0 < encoder.embedded < CONTENTS
    assert report.resumed + encoder.embedded == CONTENTS
    assert_like_new(library)


def test_a_repair_that_waited_for_a_change_takes_nothing_of_the_new_model_for_damage(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waited(LockedIndex):
        def __enter__(self) -> LockedIndex:
            monkeypatch.undo()
            change(library)
            return super().__enter__()

    monkeypatch.setattr(indexer.verify, "LockedIndex", Waited)
    assert verify(library / "index", repair=True).ok
    assert_like_new(library)


@pytest.mark.parametrize("found", ["gone", "half of it"])
def test_what_is_dropped_while_it_is_verified_is_no_problem(
    library: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        change(library, stop=stop, workers=1, on_progress=lambda progress: progress.done >= 8 and stop.set())
    name = "_open" if found == "gone" else "check_segments"
    function = getattr(indexer.verify, name)

    def late(*arguments: Any, **options: Any) -> Any:
        if any(getattr(argument, "folder", None) == library / "index" / "next" for argument in arguments):
            cancel(library / "index")
        return function(*arguments, **options)

    monkeypatch.setattr(indexer.verify, name, late)
    assert verify(library / "index").ok
    assert not (library / "index" / "next").exists()


def test_a_change_that_has_just_made_its_tables_is_no_problem(library: Path) -> None:
    (library / "index" / "next" / "segments").mkdir(parents=True)
    (library / "index" / "next" / "metadata.sqlite").touch()
    assert verify(library / "index").ok


def test_a_card_and_tables_of_different_times_are_told(library: Path) -> None:
    card = (library / "index" / "index.json").read_bytes()
    change(library)
    (library / "index" / "index.json").write_bytes(card)
    (problem,) = (problem for problem in verify(library / "index").problems if problem.kind == "encoders")
    assert "restore" in problem.remedy
    with (
        Index(library / "index") as opened,
        pytest.raises(IndexFormatError, match="another encoder than its index.json"),
    ):
        opened.snapshot()


def test_tags_and_vector_ids_stay_with_their_contents(library: Path) -> None:
    before = hashes(library / "index")
    with closing(sqlite3.connect(library / "index" / "metadata.sqlite")) as tables, tables:
        tables.execute("INSERT INTO taggings VALUES (1, '2026-01-01', 'x', '[]', '[]', 1, 0.5, 25)")
        tables.execute("INSERT INTO labels VALUES (1, 'dog', 1)")
        tables.execute("INSERT INTO tags VALUES (7, 1, 0.9), (15, 1, 0.8)")
    content = before[15]
    (gone,) = {row.key for row in rows_of(library) if row.vector_id == 15}
    os.unlink(gone)
    change(library)
    after = hashes(library / "index")
    assert after == {number: content_hash for number, content_hash in before.items() if content_hash != content}
    with closing(sqlite3.connect(library / "index" / "metadata.sqlite")) as tables:
        assert tables.execute("SELECT vector_id FROM tags").fetchall() == [(7,)]
        assert tables.execute("PRAGMA foreign_key_check").fetchall() == []


def rows_of(folder: Path) -> list[Any]:
    with Index(folder / "index") as opened:
        return all_rows(opened)


def test_what_was_built_for_large_libraries_is_built_again_of_its_kind(library: Path) -> None:
    compact(library / "index", kind="scan")
    change(library)
    with Index(library / "index") as opened:
        snapshot = opened.snapshot()
        assert snapshot.ann is not None
        assert (snapshot.ann.parameters.kind, snapshot.ann.parameters.count) == ("scan", CONTENTS)
        assert not snapshot.is_exact() or len(snapshot) <= 16_384
    assert verify(library / "index").ok
    assert is_sound_of(library, dim=24) == PHOTOS


def is_sound_of(folder: Path, *, dim: int) -> int:
    with Index(folder / "index") as opened:
        rows = all_rows(opened)
        assert {opened.vector(row.vector_id).shape for row in rows} == {(dim,)}
        return len(rows)


def test_many_small_segments_become_full_ones(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer.filling, "COMMIT_EVERY_PHOTOS", 4)
    monkeypatch.setattr(indexer.takeover, "SEGMENT_BYTES", 10 * 4 * 24)
    change(library)
    with Index(library / "index") as opened:
        assert [len(segment.ids) for segment in opened.snapshot().segments] == [10, 10, 5]
    assert_like_new(library)


def test_an_empty_index_changes_its_model_too(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    index(tmp_path)
    assert change(tmp_path).swapped
    painted(1).save(tmp_path / "photos" / "a.png")
    assert index(tmp_path, New()).added == 1


def test_to_cancel_what_a_killed_change_has_already_done_loses_nothing(
    library: Path, killer: Callable[[Path, str, int, str], int]
) -> None:
    """The tables name the new encoder, and only `next/` has its card yet."""
    assert killer(library, "tidy", 1, "before") == signal.SIGKILL
    assert not cancel(library / "index"), "it is over"
    assert index(library, New()).unchanged == PHOTOS
    assert_like_new(library)


def test_a_photo_that_is_moved_while_others_are_embedded_is_read_where_it_is_now(library: Path) -> None:
    """It was looked for under its old name before a run of `index` told of the new one."""

    class Busy(New):
        def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
            if not moved.exists():
                (library / "photos" / "09.png").rename(moved)
            return super().encode_pixels(pixels)

    def moved_then_indexed(progress: Any) -> None:
        if progress.done == CONTENTS - 1 and not reports:
            reports.append(index(library))

    moved, reports = library / "photos" / "moved.png", list[Any]()
    before = ids(library / "index")
    assert change(library, Busy(), workers=1, batch_size=2, on_progress=moved_then_indexed).swapped
    assert reports[0].moved == 1
    assert ids(library / "index")["moved.png"] == before["09.png"]
    assert_like_new(library)


@pytest.mark.parametrize("damage", ["tables", "card", "tables are no tables"])
def test_where_what_is_half_made_is_lost_the_way_out_is_to_drop_it(library: Path, damage: str) -> None:
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        change(library, stop=stop, workers=1, on_progress=lambda progress: progress.done >= 8 and stop.set())
    staged = library / "index" / "next"
    for file in staged.glob("metadata.sqlite*" if "tables" in damage else "index.json"):
        file.unlink()
    if damage == "tables are no tables":
        (staged / "metadata.sqlite").write_bytes(b"no tables" * 1000)
    with pytest.raises(IndexFormatError, match="drop what was begun with: searchengine reencode --cancel") as refused:
        change(library)
    assert "backup" not in str(refused.value)
    with Index(library / "index") as opened:
        assert len(Searcher(opened, Old()).search("anything", k=100)) == PHOTOS
    assert cancel(library / "index")
    assert change(library).swapped
    assert_like_new(library)


@pytest.mark.parametrize("recorded", ["{", "[1, 2]", "null", '{"kind": "bogus"}', '{"kind": 7, "recall_target": "x"}'])
def test_damage_to_what_was_built_of_the_old_vectors_is_forgotten_with_them(library: Path, recorded: str) -> None:
    compact(library / "index", kind="scan")
    with closing(sqlite3.connect(library / "index" / "metadata.sqlite")) as tables, tables:
        tables.execute("UPDATE ann SET parameters = ?", (recorded,))
    assert change(library).swapped
    shutil.rmtree(library / "index" / "ann")
    assert_like_new(library)


def test_two_processes_that_make_the_same_change_make_it_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looked at the index just before the first was done."""
    refuse_another = indexer.reencode._refuse_another

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(indexer.reencode, "_refuse_another", refuse_another)
        assert change(library).swapped
        refuse_another(*arguments)

    monkeypatch.setattr(indexer.reencode, "_refuse_another", late)
    encoder = New()
    assert not change(library, encoder).swapped
    assert encoder.embedded == 0
    assert_like_new(library)


# -- the command, with the encoder `mini`


@pytest.fixture
def other_heads(tmp_path: Path) -> Path:
    """The shipped heads with their channels in another order: another fingerprint, and vectors of another space."""
    with safe_open(str(parts.SHIPPED_HEADS), framework="numpy") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in ("labels", "projection"):
        tensors[name] = np.ascontiguousarray(tensors[name][:, ::-1])
    save_file(tensors, tmp_path / "mine.safetensors", metadata=facts)
    return tmp_path / "mine.safetensors"


def test_the_command_changes_the_model_and_a_warm_process_gives_way(
    cli: Cli, own_home: None, other_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(tmp_path / "index"))
    (tmp_path / "photos").mkdir()
    for number in range(3):
        painted(number).save(tmp_path / "photos" / f"{number}.png")
    assert cli("index", tmp_path / "photos", "--model", "mini").code == 0
    assert cli("reencode").code == 2
    command = [sys.executable, "-m", "searchengine", "warm", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["pid"] == process.pid
        before = cli("search", "a dog", "--json").lines
        assert [line["searches"] for line in cli("warm", "--status", "--json").lines] == [1]
        refused = cli("index", tmp_path / "photos", "--model", other_heads)
        assert (refused.code, "searchengine reencode --model" in refused.err) == (4, True)
        outcome = cli("reencode", "--model", other_heads, "--json")
        assert outcome.code == 0, outcome.err
        (report,) = outcome.lines
        assert (report["swapped"], report["embedded"], report["model"]) == (True, 3, str(other_heads))
        after = cli("search", "a dog", "--json").lines
        assert process.wait(timeout=10) == 0, "it serves nobody any more"
    assert {line["id"] for line in after} == {line["id"] for line in before}
    (status,) = cli("status", "--json").lines
    assert (status["model"], status["fingerprint"], status["model_change"]) == (
        str(other_heads),
        report["fingerprint"],
        None,
    )
    assert "nothing to do" in cli("reencode", "--model", other_heads).out


def test_the_command_tells_of_a_change_that_is_under_way_and_cancels_it(
    cli: Cli, own_home: None, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(library / "index"))
    (library / "photos" / "05.png").unlink()
    (library / "photos" / "05.png").mkdir()
    monkeypatch.setattr("searchengine.cli.reencode.encoder_for", lambda settings: New())
    outcome = cli("reencode", "--model", "new")
    assert (outcome.code, outcome.out) == (1, "")
    assert "1 photo cannot be read now, so the index stays as it is" in outcome.err
    (status,) = cli("status", "--json").lines
    assert status["model_change"] == {
        "model": "new",
        "precision": "fp32",
        "fingerprint": New().fingerprint,
        "vectors": CONTENTS - 1,
    }
    assert "changing  to new in fp32: 24 vectors are made" in cli("status").out
    assert cli("reencode", "--cancel", "--model", "new").code == 2
    assert cli("reencode", "--cancel", "--json").lines == [{"cancelled": True}]
    assert cli("status", "--json").lines[0]["model_change"] is None
    outcome = cli("reencode", "--model", "new", "--drop-unreadable")
    assert outcome.code == 0
    assert "the index is of the encoder new in fp32 now, with 24 vectors" in outcome.out
    assert "1 photo failed" in outcome.out
