"""Photos in zip and tar archives: found and read in place, as surely as in a folder, and never unpacked."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crawl import all_rows, counters, state, touch

from indexer.pipeline import build
from indexer.report import Report
from indexer.verify import verify
from searchengine.conditions import filters_of
from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.filters import Filters, prefixes_under
from searchengine.index.reader import Index
from searchengine.query import Image as ImageOf
from searchengine.query import Text, parse
from searchengine.stores import ImageStore, KnownStores, StoredPhoto, Unlistable, open_store, open_stores
from searchengine.stores.expand import expanded
from searchengine.stores.ranged import NotThere

Pack = Callable[[Path, Path], Path]

MAX_BYTES = 10**6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is recorded of archives goes here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "searchengine" / "contents"


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def tarred(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w") as file:
        file.add(folder, ".")
    return archive


def packed(archive: Path, members: dict[str, bytes]) -> Path:
    """An archive of the kind that its name tells."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
    else:
        with tarfile.open(archive, "w") as file:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return archive


KINDS = pytest.mark.parametrize("archive", ["all.zip", "all.tar"])
PACKERS = {"all.zip": zipped, "all.tar": tarred}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    painted(seed).save(buffer, "PNG")
    return buffer.getvalue()


def listed(store: ImageStore) -> dict[str, StoredPhoto]:
    """By their names in the archive."""
    found = {item.key.removeprefix(store.prefix): item for item in store.scan() if isinstance(item, StoredPhoto)}
    assert all(item.key.startswith(store.prefix) for item in found.values())
    return found


def unlistable(store: ImageStore) -> list[Unlistable]:
    return [item for item in store.scan() if isinstance(item, Unlistable)]


def read(store: ImageStore, name: str) -> bytes:
    return store.read(store.prefix + name, max_bytes=MAX_BYTES)[1]


@pytest.fixture
def update(tmp_path: Path, encoder: FakeEncoder) -> Callable[..., Report]:
    def run(*stores: Path | str, **options: Any) -> Report:
        return build(tmp_path / "index", stores, encoder=encoder, isolated=False, **options)

    return run


# -- as in a folder --------------------------------------------------------------------------------------------------


@KINDS
def test_an_archive_is_indexed_as_the_folder_that_it_was_made_of(
    archive: str, photos: Path, tmp_path: Path, encoder: FakeEncoder
) -> None:
    place = PACKERS[archive](photos, tmp_path / archive)
    build(tmp_path / "of-folder", [photos], encoder=encoder, isolated=False)
    report = build(tmp_path / "of-archive", [place], encoder=encoder, isolated=False)
    assert counters(report) == {"added": 12}
    folder, inside = state(tmp_path / "of-folder"), state(tmp_path / "of-archive")
    prefix = f"{place}!/"
    assert {key.removeprefix(prefix): vector for key, vector in inside["vectors"].items()} == {
        key.removeprefix(f"{photos}/"): vector for key, vector in folder["vectors"].items()
    }
    assert sorted(row[:2] for row in inside["photos"].values()) == sorted(row[:2] for row in folder["photos"].values())


@KINDS
def test_what_is_added_replaced_and_removed_in_an_archive_is_seen(
    archive: str, tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / archive, {"a.png": png(1), "b.png": png(2), "c/d.png": png(3)})
    assert counters(update(place)) == {"added": 3}
    assert counters(update(place)) == {"unchanged": 3}
    packed(place, {"a.png": png(1), "b.png": png(4), "new.png": png(5)})
    report = update(place)
    assert (report.added, report.deleted, report.failed) == (1, 1, 0)
    assert set(state(tmp_path / "index")["photos"]) == {f"{place}!/{name}" for name in ("a.png", "b.png", "new.png")}


