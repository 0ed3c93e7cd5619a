"""Photos by a list of their places, in CSV, Parquet or text; and that no list loses what it does not mean to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fakes import FakeEncoder
from pyarrow import parquet
from remote_servers import serving
from test_archives import packed, png
from test_crawl import counters, state
from web_files import WebFiles, web_files

from indexer.pipeline import build
from indexer.report import Report
from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.index.reader import Index
from searchengine.stores import ImageStore, KnownStores, Mount, StoredPhoto, Unlistable, open_store, open_stores, retry
from searchengine.stores.expand import expanded
from searchengine.stores.local import local_device
from searchengine.stores.ranged import NotThere

Update = Callable[..., Report]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def update(tmp_path: Path, encoder: FakeEncoder) -> Update:
    def run(*stores: Path | str, **options: Any) -> Report:
        return build(tmp_path / "index", stores, encoder=encoder, isolated=False, **options)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photos, one of them in an archive, and a list beside them."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/b c.png", "sub/noextension")):
        (folder / name).write_bytes(png(number))
    packed(folder / "box.zip", {"in/d.png": png(3)})
    return folder


PLACES = ("a.png", "sub/b c.png", "./sub/../sub/noextension", "box.zip!/in/d.png")


def keys_of(folder: Path) -> set[str]:
    return {f"{folder}/{name}" for name in ("a.png", "sub/b c.png", "sub/noextension", "box.zip!/in/d.png")}


def listed(store: ImageStore) -> dict[str, StoredPhoto]:
    return {item.key: item for item in store.scan() if isinstance(item, StoredPhoto)}


def untold(store: ImageStore) -> dict[str, str]:
    return {item.prefix: item.reason for item in store.scan() if isinstance(item, Unlistable)}


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- kinds of lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "csv", "semicolons", "parquet"])
def test_a_list_of_any_kind_is_indexed_as_its_photos_are(
    kind: str, folder: Path, tmp_path: Path, encoder: FakeEncoder
) -> None:
    list_ = folder / f"list.{kind.replace('semicolons', 'csv')}"
    if kind == "parquet":
        parquet.write_table(pa.table({"caption": ["x"] * 4, "image_path": list(PLACES)}), list_, row_group_size=2)
    else:
        lines = {"txt": PLACES, "csv": ('"Label","Path"', *(f'"x, y","{place}"' for place in PLACES))}
        semicolons = ("id;file_name", *(f"7;{place}" for place in PLACES))
        written(list_, "\ufeff" + "\r\n".join(lines.get(kind, semicolons)) + "\r\n\r\n")
    report = build(tmp_path / "index", [list_], encoder=encoder, isolated=False)
    assert counters(report) == {"added": 4}
    found = state(tmp_path / "index")
    assert set(found["photos"]) == keys_of(folder)
    build(tmp_path / "of-folder", [folder, folder / "box.zip"], encoder=encoder, isolated=False)
    assert found["vectors"] == state(tmp_path / "of-folder")["vectors"]
    assert counters(build(tmp_path / "index", [list_], encoder=encoder, isolated=False)) == {"unchanged": 4}


def test_the_key_of_a_photo_is_its_own_place_and_the_list_is_its_store(
    folder: Path, update: Update, tmp_path: Path
) -> None:
    list_ = written(folder / "list.txt", "a.png\n")
    update(list_)
    with Index(tmp_path / "index") as index:
        row = index.image_by_key(f"manifest:{list_}", f"{folder}/a.png")
    assert row is not None
    assert row.size_bytes == (folder / "a.png").stat().st_size
    assert KnownStores().read(row.store, row.key, max_bytes=10**6) == png(0)
    list_.unlink()  # the photo is still there
    assert KnownStores().read(row.store, row.key, max_bytes=10**6) == png(0)
    assert KnownStores().is_there(row.store, row.key)


def test_names_that_are_not_utf_8_are_listed_from_text_and_csv(tmp_path: Path) -> None:
    name = b"\xff\xfe.png"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(png(1))
    for list_ in (written(tmp_path / "l.txt", name + b"\n"), written(tmp_path / "l.csv", b"url\n" + name + b"\n")):
        assert set(listed(open_store(str(list_)))) == {os.fsdecode(os.path.join(os.fsencode(tmp_path), name))}
    bad = tmp_path / os.fsdecode(b"\xff.txt")
    bad.write_text("a.png\n")
    with pytest.raises(UsageError, match="not UTF-8; rename it"):
        open_store(str(bad))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("list.csv", b"", "names none of the columns key, path, url"),
        ("list.csv", b"label,width\n1,2\n", "names none of the columns"),
        ("list.parquet", b"PAR1 is not enough", "no whole Parquet file"),
    ],
)
def test_what_is_no_list_is_refused_with_what_to_do(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    list_ = written(tmp_path / name, content)
    with pytest.raises(StoreUnusable, match=reason):
        open_store(str(list_))
    parquet.write_table(pa.table({"caption": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(StoreUnusable, match="has the columns caption, but none of key"):
        open_store(str(tmp_path / "other.parquet"))
    with pytest.raises(NotThere):
        open_store(str(tmp_path / "none.csv"))


def test_without_pyarrow_a_parquet_list_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"path": ["a.png"]}), tmp_path / "l.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'searchengine\[parquet\]'"):
        open_store(str(tmp_path / "l.parquet"))


# -- what a list says beside places ----------------------------------------------------------------------------------


def test_sizes_and_tags_of_a_list_are_believed_until_they_change(folder: Path, update: Update) -> None:
    list_ = folder / "list.csv"
    size = len(png(0))

    def tagged(tag: str) -> Path:
        return written(list_, f"url,size_bytes,etag\na.png,{size},{tag}\n")

    assert counters(update(tagged("one"))) == {"added": 1}
    (folder / "a.png").write_bytes(png(0))  # touched: no file is looked at
    assert counters(update(list_)) == {"unchanged": 1}
    assert update(tagged("two")).added + update(list_).unchanged == 1
    other = png(9)
    (folder / "a.png").write_bytes(other)
    skipped: dict[str, str] = {}
    report = update(written(list_, f"url,size_bytes,etag\na.png,{size},three\n"), on_skip=skipped.__setitem__)
    assert report.failed == (len(other) != size)
    if report.failed:
        assert f"but the list says {size:,}; correct the list" in skipped[f"{folder}/a.png"]
    assert update(written(list_, f"url,size_bytes,etag\na.png,{len(other)},four\n")).updated == 1


def test_times_count_as_tags_in_every_way_of_writing_them(tmp_path: Path) -> None:
    moment = datetime(2024, 5, 31, 18, 30, tzinfo=UTC)
    seconds = int(moment.timestamp())
    values = [str(seconds), f"{seconds}.0", "2024-05-31T18:30:00", "2024-05-31 20:30:00+02:00", "2024-05-31T18:30:00Z"]
    for value in values:
        list_ = written(tmp_path / "l.csv", f"key,size,last_modified\nx.png,5,{value}\n")
        (photo,) = listed(open_store(str(list_))).values()
        assert (photo.size_bytes, photo.mtime_ns, photo.etag) == (5, seconds * 10**9, None)
    precise = seconds * 10**9 + 123_456_789
    table = pa.table({"path": ["x.png"], "size": [5], "mtime": pa.array([precise], pa.timestamp("ns", tz="UTC"))})
    parquet.write_table(table, tmp_path / "l.parquet")
    (photo,) = listed(open_store(str(tmp_path / "l.parquet"))).values()
    assert photo.mtime_ns == precise
    parquet.write_table(pa.table({"path": ["x.png"], "size": [5], "mtime_ns": [precise]}), tmp_path / "l.parquet")
    assert listed(open_store(str(tmp_path / "l.parquet"))) == {photo.key: photo}


def test_a_row_that_makes_no_sense_costs_itself_alone(folder: Path, update: Update) -> None:
    rows = ["path,size_bytes,mtime", "a.png,,", "sub/b c.png,many,", "box.zip!/in/d.png,5,soon", ",5,5", "short"]
    skipped: dict[str, str] = {}
    report = update(written(folder / "l.csv", "\n".join(rows)), on_skip=skipped.__setitem__)
    assert (report.added, report.unlistable) == (1, 2)
    assert "'many', no whole number" in skipped[f"{folder}/sub/b c.png"]
    assert "'soon', no date of ISO 8601" in skipped[f"{folder}/box.zip!/in/d.png"]


def test_a_known_photo_whose_row_makes_no_sense_any_more_stays(folder: Path, update: Update) -> None:
    list_ = written(folder / "l.csv", "path,size_bytes\na.png,\nsub/b c.png,\n")
    update(list_)
    written(list_, "path,size_bytes\na.png,\nsub/b c.png,many\n")
    assert counters(update(list_)) == {"unchanged": 1, "unlistable": 1}
    written(list_, "path,size_bytes\na.png,\nsub/b c.png,\n")
    assert counters(update(list_)) == {"unchanged": 2}


# -- gone, away, broken ----------------------------------------------------------------------------------------------


def test_what_leaves_the_list_or_its_place_leaves_the_index(folder: Path, update: Update, tmp_path: Path) -> None:
    list_ = written(folder / "l.txt", "\n".join(PLACES))
    update(list_)
    (folder / "a.png").unlink()
    packed(folder / "box.zip", {"other.png": b""})
    assert update(list_).deleted == 2
    written(list_, "sub/b c.png\n")
    assert update(list_).deleted == 1
    assert set(state(tmp_path / "index")["photos"]) == {f"{folder}/sub/b c.png"}


def test_a_list_that_breaks_off_is_empty_or_names_only_what_is_gone_deletes_nothing(
    folder: Path, update: Update, tmp_path: Path
) -> None:
    list_ = written(folder / "l.csv", "path\n" + "\n".join(PLACES))
    update(list_)
    for text in ("path\n", 'path\na.png\n"' + "x" * 200_000, "path\nnone.png\nnor this.png\n"):
        report = update(written(list_, text))
        assert (report.deleted, report.unlistable) == (0, 1)
        assert set(state(tmp_path / "index")["photos"]) == keys_of(folder)
    with pytest.raises(StoreUnusable):
        update(written(list_, ""))
    list_.unlink()
    with pytest.raises(StoreUnusable):
        update(list_)
    assert set(state(tmp_path / "index")["photos"]) == keys_of(folder)
    assert counters(update(written(list_, "path\n" + "\n".join(PLACES)))) == {"unchanged": 4}


def test_a_disk_that_is_away_keeps_its_photos(folder: Path, tmp_path: Path, update: Update, monkeypatch: Any) -> None:
    """Another device than the one recorded is told of the folder, as where nothing is mounted on it any more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "e.png").write_bytes(png(5))
    list_ = written(folder / "l.txt", f"a.png\n{disk}/e.png\n")
    mounted = {str(disk): 4711}

    def device(path: str) -> int | None:
        return next((mounted[top] for top in mounted if path.startswith(top)), local_device(path))

    monkeypatch.setattr("searchengine.stores.manifest.local_device", device)
    monkeypatch.setattr("indexer.mounts.device_of", lambda store, prefix: device(prefix) if prefix else None)
    assert Mount(f"{disk}/", 4711) in set(open_store(str(list_)).scan())
    update(list_)
    mounted.clear()
    (disk / "e.png").unlink()
    report = update(list_)
    assert (report.deleted, report.unlistable) == (0, 1)
    mounted[str(disk)] = 4711
    assert update(list_).deleted == 1


