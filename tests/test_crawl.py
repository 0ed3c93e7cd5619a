"""Bringing an index up to date: what is new, changed, moved, gone; and that any history ends like a fresh start."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stores import refuse

import indexer.pipeline
import indexer.reading
from indexer.pipeline import build
from indexer.plan import plan
from indexer.report import Progress, Report
from searchengine.decode import DecodeLimits
from searchengine.errors import StoreUnusable, UsageError
from searchengine.index.reader import Index
from searchengine.stores.local import LocalStore

Paint = Callable[..., Path]
Update = Callable[..., Report]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir(exist_ok=True)
    return tmp_path / "photos"


@pytest.fixture
def update(tmp_path: Path, folder: Path, encoder: FakeEncoder) -> Update:
    """Bring the index up to date with the folder, and hold the counters against their law."""

    def run(*stores: Path, **options: Any) -> Report:
        return checked(build(tmp_path / "index", stores or [folder], encoder=encoder, isolated=False, **options))

    return run


def checked(report: Report) -> Report:
    assert report.scanned == report.added + report.updated + report.moved + report.unchanged + report.failed
    return report


def counters(report: Report) -> dict[str, int]:
    """Those that are not zero."""
    names = ("added", "updated", "moved", "deleted", "unchanged", "duplicates", "failed", "unlistable")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def state(index: Path) -> dict[str, Any]:
    """What an index says, without the ids: photos with vectors, and failures."""
    with Index(index) as opened:
        photos = {row.key: row for row in all_rows(opened)}
        content = hashes(index)
        return {
            "photos": {
                key: (content[row.vector_id], row.size_bytes, row.mtime_ns, row.width, row.height, row.taken_at)
                for key, row in photos.items()
            },
            "vectors": {key: opened.vector(row.vector_id).tobytes() for key, row in photos.items()},
            "failures": sorted(opened.failed_photos()),
        }


def all_rows(index: Index) -> list[Any]:
    ids = [int(i) for segment in index.snapshot().segments for i in segment.ids]
    return [row for rows in index.images_of(ids).values() for row in rows]


def hashes(index: Path) -> dict[int, bytes]:
    with sqlite3.connect(f"file:{index}/metadata.sqlite?mode=ro", uri=True) as connection:
        return dict(connection.execute("SELECT id, content_hash FROM vectors"))


def ids(index: Path) -> dict[str, int]:
    """name -> id of each photo."""
    with Index(index) as opened:
        return {os.path.basename(row.key): row.id for row in all_rows(opened)}


def touch(path: Path, seconds: int = 10) -> None:
    """Another time of change, by more than any file system rounds."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_a_new_folder_is_added_and_a_second_run_does_nothing(
    photos: Path, update: Update, encoder: FakeEncoder
) -> None:
    first = update(photos)
    assert counters(first) == {"added": 12}
    assert sum(encoder.batches) == 12
    encoder.batches.clear()
    second = update(photos)
    assert counters(second) == {"unchanged": 12}
    assert encoder.batches == []