def test_a_zip_that_is_packed_anew_is_read_only_where_its_checksums_differ(
    tmp_path: Path, update: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = packed(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2)})
    update(place)
    with zipfile.ZipFile(place) as before:
        times = {info.filename: info.date_time for info in before.infolist()}
    with zipfile.ZipFile(place, "w") as again:
        for name, seed in (("a.png", 1), ("b.png", 3)):
            again.writestr(zipfile.ZipInfo(name, times[name]), png(seed))
    assert counters(update(place)) == {"unchanged": 1, "updated": 1}


def test_a_photo_that_moves_from_a_folder_into_an_archive_keeps_its_id(
    photos: Path, tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / "a.tar", {"other.png": png(1)})
    update(photos, place)
    with Index(tmp_path / "index") as index:
        before = index.image_by_key("local", str(photos / "red.png"))
    with tarfile.open(place, "a") as file:
        file.add(photos / "red.png", "moved.png")
    (photos / "red.png").unlink()
    assert update(photos, place).moved == 1
    with Index(tmp_path / "index") as index:
        after = index.image_by_key("tar", f"{place}!/moved.png")
    assert before is not None
    assert after is not None
    assert before.id == after.id


def test_many_shards_are_one_run_and_each_photo_is_read_from_its_own(
    tmp_path: Path, update: Callable[..., Report]
) -> None:
    for shard in range(12):
        packed(tmp_path / f"shard-{shard:06d}.tar", {f"{shard:03d}.png": png(shard), f"{shard:03d}.cls": b"7"})
    report = update(f"{tmp_path}/shard-{{000000..000011}}.tar")
    assert (report.added, report.ignored, report.failed) == (12, 12, 0)
    with Index(tmp_path / "index") as index:
        stores = KnownStores()
        for row in all_rows(index):
            seed = int(os.path.basename(row.key)[:3])
            assert stores.read(row.store, row.key, max_bytes=MAX_BYTES) == png(seed)


@KINDS
def test_hidden_names_and_what_is_no_file_are_left_out_and_names_are_only_names(archive: str, tmp_path: Path) -> None:
    names = ["a.png", "./b.png", "../up.png", "/abs.png", "d/e f.png", "d/.hid.png", "@eaDir/x.png", "__MACOSX/._a.png"]
    store = open_store(str(packed(tmp_path / archive, {name: name.encode() for name in names})))
    found = listed(store)
    stripped = "b.png" if archive.endswith("tar") else "./b.png"
    assert set(found) == {"a.png", stripped, "../up.png", "/abs.png", "d/e f.png"}
    assert read(store, "../up.png") == b"../up.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive, "cache"]


