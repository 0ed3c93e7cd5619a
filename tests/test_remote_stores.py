"""Photos on web servers, behind ssh, in what else fsspec opens; how stores are asked again, and files fetched ahead."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import asyncssh
import fsspec.asyn
import fsspec.config
import pytest
from fakes import FakeEncoder
from gcp_storage_emulator.server import create_server
from hypothesis import given
from hypothesis import strategies as st
from remote_servers import Fault, proxy_to, serving, sftp_server

import indexer
from indexer.fetching import FetchPool
from indexer.reading import PhotoReader
from indexer.verify import verify
from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.stores import KnownStores, StoredPhoto, Unlistable, is_url, open_store, remote, retry
from searchengine.stores.addresses import canonical
from searchengine.stores.background import map_at_once
from searchengine.stores.ranged import FileChanged, NotThere
from searchengine.stores.remote import RemoteStore, open_binary
from searchengine.stores.transfer import Busy, Refused

Paint = Callable[..., Path]
WAIT_SECONDS = 30.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)


class _Plain(SimpleHTTPRequestHandler):
    """Python's own: pages of links, Last-Modified, neither tags nor ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


class _WithRanges(_Plain):
    """The same with entity tags and ranges, and without the times."""

    tagged = True

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_HEAD()
            return
        data = path.read_bytes()
        self.send_response(200)
        self._describe(data)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if not path.is_file() or not asked:
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        if self.tagged and self.headers.get("If-Match", tag := _tag(data)) != tag:
            self.send_response(412)
            self.send_header("Content-Length", "0")
        elif not part:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self._describe(data)
            self.send_header("Content-Length", "0")
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
            self._describe(data)
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if part:
            self.wfile.write(part)

    def _describe(self, data: bytes) -> None:
        if self.tagged:
            self.send_header("ETag", _tag(data))


class _Silent(_WithRanges):
    """Tells neither tags nor times."""

    tagged = False


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@pytest.fixture(params=[_Plain, _WithRanges])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a web server that gives out the folder web/ of the test's own."""
    (tmp_path / "web").mkdir(exist_ok=True)
    with serving(partial(request.param, directory=str(tmp_path / "web"))) as port:
        yield f"http://127.0.0.1:{port}/"


def listed(location: str) -> dict[str, StoredPhoto]:
    """What a store lists, by the names below `location`; fails if a part cannot be listed."""
    items = list(open_store(location).scan())
    assert not [item for item in items if isinstance(item, Unlistable)]
    return {item.key.removeprefix(location): item for item in items if isinstance(item, StoredPhoto)}


# -- web servers -----------------------------------------------------------------------------------------------------


def test_a_page_of_links_is_a_folder_and_what_is_below_it_is_listed_and_read(web: str, tmp_path: Path) -> None:
    names = {"a.jpg", "sub/b c.jpg", "sub/deep/é #1.png", "sub/empty.jpg"}
    for name in {*names, ".hidden.jpg", "sub/.git/x.jpg", "node_modules/y.jpg"}:
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if "empty" in name else name.encode() * 100)
    found = listed(web)
    assert set(found) == {"a.jpg", "sub/b%20c.jpg", "sub/deep/%C3%A9%20%231.png", "sub/empty.jpg"}
    store = open_store(web)
    for item in found.values():
        photo, data = store.read(item.key, max_bytes=10**6)
        assert photo == item
        assert len(data) == item.size_bytes
        assert store.head(item.key) == data[:32]
    assert set(listed(web + "sub/")) == {"b%20c.jpg", "deep/%C3%A9%20%231.png", "empty.jpg"}
    with pytest.raises(ImageError, match="larger than the limit of 10 bytes"):
        store.read(found["a.jpg"].key, max_bytes=10)


