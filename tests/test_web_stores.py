"""Photos that are not files of this machine (in archives, on other servers): shown by the service and the commands."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import Cli
from PIL import Image
from serving import Server, serving_index
from test_archives import packed
from test_web_images import jpeg
from web_files import WebFiles, web_files

import searchengine.web.originals
from indexer.pipeline import build
from searchengine import load_encoder, open_index
from searchengine.cli.page import render_page
from searchengine.cli.sheet import draw_sheet
from searchengine.hits import Hit
from searchengine.stores import retry

Find = Callable[[str], int]
TOKEN = "a-token-of-the-service-0123456789"
HEADERS = [("Authorization", f"Bearer {TOKEN}")]

ZIPPED = ("plain", "ranges", "changed", "gone", "thumb")
ON_THE_WEB = ("plain", "kept", "away", "same-size", *(f"slow{number}" for number in range(8)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def web() -> Iterator[WebFiles]:
    with pytest.MonkeyPatch.context() as patch, web_files() as server:
        patch.setattr(retry, "FIRST_WAIT_SECONDS", 0.005)
        yield server


@pytest.fixture(scope="module")
def library(home: Path, web: WebFiles) -> Path:
    """The index of a zip, a tar, a list of URLs, and a folder that holds a copy of a photo in the zip."""
    packed(home / "box.zip", {f"in/{name}.jpg": jpeg(number) for number, name in enumerate(ZIPPED)})
    packed(home / "box.tar", {"tarred.jpg": jpeg(20)})
    urls = [web.put(f"{name}.jpg?v=1", jpeg(30 + number)) for number, name in enumerate(ON_THE_WEB)]
    (home / "urls.txt").write_text("\n".join(urls))
    (home / "folder").mkdir()
    (home / "folder" / "copy.jpg").write_bytes(jpeg(0))
    (home / "folder" / "copy2.jpg").write_bytes(jpeg(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "XDG_CACHE_HOME"))
        places = [home / name for name in ("box.zip", "box.tar", "urls.txt", "folder")]
        report = build(home / "index", places, encoder=load_encoder("mini"), isolated=False)
    assert (report.failed, report.unlistable) == (0, 0)
    return home / "index"


@pytest.fixture(scope="module")
def server(library: Path, home: Path) -> Iterator[Server]:
    with serving_index(library, home=home, token=TOKEN) as running:
        yield running


@pytest.fixture
def id_of(library: Path, home: Path, web: WebFiles) -> Iterator[Find]:
    with open_index(library) as index:

        def find(name: str) -> int:
            stores = {
                "zip": ("zip", f"{home}/box.zip!/in/{name}"),
                "tar": ("tar", f"{home}/box.tar!/{name}"),
                "web": (f"manifest:{home}/urls.txt", f"{web.address}/{name}?v=1"),
                "folder": ("local", f"{home}/folder/{name}"),
            }
            kind, _, name = name.partition(":")
            store, key = {k: (s, key.replace(f"{kind}:", "")) for k, (s, key) in stores.items()}[kind]
            row = index.image_by_key(store, key)
            assert row is not None, key
            return row.id

        yield find


# -- the service -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), [("zip:plain.jpg", 0), ("tar:tarred.jpg", 20), ("web:plain.jpg", 30)])
def test_a_photo_in_any_store_is_served_as_a_file_is(name: str, seed: int, server: Server, id_of: Find) -> None:
    content = jpeg(seed)
    target = f"/api/images/{id_of(name)}"
    answer = server.ask(target, headers=HEADERS)
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert answer.headers["content-length"] == str(len(content))
    assert ("last-modified" in answer.headers) == name.startswith("zip")  # the others tell no time
    assert answer.headers["content-disposition"].startswith("inline; filename=")
    assert "location" not in answer.headers
    part = server.ask(target, headers=[*HEADERS, ("Range", "bytes=5-14")])
    assert (part.status, part.body) == (206, content[5:15])
    assert part.headers["content-range"] == f"bytes 5-14/{len(content)}"
    known = server.ask(target, headers=[*HEADERS, ("If-None-Match", answer.headers["etag"])])
    assert (known.status, known.body) == (304, b"")
    head = server.ask(target, method="HEAD", headers=HEADERS)
    assert (head.status, head.body) == (200, b"")
    assert head.headers == {**answer.headers, "date": head.headers["date"]}
    beyond = server.ask(target, headers=[*HEADERS, ("Range", f"bytes={len(content)}-")])
    assert beyond.status == 416
    small = server.ask(f"{target}/thumbnail?size=160", headers=HEADERS)
    assert small.status == 200
    assert Image.open(io.BytesIO(small.body)).size == (160, 107)
    details = server.ask(f"{target}/details", headers=HEADERS).json
    assert (details["width"], details["height"], details["size_bytes"]) == (600, 400, len(content))


def test_without_the_token_nothing_of_any_store_is_shown(server: Server, id_of: Find) -> None:
    for name in ("zip:plain.jpg", "web:plain.jpg"):
        for target in (f"/api/images/{id_of(name)}", f"/api/images/{id_of(name)}/thumbnail"):
            assert server.ask(target).status == 401


def test_a_store_is_asked_by_the_service_and_learns_nothing_of_its_clients(
    server: Server, id_of: Find, web: WebFiles
) -> None:
    """No redirect, so no client asks the store itself; what was read is kept for who asks again, and for its parts."""
    target = f"/api/images/{id_of('web:kept.jpg')}"
    web.asked.clear()
    web.headers.clear()
    secrets = [("Cookie", "session=private"), ("Referer", "http://private/"), ("X-Private", "private")]
    assert server.ask(target, headers=[*HEADERS, *secrets]).status == 200
    reads = [path for method, path in web.asked if method == "GET"]
    assert set(reads) == {"/kept.jpg?v=1"}
    for _ in range(3):
        assert server.ask(target, headers=[*HEADERS, ("Range", "bytes=0-9")]).status == 206
    assert [path for method, path in web.asked if method == "GET"] == reads
    assert not any("private" in str(headers) or TOKEN in str(headers) for headers in web.headers)


def test_a_photo_that_is_another_now_is_409_and_one_that_is_away_404_while_its_thumbnail_lives_on(
    server: Server, id_of: Find, web: WebFiles, home: Path
) -> None:
    assert server.ask(f"/api/images/{id_of('zip:thumb.jpg')}/thumbnail?size=160", headers=HEADERS).status == 200
    members = {f"in/{name}.jpg": jpeg(number) for number, name in enumerate(ZIPPED) if name not in ("gone", "thumb")}
    packed(home / "box.zip", members | {"in/changed.jpg": jpeg(99)})
    web.statuses["/away.jpg?v=1"] = 403
    same_size = bytearray(web.files["/same-size.jpg?v=1"])
    same_size[-10] ^= 1
    web.put("same-size.jpg?v=1", bytes(same_size))
    expected = {"zip:changed.jpg": 409, "web:same-size.jpg": 409, "zip:gone.jpg": 404, "web:away.jpg": 404}
    for name, status in expected.items():
        answer = server.ask(f"/api/images/{id_of(name)}", headers=HEADERS)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert web.address not in answer.body.decode()
        assert server.ask(f"/api/images/{id_of(name)}/thumbnail?size=160", headers=HEADERS).status == status
    assert server.ask(f"/api/images/{id_of('zip:thumb.jpg')}/thumbnail?size=160", headers=HEADERS).status == 200
    # What is not changed in the archive is shown as before.
    assert server.ask(f"/api/images/{id_of('zip:ranges.jpg')}", headers=HEADERS).body == jpeg(1)


def test_a_store_that_does_not_answer_holds_up_nothing_else(server: Server, id_of: Find, web: WebFiles) -> None:
    slow = [id_of(f"web:slow{number}.jpg") for number in range(8)]
    web.meeting = meeting = threading.Barrier(9)
    with ThreadPoolExecutor(8) as pool:
        try:
            answers = [pool.submit(server.ask, f"/api/images/{number}", headers=HEADERS) for number in slow]
            assert server.ask("/api/search?q=colours&k=3", headers=HEADERS).status == 200
            assert server.ask(f"/api/images/{id_of('folder:copy.jpg')}", headers=HEADERS).status == 200
            assert not any(answer.done() for answer in answers)
            meeting.wait(timeout=30)
        finally:
            web.meeting = None
            meeting.abort()
        assert {answer.result(timeout=30).status for answer in answers} == {200}


def test_beyond_the_bound_who_asks_for_a_photo_far_away_is_told_to_come_back(
    server: Server, id_of: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searchengine.web.originals, "MAX_WAITING", 0)
    answer = server.ask(f"/api/images/{id_of('zip:plain.jpg')}", headers=HEADERS)
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    assert server.ask(f"/api/images/{id_of('folder:copy.jpg')}", headers=HEADERS).status == 200


def test_under_in_the_api_takes_archives_and_urls(server: Server, home: Path, web: WebFiles) -> None:
    def found(under: str) -> set[str]:
        answer = server.ask(f"/api/search?q=colours&k=50&under={under}", headers=HEADERS)
        return {hit["path"] for hit in answer.json["hits"]}

    assert found(f"{home}/box.zip") == {f"{home}/box.zip!/in/{name}.jpg" for name in ZIPPED}
    assert found(f"{home}/box.tar") == {f"{home}/box.tar!/tarred.jpg"}
    assert found(web.address) == {f"{web.address}/{name}.jpg?v=1" for name in ON_THE_WEB}
    assert found("s3://nothing/here") == set()


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(cli: Cli, library: Path, home: Path, own_home: None, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(library))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "XDG_CACHE_HOME"))
    return cli


def test_sheet_page_and_preview_show_photos_of_every_store(
    command: Cli, tmp_path: Path, home: Path, web: WebFiles
) -> None:
    hits = [
        Hit(rank=rank, score=0.9, relevance=0.9, id=rank, store=store, path=path, taken_at=None, width=600, height=400)
        for rank, (store, path) in enumerate(
            [
                ("zip", f"{home}/box.zip!/in/plain.jpg"),
                ("tar", f"{home}/box.tar!/tarred.jpg"),
                (f"manifest:{home}/urls.txt", f"{web.address}/plain.jpg?v=1"),
                ("local", f"{home}/folder/copy.jpg"),
                ("zip", f"{home}/box.zip!/none.jpg"),
            ],
            start=1,
        )
    ]
    page = render_page(hits, title="t", match=0.5)
    assert page.count('src="data:image/jpeg') == 4
    assert page.count("not readable now") == 1
    assert page.count("href=") == page.count(f'href="file://{home}/folder/copy.jpg"') == 1
    sheet = draw_sheet(hits, title="t", match=0.5)
    alone = draw_sheet(hits[-1:], title="t", match=0.5)
    assert len(set(sheet.get_flattened_data())) > len(set(alone.get_flattened_data()))
    outcome = command("search", "colours", "--under", home / "box.tar", "--preview", "--threshold", "none")
    assert outcome.code == 0
    assert "▀" in outcome.out


def test_a_picture_in_an_archive_or_at_a_url_is_a_query(
    command: Cli, home: Path, web: WebFiles, tmp_path: Path
) -> None:
    def best(*arguments: str) -> str:
        outcome = command(*arguments, "--json", "-k", "1")
        assert outcome.code == 0, outcome.err
        return str(json.loads(outcome.out.splitlines()[0])["path"])

    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(20))).save(buffer, "JPEG", quality=50)
    again = buffer.getvalue()  # of another content, so its vector is computed
    other = web.put("new.jpg", again)
    assert best("search", f"{packed(tmp_path / 'new.zip', {'x.jpg': again})}!/x.jpg") == f"{home}/box.tar!/tarred.jpg"
    assert best("search", other) == f"{home}/box.tar!/tarred.jpg"
    assert best("search", "a", "--like", other, "--not", "b") == f"{home}/box.tar!/tarred.jpg"
    # What is indexed does not return itself.
    assert best("similar", f"{home}/box.tar!/tarred.jpg") != f"{home}/box.tar!/tarred.jpg"
    outcome = command("similar", f"{home}/box.zip!/none.jpg")
    assert outcome.code == 2
    assert "cannot be a query: cannot be read" in outcome.err
    assert command("similar", f"{web.address}/none.jpg").code == 2


def test_classify_takes_photos_of_every_store(command: Cli, home: Path, web: WebFiles) -> None:
    images = [f"{home}/box.zip!/in/plain.jpg", f"{home}/box.tar!/tarred.jpg", f"{web.address}/plain.jpg?v=1"]
    outcome = command("classify", *images, "--labels", "red,blue", "--json")
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["path"] for line in outcome.out.splitlines()] == images


def test_only_files_on_disk_are_printed_as_copies_for_scripts(command: Cli, home: Path) -> None:
    outcome = command("duplicates", "--exact", "-0")
    printed = set(filter(None, outcome.out.split("\0")))
    everything = {f"{home}/folder/copy.jpg", f"{home}/folder/copy2.jpg"}
    # The best of the group is the oldest: the photo in the archive is, or else is left out.
    assert printed
    assert printed <= everything
    assert "box.zip" not in outcome.out


def test_without_its_archive_no_copy_of_a_photo_is_printed_where_the_best_is_in_it(
    command: Cli, tmp_path: Path, own_home: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = packed(tmp_path / "a.zip", {"a.jpg": jpeg(1)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jpg").write_bytes(jpeg(1))
    build(tmp_path / "index", [place, tmp_path / "folder"], encoder=load_encoder("mini"), isolated=False)
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(tmp_path / "index"))
    os.utime(tmp_path / "folder" / "b.jpg")
    build(tmp_path / "index", [place, tmp_path / "folder"], encoder=load_encoder("mini"), isolated=False)
    assert command("duplicates", "--exact", "-0").out == f"{tmp_path}/folder/b.jpg\0"
    place.unlink()
    outcome = command("duplicates", "--exact", "-0")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no longer as it was indexed" in outcome.err