def test_links_devices_and_holes_in_archives_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("kept.png"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("kept.png", b"")
        file.mkdir("folder.png")
    for name in ("a.tar", "a.zip"):
        assert set(listed(open_store(str(tmp_path / name)))) == {"kept.png"}


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_sparse_members_long_names_and_every_tar_format_are_understood(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    long = "n" * 120 + "/" + "m" * 120 + ".png"
    (folder / long).parent.mkdir()
    (folder / long).write_bytes(b"long")
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(2**20)
        file.seek(2**20)
        file.write(b"end")
    for form in ("gnu", "pax"):
        subprocess.run(
            ["tar", "-S", f"--format={form}", "-cf", f"{form}.tar", "-C", "in", "."], cwd=tmp_path, check=True
        )
        store = open_store(str(tmp_path / f"{form}.tar"))
        assert set(listed(store)) == {long}
        assert read(store, long) == b"long"


@KINDS
def test_names_that_are_not_utf_8_are_listed_and_read(archive: str, tmp_path: Path, update: Any) -> None:
    stray = os.fsdecode(b"\xff\xfe.png")
    place = tmp_path / archive
    if archive.endswith("tar"):
        packed(place, {stray: png(1)})
        expected = stray
    else:
        # What no marked name may be: the bytes of the name are put in place of others of the same length.
        packed(place, {"é.png": png(1)})
        place.write_bytes(place.read_bytes().replace("é.png".encode(), b"\xff\xfe.png"))
        expected = stray
    store = open_store(str(place))
    assert set(listed(store)) == {expected}
    assert read(store, expected) == png(1)
    assert counters(update(place)) == {"added": 1}
    assert counters(update(place)) == {"unchanged": 1}


def test_names_of_old_zip_archives_are_those_of_their_code_page_unless_they_are_utf_8(tmp_path: Path) -> None:
    packed(tmp_path / "a.zip", {"AB.png": b"old", "CD.png": b"new"})
    data = (tmp_path / "a.zip").read_bytes()
    data = data.replace(b"AB.png", b"\x82B.png").replace(b"CD.png", "é.png".encode())  # neither is marked
    (tmp_path / "a.zip").write_bytes(data)
    store = open_store(str(tmp_path / "a.zip"))
    assert {name: read(store, name) for name in listed(store)} == {"éB.png": b"old", "é.png": b"new"}


@KINDS
def test_files_without_an_extension_are_known_by_their_first_bytes(
    archive: str, tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / archive, {"photo": png(1), "text": b"words " * 1000, "empty": b""})
    report = update(place)
    assert (report.added, report.ignored) == (1, 2)


@KINDS
def test_threads_share_an_archive(archive: str, tmp_path: Path) -> None:
    members = {f"{number}.png": bytes([number]) * (1000 + number) for number in range(40)}
    store = open_store(str(packed(tmp_path / archive, members)))
    with ThreadPoolExecutor(8) as pool:
        assert dict(zip(members, pool.map(lambda name: read(store, name), members), strict=True)) == members


NAMES = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and name not in ("@eaDir", "node_modules")
)
MEMBERS = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join),
    st.tuples(st.binary(max_size=300), st.integers(1, 50), st.sampled_from([0, 8, 12])),
    max_size=8,
)