# -- places far away -------------------------------------------------------------------------------------------------


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebFiles]:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)
    with web_files() as server:
        yield server


def test_a_list_of_urls_is_indexed_and_only_what_changed_is_read_again(
    web: WebFiles, tmp_path: Path, update: Update
) -> None:
    # Names say nothing: what is listed is taken for a photo.
    urls = [web.put(f"photo?id={number}", png(number)) for number in range(3)] + [web.put("plain.png", png(7))]
    list_ = written(tmp_path / "urls.txt", "\n".join(urls))
    assert counters(update(list_)) == {"added": 4}
    assert set(state(tmp_path / "index")["photos"]) == set(urls)
    web.asked.clear()
    assert counters(update(list_)) == {"unchanged": 4}
    assert {method for method, _ in web.asked} == {"HEAD"}
    web.put("plain.png", png(8))
    web.put("photo?id=1", b"no picture")
    del web.files["/photo?id=2"]
    web.statuses["/photo?id=0"] = 403
    skipped: dict[str, str] = {}
    report = update(list_, on_skip=skipped.__setitem__)
    assert (report.updated, report.failed, report.deleted, report.unlistable) == (1, 1, 1, 1)
    assert set(skipped) == {urls[0], urls[1]}
    assert set(state(tmp_path / "index")["photos"]) == {urls[0], urls[3]}


