"""Photos in a bucket of a real S3 server on loopback, as it is and with faults put in between."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
from commandline import Cli
from fakes import FakeEncoder
from remote_servers import ACCESS_KEY, SECRET_KEY, Fault, Faults, Proxy, SeaweedServer, proxy_to, seaweed, serving
from serving import serving_index

import indexer
from indexer.report import Report
from searchengine import Searcher, open_index
from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.filters import Filters
from searchengine.models.registry import load_encoder
from searchengine.stores import StoredPhoto, open_store, remote, retry, s3
from searchengine.stores.ranged import FileChanged

Paint = Callable[..., Path]
SLOW_DOWN = Fault(status=503, code="SlowDown")


@dataclass
class Bucket:
    """A folder of its own in a bucket, behind a proxy."""

    folder: str
    files: Any
    proxy: Proxy
    server: SeaweedServer

    @property
    def location(self) -> str:
        return f"s3://photos/{self.folder}/"

    def put(self, name: str, data: bytes) -> str:
        self.files.pipe_file(f"photos/{self.folder}/{name}", data)
        return self.location + name

    def fill(self, folder: Path) -> None:
        """Everything below a folder."""
        with ThreadPoolExecutor(8) as pool:
            for path in (path for path in folder.rglob("*") if path.is_file()):
                pool.submit(self.put, path.relative_to(folder).as_posix(), path.read_bytes())

    def remove(self, name: str) -> None:
        self.files.rm_file(f"photos/{self.folder}/{name}")

    def is_page(self, target: str) -> bool:
        return "list-type=2" in target


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: SeaweedServer) -> Iterator[Proxy]:
    with proxy_to(server.port) as between:
        yield between


@pytest.fixture(scope="module")
def files(server: SeaweedServer) -> Any:
    """What puts files there, past the proxy."""
    return server.client()


@pytest.fixture
def bucket(
    server: SeaweedServer, files: Any, proxy: Proxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)
    proxy.reset()
    yield Bucket(request.node.name[5:45], files, proxy, server)
    proxy.reset()


def bring_up_to_date(index: Path, location: str | Path, **options: Any) -> Report:
    return indexer.build(index, [str(location)], encoder=FakeEncoder(), isolated=False, workers=2, **options)


def contents(index: Path, *, root: str) -> dict[str, tuple[object, ...]]:
    """What an index knows of each photo, by its name below `root`, with the bits of its vector; less times and ids."""
    with open_index(index) as opened:
        rows = opened.images(opened.photos_of(opened.vector_ids(Filters()))[0]).values()
        return {
            row.key.removeprefix(root): (row.size_bytes, row.width, row.height, opened.vector(row.vector_id).tobytes())
            for row in rows
        }


def names_in(index: Path, location: str) -> set[str]:
    return set(contents(index, root=location))


def first_times(count: int, fault: Fault, *, method: str = "GET", part: str = "") -> Faults:
    """The fault, the first `count` times that such a request comes."""
    left = itertools.count(count, -1)
    return lambda asked, target: fault if asked == method and part in target and next(left) > 0 else None


# -- what a run over a bucket does -----------------------------------------------------------------------------------


def test_a_run_over_a_bucket_equals_one_over_the_same_photos_in_a_folder(
    bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    bucket.fill(photos)
    remote_report = bring_up_to_date(tmp_path / "remote", bucket.location)
    local_report = bring_up_to_date(tmp_path / "local", photos)
    assert remote_report.added == local_report.added == 12
    assert contents(tmp_path / "remote", root=bucket.location) == contents(tmp_path / "local", root=f"{photos}/")


def test_a_second_run_reads_nothing_and_then_only_what_changed(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    bucket.fill(photos)
    index = tmp_path / "index"
    bring_up_to_date(index, bucket.location)
    bucket.proxy.reset()
    assert bring_up_to_date(index, bucket.location).unchanged == 12
    assert [target for _, target in bucket.proxy.requests if not bucket.is_page(target)] == []

    # Another picture of the same size in the same second: the entity tag alone tells.
    changed = bytearray((photos / "2024" / "e.bmp").read_bytes())
    changed[-1] ^= 0xFF
    bucket.put("2024/e.bmp", bytes(changed))
    bucket.put("new.png", (photos / "2023" / "beach" / "d.png").read_bytes()[:-1] + b"x")
    bucket.put("moved.png", (photos / "red.png").read_bytes())
    bucket.remove("red.png")
    bucket.remove("g.gif")
    report = bring_up_to_date(index, bucket.location)
    assert (report.added, report.updated, report.moved, report.deleted, report.unchanged) == (1, 1, 1, 1, 9)
    assert {"moved.png", "new.png"} < names_in(index, bucket.location)
    assert not {"red.png", "g.gif"} & names_in(index, bucket.location)


def test_a_listing_of_many_pages_is_whole_and_leaves_out_what_is_hidden(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PAGE_KEYS", 3)
    names = {f"{folder}{number}.jpg" for folder in ("", "a/", "a/b c/", "ä#?%41+&/") for number in range(3)}
    hidden = {".secret.jpg", "a/.git/x.jpg", "@eaDir/x.jpg", "a/node_modules/x.jpg"}
    for name in names | hidden:
        bucket.put(name, b"x" * len(name))
    store = open_store(bucket.location)
    items = {item.key: item for item in store.scan() if isinstance(item, StoredPhoto)}
    assert set(items) == {bucket.location + name for name in names}
    assert bucket.proxy.count("GET", "list-type=2") > len(names) // 3
    for key, item in items.items():
        photo, data = store.read(key, max_bytes=100)
        assert photo == item
        assert len(data) == item.size_bytes == len(key.removeprefix(bucket.location))
    below = {item.key for item in store.scan(bucket.location + "a/") if isinstance(item, StoredPhoto)}
    assert below == {key for key in items if key.startswith(bucket.location + "a/")}
    assert list(store.scan(bucket.location + "nothing/")) == []


def test_photos_of_a_bucket_are_found_and_shown_and_no_credentials_are_kept(
    bucket: Bucket, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bucket.fill(photos)
    bucket.proxy.reset(lambda method, target: Fault(status=403, code="AccessDenied") if "red.png" in target else None)
    index, told = tmp_path / "index", list[str]()
    encoder = load_encoder("mini")
    indexer.build(
        index,
        [bucket.location],
        encoder=encoder,
        isolated=False,
        on_skip=lambda key, reason: told.append(f"{key}: {reason}"),
    )
    assert told[0].startswith(bucket.location + "red.png: cannot be read: the answer is 403 AccessDenied")
    with open_index(index) as opened:
        (hit,) = Searcher(opened, encoder).search("blocks", k=1)
    assert (hit.store, hit.path.startswith(bucket.location)) == ("s3", True)
    with serving_index(index, home=tmp_path) as server:
        found = server.ask("/api/search?q=blocks&k=3")
        answer = server.ask(f"/api/images/{hit.id}")
        small = server.ask(f"/api/images/{hit.id}/thumbnail?size=160")
    assert (found.status, found.json["hits"][0]["path"]) == (200, hit.path)
    assert answer.body == (photos / hit.path.removeprefix(bucket.location)).read_bytes()
    assert (answer.status, small.status) == (200, 200)
    told += [caplog.text, found.body.decode(), str(answer.headers)]
    written = b"".join(path.read_bytes() for path in index.rglob("*") if path.is_file())
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret.encode() not in written + "".join(told).encode()


# -- faults ----------------------------------------------------------------------------------------------------------


FAULTS = {
    "throttled": SLOW_DOWN,
    "too many requests": Fault(status=429, code="TooManyRequests"),
    "an error inside": Fault(status=500, code="InternalError"),
    "a bad gateway": Fault(status=502),
    "cut off": Fault(cut=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_in_trouble_is_asked_again(bucket: Bucket, fault: str) -> None:
    key = bucket.put("a.jpg", bytes(range(256)) * 20)
    for part in ("list-type=2", "a.jpg"):
        bucket.proxy.reset(first_times(2, FAULTS[fault], part=part))
        store = open_store(bucket.location)
        assert [item.key for item in store.scan() if isinstance(item, StoredPhoto)] == [key]
        assert store.read(key, max_bytes=10_000)[1] == bytes(range(256)) * 20
        assert bucket.proxy.count("GET", part) > 2


@pytest.mark.parametrize("seed", range(2))
def test_a_run_through_every_kind_of_trouble_equals_one_over_a_folder(
    bucket: Bucket, photos: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.fill(photos)
    monkeypatch.setattr(s3, "PAGE_KEYS", 4)
    monkeypatch.setattr(remote, "PART_BYTES", 10_000)
    chance, faults, times = random.Random(seed), list(FAULTS.values()), Counter[str]()

    def at_random(method: str, target: str) -> Fault | None:
        times[target] += 1
        return chance.choice(faults) if times[target] < 3 and chance.random() < 0.7 else None

    bucket.proxy.reset(at_random)
    report = bring_up_to_date(tmp_path / "index", bucket.location)
    assert (report.added, report.failed, report.unlistable) == (12, 0, 0)
    bring_up_to_date(tmp_path / "local", photos)
    assert contents(tmp_path / "index", root=bucket.location) == contents(tmp_path / "local", root=f"{photos}/")


def test_a_store_that_says_when_to_come_again_is_heeded(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    key = bucket.put("a.jpg", b"abc")
    store = open_store(bucket.location)
    for told, expected in (("7", 7.0), ("100000", retry.LONGEST_WAIT_SECONDS)):
        bucket.proxy.reset(first_times(1, Fault(status=503, code="SlowDown", headers={"Retry-After": told})))
        assert store.read(key, max_bytes=10)[1] == b"abc"
        assert waits.pop() == expected
    assert waits == []


def test_a_store_that_falls_silent_is_asked_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(s3.SETTINGS, "read_timeout", 0.3)
    key = bucket.put("a.jpg", b"abc")
    store = open_store(bucket.location)
    bucket.proxy.reset(first_times(1, Fault(silent=True), part="a.jpg"))
    assert store.read(key, max_bytes=10)[1] == b"abc"
    assert bucket.proxy.count("GET", "a.jpg") == 2


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_not_asked_again(bucket: Bucket, status: int) -> None:
    key = bucket.put("a.jpg", b"abc")
    store = open_store(bucket.location)
    bucket.proxy.reset(first_times(9, Fault(status=status, code="No"), part="a.jpg"))
    with pytest.raises(ImageError, match="cannot be read: (the answer is 403 No; check|there is no such file)"):
        store.read(key, max_bytes=10)
    assert bucket.proxy.count("GET", "a.jpg") == 1


def test_a_photo_that_always_fails_costs_itself_and_a_store_that_does_ends_the_run(
    bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    bucket.fill(photos)
    bucket.proxy.reset(lambda method, target: SLOW_DOWN if "red.png" in target else None)
    report = bring_up_to_date(tmp_path / "index", bucket.location)
    assert (report.added, report.failed) == (11, 1)
    with open_index(tmp_path / "index") as index:
        assert [reason for _, _, reason in index.failed_photos()] == [
            "cannot be read: the answer is 503 SlowDown (7 tries)"
        ]
    assert bring_up_to_date(tmp_path / "index", bucket.location).failed == 1

    pages = itertools.count()
    bucket.proxy.reset(
        lambda method, target: None if bucket.is_page(target) and next(pages) < 2 else Fault(status=500, code="Broken")
    )
    with pytest.raises(StoreUnusable, match="s3://photos/.* cannot be read: the answer is 500 Broken"):
        bring_up_to_date(tmp_path / "index", bucket.location)
    bucket.proxy.reset()
    report = bring_up_to_date(tmp_path / "index", bucket.location)
    assert (report.added, report.failed, report.deleted) == (1, 0, 0)


def test_what_was_read_before_a_store_went_away_is_kept(bucket: Bucket, photos: Path, tmp_path: Path) -> None:
    bucket.fill(photos)
    gets = itertools.count()
    bucket.proxy.reset(
        lambda method, target: SLOW_DOWN if next(gets) > 8 else None  # two pages and six photos
    )
    with pytest.raises(StoreUnusable, match="the answer is 503 SlowDown"):
        bring_up_to_date(tmp_path / "index", bucket.location)
    kept = len(names_in(tmp_path / "index", bucket.location))
    assert kept > 0
    bucket.proxy.reset()
    report = bring_up_to_date(tmp_path / "index", bucket.location)
    assert (report.added, report.unchanged) == (12 - kept, kept)


def test_a_photo_that_moves_from_a_folder_into_a_bucket_stays_the_same(
    bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    bucket.put("first.jpg", (photos / "g.gif").read_bytes())
    stores, index = [str(photos), bucket.location], tmp_path / "index"
    indexer.build(index, stores, encoder=FakeEncoder(), isolated=False)
    bucket.put("red.png", (photos / "red.png").read_bytes())
    (photos / "red.png").unlink()
    encoder = FakeEncoder()
    report = indexer.build(index, stores, encoder=encoder, isolated=False)
    assert (report.moved, report.added, report.deleted, report.unchanged) == (1, 0, 0, 12)
    assert encoder.batches == []


def test_a_listing_that_breaks_off_half_way_deletes_nothing(
    bucket: Bucket, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.fill(photos)
    index = tmp_path / "index"
    bring_up_to_date(index, bucket.location)
    before = contents(index, root=bucket.location)
    bucket.remove("red.png")
    monkeypatch.setattr(s3, "PAGE_KEYS", 5)
    bucket.proxy.reset(lambda method, target: SLOW_DOWN if "continuation-token" in target else None)
    report = bring_up_to_date(index, bucket.location)
    assert (report.deleted, report.unlistable) == (0, 1)
    assert contents(index, root=bucket.location) == before
    bucket.proxy.reset()
    assert bring_up_to_date(index, bucket.location).deleted == 1


def test_a_listing_cut_off_without_a_way_on_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class CutOff(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")

        def log_message(self, *_: object) -> None:
            pass

    with serving(CutOff) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        with pytest.raises(StoreUnusable, match="the listing is cut off"):
            list(remote.RemoteStore("s3://photos/", must_exist=False).scan())


def test_a_server_that_is_killed_and_started_again_in_the_middle_costs_nothing(
    bucket: Bucket, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.fill(photos)
    for name, value in (("ATTEMPTS", 300), ("FIRST_WAIT_SECONDS", 0.1), ("LONGEST_WAIT_SECONDS", 0.2)):
        monkeypatch.setattr(retry, name, value)
    seen = threading.Event()

    def tell_of_reads(method: str, target: str) -> None:
        if sum("list-type" not in asked for _, asked in list(bucket.proxy.requests)) == 4:
            seen.set()

    bucket.proxy.reset(tell_of_reads)
    monkeypatch.setattr(s3.S3Files, "reads_at_once", 2)
    with ThreadPoolExecutor(1) as background:
        run = background.submit(bring_up_to_date, tmp_path / "index", bucket.location)
        assert seen.wait(30)
        bucket.server.kill()
        bucket.server.start()
        report = run.result(60)
    assert (report.added, report.failed) == (12, 0)
    bring_up_to_date(tmp_path / "local", photos)
    assert contents(tmp_path / "index", root=bucket.location) == contents(tmp_path / "local", root=f"{photos}/")


# -- large objects, and those that change ----------------------------------------------------------------------------


def test_a_large_object_comes_in_parts_at_once_and_whole(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 1000)
    data = bytes(number * number % 251 for number in range(7777))
    key = bucket.put("large.tif", data)
    store = open_store(bucket.location)
    assert store.read(key, max_bytes=7777)[1] == data
    assert bucket.proxy.count("GET", "large.tif") == 8
    bucket.proxy.reset()
    with pytest.raises(ImageError, match="larger than the limit of 7,776 bytes"):
        store.read(key, max_bytes=7776)
    assert bucket.proxy.count("GET", "large.tif") == 1


def test_an_object_that_is_replaced_between_its_parts_is_not_read(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 1000)
    key = bucket.put("large.tif", b"a" * 3000)
    store = open_store(bucket.location)
    times = itertools.count()

    def replace_before_the_second(method: str, target: str) -> None:
        if "large.tif" in target and next(times) == 1:
            bucket.put("large.tif", b"b" * 3000)

    bucket.proxy.reset(replace_before_the_second)
    with pytest.raises(ImageError, match="it changed while it was being read"):
        store.read(key, max_bytes=10_000)


def test_ranges_of_an_object_are_of_one_state_of_it(bucket: Bucket) -> None:
    data = bytes(range(256)) * 4
    key = bucket.put("archive.bin", data)
    file = remote.open_binary(key)
    assert file.size_bytes == 1024
    with ThreadPoolExecutor(4) as pool:
        ranges = [(0, 10), (1000, 24), (1000, 99), (1024, 5), (0, 0), (17, 500)]
        got = list(pool.map(lambda asked: file.read_at(*asked), ranges))
    assert got == [data[start : start + length] for start, length in ranges]
    bucket.put("archive.bin", data[::-1])
    with pytest.raises(FileChanged):
        file.read_at(0, 10)


# -- what cannot be used ---------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_read_is_told_with_a_remedy(
    bucket: Bucket, tmp_path: Path, cli: Cli, own_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(location: str) -> str:
        with pytest.raises(StoreUnusable) as caught:
            open_store(location)
        assert SECRET_KEY not in str(caught.value)
        return str(caught.value)

    bucket.put("a.jpg", b"x")
    outcome = cli("index", "s3://nowhere/", "--index", tmp_path / "index", "--model", "mini")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == "searchengine: s3://nowhere/ cannot be read: there is no bucket nowhere; check its name\n"
    assert f"there is nothing at {bucket.location}typo/; check the name" in refused(bucket.location + "typo")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert "403 SignatureDoesNotMatch; check the credentials (AWS_ACCESS_KEY_ID" in refused(bucket.location)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "there are no credentials for it; check the credentials" in refused(bucket.location)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "The config profile (nobody) could not be found" in refused(bucket.location)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # as FSSPEC_S3_ANON=true does at the start
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9")
    assert "there is no such host; check the address" in refused(bucket.location)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "the connection failed: Connection refused" in refused(bucket.location)


def test_without_its_bucket_a_photo_is_not_gone_for_sure(bucket: Bucket) -> None:
    key = bucket.put("a.jpg", b"x")
    photo = remote.RemoteStore(bucket.location).look(key)
    assert photo is not None
    assert (photo.key, photo.size_bytes) == (key, 1)
    store = remote.RemoteStore("s3://photos/", must_exist=False)
    assert store.look(key + "x") is None
    assert not store.is_there(key + "x")
    store = remote.RemoteStore("s3://nowhere/", must_exist=False)
    with pytest.raises(StoreUnusable, match="there is no bucket nowhere"):
        store.look("s3://nowhere/a.jpg")
    assert store.is_there("s3://nowhere/a.jpg")


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        UsageError, match=r"s3:// needs the extra s3; install it with: pip install 'searchengine\[s3\]'"
    ):
        open_store("s3://bucket/")


def test_a_bucket_may_be_empty_and_a_folder_in_it_must_not(bucket: Bucket) -> None:
    bucket.files.mkdir("empty-bucket")
    assert list(open_store("s3://empty-bucket").scan()) == []
    with pytest.raises(StoreUnusable):
        open_store("s3://empty-bucket/folder")
