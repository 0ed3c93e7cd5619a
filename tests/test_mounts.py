"""Disks come and go: an empty folder where one used to be mounted does not mean that its photos were deleted."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEncoder
from test_crawl import Paint, Update, assert_like_new, checked, counters, folder, ids, state, update
from test_reader import can_mount
from test_stores import refuse

from searchengine.stores import local

__all__ = ["folder", "update"]  # fixtures

Plug = Callable[[Path], None]


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A folder named here is on a file system of its own, with all that is below it."""
    mounted: dict[str, int] = {}
    real = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        status = real(path, *arguments, **options)
        for mount, device in mounted.items():
            if str(path) == mount or str(path).startswith(mount + "/"):
                return os.stat_result([*status[:2], device, *status[3:]])
        return status

    monkeypatch.setattr(local.os, "stat", stat)
    yield mounted


def unplug(disk: Path, disks: dict[str, int]) -> Path:
    """The disk is away, and its mount point an empty folder."""
    away = disk.with_name(f".{disk.name}")  # hidden, so nobody finds it there
    disk.rename(away)
    disk.mkdir()
    disks.pop(str(disk))
    return away


def plug(disk: Path, away: Path, disks: dict[str, int], *, device: int) -> None:
    disk.rmdir()
    away.rename(disk)
    disks[str(disk)] = device


@pytest.mark.parametrize("store", ["disk", "."], ids=["the store is the disk", "the disk is inside the store"])
def test_photos_on_a_disk_that_is_not_mounted_stay(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int], encoder: FakeEncoder, store: str
) -> None:
    for name in ("disk/a.png", "disk/deep/b.png"):
        paint(f"photos/{name}", len(name))
    disk = tmp_path / "photos" / "disk"
    disks[str(disk)] = 77
    assert counters(update(disk.parent / store)) == {"added": 2}
    before = state(tmp_path / "index")["photos"]
    away = unplug(disk, disks)
    skipped: list[tuple[str, str]] = []
    for _ in range(2):
        report = update(disk.parent / store, on_skip=lambda key, reason: skipped.append((key, reason)))
        assert counters(report) == {"unlistable": 1}
    assert skipped[0][0] == f"{disk}/"
    assert skipped[0][1].startswith("cannot be listed: the disk that was there is not mounted")
    assert state(tmp_path / "index")["photos"] == before
    assert state(tmp_path / "index")["failures"] == [("local", *skipped[0])]
    plug(disk, away, disks, device=78)
    encoder.batches.clear()
    assert counters(update(disk.parent / store)) == {"unchanged": 2}
    assert encoder.batches == []
    assert_like_new(tmp_path)