def test_a_list_that_tells_sizes_and_tags_asks_nothing_of_the_places(
    web: WebFiles, tmp_path: Path, update: Update
) -> None:
    urls = [web.put(f"{number}.png", png(number)) for number in range(3)]
    rows = [f"{url},{len(png(number))},v{number}" for number, url in enumerate(urls)]
    list_ = written(tmp_path / "urls.csv", "\n".join(["url,size_bytes,etag", *rows]))
    assert counters(update(list_)) == {"added": 3}
    web.asked.clear()
    assert counters(update(list_)) == {"unchanged": 3}
    assert web.asked == []


def test_places_are_asked_by_many_at_once(web: WebFiles, tmp_path: Path) -> None:
    urls = [web.put(f"{number}.png", b"x") for number in range(16)]
    list_ = written(tmp_path / "urls.txt", "\n".join(urls))
    web.meeting = threading.Barrier(16)  # broken, and so an error, unless all sixteen come together
    assert set(listed(open_store(str(list_)))) == set(urls)


def test_a_host_that_is_away_costs_its_own_photos_alone(web: WebFiles, tmp_path: Path, update: Update) -> None:
    away = "http://127.0.0.1:1/x.png"
    list_ = written(tmp_path / "urls.txt", f"{away}\n{web.put('a.png', png(1))}\n")
    report = update(list_)
    assert (report.added, report.unlistable) == (1, 1)