@given(members=MEMBERS.filter(bool), comment=st.binary(max_size=100), before=st.binary(max_size=50))
@settings(max_examples=60)
def test_whatever_the_standard_library_packs_is_read_to_the_byte(
    members: dict[str, tuple[bytes, int, int]], comment: bytes, before: bytes
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        with open(f"{folder}/a.zip", "wb") as file:
            file.write(before)  # as of a program that unpacks it
            with zipfile.ZipFile(file, "w") as archive:
                archive.comment = comment
                for name, (data, times, method) in members.items():
                    archive.writestr(zipfile.ZipInfo(name), data * times, method)
        with tarfile.open(f"{folder}/a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, (data, times, _) in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data * times)
                tar.addfile(member, io.BytesIO(data * times))
        for name in ("a.zip", "a.tar"):
            store = open_store(f"{folder}/{name}")
            found = listed(store)
            assert {name: read(store, name) for name in found} == {
                name: data * times for name, (data, times, _) in members.items()
            }
            assert {name: item.size_bytes for name, item in found.items()} == {
                name: len(data * times) for name, (data, times, _) in members.items()
            }


# -- large, damaged, hostile -----------------------------------------------------------------------------------------


def test_archives_beyond_4_gib_are_read_by_their_wide_numbers(tmp_path: Path) -> None:
    """A sparse file stands for what lies before the member, so that its place needs more than 32 bits."""
    place = tmp_path / "a.zip"
    with open(place, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("first.png", b"first")
            file.seek(5 * 2**30)
            archive.start_dir = file.tell()
            archive.writestr("far.png", b"far away")
    assert place.stat().st_blocks * 512 < 2**20
    store = open_store(str(place))
    assert {name: read(store, name) for name in listed(store)} == {"first.png": b"first", "far.png": b"far away"}
    assert store.head(f"{place}!/far.png") == b"far away"


def test_a_zip_of_more_members_than_16_bits_count_is_listed_whole(tmp_path: Path) -> None:
    data = packed(tmp_path / "a.zip", {"00000.png": b"x"}).read_bytes()
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    directory = b"".join(data[at:end].replace(b"00000", b"%05d" % number) for number in range(66_000))
    # As old packers wrote it: how many there are, without what does not fit into 16 bits.
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 66_000 % 2**16, 66_000 % 2**16, len(directory), at, 0)
    (tmp_path / "a.zip").write_bytes(data[:at] + directory + ending)
    store = open_store(str(tmp_path / "a.zip"))
    assert len(listed(store)) == 66_000
    for number in (0, 63, 64, 65_999, 7, 30_000):
        assert store.is_there(f"{store.prefix}{number:05d}.png")
        assert store.look(f"{store.prefix}{number:05d}.pnh") is None
    assert not any(store.is_there(store.prefix + name) for name in ("", "zzz", "/", "65999.pn"))


def test_no_more_comes_out_of_a_bomb_than_the_limit(tmp_path: Path) -> None:
    place = packed(tmp_path / "a.zip", {"zeros.png": bytes(50 * 2**20), "small.png": bytes(1000)})
    store = open_store(str(place))
    with pytest.raises(ImageError, match="larger than the limit of 1,000,000 bytes"):
        read(store, "zeros.png")
    # One that lies about its size gives no byte more than it claims.
    data = place.read_bytes()
    at = data.index(b"PK\1\2")
    place.write_bytes(data[: at + 24] + struct.pack("<L", 500) + data[at + 28 :])
    touch(place)
    with pytest.raises(ImageError, match="is damaged"):
        read(open_store(str(place)), "zeros.png")


def test_numbers_that_no_table_holds_cost_their_member_alone(tmp_path: Path) -> None:
    place = packed(tmp_path / "a.zip", {"far.png": b"1", "fine.png": b"2"})
    data = place.read_bytes()
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry = bytearray(data[at : data.index(b"PK\1\2", at + 4)])
    entry[42:46] = b"\xff" * 4
    struct.pack_into("<H", entry, 30, 12)
    entry += struct.pack("<2HQ", 1, 8, 2**64 - 1)
    directory = bytes(entry) + data[at + len(entry) - 12 : end]
    place.write_bytes(data[:at] + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), at, 0))
    huge = tarfile.TarInfo("huge.png")
    huge.size = 2**70
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("fine.png").tobuf() + huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    for name, odd in (("a.zip", "far.png"), ("a.tar", "huge.png")):
        store = open_store(str(tmp_path / name))
        assert set(listed(store)) == {"fine.png", odd}
        assert read(store, "fine.png") in (b"2", b"")
        with pytest.raises(ImageError, match="makes no sense"):
            read(store, odd)


def test_encrypted_and_oddly_packed_members_are_failures_and_cost_no_other(
    tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / "a.zip", {"locked.png": png(1), "odd.png": png(2), "fine.png": png(3)})
    data = bytearray(place.read_bytes())
    locked, odd = data.index(b"PK\1\2"), data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[locked + 8] |= 1
    data[odd + 10] = 9  # Deflate64
    place.write_bytes(data)
    skipped: dict[str, str] = {}
    report = update(place, on_skip=skipped.__setitem__)
    assert (report.added, report.failed) == (1, 2)
    assert "is encrypted in its archive" in skipped[f"{place}!/locked.png"]
    assert "method 9" in skipped[f"{place}!/odd.png"]


def test_a_byte_that_flips_in_a_zip_is_told_and_costs_one_photo(tmp_path: Path, update: Callable[..., Report]) -> None:
    place = packed(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2)})
    data = bytearray(place.read_bytes())
    data[60] ^= 0xFF
    place.write_bytes(data)
    skipped: dict[str, str] = {}
    assert counters(update(place, on_skip=skipped.__setitem__)) == {"added": 1, "failed": 1}
    assert "is damaged" in skipped[f"{place}!/a.png"]