def test_a_mount_point_that_vanishes_with_its_disk_deletes_nothing(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    paint("photos/media/usb/a.png", 1)
    paint("photos/media/b.png", 2)
    disk = tmp_path / "photos" / "media" / "usb"
    disks[str(disk)] = 77
    update()
    unplug(disk, disks)
    disk.rmdir()
    assert counters(update()) == {"unchanged": 1, "unlistable": 1}
    assert counters(update(within=[str(disk)])) == {"unlistable": 1}
    assert counters(update(within=[str(disk.parent)])) == {"unchanged": 1, "unlistable": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png"}


def test_a_folder_of_a_disk_that_is_not_mounted_says_nothing(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    """The mount point has a folder of that name of its own."""
    paint("disk/album/a.png", 1)
    disk = tmp_path / "disk"
    disks[str(disk)] = 77
    update(disk)
    unplug(disk, disks)
    (disk / "album").mkdir()
    assert counters(update(disk / "album")) == {"unlistable": 1}
    assert set(ids(tmp_path / "index")) == {"a.png"}


def test_a_place_that_cannot_be_listed_is_told_once(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("photos/disk/a.png", 1)
    disk = tmp_path / "photos" / "disk"
    disks[str(disk)] = 77
    update()
    disks[str(disk)] = 78
    with monkeypatch.context() as patch:
        refuse(patch, str(disk))
        assert counters(update()) == {"unlistable": 1}
    assert counters(update()) == {"unchanged": 1}


def test_photos_deleted_from_a_mounted_disk_are_gone(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    photo = paint("photos/disk/a.png", 1)
    disks[str(photo.parent)] = 77
    update()
    photo.unlink()
    assert counters(update()) == {"deleted": 1}


def test_photos_deleted_after_the_disk_came_back_under_another_number_are_gone(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    photo = paint("photos/disk/a.png", 1)
    other = paint("photos/disk/b.png", 2)
    disks[str(photo.parent)] = 77
    update()
    disks[str(photo.parent)] = 78
    photo.unlink()
    assert counters(update()) == {"unchanged": 1, "deleted": 1}
    other.unlink()
    assert counters(update()) == {"deleted": 1}


def test_photos_copied_into_a_folder_in_place_of_the_disk_replace_it(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    paint("photos/disk/a.png", 1)
    paint("photos/disk/b.png", 2)
    disk = tmp_path / "photos" / "disk"
    disks[str(disk)] = 77
    update()
    away = unplug(disk, disks)
    shutil.copy2(away / "a.png", disk / "a.png")
    assert counters(update()) == {"unchanged": 1, "deleted": 1}
    (disk / "a.png").unlink()
    assert counters(update()) == {"deleted": 1}, "it is a folder like any other now"


def test_a_photo_that_came_while_the_disk_was_away_does_not_replace_it(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    paint("photos/disk/a.png", 1)
    disk = tmp_path / "photos" / "disk"
    disks[str(disk)] = 77
    update()
    unplug(disk, disks)
    paint("photos/disk/b.png", 2)
    assert counters(update()) == {"added": 1, "unlistable": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png"}


def test_what_was_on_a_disk_can_be_forgotten(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    paint("photos/disk/a.png", 1)
    paint("photos/b.png", 2)
    disk = tmp_path / "photos" / "disk"
    disks[str(disk)] = 77
    update()
    unplug(disk, disks)
    assert counters(update(exclude=["disk/*"])) == {"unchanged": 1, "deleted": 1}
    assert counters(update()) == {"unchanged": 1}


def test_a_disk_on_which_nothing_is_looked_at_is_not_taken_for_unmounted(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    photo = paint("photos/disk/a.png", 1)
    paint("photos/b.jpg", 2)
    disks[str(photo.parent)] = 77
    update()
    disks[str(photo.parent)] = 78  # as after each start of the machine
    assert counters(update(include=["*.jpg"])) == {"unchanged": 1}
    assert counters(update()) == {"unchanged": 2}


def test_a_photo_on_a_disk_that_is_away_has_not_moved_to_where_a_copy_is(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    photo = paint("disk/a.png", 1)
    (tmp_path / "photos").mkdir(exist_ok=True)
    copy = shutil.copy2(photo, tmp_path / "copy.png")
    disks[str(photo.parent)] = 77
    update(photo.parent)
    unplug(photo.parent, disks)
    shutil.move(copy, tmp_path / "photos" / "b.png")
    assert counters(update()) == {"added": 1, "duplicates": 1}
    photo.parent.rmdir()
    shutil.copy2(tmp_path / "photos" / "b.png", tmp_path / "photos" / "c.png")
    assert counters(update()) == {"added": 1, "unchanged": 1, "duplicates": 1}
    assert set(ids(tmp_path / "index")) == {"a.png", "b.png", "c.png"}


def test_an_index_that_never_recorded_its_disks_loses_nothing_to_an_empty_folder(
    update: Update, paint: Paint, tmp_path: Path
) -> None:
    photo = paint("photos/a.png", 1)
    update()
    with sqlite3.connect(tmp_path / "index" / "metadata.sqlite") as connection:
        connection.execute("DELETE FROM mounts")
    connection.close()
    content = photo.read_bytes()
    photo.unlink()
    assert counters(update()) == {"unlistable": 1}
    photo.write_bytes(content)
    update()
    photo.unlink()
    assert counters(update()) == {"deleted": 1}


def test_a_folder_above_one_that_was_indexed_is_no_disk_that_is_away(
    update: Update, paint: Paint, tmp_path: Path
) -> None:
    photo = paint("photos/a/b/d.png", 1)
    update(photo.parent)
    before = ids(tmp_path / "index")
    (tmp_path / "photos" / "c").mkdir()
    photo.rename(tmp_path / "photos" / "c" / "d.png")
    assert counters(update(tmp_path / "photos" / "a", tmp_path / "photos" / "c")) == {"moved": 1}
    assert ids(tmp_path / "index") == before


def test_only_where_file_systems_meet_is_recorded(
    update: Update, paint: Paint, tmp_path: Path, disks: dict[str, int]
) -> None:
    for name in ("a.png", "x/b.png", "x/disk/c.png", "x/disk/y/d.png"):
        paint(f"photos/{name}", len(name))
    photos = tmp_path / "photos"
    disks[str(photos / "x" / "disk")] = 77
    update()
    update(within=[str(photos / "x"), str(photos / "x" / "disk" / "y")])
    with sqlite3.connect(tmp_path / "index" / "metadata.sqlite") as connection:
        recorded = {
            os.fsdecode(prefix): device for prefix, device in connection.execute("SELECT prefix, device FROM mounts")
        }
    connection.close()
    assert recorded == {f"{photos}/": os.stat(photos).st_dev, f"{photos}/x/disk/": 77}


@pytest.mark.skipif(not can_mount(), reason="a disk can be mounted only by root, where mounting is allowed")
def test_a_real_disk_is_unmounted_and_mounted_again(
    update: Update, paint: Paint, tmp_path: Path, encoder: FakeEncoder
) -> None:
    disk = tmp_path / "photos" / "nas"
    disk.mkdir()
    image = tmp_path / "nas.img"
    with open(image, "wb") as file:
        file.truncate(8 * 2**20)
    made = subprocess.run(["mkfs.ext4", "-q", image], capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True).returncode:
        pytest.skip("a loop device cannot be mounted here")
    try:
        paint("photos/nas/a.png", 1)
        paint("photos/b.png", 2)
        assert counters(update()) == {"added": 2}
        subprocess.run(["umount", disk], check=True)
        assert counters(update()) == {"unchanged": 1, "unlistable": 1}
        assert counters(update(disk)) == {"unlistable": 1}
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        encoder.batches.clear()
        assert counters(checked(update())) == {"unchanged": 2}
        assert encoder.batches == []
    finally:
        subprocess.run(["umount", disk], capture_output=True)