def test_a_list_at_a_url_counts_its_places_from_there_and_reads_no_file_of_this_machine(
    web: WebFiles, tmp_path: Path, update: Update
) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    web.put("photos/a.png", png(2))
    web.put("b.png", png(3))
    packed(tmp_path / "box.zip", {"c.png": png(4)})
    web.put("photos/box.zip", (tmp_path / "box.zip").read_bytes())
    places = ["a.png", "../../../b.png", "box.zip!/c.png", f"{tmp_path}/secret.png", "file:///etc/passwd"]
    list_ = web.put("photos/list.txt", "\n".join(places).encode())
    skipped: dict[str, str] = {}
    report = update(list_, on_skip=skipped.__setitem__)
    assert (report.added, report.unlistable) == (3, 2)
    assert set(state(tmp_path / "index")["photos"]) == {
        f"{web.address}/{name}" for name in ("photos/a.png", "b.png", "photos/box.zip!/c.png")
    }
    assert "cannot name files of this machine" in skipped[f"{tmp_path}/secret.png"]
    assert counters(update(list_)) == {"unchanged": 3, "unlistable": 2}


def test_archives_at_urls_are_read_by_ranges(web: WebFiles, tmp_path: Path, update: Update) -> None:
    members = {f"{number}.png": png(number) for number in range(5)} | {"padding.bin": os.urandom(2**20)}
    for name in ("a.zip", "b.tar"):
        web.put(name, packed(tmp_path / name, members).read_bytes())
    report = update(f"{web.address}/a.zip", f"{web.address}/b.tar")
    assert (report.added, report.duplicates, report.failed) == (10, 5, 0)
    web.asked.clear()
    assert counters(update(f"{web.address}/a.zip", f"{web.address}/b.tar")) == {"unchanged": 10}
    # One look at each, whether it is an archive; what is in them is recorded.
    assert [path for method, path in web.asked if method == "GET"] == ["/a.zip", "/b.tar"]
    stores = KnownStores()
    assert stores.read("zip", f"{web.address}/a.zip!/3.png", max_bytes=10**6) == png(3)
    # Another archive in its place, while it is open.
    web.put("a.zip", packed(tmp_path / "a.zip", {"3.png": png(30), "new.png": png(31)}).read_bytes())
    assert stores.read("zip", f"{web.address}/a.zip!/3.png", max_bytes=10**6) == png(30)
    web.statuses["/a.zip"] = 403
    with pytest.raises(StoreUnusable):
        update(f"{web.address}/a.zip")
    with pytest.raises(ImageError):
        stores.read("zip", f"{web.address}/a.zip!/new.png", max_bytes=10**6)
    del web.statuses["/a.zip"]
    assert update(f"{web.address}/a.zip").deleted == 4