@pytest.mark.parametrize("archive", ["all.zip", "all.tar"])
def test_wherever_an_archive_breaks_off_nothing_is_deleted(
    archive: str, tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / archive, {f"{number}.png": png(number) for number in range(6)})
    whole = place.read_bytes()
    update(place)
    # In the middle of a photo, between two, and in a directory or a header.
    for cut in (len(whole) // 3, len(whole) // 2 // 512 * 512, len(whole) - 30):
        if archive.endswith("tar"):
            cut = min(cut, whole.rindex(b"5.png") + 600)
        place.write_bytes(whole[:cut])
        try:
            report = update(place)
            assert (report.deleted, report.unlistable) == (0, 1)
        except StoreUnusable as error:
            assert archive in str(error)
        verify(tmp_path / "index", stores=True, repair=True)
        assert len(state(tmp_path / "index")["photos"]) == 6
    place.write_bytes(whole)
    assert counters(update(place)) in ({"unchanged": 6}, {"updated": 6})


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_an_archive_that_is_emptied_or_has_fewer_names_than_it_says_deletes_nothing(
    name: str, tmp_path: Path, update: Callable[..., Report]
) -> None:
    archive = packed(tmp_path / name, {f"{number}.png": png(number) for number in range(4)})
    whole = archive.read_bytes()
    update(archive)
    if name == "a.zip":
        end = whole.rfind(b"PK\5\6")
        (size_bytes,) = struct.unpack_from("<L", whole, end + 12)
        damaged = [whole[: end + 12] + struct.pack("<L", size_bytes * 3 // 4) + whole[end + 16 :]]
    else:
        with tarfile.open(archive) as file:
            offsets = [member.offset for member in file.getmembers()]
        zeroed = whole[: offsets[2]] + bytes(1024) + whole[offsets[2] + 1024 :]
        damaged = [zeroed, whole[: offsets[2]] + bytes(2 * 2**20)]  # as a download leaves what has not come yet
    packed(archive, {})
    for content in (archive.read_bytes(), *damaged):
        archive.write_bytes(content)
        report = update(archive)
        assert (report.deleted, report.unlistable) == (0, 1)
    archive.write_bytes(whole)
    assert counters(update(archive)).keys() <= {"unchanged", "updated"}


def test_a_tar_that_is_damaged_in_the_middle_gives_what_lies_before_and_says_so(
    tmp_path: Path, update: Callable[..., Report]
) -> None:
    place = packed(tmp_path / "a.tar", {f"{number}.png": png(number) for number in range(6)})
    update(place)
    data = bytearray(place.read_bytes())
    at = data.index(b"3.png")
    data[at : at + 512] = random.Random(0).randbytes(512)
    place.write_bytes(data)
    (trouble,) = unlistable(open_store(str(place)))
    assert trouble.prefix == f"{place}!/"
    assert "damaged after" in trouble.reason
    assert set(listed(open_store(str(place)))) == {"0.png", "1.png", "2.png"}
    report = update(place)
    assert (report.deleted, report.unlistable) == (0, 1)
    assert len(state(tmp_path / "index")["photos"]) == 6


def test_headers_that_claim_gigabytes_or_lead_back_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    good = tarfile.TarInfo("good.png").tobuf()
    with open(tmp_path / "name.tar", "wb") as file:
        file.write(good + long_name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**34)
    assert set(listed(open_store(str(tmp_path / "name.tar")))) == {"good.png"}
    assert "claims to be of more than" in unlistable(open_store(str(tmp_path / "name.tar")))[0].reason
    short_name = tarfile.TarInfo("././@LongLink")
    short_name.type, short_name.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (short_name.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000
    (tmp_path / "chain.tar").write_bytes(good + chain + bytes(1024))
    assert set(listed(open_store(str(tmp_path / "chain.tar")))) == {"good.png"}
    assert unlistable(open_store(str(tmp_path / "chain.tar")))
    back = tarfile.TarInfo("back.png")
    back.size = -512
    (tmp_path / "back.tar").write_bytes(good + back.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert unlistable(open_store(str(tmp_path / "back.tar")))


@given(data=st.data())
@settings(max_examples=80)
def test_no_archive_however_damaged_does_more_than_fail(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        kind = data.draw(st.sampled_from(["zip", "tar"]))
        place = packed(Path(folder) / f"a.{kind}", {"a.png": b"abc" * 50, "d/b.png": b"x"})
        content = bytearray(place.read_bytes())
        # Most of a tar is padding: headers are where something can go wrong.
        spans = [(0, len(content))] if kind == "zip" else [(0, 512), (1024, 1536)]
        for first, last in spans:
            for at in data.draw(st.lists(st.integers(first, last - 1), max_size=6)):
                content[at] = data.draw(st.integers(0, 255))
        place.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            store = open_store(str(place))
            for item in store.scan():
                if isinstance(item, StoredPhoto):
                    store.head(item.key)
                    assert len(store.read(item.key, max_bytes=1000)[1]) <= 1000
        except (StoreUnusable, ImageError):
            pass


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.zip", b"", "no whole zip archive"),
        ("text.zip", b"words " * 1000, "no whole zip archive"),
        ("empty.tar", b"", "it is empty"),
        ("text.tar", b"words " * 1000, "no tar archive"),
        (
            "gzip.tar",
            b"\x1f\x8b\x08" + bytes(600),
            "compressed, so that no photo in it can be read by itself; use gzip -d",
        ),
        ("a.tar.gz", b"\x1f\x8b\x08", "decompress it to a .tar"),
        ("b.TGZ", b"", "decompress it to a .tar"),
    ],
)
def test_what_is_no_archive_is_refused_with_what_to_do(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreUnusable, match=reason) as refused:
        open_store(str(tmp_path / name))
    assert name in str(refused.value)


def test_the_command_line_refuses_what_is_no_archive(tmp_path: Path, own_home: None, cli: Cli) -> None:
    (tmp_path / "a.zip").write_bytes(b"words")
    outcome = cli("index", tmp_path / "a.zip", "--index", tmp_path / "index", "--dry-run")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.count("\n") == 1
    assert f"{tmp_path}/a.zip cannot be opened: it is no whole zip archive" in outcome.err


def test_an_archive_that_is_not_there_is_refused_and_a_folder_named_like_one_is_a_folder(
    tmp_path: Path, paint: Callable[..., Path]
) -> None:
    with pytest.raises(NotThere, match="does not exist; check the path"):
        open_store(str(tmp_path / "none.zip"))
    paint("holiday.zip/a.png")
    assert open_store(str(tmp_path / "holiday.zip")).name == "local"
    packed(tmp_path / "holiday.zip" / "b.zip", {"a.png": b"1"})
    assert listed(open_store(str(tmp_path / "holiday.zip" / "b.zip")))
    (tmp_path / "odd.zip!").mkdir()
    packed(tmp_path / "odd.zip!" / "c.zip", {"a.png": b"1"})
    with pytest.raises(UsageError, match="rename the folder"):
        open_store(str(tmp_path / "odd.zip!" / "c.zip"))


# -- gone, away, changing --------------------------------------------------------------------------------------------


def test_an_archive_that_is_gone_loses_nothing_until_verify_is_asked_to_repair(
    tmp_path: Path, update: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = packed(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)})
    kept = packed(tmp_path / "kept.zip", {"c.png": png(3)})
    update(place, kept)
    place.unlink()
    with pytest.raises(StoreUnusable):
        update(place)
    update(kept)
    assert len(state(tmp_path / "index")["photos"]) == 3
    # On another file system than the one recorded, its disk is away: nothing is dropped.
    with monkeypatch.context() as patch:
        patch.setattr("indexer.checks.photos.device_of", lambda store, prefix: 1)
        found = verify(tmp_path / "index", stores=True, repair=True)
        assert len(state(tmp_path / "index")["photos"]) == 3
    found = verify(tmp_path / "index", stores=True, repair=True)
    assert [repair.problem.kind for repair in found.repaired] == ["photo", "photo"]
    assert set(state(tmp_path / "index")["photos"]) == {f"{kept}!/c.png"}


def test_an_archive_that_is_replaced_while_it_is_read_gives_whole_photos_or_none(tmp_path: Path) -> None:
    place = tmp_path / "a.zip"
    versions = [
        {"first.png": b"1" * 5000, "photo.png": b"a" * 40_000},
        {"photo.png": b"b" * 50_000, "other.png": b"2" * 10},
    ]
    packed(place, versions[0])
    store = open_store(str(place))
    done = threading.Event()

    def replace() -> None:
        for turn in range(60):
            packed(tmp_path / "next.zip", versions[turn % 2])
            os.utime(tmp_path / "next.zip", ns=(turn, 10**18 + turn))
            os.replace(tmp_path / "next.zip", place)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while not done.is_set():
        try:
            seen.add(read(store, "photo.png"))
        except ImageError as error:
            assert "change" in str(error)
    writer.join()
    seen.add(read(store, "photo.png"))
    assert seen <= {b"a" * 40_000, b"b" * 50_000}
    assert read(store, "photo.png") == versions[1]["photo.png"]


# -- what is recorded ------------------------------------------------------------------------------------------------


@KINDS
def test_what_is_in_an_archive_is_recorded_once_for_each_state(archive: str, tmp_path: Path, cache: Path) -> None:
    place = packed(tmp_path / archive, {"a.png": b"1"})
    listed(open_store(str(place)))
    (table,) = cache.iterdir()
    made = table.stat().st_ino
    listed(open_store(str(place)))
    assert [file.stat().st_ino for file in cache.iterdir()] == [made]
    packed(place, {"a.png": b"1", "b.png": b"2"})
    assert set(listed(open_store(str(place)))) == {"a.png", "b.png"}
    assert [file.stat().st_ino != made for file in cache.iterdir()] == [True]


def test_a_record_that_is_damaged_or_cannot_be_kept_is_made_anew(tmp_path: Path, cache: Path) -> None:
    place = packed(tmp_path / "a.tar", {"a.png": b"1"})
    store = open_store(str(place))
    assert listed(store)
    (table,) = cache.iterdir()
    for content in (b"", b"no table", table.read_bytes()[:5000]):
        table.write_bytes(content)
        assert read(store, "a.png") == b"1"
        assert listed(open_store(str(place)))
    shutil.rmtree(cache)
    cache.write_bytes(b"a file where the folder was")
    assert set(listed(open_store(str(place)))) == {"a.png"}
    assert read(open_store(str(place)), "a.png") == b"1"


def test_records_that_nobody_has_used_for_long_are_deleted(tmp_path: Path, cache: Path) -> None:
    listed(open_store(str(packed(tmp_path / "a.tar", {"a.png": b"1"}))))
    (old,) = cache.iterdir()
    os.utime(old, (0, 0))
    listed(open_store(str(packed(tmp_path / "b.tar", {"a.png": b"1"}))))
    assert old not in cache.iterdir()
    assert len(list(cache.iterdir())) == 1


def test_listing_a_large_archive_takes_little_memory(tmp_path: Path) -> None:
    """The standard library keeps about 1 KB a member."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(1500):
            archive.addfile(tarfile.TarInfo(f"{'folder' * 15}/{number}.png"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for number in range(8000):
            file.writestr(zipfile.ZipInfo(f"{'folder' * 15}/{number}.png"), b"")
    script = """
import sys, tracemalloc
from searchengine.stores import open_store
for place, members, limit_bytes in ((sys.argv[1], 1500, 2**20), (sys.argv[2], 8000, 3 * 2**20)):
    store = open_store(place)
    tracemalloc.start()
    assert sum(1 for _ in store.scan()) == members + 1
    assert tracemalloc.get_traced_memory()[1] < limit_bytes, tracemalloc.get_traced_memory()
    tracemalloc.stop()
"""
    places = [str(tmp_path / "a.tar"), str(tmp_path / "a.zip")]
    subprocess.run([sys.executable, "-c", script, *places], check=True)


# -- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{9..11}.zip", ["s-9.zip", "s-10.zip", "s-11.zip"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        (
            "s3://bucket/{train,val}/{00..01}.tar",
            [f"s3://bucket/{part}/0{n}.tar" for part in ("train", "val") for n in (0, 1)],
        ),
        ("folder-{1..3}", ["folder-{1..3}"]),
        ("{x}.zip", ["{x}.zip"]),
        ("http://[::1]:80/a.zip", ["http://[::1]:80/a.zip"]),
        ("https://host/get?name=*.zip", ["https://host/get?name=*.zip"]),
    ],
)
def test_braces_stand_for_many_archives(pattern: str, expected: list[str]) -> None:
    assert expanded(pattern) == expected


def test_wildcards_stand_for_the_archives_that_are_there(tmp_path: Path) -> None:
    for name in ("a-1.zip", "a-2.zip", "b.zip", "a-3.tar", "a-[1].zip"):
        packed(tmp_path / name, {"x.png": b"1"})
    assert expanded(f"{tmp_path}/a-?.zip") == [f"{tmp_path}/a-1.zip", f"{tmp_path}/a-2.zip"]
    assert expanded(f"{tmp_path}/a-[1].zip") == [f"{tmp_path}/a-[1].zip"]  # a file of that very name
    assert {store.prefix for store in open_stores([f"{tmp_path}/*.zip"])} == {
        f"{tmp_path}/{name}!/" for name in ("a-1.zip", "a-2.zip", "a-[1].zip", "b.zip")
    }
    with pytest.raises(StoreUnusable, match="nothing is called"):
        expanded(f"{tmp_path}/none-*.tar")
    with pytest.raises(UsageError, match="more than 100,000 places"):
        expanded("s-{0..99}-{0..99}-{0..99}.tar")


# -- searching -------------------------------------------------------------------------------------------------------


def test_under_narrows_to_an_archive_and_to_folders_in_and_above_it(
    tmp_path: Path, photos: Path, update: Callable[..., Report]
) -> None:
    place = packed(photos / "a.zip", {"x/1.png": png(31), "x/2.png": png(32), "y/3.png": png(33)})
    packed(tmp_path / "other.tar", {"4.png": png(34)})
    update(photos, place, tmp_path / "other.tar")
    with Index(tmp_path / "index") as index:

        def count(under: str | Path) -> int:
            return index.count_images(Filters(under=str(under)))

        assert count(place) == count(f"{place}!/") == count(f"{place}!") == 3
        assert count(f"{place}!/x") == count(f"{place}!/x/") == 2
        assert count(photos) == 12 + 3
        assert count(tmp_path) == count("/") == 12 + 3 + 1
        assert count(tmp_path / "other.tar") == 1
        assert count(photos / "2023") == 4
        assert count(f"{place}!/none") == count(tmp_path / "oth") == count("s3://bucket") == 0


def test_queries_name_photos_and_folders_in_archives_and_at_urls(tmp_path: Path) -> None:
    place = packed(tmp_path / "a.zip", {"x/1.png": png(1)})
    inside = f"{place}!/x/1.png"
    assert parse(inside) == parse(f"image:{inside}") == ImageOf(inside)
    assert parse("s3://bucket/x.jpg") == ImageOf("s3://bucket/x.jpg")
    assert parse("https://host/x.jpg?width=300") == ImageOf("https://host/x.jpg?width=300")
    for text in ("https://host/page", "see https://host/x.jpg for more", "zip!/x"):
        assert parse(text) == Text(text)
    # What strangers ask opens no file and asks no server.
    for text in (inside, "s3://bucket/x.jpg", "https://host/x.jpg"):
        assert parse(text, files=False) == Text(text)
    for value in ("s3://bucket/folder", inside.removesuffix("/1.png"), str(place)):
        assert filters_of("under", value).under == value
    assert prefixes_under(filters_of("under", "S3://bucket/folder/").under or "") == ("s3://bucket/folder/",)
    assert prefixes_under(str(place)) == (f"{place}/", f"{place}!/")
    (tmp_path / "link").symlink_to(tmp_path)
    assert filters_of("under", f"{tmp_path}/link/a.zip!/x/").under == f"{place}!/x"
