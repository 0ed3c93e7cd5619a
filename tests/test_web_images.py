"""Photos over HTTP: the file that was indexed and no other, small copies made once, what the index knows."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import shutil
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import painted
from hostile import SITECUSTOMIZE, children, large_png, needs_proc
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import Server, serving_index

from indexer import build
from indexer.tags import TaggingRequest, write_tags
from searchengine import open_index
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits, thumbnail
from searchengine.errors import ImageError, OverloadError
from searchengine.formats import EXTENSIONS
from searchengine.index.photos import ImageRow
from searchengine.isolation import IsolatedDecoder
from searchengine.models.registry import load_encoder
from searchengine.web.decoders import DecoderPool
from searchengine.web.originals import media_type_of
from searchengine.web.routes.images import _disposition, _range
from searchengine.web.thumbnails import SIZES_PX, Thumbnails, _listed, name_of, size_for

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.fixture(scope="module")
def decoders() -> Iterator[DecoderPool]:
    with closing(DecoderPool(limits=DEFAULT_LIMITS)) as pool:
        yield pool


@pytest.fixture
def thumbnails(tmp_path: Path, decoders: DecoderPool) -> Iterator[Thumbnails]:
    with closing(Thumbnails(folder=tmp_path / "thumbnails", decoders=decoders)) as made:
        yield made


def jpeg(seed: int, *, width: int = 600, height: int = 400) -> bytes:
    buffer = io.BytesIO()
    painted(seed, width=width, height=height).save(buffer, "JPEG")
    return buffer.getvalue()


# -- thumbnails in the isolated decoder ------------------------------------------------------------------------------


def test_a_thumbnail_keeps_its_shape_and_is_what_this_process_would_make(decoders: DecoderPool) -> None:
    for width, height, expected in ((600, 400, (160, 107)), (400, 600, (107, 160)), (60, 40, (60, 40))):
        pixels = decoders.thumbnail(jpeg(1, width=width, height=height), max_side_px=160)
        assert pixels.shape == (*reversed(expected), 3)
        here = thumbnail(jpeg(1, width=width, height=height), max_side_px=160)
        np.testing.assert_array_equal(pixels, np.asarray(here))


def test_a_thumbnail_is_upright(decoders: DecoderPool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    painted(1, width=300, height=200).save(buffer, "JPEG", exif=exif)
    assert decoders.thumbnail(buffer.getvalue(), max_side_px=150).shape == (150, 100, 3)


def test_nasty_files_give_a_thumbnail_or_the_reason_that_this_process_gives(decoders: DecoderPool, data: Path) -> None:
    files = [file for file in sorted((data / "nasty").rglob("*")) if file.suffix.lower() in EXTENSIONS]
    outcomes = {True: 0, False: 0}
    for file in [file for file in files if file.stat().st_size < 50_000][::25]:
        content = file.read_bytes()
        try:
            here = np.asarray(thumbnail(content, max_side_px=64))
        except ImageError as error:
            with pytest.raises(ImageError) as other:
                decoders.thumbnail(content, max_side_px=64)
            assert str(other.value) == str(error), file
            outcomes[False] += 1
        else:
            np.testing.assert_array_equal(decoders.thumbnail(content, max_side_px=64), here)
            outcomes[True] += 1
    assert min(outcomes.values()) > 3


def test_a_decompression_bomb_ends_its_process_and_no_other_photo() -> None:
    limits = DecodeLimits(max_memory_bytes=64 * 2**20)
    with closing(DecoderPool(limits=limits, size=1)) as pool:
        with pytest.raises(ImageError, match="64 MiB of memory"):
            pool.thumbnail(large_png(6_000), max_side_px=160)
        assert pool.thumbnail(jpeg(1), max_side_px=160).shape == (107, 160, 3)


@needs_proc
@pytest.mark.parametrize("width, height", [(161, 10), (10, 161), (0, 10), (-5, -5)])
def test_a_hijacked_decoder_cannot_give_other_pixels_than_were_asked_for(
    width: int, height: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = b'{"width":%d,"height":%d,"taken_at":null,"camera":null,"latitude":null,"longitude":null}' % (width, height)
    lie = (1).to_bytes(4, "big") + len(said).to_bytes(4, "big") + said + bytes(1000)
    before = children()
    with closing(IsolatedDecoder(limits=DecodeLimits(max_seconds=1))) as decoder:
        with pytest.raises(ImageError, match="answers nonsense"):
            decoder.thumbnail(b"LIE:" + lie, max_side_px=160)
        assert children() == before


def test_the_pool_decodes_two_photos_at_once_and_starts_no_more_processes_than_it_needs() -> None:
    with closing(DecoderPool(limits=DEFAULT_LIMITS)) as pool:
        before = len(children())
        for _ in range(3):
            pool.thumbnail(jpeg(1), max_side_px=160)
        assert len(children()) == before + 1
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda seed: pool.thumbnail(jpeg(seed), max_side_px=160), range(24)))
        assert len(children()) <= before + 2


# -- the cache of thumbnails -----------------------------------------------------------------------------------------


def row(key: str = "/photos/a.jpg", *, size_bytes: int = 10, mtime_ns: int = 5) -> ImageRow:
    return ImageRow(1, "local", key, size_bytes, mtime_ns, 60, 40, None, None, None, None, 1)


def test_a_thumbnail_is_made_once_even_if_many_ask_at_once(thumbnails: Thumbnails) -> None:
    reads = []
    go = threading.Event()

    def read() -> bytes:
        reads.append(1)
        go.wait(10)
        return jpeg(1)

    futures = [thumbnails.make("a.jpg", max_side_px=160, read=read) for _ in range(20)]
    go.set()
    made = {future.result(10) for future in futures}
    assert len(made) == len(reads) == 1
    assert thumbnails.cached("a.jpg") in made
    again = thumbnails.make("a.jpg", max_side_px=160, read=read).result(10)
    assert {again} == made
    assert len(reads) == 1
    assert Image.open(io.BytesIO(again)).size == (160, 107)


def test_the_cache_stays_within_its_limit_and_lets_go_what_was_used_longest_ago(
    tmp_path: Path, decoders: DecoderPool
) -> None:
    folder = tmp_path / "thumbnails"
    size = len(
        Thumbnails(folder=folder, decoders=decoders).make("0.jpg", max_side_px=160, read=lambda: jpeg(1)).result()
    )
    with closing(Thumbnails(folder=folder, decoders=decoders, max_bytes=4 * size + size // 2)) as small:
        for name in ("1.jpg", "2.jpg", "3.jpg"):
            small.make(name, max_side_px=160, read=lambda: jpeg(1)).result()
        assert small.cached("0.jpg")
        small.make("4.jpg", max_side_px=160, read=lambda: jpeg(1)).result()
    assert {file.name for file in folder.iterdir()} == {"0.jpg", "2.jpg", "3.jpg", "4.jpg"}
    assert folder.stat().st_mode & 0o077 == 0
    # Another process finds them, and what was used last.
    os.utime(folder / "2.jpg", (0, 0))
    with closing(Thumbnails(folder=folder, decoders=decoders, max_bytes=4 * size + size // 2)) as other:
        other.make("5.jpg", max_side_px=160, read=lambda: jpeg(1)).result()
    assert {file.name for file in folder.iterdir()} == {"0.jpg", "3.jpg", "4.jpg", "5.jpg"}


def test_without_a_folder_that_can_be_written_thumbnails_are_made_all_the_same(
    tmp_path: Path, decoders: DecoderPool
) -> None:
    (tmp_path / "file").touch()
    with closing(Thumbnails(folder=tmp_path / "file" / "thumbnails", decoders=decoders)) as none:
        for _ in range(2):
            assert none.make("a.jpg", max_side_px=160, read=lambda: jpeg(1)).result()


def test_a_failure_is_told_to_all_who_wait_and_tried_again_by_the_next(thumbnails: Thumbnails) -> None:
    with pytest.raises(ImageError):
        thumbnails.make("a.jpg", max_side_px=160, read=lambda: SVG).result()
    assert thumbnails.cached("a.jpg") is None
    assert thumbnails.make("a.jpg", max_side_px=160, read=lambda: jpeg(1)).result()


def test_beyond_the_bound_no_more_thumbnails_are_promised(
    thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchengine.web.thumbnails.MAX_WAITING", 3)
    go = threading.Event()

    def read() -> bytes:
        go.wait(10)
        return jpeg(1)

    futures = [thumbnails.make(f"{number}.jpg", max_side_px=160, read=read) for number in range(3)]
    with pytest.raises(OverloadError):
        thumbnails.make("one-more.jpg", max_side_px=160, read=read)
    go.set()
    assert all(future.result(10) for future in futures)


def test_to_promise_a_thumbnail_waits_for_no_disk(thumbnails: Thumbnails, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, go = threading.Event(), threading.Event()

    def slow(folder: Path) -> OrderedDict[str, int]:
        lists.set()
        assert go.wait(10)
        return _listed(folder)

    monkeypatch.setattr("searchengine.web.thumbnails._listed", slow)
    first = thumbnails.make("1.jpg", max_side_px=160, read=lambda: jpeg(1))
    assert lists.wait(10)
    with ThreadPoolExecutor(1) as asker:
        promised = asker.submit(thumbnails.make, "2.jpg", max_side_px=160, read=lambda: jpeg(2))
        try:
            second = promised.result(2)
        finally:
            go.set()
    assert first.result(10) and second.result(10)


def test_a_thumbnail_has_another_name_as_soon_as_the_index_knows_the_photo_as_another() -> None:
    rows = [row(), row("/photos/b.jpg"), row(size_bytes=11), row(mtime_ns=6), row("/photos/\udcff.jpg")]
    names = [name_of(each, max_side_px=size) for each in rows for size in SIZES_PX]
    assert len(set(names)) == len(names)
    assert [size_for(side) for side in (1, 160, 161, 1920, 99_999)] == [160, 160, 320, 1920, 1920]


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, expected",
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n\0\0", "image/png"),
        (b"RIFF\n\n\n\nWEBPVP8 ", "image/webp"),
        (b"\0\0\0\x1cftypavif", "image/avif"),
        (b"BM6\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0", "image/bmp"),
        (b"BM, said the page, <script>alert(1)</script>", None),
        (b"RIFF....WAVE", None),
        (SVG, None),
        (b"<!doctype html>", None),
        (b"#define x_width 8", None),
        (b"%PDF-1.7", None),
        (b"P6 1 1 255 ", None),
        (b"", None),
    ],
)
def test_only_raster_images_have_a_type_and_only_by_their_first_bytes(head: bytes, expected: str | None) -> None:
    assert media_type_of(head) == expected


@given(st.text(st.characters(codec=None), min_size=1) | st.binary(min_size=1).map(os.fsdecode))
def test_no_name_of_a_file_breaks_out_of_its_header(name: str) -> None:
    try:
        header = _disposition(f"/photos/{name}", is_shown=True)
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for c in name)  # no name that a file can have
        return
    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
    assert header.count(";") == 2
    saved_as = unquote(header.split("''")[1])
    assert saved_as.isprintable()
    assert not set('/\\"') & set(saved_as)


@given(st.integers(1, 100), st.integers(0, 120), st.integers(0, 120))
def test_a_range_is_the_part_that_it_says_of_what_there_is(size: int, first: int, last: int) -> None:
    whole = bytes(range(size))
    for text, expected in (
        (f"bytes={first}-", whole[first:]),
        (f"bytes={first}-{last}", whole[first : last + 1] if first <= last else whole),
        (f"bytes=-{last}", whole[-last:] if last else b""),
    ):
        try:
            start, end = _range(text, size_bytes=size) or (0, size)
        except Exception as error:
            assert getattr(error, "status_code", None) == 416
            assert expected == b""
        else:
            assert whole[start:end] == expected != b""


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    """Each test uses photos of its own, for some of them come to harm."""
    folder = home / "photos"
    for number, name in enumerate(NAMES):
        (folder / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / os.fsdecode(name)).write_bytes(jpeg(number, width=600 + number))
    painted(50, width=300).save(folder / "icon.tga")
    painted(51, width=300).save(folder / "picture.jpg", "PNG")
    (folder / "large.jpg").write_bytes(jpeg(52) + bytes(16 * 2**20))  # more than the network holds
    (folder / "link.jpg").symlink_to("sub/target.jpg")
    build(home / "index", [folder], encoder=load_encoder("mini"))
    with serving_index(home / "index", home=home) as running:
        yield running


NAMES = [
    b"plain.jpg",
    b"ranges.jpg",
    b"gone.jpg",
    b"changed.jpg",
    b"same-size.jpg",
    b"linked-out.jpg",
    b"linked-copy.jpg",
    b"linked-in.jpg",
    b"pipe.jpg",
    b"folder.jpg",
    b"html.jpg",
    b"touched.jpg",
    b"thumb.jpg",
    b"away.jpg",
    b"edited/photo.jpg",
    b"edited/removed.jpg",
    b"sub/target.jpg",
    b'a"b\\c\r\nSet-Cookie: x=1.jpg',
    b"\xff\xfe stray.jpg",
    "Zo\u00eb \u732b.jpg".encode(),
]


@pytest.fixture
def id_of(home: Path) -> Iterator[Callable[[str], int]]:
    with open_index(home / "index") as index:

        def find(name: str) -> int:
            row = index.image_by_key("local", str(home / "photos" / name))
            assert row is not None
            return row.id

        yield find


Find = Callable[[str], int]


def test_the_file_is_served_whole_with_its_type_a_strong_etag_and_its_time(
    server: Server, home: Path, id_of: Find
) -> None:
    content = (home / "photos" / "plain.jpg").read_bytes()
    answer = server.ask(f"/api/images/{id_of('plain.jpg')}")
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert parsedate_to_datetime(answer.headers["last-modified"]).timestamp() == pytest.approx(
        (home / "photos" / "plain.jpg").stat().st_mtime, abs=1
    )
    head = server.ask(f"/api/images/{id_of('plain.jpg')}", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers == {**answer.headers, "date": head.headers["date"]}


def test_what_the_client_has_is_not_sent_again(server: Server, id_of: Find) -> None:
    for target in (f"/api/images/{id_of('plain.jpg')}", f"/api/images/{id_of('plain.jpg')}/thumbnail?size=160"):
        etag = server.ask(target).headers["etag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            answer = server.ask(target, headers=[("If-None-Match", known)])
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
        assert server.ask(target, headers=[("If-None-Match", '"other"')]).status == 200


def test_a_range_is_206_with_just_these_bytes_and_one_beyond_the_end_416(
    server: Server, home: Path, id_of: Find
) -> None:
    content = (home / "photos" / "ranges.jpg").read_bytes()
    target = f"/api/images/{id_of('ranges.jpg')}"
    etag = server.ask(target).headers["etag"]
    for asked, expected in (("0-9", content[:10]), ("10-", content[10:]), ("-7", content[-7:])):
        answer = server.ask(target, headers=[("Range", f"bytes={asked}"), ("If-Range", etag)])
        assert (answer.status, answer.body) == (206, expected)
        start = content.index(expected)
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(content)}"
        assert answer.headers["content-length"] == str(len(expected))
    beyond = server.ask(target, headers=[("Range", f"bytes={len(content)}-")])
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert beyond.headers["content-type"] == "application/problem+json"
    changed = server.ask(target, headers=[("Range", "bytes=0-9"), ("If-Range", '"another"')])
    assert (changed.status, changed.body) == (200, content)


@needs_proc
def test_a_file_is_closed_when_its_client_goes_away(server: Server, home: Path, id_of: Find) -> None:
    large = str(home / "photos" / "large.jpg")

    def is_open() -> bool:
        links = []
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                links.append(os.readlink(entry.path))
        return large in links

    gc.disable()
    try:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(
                    f"GET /api/images/{id_of('large.jpg')} HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode()
                )
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
                assert is_open()
        deadline = time.monotonic() + 5
        while is_open():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        gc.enable()


def test_an_id_that_the_index_does_not_have_is_404(server: Server) -> None:
    for part in ("", "/thumbnail", "/details"):
        answer = server.ask(f"/api/images/999999{part}")
        assert answer.status == 404
        assert answer.json["detail"].startswith("the index has no photo with id 999999")


def test_a_file_that_is_gone_is_404_and_its_thumbnail_lives_on(server: Server, home: Path, id_of: Find) -> None:
    target = f"/api/images/{id_of('gone.jpg')}"
    thumb = server.ask(f"{target}/thumbnail?size=160")
    (home / "photos" / "gone.jpg").unlink()
    answer = server.ask(target)
    assert answer.status == 404
    assert "mount its disk" in answer.json["detail"]
    assert server.ask(f"{target}/thumbnail?size=160").body == thumb.body
    assert server.ask(f"{target}/thumbnail?size=320").status == 404


def test_a_file_whose_content_has_changed_is_409_even_under_the_same_size_and_time(
    server: Server, home: Path, id_of: Find
) -> None:
    photos = home / "photos"
    (photos / "changed.jpg").write_bytes(jpeg(99))
    same = photos / "same-size.jpg"
    before = same.stat()
    assert server.ask(f"/api/images/{id_of('same-size.jpg')}").status == 200
    content = bytearray(same.read_bytes())
    content[-10] ^= 1
    same.write_bytes(content)
    os.utime(same, ns=(before.st_mtime_ns, before.st_mtime_ns))
    for name in ("changed.jpg", "same-size.jpg"):
        for part in ("", "/thumbnail"):
            answer = server.ask(f"/api/images/{id_of(name)}{part}")
            assert (answer.status, answer.headers["content-type"]) == (409, "application/problem+json")
            assert "changed since it was indexed" in answer.json["detail"]


def test_a_file_that_was_only_touched_is_still_the_photo(server: Server, home: Path, id_of: Find) -> None:
    os.utime(home / "photos" / "touched.jpg", (1e9, 1e9))
    assert server.ask(f"/api/images/{id_of('touched.jpg')}").status == 200


def test_a_link_in_the_place_of_a_photo_leads_nowhere(server: Server, home: Path, id_of: Find) -> None:
    photos = home / "photos"
    secret = home / "secret"
    secret.write_bytes(b"x" * (photos / "linked-out.jpg").stat().st_size)
    os.utime(secret, ns=(0, (photos / "linked-out.jpg").stat().st_mtime_ns))
    shutil.copy2(photos / "linked-copy.jpg", home / "copy-outside.jpg")
    for name, target in (
        ("linked-out.jpg", secret),
        ("linked-copy.jpg", home / "copy-outside.jpg"),  # the right content, but no photo of the index
        ("linked-in.jpg", photos / "plain.jpg"),  # a photo of the index, but another
    ):
        (photos / name).unlink()
        (photos / name).symlink_to(target)
        for part in ("", "/thumbnail"):
            assert server.ask(f"/api/images/{id_of(name)}{part}").status == 409


def test_a_link_that_was_indexed_and_leads_to_a_photo_of_the_index_is_served(server: Server, id_of: Find) -> None:
    target = server.ask(f"/api/images/{id_of('sub/target.jpg')}")
    assert server.ask(f"/api/images/{id_of('link.jpg')}").body == target.body != b""


def test_pipes_folders_and_code_in_the_place_of_a_photo_are_not_served(server: Server, home: Path, id_of: Find) -> None:
    photos = home / "photos"
    size = (photos / "html.jpg").stat().st_size
    for name in ("pipe.jpg", "folder.jpg", "html.jpg"):
        (photos / name).unlink()
    os.mkfifo(photos / "pipe.jpg")
    (photos / "folder.jpg").mkdir()
    (photos / "html.jpg").write_bytes(SVG.ljust(size))
    for name in ("pipe.jpg", "folder.jpg", "html.jpg"):
        for part in ("", "/thumbnail"):
            answer = server.ask(f"/api/images/{id_of(name)}{part}")
            assert answer.status in (404, 409)
            assert b"script" not in answer.body


def test_the_content_tells_the_type_and_what_browsers_do_not_know_is_a_download(server: Server, id_of: Find) -> None:
    assert server.ask(f"/api/images/{id_of('picture.jpg')}").headers["content-type"] == "image/png"
    tga = server.ask(f"/api/images/{id_of('icon.tga')}")
    assert tga.headers["content-type"] == "application/octet-stream"
    assert tga.headers["content-disposition"].startswith("attachment;")
    assert "sandbox" in tga.headers["content-security-policy"]


def test_names_with_newlines_quotes_and_stray_bytes_stay_inside_their_header(server: Server, id_of: Find) -> None:
    for name in NAMES[-3:]:
        image_id = id_of(os.fsdecode(name))
        answer = server.ask(f"/api/images/{image_id}")
        assert answer.status == 200
        assert "set-cookie" not in answer.headers
        assert answer.headers["content-disposition"].startswith('inline; filename="')
        details = server.ask(f"/api/images/{image_id}/details").json
        assert os.path.basename(details["path"]) == os.path.basename(os.fsdecode(name))
    assert server.ask(f"/api/images/{id_of(NAMES[-1].decode())}").headers["content-disposition"] == (
        "inline; filename=\"Zo_ _.jpg\"; filename*=UTF-8''Zo%C3%AB%20%E7%8C%AB.jpg"
    )


def test_thumbnails_have_the_next_larger_size_and_say_how_long_they_hold(server: Server, id_of: Find) -> None:
    target = f"/api/images/{id_of('thumb.jpg')}/thumbnail"
    for asked, side in (("", 320), ("?size=1", 160), ("?size=161", 320), ("?size=5000", 612)):
        answer = server.ask(f"{target}{asked}")
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        assert max(Image.open(io.BytesIO(answer.body)).size) == side
        assert answer.headers["cache-control"].startswith("private, max-age=600")
    for asked in ("?size=0", "?size=-1", "?size=x", "?size=1e9", f"?size={10**30}"):
        assert server.ask(f"{target}{asked}").status == 422


def test_many_clients_get_many_thumbnails(server: Server, id_of: Find) -> None:
    targets = [f"/api/images/{id_of('away.jpg')}/thumbnail?size={size}" for size in SIZES_PX] * 8
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(server.ask, targets))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) <= len(SIZES_PX)


def test_what_is_indexed_anew_shows_at_once_and_what_left_the_index_is_gone(
    server: Server, home: Path, id_of: Find
) -> None:
    image_id = id_of("edited/photo.jpg")
    before = server.ask(f"/api/images/{image_id}/thumbnail")
    removed = f"/api/images/{id_of('edited/removed.jpg')}"
    assert server.ask(f"{removed}/thumbnail").status == 200
    os.rename(home / "photos" / "edited" / "removed.jpg", home / "elsewhere.jpg")
    (home / "photos" / "edited/photo.jpg").write_bytes(jpeg(77, width=900))
    build(home / "index", [home / "photos" / "edited"], encoder=load_encoder("mini"))
    assert id_of("edited/photo.jpg") == image_id
    after = server.ask(f"/api/images/{image_id}/thumbnail", headers=[("If-None-Match", before.headers["etag"])])
    assert after.status == 200
    assert after.headers["etag"] != before.headers["etag"]
    assert after.body != before.body
    (home / "photos" / "edited" / "removed.jpg").symlink_to(home / "elsewhere.jpg")
    assert {server.ask(f"{removed}{part}").status for part in ("", "/thumbnail", "/details")} == {404}


def test_details_are_what_the_index_knows(server: Server, home: Path, id_of: Find) -> None:
    path = home / "photos" / "plain.jpg"
    answer = server.ask(f"/api/images/{id_of('plain.jpg')}/details").json
    assert answer == {
        "id": id_of("plain.jpg"),
        "store": "local",
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "mtime": datetime.fromtimestamp(path.stat().st_mtime, tz=UTC).isoformat(timespec="seconds"),
        "width": 600,
        "height": 400,
        "taken_at": None,
        "latitude": None,
        "longitude": None,
        "camera": None,
        "tags": [],
    }
    wanted = TaggingRequest(labels=["stripes", "blocks"], templates=["{}"], top=2, min_probability=0)
    write_tags(home / "index", wanted, encoder=load_encoder("mini"))
    assert server.ask(f"/api/images/{id_of('plain.jpg')}/details").json["tags"] == ["blocks", "stripes"]