def test_a_changed_photo_is_embedded_again_under_its_id(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("photos/a.png", 1)
    update()
    before = ids(tmp_path / "index")
    touch(paint("photos/a.png", 2))
    assert counters(update()) == {"updated": 1}
    assert ids(tmp_path / "index") == before
    assert_like_new(tmp_path)


def test_a_touched_photo_is_read_but_not_embedded_and_is_no_copy(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    update()
    touch(photo)
    encoder.batches.clear()
    assert counters(update()) == {"updated": 1}
    assert encoder.batches == []
    assert counters(update()) == {"unchanged": 1}
    assert_like_new(tmp_path)


def test_a_moved_photo_keeps_its_id_and_is_not_embedded_again(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    paint("photos/b.png", 2)
    update()
    before = ids(tmp_path / "index")
    (tmp_path / "photos" / "deep").mkdir()
    photo.rename(tmp_path / "photos" / "deep" / "renamed.png")
    encoder.batches.clear()
    assert counters(update()) == {"moved": 1, "unchanged": 1}
    assert encoder.batches == []
    assert ids(tmp_path / "index") == {"renamed.png": before["a.png"], "b.png": before["b.png"]}
    assert_like_new(tmp_path)


def test_hard_links_are_copies_that_share_one_vector(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    (tmp_path / "photos" / "b.png").hardlink_to(photo)
    assert counters(update()) == {"added": 2, "duplicates": 1}
    assert sum(encoder.batches) == 1
    photo.unlink()
    assert counters(update()) == {"unchanged": 1, "deleted": 1}
    assert_like_new(tmp_path)


def test_a_great_move_in_many_commits_keeps_all_ids(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 3)
    for number in range(12):
        paint(f"photos/x/{number:02}.png", number % 9)
    assert counters(update()) == {"added": 12, "duplicates": 3}
    before = ids(tmp_path / "index")
    (tmp_path / "photos" / "x").rename(tmp_path / "photos" / "y")
    assert counters(update(batch_size=2)) == {"moved": 12}
    assert ids(tmp_path / "index") == before
    assert_like_new(tmp_path)


def test_two_copies_that_both_move_keep_their_two_ids(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("photos/a.png", 1)
    paint("photos/b.png", 1)
    assert counters(update()) == {"added": 2, "duplicates": 1}
    before = ids(tmp_path / "index")
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").rename(tmp_path / "photos" / f"{name}2.png")
    assert counters(update()) == {"moved": 2}
    assert set(ids(tmp_path / "index").values()) == set(before.values())


def test_a_copy_shares_the_vector_and_is_a_duplicate(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    update()
    shutil.copy2(photo, tmp_path / "photos" / "b.png")
    encoder.batches.clear()
    assert counters(update()) == {"added": 1, "unchanged": 1, "duplicates": 1}
    assert encoder.batches == []
    assert len(hashes(tmp_path / "index")) == 1


def test_copies_in_one_batch_are_embedded_once(update: Update, paint: Paint, encoder: FakeEncoder) -> None:
    for number in range(10):
        paint(f"photos/{number}.png", 1)
    assert counters(update(workers=4)) == {"added": 10, "duplicates": 9}
    assert encoder.batches == [1]


def test_a_copied_and_a_moved_photo_are_one_move_and_one_copy(update: Update, paint: Paint, tmp_path: Path) -> None:
    photo = paint("photos/a.png", 1)
    update()
    before = ids(tmp_path / "index")
    shutil.copy2(photo, tmp_path / "photos" / "b.png")
    photo.rename(tmp_path / "photos" / "c.png")
    assert counters(update()) == {"moved": 1, "added": 1, "duplicates": 1}
    assert before["a.png"] in ids(tmp_path / "index").values()
    assert_like_new(tmp_path)


def test_a_photo_moved_over_another_leaves_one(update: Update, paint: Paint, tmp_path: Path) -> None:
    photo = paint("photos/a.png", 1)
    touch(photo)
    paint("photos/b.png", 2)
    update()
    photo.replace(tmp_path / "photos" / "b.png")
    assert update().deleted == 1
    assert_like_new(tmp_path)


def test_two_photos_that_swap_names_swap_vectors(update: Update, paint: Paint, tmp_path: Path) -> None:
    a, b = paint("photos/a.png", 1), paint("photos/b.png", 2)
    touch(b)
    update()
    a.rename(tmp_path / "photos" / "tmp")
    b.rename(a)
    (tmp_path / "photos" / "tmp").rename(b)
    assert update().updated == 2
    assert_like_new(tmp_path)


def test_a_deleted_photo_is_gone_and_comes_back_without_being_embedded(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    paint("photos/b.png", 2)
    update()
    photo.rename(tmp_path / "aside.png")
    assert counters(update()) == {"deleted": 1, "unchanged": 1}
    assert set(ids(tmp_path / "index")) == {"b.png"}
    assert_like_new(tmp_path)
    (tmp_path / "aside.png").rename(photo)
    encoder.batches.clear()
    assert counters(update()) == {"added": 1, "unchanged": 1}, "what only a dead vector remembers is no copy of another"
    assert encoder.batches == []
    assert_like_new(tmp_path)


def test_failures_are_recorded_with_a_reason_and_tried_again_when_they_change(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/good.png", 1)
    bad = tmp_path / "photos" / "bad.jpg"
    bad.write_text("hello")
    skipped: list[tuple[str, str]] = []
    assert counters(update(on_skip=lambda key, reason: skipped.append((key, reason)))) == {"added": 1, "failed": 1}
    assert skipped == [(str(bad), "not a picture in a supported format")]
    assert state(tmp_path / "index")["failures"] == [("local", *skipped[0])]
    with monkeypatch.context() as patch:
        patch.setattr(indexer.reading, "decode_bytes", lambda *_, **__: pytest.fail("it was tried again"))
        assert counters(update()) == {"unchanged": 1, "failed": 1}
    painted(2).save(bad, "JPEG")
    assert counters(update()) == {"added": 1, "unchanged": 1}
    assert state(tmp_path / "index")["failures"] == []


def test_a_failed_file_that_is_deleted_is_forgotten(update: Update, tmp_path: Path) -> None:
    bad = tmp_path / "photos" / "bad.jpg"
    bad.write_text("hello")
    update()
    bad.unlink()
    assert counters(update()) == {}
    assert state(tmp_path / "index")["failures"] == []


def test_a_photo_that_becomes_corrupt_leaves_the_results(update: Update, paint: Paint, tmp_path: Path) -> None:
    photo = paint("photos/a.png", 1)
    update()
    photo.write_bytes(photo.read_bytes()[:100])
    assert counters(update()) == {"failed": 1}
    assert ids(tmp_path / "index") == {}
    assert_like_new(tmp_path)


def refuse_reading(patch: pytest.MonkeyPatch, photo: Path) -> None:
    opened = os.open

    def guarded(path: Any, *arguments: Any, **options: Any) -> int:
        if path == str(photo):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    patch.setattr(os, "open", guarded)


def test_a_file_that_cannot_be_read_now_is_tried_again_though_it_did_not_change(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = paint("photos/a.png", 1)
    with monkeypatch.context() as patch:
        refuse_reading(patch, photo)
        for _ in range(2):
            assert counters(update()) == {"failed": 1}
            assert state(tmp_path / "index")["failures"] == [("local", str(photo), "cannot be read: Permission denied")]
    assert counters(update()) == {"added": 1}, "permissions change neither size nor time"
    assert_like_new(tmp_path)


def test_a_known_photo_that_cannot_be_read_now_stays_as_it_was(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = paint("photos/a.png", 1)
    update()
    known = state(tmp_path / "index")["photos"]
    time_ns = photo.stat().st_mtime_ns
    touch(photo)
    with monkeypatch.context() as patch:
        refuse_reading(patch, photo)
        assert counters(update()) == {"failed": 1}
    assert state(tmp_path / "index")["photos"] == known
    os.utime(photo, ns=(time_ns, time_ns))
    assert counters(update()) == {"unchanged": 1}
    assert state(tmp_path / "index")["failures"] == []


def test_a_file_over_the_limit_is_taken_once_the_limit_is_raised(update: Update, paint: Paint) -> None:
    paint("photos/a.png", 1)
    assert counters(update(limits=DecodeLimits(max_file_bytes=10))) == {"failed": 1}
    assert counters(update()) == {"added": 1}


def test_a_folder_that_cannot_be_listed_deletes_nothing(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/closed/a.png", 1)
    paint("photos/closed/deep/b.png", 2)
    paint("photos/open/c.png", 3)
    (tmp_path / "photos" / "closed" / "bad.jpg").write_text("hello")
    update()
    before = state(tmp_path / "index")
    (tmp_path / "photos" / "open" / "c.png").unlink()
    skipped: list[str] = []
    with monkeypatch.context() as patch:
        refuse(patch, str(tmp_path / "photos" / "closed"))
        assert counters(update(on_skip=lambda key, reason: skipped.append(reason))) == {
            "deleted": 1,
            "unlistable": 1,
        }
    assert skipped == ["cannot be listed: Permission denied; what the index knows of it stays"]
    after = state(tmp_path / "index")
    assert set(before["photos"]) - set(after["photos"]) == {str(tmp_path / "photos" / "open" / "c.png")}
    refused = ("local", str(tmp_path / "photos" / "closed") + "/", *skipped)
    assert after["failures"] == [refused, *before["failures"]], "it is recorded, too"
    with monkeypatch.context() as patch:
        refuse(patch, str(tmp_path / "photos"))
        assert counters(update()) == {"unlistable": 1}
    assert state(tmp_path / "index")["photos"] == after["photos"]
    assert counters(update()) == {"unchanged": 2, "failed": 1}
    assert state(tmp_path / "index")["failures"] == before["failures"], "it is forgotten once it can be listed again"


def test_a_photo_is_not_taken_for_moved_out_of_a_folder_that_cannot_be_listed(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = paint("photos/closed/a.png", 1)
    update()
    shutil.copy2(photo, tmp_path / "photos" / "b.png")
    with monkeypatch.context() as patch:
        refuse(patch, str(tmp_path / "photos" / "closed"))
        assert counters(update()) == {"added": 1, "duplicates": 1, "unlistable": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png"}


def test_an_entry_that_cannot_be_looked_at_does_not_shield_its_neighbours(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/a.png", 1)
    gone = paint("photos/a.png.png", 2)
    update()
    gone.unlink()
    look_at = LocalStore._look_at

    def guarded(self: LocalStore, entry: os.DirEntry[str], *rest: Any) -> Any:
        if entry.name == "a.png":
            return iter([indexer.crawl.Unlistable(entry.path, "Input/output error")])
        return look_at(self, entry, *rest)

    monkeypatch.setattr(LocalStore, "_look_at", guarded)
    assert counters(update()) == {"deleted": 1, "unlistable": 1}
    assert set(ids(tmp_path / "index")) == {"a.png"}


def test_a_folder_that_cannot_even_be_told_from_a_file_deletes_nothing(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems do not tell the kind of an entry in their listing, and asking for it may fail."""
    paint("photos/sub/a.png", 1)
    paint("photos/b.png", 2)
    update()
    look_at = LocalStore._look_at

    def guarded(self: LocalStore, entry: os.DirEntry[str], *rest: Any) -> Any:
        if entry.name == "sub":
            return iter([indexer.crawl.Unlistable(entry.path, "Input/output error")])
        return look_at(self, entry, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_look_at", guarded)
        assert counters(update()) == {"unchanged": 1, "unlistable": 1}
    assert counters(update()) == {"unchanged": 2}
    assert state(tmp_path / "index")["failures"] == []


def test_a_folder_that_can_be_listed_again_is_no_failure_whatever_is_included(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/sub/a.png", 1)
    with monkeypatch.context() as patch:
        refuse(patch, str(tmp_path / "photos" / "sub"))
        assert counters(update(include=["*.png"])) == {"unlistable": 1}
    assert len(state(tmp_path / "index")["failures"]) == 1
    assert counters(update(include=["*.png"])) == {"added": 1}
    assert state(tmp_path / "index")["failures"] == []


def test_a_photo_that_a_listing_left_out_while_it_was_saved_stays(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editors save by putting a new file in the old one's place; a listing made at that moment may show neither."""
    paint("photos/a.png", 1)
    gone = paint("photos/b.png", 2)
    update()
    gone.unlink()
    scan = LocalStore.scan
    with monkeypatch.context() as patch:
        patch.setattr(
            LocalStore, "scan", lambda *_: (i for i in scan(*_) if not getattr(i, "key", "").endswith("a.png"))
        )
        assert counters(update()) == {"deleted": 1}
    assert counters(update()) == {"unchanged": 1}


def test_a_photo_that_becomes_something_else_under_its_name_is_gone(
    update: Update, paint: Paint, tmp_path: Path
) -> None:
    outside = paint("outside.png", 9)
    folder = tmp_path / "photos"
    for number, name in enumerate(("folder.png", "link.png", "deep/a.png", "fifo.png")):
        paint(f"photos/{name}", number)
    update()
    for name in ("folder.png", "link.png", "fifo.png"):
        (folder / name).unlink()
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(outside)
    os.mkfifo(folder / "fifo.png")
    (folder / "deep").rename(tmp_path / "deep")
    (folder / "deep").symlink_to(tmp_path / "deep")
    assert counters(update()) == {"deleted": 4}


def test_many_copies_that_all_move_keep_their_ids_in_order(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.crawl, "ROWS_OF_ONE_CONTENT", 2)
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 3)
    for number in range(10):
        paint(f"photos/x/{number}.png", 1)
    update()
    before = ids(tmp_path / "index")
    (tmp_path / "photos" / "x" / "4.png").rename(tmp_path / "photos" / "4.png")
    (tmp_path / "photos" / "x").rename(tmp_path / "photos" / "y")
    assert counters(update()) == {"moved": 10}
    assert sorted(ids(tmp_path / "index").values()) == sorted(before.values())
    assert_like_new(tmp_path)


def test_photos_that_change_names_all_around_are_no_copies(update: Update, paint: Paint, tmp_path: Path) -> None:
    for number in range(4):
        touch(paint(f"photos/{number}.png", number), 10 * number)
    update()
    for number in range(1, 4):
        (tmp_path / "photos" / f"{number}.png").rename(tmp_path / "photos" / f"{number - 1}.png")
    assert counters(update()) == {"updated": 3, "deleted": 1}
    assert_like_new(tmp_path)


def test_copies_are_counted_whatever_the_order(update: Update, paint: Paint, tmp_path: Path) -> None:
    photos = [paint(f"photos/{name}.png", 1) for name in "abc"]
    assert counters(update()) == {"added": 3, "duplicates": 2}
    touch(photos[1])
    assert counters(update()) == {"updated": 1, "unchanged": 2, "duplicates": 1}
    for photo in photos:
        touch(photo, 20)
    paint("photos/other.png", 2)
    assert counters(update()) == {"added": 1, "updated": 3, "duplicates": 2}


def test_a_missing_store_is_refused_before_an_index_is_made(update: Update, tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable):
        update(tmp_path / "missing")
    assert not (tmp_path / "index").exists()


def test_a_single_folder_must_be_in_a_list(tmp_path: Path, folder: Path, encoder: FakeEncoder) -> None:
    """A text is a sequence of texts, and "~/Pictures" would begin with the whole home folder."""
    for wrong in (str(folder), folder):
        with pytest.raises(UsageError, match="list"):
            build(tmp_path / "index", wrong, encoder=encoder)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="list"):
            plan(tmp_path / "index", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"workers": -1}])
def test_a_count_of_workers_or_photos_that_makes_no_sense_is_refused(update: Update, options: Any) -> None:
    with pytest.raises(UsageError):
        update(**options)


def test_only_pictures_count_and_case_does_not(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("photos/a.PNG", 1)
    paint("photos/b.png", 2).rename(tmp_path / "photos" / "b.JPEG")
    (tmp_path / "photos" / "c.txt").write_text("no")
    (tmp_path / "photos" / "png").write_text("no")
    report = update()
    assert counters(report) == {"added": 2}
    assert (report.scanned, report.ignored) == (2, 2), "what is left out is counted"


def test_a_run_with_include_looks_only_at_what_matches(update: Update, paint: Paint, tmp_path: Path) -> None:
    for number, name in enumerate(("2023/a.png", "2023/b.png", "2024/c.png", "2024/d.png")):
        paint(f"photos/{name}", number)
    assert counters(update(include=["2023/*"])) == {"added": 2}
    assert counters(update()) == {"added": 2, "unchanged": 2}
    (tmp_path / "photos" / "2023" / "a.png").unlink()
    (tmp_path / "photos" / "2024" / "c.png").unlink()
    assert counters(update(include=["2023/*"])) == {"unchanged": 1, "deleted": 1}
    assert set(ids(tmp_path / "index")) == {"b.png", "c.png", "d.png"}


def test_what_is_excluded_leaves_the_index(update: Update, paint: Paint, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "Screenshots/b.png", "x/screenshots/c.png", "x/d.png")):
        paint(f"photos/{name}", number)
    assert counters(update()) == {"added": 4}
    assert counters(update(exclude=["*/screenshots/*"])) == {"unchanged": 2, "deleted": 2}
    assert set(ids(tmp_path / "index")) == {"a.png", "d.png"}
    assert counters(update(exclude=["D.*"], include=["*.png"])) == {"unchanged": 1, "added": 2, "deleted": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png", "c.png"}


def test_nested_and_repeated_stores_list_a_photo_once(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("photos/a.png", 1)
    paint("photos/sub/b.png", 2)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    folder = tmp_path / "photos"
    assert counters(update(folder / "sub", folder, folder, tmp_path / "link")) == {"added": 2}
    assert counters(update(folder / "sub")) == {"unchanged": 1}
    assert counters(update(folder)) == {"unchanged": 2}


def test_a_store_says_nothing_about_photos_of_another(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("one/a.png", 1)
    paint("one-more/b.png", 2)
    assert counters(update(tmp_path / "one", tmp_path / "one-more")) == {"added": 2}
    shutil.rmtree(tmp_path / "one-more")
    (tmp_path / "one-more").mkdir()
    assert counters(update(tmp_path / "one")) == {"unchanged": 1}
    assert counters(update(tmp_path / "one", tmp_path / "one-more")) == {"unchanged": 1, "deleted": 1}


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_photo_that_moves_between_stores_keeps_its_id(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path, first: str
) -> None:
    photo = paint("one/a.png", 1)
    paint("two/b.png", 2)
    stores = [tmp_path / "one", tmp_path / "two"]
    update(*stores)
    before = ids(tmp_path / "index")
    photo.rename(tmp_path / "two" / "a.png")
    encoder.batches.clear()
    assert counters(update(*(stores if first == "one" else stores[::-1]))) == {"moved": 1, "unchanged": 1}
    assert encoder.batches == []
    assert ids(tmp_path / "index") == before


def test_the_photos_of_a_store_that_was_renamed_have_moved(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("one/a.png", 1)
    paint("one/deep/b.png", 2)
    update(tmp_path / "one")
    before = ids(tmp_path / "index")
    (tmp_path / "one").rename(tmp_path / "two")
    assert counters(update(tmp_path / "two")) == {"moved": 2}
    assert ids(tmp_path / "index") == before


def test_a_photo_of_another_store_that_is_still_there_has_not_moved(
    update: Update, paint: Paint, tmp_path: Path
) -> None:
    photo = paint("one/a.png", 1)
    update(tmp_path / "one")
    (tmp_path / "two").mkdir()
    shutil.copy2(photo, tmp_path / "two" / "b.png")
    assert counters(update(tmp_path / "two")) == {"added": 1, "duplicates": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png"}


def test_a_run_within_some_folders_looks_at_nothing_else(update: Update, paint: Paint, tmp_path: Path) -> None:
    for number, name in enumerate(("x/a.png", "x/deep/b.png", "y/c.png", "z/d.png")):
        paint(f"photos/{name}", number)
    folder = tmp_path / "photos"
    update()
    before = ids(tmp_path / "index")
    (folder / "x" / "a.png").rename(folder / "y" / "a2.png")
    shutil.rmtree(folder / "x" / "deep")
    (folder / "z" / "d.png").unlink()
    paint("photos/z/e.png", 9)
    within = [str(folder / "x"), str(folder / "y"), str(tmp_path / "elsewhere"), str(folder / "y" / "none")]
    assert counters(update(within=within)) == {"moved": 1, "unchanged": 1, "deleted": 1}
    after = ids(tmp_path / "index")
    assert after == {"a2.png": before["a.png"], "c.png": before["c.png"], "d.png": before["d.png"]}
    shutil.rmtree(folder / "x")
    assert counters(update(within=[str(folder / "x"), str(folder / "z" / "gone")])) == {}
    assert counters(update(within=[str(tmp_path)])) == {"added": 1, "unchanged": 2, "deleted": 1}
    assert_like_new(tmp_path)


def test_a_run_within_a_folder_has_the_globs_and_skips_of_a_whole_run(
    update: Update, paint: Paint, tmp_path: Path
) -> None:
    for number, name in enumerate(("screenshots/a.png", "keep/b.png", "@eaDir/c.png", ".hidden/d.png", "x/.y/e.png")):
        paint(f"photos/{name}", number)
    folder = tmp_path / "photos"
    (folder / "link").symlink_to(folder / "keep")
    within = [str(folder / name) for name in ("screenshots", "keep", "@eaDir", ".hidden", "x/.y", "link", "keep/b.png")]
    assert counters(update(within=within, exclude=["screenshots/*"])) == {"added": 1}
    assert set(ids(tmp_path / "index")) == {"b.png"}


@pytest.mark.parametrize("known", [False, True])
def test_a_file_that_is_another_for_the_moment_of_reading_is_not_mistaken_for_ever(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Two photos swap their names after the listing, are read, and swap back."""
    first, second = paint("photos/a.png", 1), paint("photos/b.png", 2)
    touch(second)
    if known:
        update()
        touch(first, 20)
        touch(second, 30)
    read = LocalStore.read

    def swap() -> None:
        first.rename(tmp_path / "spare")
        second.rename(first)
        (tmp_path / "spare").rename(second)

    def read_swapped(self: LocalStore, key: str, *, max_bytes: int) -> Any:
        swap()
        try:
            return read(self, key, max_bytes=max_bytes)
        finally:
            swap()

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", read_swapped)
        update(workers=1)
    update()
    assert_like_new(tmp_path)


def test_failed_files_are_read_again_on_request(update: Update, paint: Paint, tmp_path: Path) -> None:
    paint("photos/large.png", 1)
    (tmp_path / "photos" / "bad.jpg").write_text("hello")
    assert counters(update(limits=DecodeLimits(max_pixels=10))) == {"failed": 2}
    assert counters(update()) == {"failed": 2}
    assert counters(plan(tmp_path / "index", [tmp_path / "photos"], retry_failed=True)) == {"added": 2}
    assert counters(update(retry_failed=True)) == {"added": 1, "failed": 1}
    assert_like_new(tmp_path)


def test_a_photo_without_an_extension_is_known_by_its_content(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = paint("photos/a.png", 1).rename(tmp_path / "photos" / "IMG_1")
    for name, text in (("README", "PNG and JPEG"), ("empty", ""), ("Makefile", "all:\n")):
        (tmp_path / "photos" / name).write_text(text)
    assert counters(update()) == {"added": 1}
    assert counters(update()) == {"unchanged": 1}
    with monkeypatch.context() as patch:
        refuse_reading(patch, photo)
        assert counters(update()) == {}, "it cannot be told whether this is a photo, so it is not taken for deleted"
    assert set(ids(tmp_path / "index")) == {"IMG_1"}
    photo.write_text("a text now")
    assert counters(update()) == {"deleted": 1}


def test_more_changes_than_a_page_holds_are_all_found(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.crawl, "ROWS_PER_PAGE", 3)
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 4)
    folder = tmp_path / "photos"
    for number in range(20):
        paint(f"photos/{number}.png", number)
        (folder / f"{number}.jpg").write_text("broken")
    assert counters(update()) == {"added": 20, "failed": 20}
    for number in range(20):
        (folder / f"{number}.jpg").unlink()
        if number % 2:
            (folder / f"{number}.png").unlink()
    assert counters(update()) == {"unchanged": 10, "deleted": 10}
    assert_like_new(tmp_path)


def test_a_stop_is_seen_while_a_store_is_being_listed(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/a.png", 1)
    update()
    (tmp_path / "photos" / "a.png").unlink()
    stop, seen = threading.Event(), []
    look_at = LocalStore._look_at

    def endless(self: LocalStore, entry: os.DirEntry[str], *rest: Any) -> Any:
        for _ in range(10_000):
            seen.append(entry.name)
            stop.set()
            yield from look_at(self, entry, *rest)

    monkeypatch.setattr(LocalStore, "_look_at", endless)
    paint("photos/b.png", 2)
    with pytest.raises(KeyboardInterrupt):
        update(stop=stop)
    assert len(seen) < 5
    assert set(ids(tmp_path / "index")) == {"a.png"}, "what was not listed to the end deletes nothing"


def test_a_listing_that_breaks_off_deletes_nothing_and_says_so(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/a.png", 1)
    paint("photos/b.png", 2)
    update()
    paint("photos/c.png", 3)
    scan = LocalStore.scan

    def broken(self: LocalStore, prefix: str) -> Any:
        yield from (item for item in scan(self, prefix) if "c.png" in getattr(item, "key", ""))
        raise StoreUnusable("the connection was lost")

    skipped: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "scan", broken)
        report = update(on_skip=lambda key, reason: skipped.append(reason))
    assert counters(report) == {"added": 1, "unlistable": 1}
    assert skipped == ["cannot be listed: the connection was lost; what the index knows of it stays"]
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png", "c.png"}
    assert_like_new_after(update, tmp_path)


def assert_like_new_after(update: Update, tmp_path: Path) -> None:
    update()
    assert_like_new(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the side files that SQLite makes for readers, too."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(("-shm", "-wal"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_plan_tells_what_would_be_done_and_writes_nothing(update: Update, paint: Paint, tmp_path: Path) -> None:
    folder, index = tmp_path / "photos", tmp_path / "index"
    paint("photos/a.png", 1)
    photo = paint("photos/b.png", 2)
    assert counters(plan(index, [folder])) == {"added": 2}
    assert not index.exists()
    update()
    paint("photos/c.png", 3)
    touch(photo)
    (folder / "a.png").unlink()
    before = files_of(index)
    assert counters(plan(index, [folder])) == {"added": 1, "updated": 1, "deleted": 1}
    assert files_of(index) == before
    assert counters(update()) == {"added": 1, "updated": 1, "deleted": 1}


def test_awkward_names_go_through_the_index_unchanged(update: Update, tmp_path: Path) -> None:
    names = [b"with space.png", b"new\nline.png", "🏖.png".encode(), b"caf\xe9\xff.png", b"%61.png", b"a'b\".png"]
    for number, name in enumerate(names):
        painted(number).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path / "photos"), name))
    assert counters(update()) == {"added": len(names)}
    assert counters(update()) == {"unchanged": len(names)}
    assert {os.fsencode(name) for name in ids(tmp_path / "index")} == set(names)


def test_a_photo_with_an_impossible_time_does_not_end_the_run(update: Update, paint: Paint) -> None:
    os.utime(paint("photos/a.png", 1), ns=(0, 2**63 + 10**9))
    paint("photos/b.png", 2)
    assert counters(update()) == {"added": 2}
    assert counters(update()) == {"unchanged": 2}


def test_an_index_may_have_any_name_that_is_utf_8(
    folder: Path, paint: Paint, tmp_path: Path, encoder: FakeEncoder
) -> None:
    paint("photos/a.png", 1)
    for name in ("with space?#%20", "ünïcödé 🏖", "new\nline"):
        build(tmp_path / name, [folder], encoder=encoder)
        assert set(ids_of(tmp_path / name)) == {"a.png"}


def ids_of(index: Path) -> list[str]:
    with Index(index) as opened:
        return [os.path.basename(row.key) for row in all_rows(opened)]


def test_progress_counts_to_the_end(update: Update, photos: Path) -> None:
    seen: list[Progress] = []
    update(photos, on_progress=seen.append, batch_size=5)
    assert [(progress.done, progress.total) for progress in seen] == [(0, 12), (5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 1), (8, 3)])
def test_the_number_of_photos_under_way_is_bounded(
    update: Update, paint: Paint, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, batch_size: int, workers: int
) -> None:
    for number in range(80):
        paint(f"photos/{number:03}.png", number)
    lock, decoded, most = threading.Lock(), 0, 0
    decode, encode = indexer.reading.decode_bytes, encoder.encode_pixels

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal decoded, most
        photo = decode(*arguments, **options)
        with lock:
            decoded += 1
            most = max(most, decoded)
        return photo

    def slow(pixels: Any) -> Any:
        nonlocal decoded
        time.sleep(0.05)  # the decoders run ahead as far as they may
        with lock:
            decoded -= len(pixels)
        return encode(pixels)

    monkeypatch.setattr(indexer.reading, "decode_bytes", counted)
    monkeypatch.setattr(encoder, "encode_pixels", slow)
    update(batch_size=batch_size, workers=workers)
    assert most <= 4 * batch_size + workers
    assert max(encoder.batches) == batch_size


def test_stopping_commits_and_the_next_run_embeds_only_the_rest(
    update: Update, paint: Paint, encoder: FakeEncoder, tmp_path: Path
) -> None:
    for number in range(30):
        paint(f"photos/{number:02}.png", number)
    stop = threading.Event()

    def on_progress(progress: Progress) -> None:
        if progress.done >= 8:
            stop.set()

    try:
        update(stop=stop, on_progress=on_progress, batch_size=4, workers=2)
    except KeyboardInterrupt:
        decoders = [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]
        assert decoders == [], "threads still work for a run that is over"
    else:
        pytest.fail("the run was not interrupted")
    committed = ids(tmp_path / "index")
    assert 8 <= len(committed) < 30
    assert sum(encoder.batches) == len(committed)
    encoder.batches.clear()
    assert counters(update()) == {"added": 30 - len(committed), "unchanged": len(committed)}
    assert sum(encoder.batches) == 30 - len(committed)
    assert_like_new(tmp_path)


def test_a_run_commits_every_so_often(
    update: Update, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 4)
    for number in range(20):
        paint(f"photos/{number:02}.png", number % 15)
    assert counters(update(batch_size=4)) == {"added": 20, "duplicates": 5}
    with Index(tmp_path / "index") as index:
        assert 2 <= len(index.snapshot().segments) <= 4  # up to three batches may be done at once
    assert_like_new(tmp_path)


def assert_like_new(tmp_path: Path) -> None:
    """The index must say what one made from scratch says."""
    with tempfile.TemporaryDirectory(dir=QUICK) as fresh:
        checked(build(Path(fresh, "index"), [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False))
        assert state(tmp_path / "index") == state(Path(fresh, "index"))


NAMES = [f"{folder}{name}.png" for folder in ("", "x/", "x/y/") for name in "abc"]
EVENTS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.integers(0, 4)),
    st.tuples(st.just("touch"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("delete"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("corrupt"), st.sampled_from(NAMES), st.integers(0, 2)),
    st.tuples(st.just("move"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("copy"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("build"), st.integers(1, 5), st.integers(1, 3)),
)


@given(st.lists(EVENTS, min_size=3, max_size=25))
@settings(max_examples=40)
def test_any_history_ends_like_a_fresh_start(events: list[tuple[str, Any, Any]]) -> None:
    clock = iter(range(1_600_000_000, 1_700_000_000))
    with tempfile.TemporaryDirectory(dir=QUICK) as scratch:
        root = Path(scratch)
        (root / "photos" / "x" / "y").mkdir(parents=True)

        def stamp(path: Path) -> None:
            seconds = next(clock)
            os.utime(path, (seconds, seconds))

        for kind, first, second in [*events, ("build", 3, 2)]:
            if kind == "build":
                sizes = {"batch_size": first, "workers": second}
                checked(build(root / "index", [root / "photos"], encoder=FakeEncoder(), isolated=False, **sizes))
                continue
            path = root / "photos" / first
            if kind == "write":
                painted(second).save(path)
                stamp(path)
            elif kind == "corrupt":
                path.write_bytes(b"broken" * second)
                stamp(path)
            elif not path.exists():
                continue
            elif kind == "touch":
                stamp(path)
            elif kind == "delete":
                path.unlink()
            elif kind == "move":
                path.replace(root / "photos" / second)
            elif path != root / "photos" / second:
                shutil.copy2(path, root / "photos" / second)
        assert_like_new(root)
        again = build(root / "index", [root / "photos"], encoder=(encoder := FakeEncoder()), isolated=False)
        assert encoder.batches == []
        assert again.added == again.updated == again.moved == again.deleted == 0


def test_equal_photos_get_equal_vectors_however_they_are_batched(paint: Paint, folder: Path, tmp_path: Path) -> None:
    for number in range(9):
        paint(f"photos/{number}.png", number)
    vectors = []
    for batch_size in (1, 4, 32):
        index = tmp_path / f"index-{batch_size}"
        build(index, [folder], encoder=FakeEncoder(), batch_size=batch_size)
        vectors.append(state(index)["vectors"])
    assert vectors[0] == vectors[1] == vectors[2]
    assert np.frombuffer(next(iter(vectors[0].values())), np.float32).shape == (16,)