def test_wildcards_stand_for_archives_and_lists_at_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)
    for name in ("shards/a-0.tar", "shards/a-1.tar", "shards/b-0.tar", "shards/deep/a-2.tar", "x/a-3.tar"):
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        packed(tmp_path / "web" / name, {f"{name[-5]}.png": png(1)})
    pages = type("Pages", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with serving(partial(pages, directory=str(tmp_path / "web"))) as port:
        address = f"http://127.0.0.1:{port}"
        assert expanded(f"{address}/shards/a-*.tar") == [f"{address}/shards/a-{number}.tar" for number in (0, 1)]
        assert expanded(f"{address}/*/a-?.tar") == [
            f"{address}/{name}.tar" for name in ("shards/a-0", "shards/a-1", "x/a-3")
        ]
        stores = open_stores([f"{address}/shards/{{a,b}}-*.tar"])
        assert [set(listed(store)) for store in stores] == [
            {f"{address}/shards/{name}.tar!/{name[-1]}.png"} for name in ("a-0", "a-1", "b-0")
        ]
        with pytest.raises(StoreUnusable, match="nothing is called"):
            expanded(f"{address}/shards/c-*.tar")


def test_an_archive_at_a_server_without_tags_is_known_by_size_and_time(tmp_path: Path, update: Update) -> None:
    asked: list[str] = []

    class Files(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.command)

    (tmp_path / "web").mkdir()
    archive = packed(tmp_path / "web" / "a.tar", {"a.png": png(1), "b.png": png(2)})
    os.utime(archive, (10**9, 10**9))
    with serving(partial(Files, directory=str(tmp_path / "web"))) as port:
        location = f"http://127.0.0.1:{port}/a.tar"
        assert counters(update(location)) == {"added": 2}
        asked.clear()
        assert counters(update(location)) == {"unchanged": 2}
        assert asked.count("GET") == 1  # the first block, to see that it is a tar
        packed(archive, {"a.png": png(1), "b.png": png(3), "c.png": png(4)})
        assert counters(update(location)) == {"added": 1, "updated": 2}
        # A time of whole seconds that has just been tells nothing yet.
        packed(archive, {"a.png": png(1), "b.png": png(3), "c.png": png(5)})
        assert counters(update(location)) == {"updated": 3}


def test_a_url_with_credentials_is_refused_and_they_get_nowhere(web: WebFiles, tmp_path: Path, update: Update) -> None:
    host = web.address.removeprefix("http://")
    rows = [
        web.put("a.png", png(1)),
        f"http://me:hunter2@{host}/b.png",
        f"http://{host}/c.png?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        f"http://me:x/hunter2@{host}/d.png",
    ]
    list_ = written(tmp_path / "urls.txt", "\n".join(rows))
    skipped: dict[str, str] = {}
    report = update(list_, on_skip=skipped.__setitem__)
    assert (report.added, report.unlistable) == (1, 3)
    assert set(skipped) == {f"http://{host}/{name}.png" for name in "bcd"}
    assert "hunter2" not in str(skipped)
    kept = [*(tmp_path / "index").rglob("*"), *(tmp_path / "cache").rglob("*")]
    assert not any(b"hunter2" in path.read_bytes() for path in kept if path.is_file())
    with pytest.raises(UsageError) as refused:
        open_store(f"http://me:hunter2@{host}/list.csv")
    assert "hunter2" not in str(refused.value)