def test_links_beside_and_above_a_page_are_not_followed(tmp_path: Path) -> None:
    page = (
        "<a href='in.jpg'><a href='./in2.jpg#x'><a href='/photos/in3.jpg'><a href='sub/'><a href='../out.jpg'>"
        "<a href='/out.jpg'><a href='//elsewhere.invalid/out.jpg'><a href='http://elsewhere.invalid/photos/o.jpg'>"
        "<a href='?C=N'><a href='sub/deep.jpg'><a href='mailto:x@y'><a href='http://[bad'><a><a href=''>"
        "<a href='gone.jpg'><a href='%2e%2e/'><a href='%2Ehidden.jpg'><a href='..%2Fout.jpg'><a href='sub%2Fs.jpg'>"
    )
    (tmp_path / "web" / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "web" / "photos" / "index.html").write_text(page)
    (tmp_path / "web" / "photos" / "sub" / "index.html").write_text(
        "<a href='../'><a href='../in.jpg'><a href='s.jpg'>"
    )
    for name in ("out.jpg", "photos/in.jpg", "photos/in2.jpg", "photos/in3.jpg", "photos/sub/s.jpg"):
        (tmp_path / "web" / name).write_bytes(b"x")
    with serving(partial(_Plain, directory=str(tmp_path / "web"))) as port:
        assert set(listed(f"http://127.0.0.1:{port}/photos/")) == {"in.jpg", "in2.jpg", "in3.jpg", "sub/s.jpg"}


def test_a_photo_that_left_the_page_but_not_the_server_stays(web: str, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "web" / "p"
    photos.rename(folder)

    def run() -> tuple[int, int, int]:
        encoder = FakeEncoder()
        report = indexer.build(tmp_path / "index", [web + "p/"], encoder=encoder, isolated=False, workers=2)
        return report.added, report.unchanged, report.deleted

    assert run() == (12, 0, 0)
    assert run() == (0, 12, 0)
    (folder / "g.gif").unlink()
    (folder / "index.html").write_text("<a href='2023/'></a><a href='2024/'></a>")
    assert run() == (0, 10, 1)


def test_a_place_that_has_become_empty_loses_nothing(web: str, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "web" / "p"
    photos.rename(folder)
    options = {"encoder": FakeEncoder(), "isolated": False, "workers": 2}
    assert indexer.build(tmp_path / "index", [web + "p/"], **options).added == 12  # type: ignore[arg-type]
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    report = indexer.build(tmp_path / "index", [web + "p/"], **options)  # type: ignore[arg-type]
    assert (report.deleted, report.unlistable) == (0, 1)


def test_a_host_that_is_away_is_one_finding_and_what_is_elsewhere_is_checked(
    paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("web/a.png", "web/b.png", "local/c.png"):
        paint(tmp_path / name)
    with serving(partial(_Plain, directory=str(tmp_path / "web"))) as port:
        host = f"http://127.0.0.1:{port}/"
        stores = [host, str(tmp_path / "local")]
        indexer.build(tmp_path / "index", stores, encoder=FakeEncoder(), isolated=False)
    (tmp_path / "local/c.png").write_bytes(b"another")
    monkeypatch.setattr(retry, "ATTEMPTS", 1)
    told = {problem.object: problem.message for problem in verify(tmp_path / "index", stores=True).problems}
    assert told.keys() == {host, str(tmp_path / "local/c.png")}
    assert told[host].startswith("2 photos were not checked: ")


def test_what_a_server_tells_neither_tag_nor_time_of_is_read_every_time(photos: Path, tmp_path: Path) -> None:
    with serving(partial(_Silent, directory=str(photos))) as port:
        location = f"http://127.0.0.1:{port}/"
        for expected in ((12, 0), (0, 12)):
            report = indexer.build(tmp_path / "index", [location], encoder=FakeEncoder(), isolated=False, workers=2)
            assert (report.added, report.updated) == expected


def test_a_large_file_comes_in_parts_or_whole_as_the_server_can(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 1000)
    data = random.Random(0).randbytes(4321)
    (tmp_path / "web" / "large.tif").write_bytes(data)
    store = open_store(web)
    assert store.read(web + "large.tif", max_bytes=4321)[1] == data
    file = open_binary(web + "large.tif")
    assert [file.read_at(0, 5), file.read_at(4000, 999), file.read_at(1500, 2500)] == [
        data[:5],
        data[4000:],
        data[1500:4000],
    ]
    (tmp_path / "web" / "large.tif").write_bytes(data + b"more")
    with pytest.raises(FileChanged):
        file.read_at(0, 10)
    with pytest.raises(NotThere):
        open_binary(web + "nothing.tif")


def test_a_server_that_refuses_or_is_no_folder_is_told_with_a_reason(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "file.jpg").write_bytes(b"x")
    with proxy_to(int(web.rpartition(":")[2].strip("/"))) as proxy:
        location = f"http://127.0.0.1:{proxy.port}/"
        with pytest.raises(NotThere, match="there is nothing at .*typo/; check the name"):
            open_store(location + "typo")
        proxy.reset(lambda method, target: Fault(status=401))
        with pytest.raises(StoreUnusable, match="the answer is 401.*; a login for it belongs into ~/.netrc"):
            open_store(location)
        proxy.reset(lambda method, target: Fault(status=200, headers={"Content-Type": "image/jpeg"}))
        with pytest.raises(StoreUnusable, match="it is image/jpeg, not a page of links"):
            list(open_store(location).scan())
        proxy.reset(lambda method, target: Fault(status=302, headers={"Location": "http://127.0.0.1:1/"}))
        with pytest.raises(StoreUnusable, match="the connection failed: Connection refused"):
            open_store(location)
        proxy.reset(lambda method, target: Fault(status=302, headers={"Location": target}))
        with pytest.raises(StoreUnusable, match="its address is of no use: TooManyRedirects"):
            open_store(location)
        # What knows only GET, and a photo of which nothing can be learnt.
        proxy.reset(lambda method, target: Fault(status=405) if method == "HEAD" else None)
        assert set(listed(location)) == {"file.jpg"}
        proxy.reset(lambda method, target: Fault(status=401) if "file" in target else None)
        (item,) = open_store(location).scan()
        assert isinstance(item, Unlistable)
        assert item.prefix == location + "file.jpg"


# -- ssh -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an ssh server that gives out the folder ssh/ of the test's own."""
    (tmp_path / "ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with sftp_server(tmp_path / "ssh", tmp_path / "home") as port:
        yield f"sftp://someone@127.0.0.1:{port}/"


def test_photos_behind_ssh_are_listed_and_read_as_those_of_a_folder(ssh: str, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "ssh"
    photos.rename(root / "photos")
    name = os.path.join(os.fsencode(root), b"photos", b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write((root / "photos" / "red.png").read_bytes())
    (root / "outside.png").write_bytes(b"x")
    (root / "photos" / "link.png").symlink_to("red.png")
    (root / "photos" / "out.png").symlink_to("../outside.png")
    (root / "photos" / "dangling.png").symlink_to("nothing.png")
    (root / "photos" / "folder").symlink_to("2024")
    os.mkfifo(root / "photos" / "fifo.png")
    (root / "photos" / ".hidden.png").write_bytes(b"x")
    found = listed(ssh + "photos/")
    expected = {item.key: item for item in open_store(str(root / "photos")).scan() if isinstance(item, StoredPhoto)}
    assert {f"{root}/photos/{name}" for name in found} == set(expected)
    store = open_store(ssh + "photos/")
    for name, item in found.items():
        photo, data = store.read(item.key, max_bytes=10**7)
        assert photo == item
        assert data == Path(f"{root}/photos/{name}").read_bytes()
    with pytest.raises(ImageError, match="not a regular file"):
        store.read(ssh + "photos/fifo.png", max_bytes=10)
    assert not store.is_there(ssh + "photos/nothing.png")
    reports = [
        indexer.build(tmp_path / "index", [ssh + "photos"], encoder=FakeEncoder(), isolated=False, workers=2)
        for _ in range(2)
    ]
    assert [(report.added, report.unchanged) for report in reports] == [(14, 0), (0, 14)]


def test_a_connection_that_was_lost_is_made_again(ssh: str, tmp_path: Path) -> None:
    (tmp_path / "ssh" / "a.jpg").write_bytes(b"abc")
    store = open_store(ssh)
    for _ in range(3):
        assert isinstance(store, RemoteStore)
        connection, _ = store._files._session  # type: ignore[attr-defined]
        fsspec.asyn.get_loop().call_soon_threadsafe(connection.abort)
        assert store.read(ssh + "a.jpg", max_bytes=10)[1] == b"abc"


def test_a_host_that_is_not_known_is_not_trusted(ssh: str, tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text("")
    with pytest.raises(StoreUnusable, match=r"is not in ~/.ssh/known_hosts, .* log in once with: ssh 127.0.0.1"):
        open_store(ssh)


def test_who_has_no_key_is_not_let_in(ssh: str, tmp_path: Path) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519")
    other.write_private_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    with pytest.raises(StoreUnusable, match="it lets nobody in with the keys of ~/.ssh"):
        open_store(ssh)


# -- Google's buckets ------------------------------------------------------------------------------------------------


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """An emulator of Google Cloud Storage with the bucket "photos"; gives what puts a file there."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="photos")
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})

    def put(name: str, data: bytes) -> None:
        query = urlencode({"uploadType": "media", "name": name})
        url = f"http://127.0.0.1:{port}/upload/storage/v1/b/photos/o?{query}"
        urlopen(Request(url, data=data, method="POST", headers={"Content-Type": "image/png"}), timeout=WAIT_SECONDS)

    yield put
    server.stop()


def test_photos_in_a_bucket_of_google_are_listed_and_read(
    google: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 1000)
    names = {"a.jpg", "b c/é #1?.png", "b c/deep/x.png"}
    for name in {*names, ".hidden.png", "b c/@eaDir/x.png"}:
        google(name, name.encode() * 300)
    assert set(listed("gs://photos/")) == names
    assert set(listed("gs://photos/b c/")) == {"é #1?.png", "deep/x.png"}
    store = open_store("gcs://photos")
    for item in store.scan():
        assert isinstance(item, StoredPhoto)
        photo, data = store.read(item.key, max_bytes=10**6)
        assert photo == item
        assert data == item.key.removeprefix("gs://photos/").encode() * 300
    with pytest.raises(ImageError, match="larger than the limit"):
        store.read("gs://photos/a.jpg", max_bytes=10)
    file = open_binary("gs://photos/a.jpg")
    google("a.jpg", b"another")
    with pytest.raises(ImageError):
        file.read_at(0, 10)
    assert store.look("gs://photos/nothing.jpg") is None
    with pytest.raises(StoreUnusable, match="there is no bucket nowhere; check its name"):
        open_store("gs://nowhere")


def test_without_a_login_for_google_the_message_tells_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))
    with pytest.raises(StoreUnusable, match="there is no login for it .*; log in with: gcloud auth application"):
        open_store("gs://photos")


# -- everything else -------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[object]:
    import fsspec

    files = fsspec.filesystem("memory", skip_instance_cache=True)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_what_fsspec_opens_is_a_store(memory: object, photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.*"):
        memory.pipe_file(f"/bucket/{path.relative_to(photos)}", path.read_bytes())  # type: ignore[attr-defined]
    found = listed("memory://bucket/")
    assert {tmp_path / "photos" / name for name in found} == set(photos.rglob("*.*"))
    store = open_store("memory://bucket")
    for name, item in found.items():
        photo, data = store.read(item.key, max_bytes=10**7)
        assert (photo.size_bytes, data) == (item.size_bytes, (photos / name).read_bytes())
    assert store.look("memory://bucket/nothing.jpg") is None
    with pytest.raises(NotThere):
        open_store("memory://nothing/")


def test_places_that_are_no_store_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nothing:// is no kind of store"):
        open_store("nothing://x/")
    with pytest.raises(UsageError, match="give the path of a folder on this machine without file://"):
        open_store("file://localhost/tmp/")
    with pytest.raises(UsageError, match="names no bucket or host"):
        open_store("s3:///folder")
    with pytest.raises(UsageError, match="is no folder; give the address of a page with links"):
        open_store("https://host.invalid/list?page=2")
    for scheme, extra in (("gs", "gcs"), ("az", "azure"), ("sftp", "sftp"), ("https", "http")):
        monkeypatch.setitem(sys.modules, remote.NEEDS[scheme][1], None)
        with pytest.raises(UsageError, match=rf"pip install 'searchengine\[{extra}\]'"):
            open_store(f"{scheme}://place/")


SECRET = "sEcReT"


@pytest.mark.parametrize(
    "location",
    [
        f"https://user:{SECRET}@host/photos/",
        f"https://{SECRET}@host/photos/",
        f"s3://key:{SECRET}@bucket/",
        f"sftp://user:{SECRET}@host/photos/",
        f"https://bucket.host/a.jpg?X-Amz-Algorithm=AWS4&X-Amz-Signature={SECRET}",
        f"https://host/a.jpg?x=1&Signature={SECRET}",
        f"https://account.host/box/a.jpg?sv=1&sig={SECRET}",
        f"https://host/a.jpg?access_token={SECRET}",
        f"https://host?token={SECRET}",
        f"https://host/a.jpg#access_token={SECRET}",
        f"https://host/a.jpg?x=1;token={SECRET}",
        f"https://user:pass/{SECRET}@host/photos/",
        f"az://box/a.jpg?sv=1&sig={SECRET}",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(location: str) -> None:
    for refuse in (canonical, open_store, open_binary):
        with pytest.raises(UsageError) as caught:
            refuse(location)
        assert SECRET not in str(caught.value)


@given(
    st.sampled_from(["s3", "S3", "gs", "az"]),
    st.text("abcdefghij0123456789-.", min_size=1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_every_other_address_is_kept_as_it_is(scheme: str, bucket: str, key: str) -> None:
    url = canonical(f"{scheme}://{bucket}/{key}")
    assert url == f"{scheme.lower()}://{bucket}/{key}"
    assert is_url(url)
    assert canonical(url) == url


def test_a_name_in_a_bucket_may_look_like_one_in_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "memory://bucket/a.zip!/b.jpg"
    fsspec.filesystem("memory").pipe_file("/bucket/a.zip!/b.jpg", b"x")
    assert KnownStores().read("memory", key, max_bytes=10) == b"x"
    assert KnownStores().of("zip", key).name == "zip"


def test_a_store_that_need_not_be_there_is_opened_without_a_request() -> None:
    store = RemoteStore("http://no-such-host.invalid/", must_exist=False)
    assert store.prefix == "http://no-such-host.invalid/"
    with pytest.raises(StoreUnusable, match="there is no such host"):
        store.read("http://no-such-host.invalid/a.jpg", max_bytes=10)
    assert store.is_there("http://no-such-host.invalid/a.jpg")


# -- asking again ----------------------------------------------------------------------------------------------------


@given(failures=st.integers(0, 12), wanted=st.sampled_from([0.0, 1.5, 1e6]))
def test_waits_grow_are_spread_and_never_shorter_than_what_the_store_wants(failures: int, wanted: float) -> None:
    waits: list[float] = []
    left = itertools.count(failures, -1)

    def request() -> str:
        if next(left) > 0:
            raise Busy("busy", wait_seconds=wanted)
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "FIRST_WAIT_SECONDS", 0.5)
        patch.setattr(retry.time, "sleep", waits.append)
        if failures < retry.ATTEMPTS:
            assert retry.retried(request) == "done"
        else:
            with pytest.raises(Busy, match=rf"busy \({retry.ATTEMPTS} tries\)"):
                retry.retried(request)
    assert len(waits) == min(failures, retry.ATTEMPTS - 1)
    for number, wait in enumerate(waits):
        backoff = 0.5 * 2**number
        least = min(wanted, retry.LONGEST_WAIT_SECONDS)
        assert max(backoff / 2, least) <= wait <= max(backoff, least)


def test_what_is_refused_is_asked_once() -> None:
    asked: list[None] = []

    def request() -> None:
        asked.append(None)
        raise Refused("no")

    with pytest.raises(Refused):
        retry.retried(request)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("7", 7.0), (None, 0.0), ("", 0.0), ("soon", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("-3", 0.0)],
)
def test_retry_after_is_seconds_or_a_date(told: str | None, seconds: float) -> None:
    assert retry.retry_after_seconds(told) == seconds
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < retry.retry_after_seconds(later) <= 100


def test_several_waits_at_once_give_results_in_order_and_end_when_nobody_asks_any_more() -> None:
    def work(number: int) -> int:
        begun.append(number)
        time.sleep(random.random() / 200)
        if number == 77:
            raise Refused("no")
        return number * number

    begun: list[int] = []
    assert list(map_at_once(work, range(50), threads=4)) == [number * number for number in range(50)]
    assert list(map_at_once(work, [], threads=4)) == []
    with pytest.raises(Refused):
        list(map_at_once(work, range(70, 80), threads=4))
    begun.clear()
    results = map_at_once(work, range(5000), threads=4)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 1000


# -- fetching ahead --------------------------------------------------------------------------------------------------


def test_what_is_fetched_at_once_keeps_within_the_limit_and_begins_in_order() -> None:
    sizes = [random.Random(number).choice([1, 10, 40, 100, 250]) for number in range(200)]
    lock, begun, holding, most = threading.Lock(), list[int](), [0], [0]

    def work(number: int) -> int:
        with lock:
            begun.append(number)
            holding[0] += min(sizes[number], 100)
            most[0] = max(most[0], holding[0])
        time.sleep(0.0005)
        with lock:
            holding[0] -= min(sizes[number], 100)
        return number

    with closing(FetchPool[int](max_bytes=100)) as pool:
        futures = [pool.submit(partial(work, n), size_bytes=size, threads=8) for n, size in enumerate(sizes)]
        assert [future.result(WAIT_SECONDS) for future in futures] == list(range(200))
    assert 10 < most[0] <= 100
    assert all(abs(place - number) < 8 for place, number in enumerate(begun))


def test_a_fetch_that_fails_is_told_and_its_room_is_free_again() -> None:
    with closing(FetchPool[int](max_bytes=10)) as pool:
        broken: Future[int] = pool.submit(lambda: 1 // 0, size_bytes=10, threads=2)
        whole = pool.submit(lambda: 1, size_bytes=10, threads=2)
        with pytest.raises(ZeroDivisionError):
            broken.result(WAIT_SECONDS)
        assert whole.result(WAIT_SECONDS) == 1


def test_a_run_that_is_stopped_does_not_wait_for_a_store_that_hangs(photos: Path, tmp_path: Path) -> None:
    stop, asked = threading.Event(), threading.Event()
    with serving(partial(_WithRanges, directory=str(photos))) as port, proxy_to(port) as proxy:

        def hang_on_files(method: str, target: str) -> Fault | None:
            if method == "GET" and not target.endswith("/"):
                asked.set()
                return Fault(silent=True)
            return None

        proxy.reset(hang_on_files)
        threading.Thread(target=lambda: asked.wait(WAIT_SECONDS) and stop.set(), daemon=True).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            indexer.build(
                tmp_path / "index",
                [f"http://127.0.0.1:{proxy.port}/"],
                encoder=FakeEncoder(),
                isolated=False,
                stop=stop,
            )
        assert time.monotonic() - started < WAIT_SECONDS / 2


def test_many_files_are_fetched_at_once_and_come_in_order(paint: Paint, tmp_path: Path) -> None:
    for number in range(24):
        paint(f"web/{number:02}.png", number)
    under_way, most, lock = [0], [0], threading.Lock()

    class Slow(_WithRanges):
        def do_GET(self) -> None:
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            if not self.path.endswith("/"):
                time.sleep(0.05)
            try:
                super().do_GET()
            finally:
                with lock:
                    under_way[0] -= 1

    with serving(partial(Slow, directory=str(tmp_path / "web"))) as port:
        store = open_store(f"http://127.0.0.1:{port}/")
        items = [item for item in store.scan() if isinstance(item, StoredPhoto)]
        reader = _reader()
        changes = [indexer.crawl.Change(store=store, listed=item, known=False) for item in items]
        outcomes = list(reader.read_all(changes, stop=threading.Event()))
    assert [outcome.change.listed.key for outcome in outcomes] == [item.key for item in items]
    assert len({outcome.content_hash for outcome in outcomes}) == 24  # type: ignore[union-attr]
    assert 4 < most[0] <= store.reads_at_once


def _reader() -> PhotoReader:
    from searchengine.decode import DEFAULT_LIMITS

    return PhotoReader(
        known=set(),
        image_size=32,
        limits=DEFAULT_LIMITS,
        workers=2,
        ahead=4,
        isolated=False,
    )
