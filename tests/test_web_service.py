"""The service as such: always current, never at a loss while its index changes, bounded, and ended with grace."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st
from serving import Server, opened_service, serving

import indexer
import searchengine.web.opened
from indexer.compact import compact
from indexer.reencode import reencode
from searchengine import Searcher, open_index
from searchengine.errors import ImageError, IndexNotFound, QueryError
from searchengine.models.registry import load_encoder
from searchengine.settings import load_settings
from searchengine.vectors import FloatMatrix
from searchengine.web.app import create_app
from searchengine.web.batching import MAX_BATCH_TEXTS, TextBatcher
from searchengine.web.caches import BoundedCache
from searchengine.web.metrics import Metrics
from searchengine.web.opened import Opened
from searchengine.web.requests import Question
from searchengine.web.security import Access
from searchengine.web.service import THREADS, Service
from searchengine.web.uploads import UploadedImage

ROOT = Path(__file__).parent.parent


class Old(FakeEncoder):
    """Notes what it is asked for, and answers no earlier than its `gate` is open."""

    def __init__(self, *, name: str = "old", dim: int = 16) -> None:
        super().__init__(name=name, dim=dim)
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        self.calls.append(list(texts))
        assert self.gate.wait(10)
        if any("too long" in text for text in texts):
            raise QueryError("a text is too long")
        return super().encode_texts(texts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The gate is closed from here on, and opened in the end if it was not before."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


class New(Old):
    def __init__(self) -> None:
        super().__init__(name="new", dim=24)


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Old]:
    known = {"old": Old(), "new": New()}
    monkeypatch.setattr(searchengine.web.opened, "load_encoder", lambda name, **_: known[name])
    return known


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """`photos`, and their `index` by `Old`, in three segments."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        painted(number).save(tmp_path / "photos" / f"{number:02}.png")
        if number % 4 == 3:
            index(tmp_path)
    return tmp_path


def index(library: Path, encoder: FakeEncoder | None = None) -> None:
    indexer.build(library / "index", [library / "photos"], encoder=encoder or Old(), isolated=False)


@pytest.fixture
def service(library: Path, encoders: dict[str, Old]) -> Iterator[Service]:
    with opened_service(library / "index", home=library) as opened:
        yield opened


@pytest.fixture
def server(service: Service) -> Iterator[Server]:
    with serving(create_app(service, Access())) as server:
        yield server


def find(server: Server, text: str, *, more: str = "") -> list[str]:
    """The names of the photos that are found."""
    answer = server.ask(f"/api/search?q={quote(text)}&k=1000{more}")
    assert answer.status == 200, answer.body
    return [Path(hit["path"]).name for hit in answer.json["hits"]]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- always current


def test_a_commit_is_seen_by_the_next_request(server: Server, library: Path) -> None:
    assert len(find(server, "a dog")) == 12
    painted(99).save(library / "photos" / "new.png")
    (library / "photos" / "00.png").unlink()
    index(library)
    found = find(server, "a dog")
    assert len(found) == 12
    assert "new.png" in found and "00.png" not in found


def test_a_scroll_goes_on_where_it_was_though_photos_come_meanwhile(server: Server, library: Path) -> None:
    before = find(server, "a dog")
    first = server.ask("/api/search?q=a+dog&k=5").json
    for number in range(100, 110):
        painted(number).save(library / "photos" / f"{number}.png")
    index(library)
    assert len(find(server, "a dog")) == 22
    rest = find(server, "a dog", more=f"&cursor={first['cursor']}")
    assert [Path(hit["path"]).name for hit in first["hits"]] + rest == before


def test_no_request_fails_nor_is_wrong_while_the_index_is_compacted_and_its_model_changed(
    server: Server, library: Path, encoders: dict[str, Old]
) -> None:
    names = {file.name for file in (library / "photos").iterdir()}
    stop = threading.Event()
    asked = [0]

    def ask(thread: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            target = (
                f"/api/images/{1 + number % 12}/similar?k=20" if thread == 0 else f"/api/search?q={thread}+{number}"
            )
            answer = server.ask(target)
            assert answer.status == 200, answer.body
            hits = answer.json["hits"]
            assert len(hits) == 12 - (thread == 0)
            assert {Path(hit["path"]).name for hit in hits} <= names
            asked[0] += 1

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, thread) for thread in range(3)]
        try:
            for change in range(3):
                compact(library / "index", kind="flat")
                encoder = New() if change % 2 == 0 else Old()
                assert reencode(library / "index", encoder=encoder, isolated=False).swapped
                done = asked[0]
                eventually(lambda done=done: asked[0] > done + 6 or any(one.done() for one in asking))  # type: ignore[misc]
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert encoders["new"].calls, "the new encoder has answered"
    with open_index(library / "index") as opened:
        expected = [Path(hit.path).name for hit in Searcher(opened, New()).search("a last one", k=20)]
    assert find(server, "a last one") == expected


def test_a_state_of_the_index_is_that_of_one_reader_and_one_commit(service: Service, library: Path) -> None:
    opened = service._current()
    before = opened.state()
    assert opened.state() == before
    again = Opened(service.settings, metrics=Metrics(), decoders=service.decoders)
    assert again.state() != before
    again.retire()
    painted(99).save(library / "photos" / "new.png")
    index(library)
    assert opened.state() != before


def test_a_broken_index_is_told_with_the_remedy_and_used_again_once_it_is_mended(
    server: Server, service: Service, library: Path
) -> None:
    find(server, "a dog")
    (library / "index").rename(library / "away")
    for target in ("/api/search?q=a+dog", "/api/search?q=another", "/api/images/1/similar", "/api/status"):
        answer = server.ask(target)
        assert answer.status == 503
        assert answer.json["type"] == "urn:searchengine:problem:IndexFormatError"
        assert "restore it" in answer.json["detail"]
    assert server.ask("/healthz").status == 200
    eventually(lambda: server.ask("/readyz").status == 503)
    (library / "away").rename(library / "index")
    assert len(find(server, "a dog")) == 12
    eventually(lambda: server.ask("/readyz").status == 200)


def test_another_index_in_its_place_is_opened_with_its_own_encoder(server: Server, library: Path) -> None:
    find(server, "a dog")
    shutil.rmtree(library / "index")
    painted(99).save(library / "photos" / "new.png")
    index(library, New())
    assert len(find(server, "a dog")) == 13


def test_a_mistake_of_the_program_tells_nothing_of_its_inside(
    server: Server, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/a/secret/path")

    monkeypatch.setattr(service._pager, "page", fail)
    answer = server.ask("/api/search?q=a+dog")
    assert answer.status == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert b"secret" not in answer.body and b"RuntimeError" not in answer.body
    assert answer.headers["x-content-type-options"] == "nosniff"


# -- batches, memory, limits


def test_texts_asked_for_meanwhile_share_one_call_of_the_encoder(server: Server, encoders: dict[str, Old]) -> None:
    encoder = encoders["old"]
    find(server, "before")
    encoder.calls.clear()
    with ThreadPoolExecutor(25) as pool, encoder.held():
        first = pool.submit(find, server, "the first")
        eventually(lambda: len(encoder.calls) == 1)
        others = [pool.submit(find, server, f"text {number % 20}") for number in range(23)]
        bad = pool.submit(server.ask, "/api/search?q=too+long")
        eventually(lambda: b"searchengine_queue_depth 22.0" in server.ask("/metrics").body)
        time.sleep(0.2)  # for those that have left the queue to reach the encoder
        encoder.gate.set()
        for found in (first, *others):
            assert len(found.result()) == 12
        assert bad.result().status == 400
    batches = [len(call) for call in encoder.calls]
    assert batches[0] == 1
    assert max(batches) == MAX_BATCH_TEXTS
    good = [text for call in encoder.calls for text in call if not any("too long" in one for one in call)]
    assert len(batches) <= 3 + MAX_BATCH_TEXTS, "two batches, and one text at a time of that with the bad one"
    assert len(good) == len(set(good)), "nothing twice"


def test_a_question_that_is_being_answered_is_not_looked_for_twice(
    server: Server, service: Service, encoders: dict[str, Old], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[object] = []
    page = service._pager.page
    monkeypatch.setattr(service._pager, "page", lambda *a, **o: (pages.append(a), page(*a, **o))[1])
    with ThreadPoolExecutor(8) as pool, encoders["old"].held():
        asked = [pool.submit(find, server, "the same") for _ in range(8)]
        eventually(lambda: len(pages) == 1)
        time.sleep(0.1)
        encoders["old"].gate.set()
        assert len({tuple(one.result()) for one in asked}) == 1
    assert find(server, "the same")
    assert len(pages) == 1


def test_beyond_the_queue_requests_are_refused_at_once_and_told_when_to_come_back(
    library: Path, encoders: dict[str, Old], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchengine.web.service.MAX_PENDING", 3)
    with opened_service(library / "index", home=library) as service, serving(create_app(service, Access())) as server:
        known = find(server, "known")
        with ThreadPoolExecutor(3) as pool, encoders["old"].held():
            waiting = [pool.submit(find, server, f"text {number}") for number in range(3)]
            eventually(lambda: service.metrics.registry.get_sample_value("searchengine_queue_depth") == 3)
            refused = server.ask("/api/search?q=one+more")
            assert refused.status == 429
            assert refused.json["type"] == "urn:searchengine:problem:OverloadError"
            assert int(refused.headers["retry-after"]) >= 1
            assert find(server, "known") == known, "it is known"
            assert server.ask("/healthz").status == server.ask("/readyz").status == 200
            encoders["old"].gate.set()
            assert all(len(one.result()) == 12 for one in waiting)
        assert find(server, "one more")
        assert service.metrics.registry.get_sample_value("searchengine_overloads_total") == 1


def test_pictures_that_take_long_hold_up_no_texts(
    server: Server, encoders: dict[str, Old], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go = threading.Semaphore(0), threading.Event()

    def slow(images: Sequence[UploadedImage], **_: Any) -> None:
        decoding.release()
        assert go.wait(20)
        raise ImageError(f"{images[0].name}: it is damaged")

    monkeypatch.setattr("searchengine.web.opened.crops_of", slow)

    def send(number: int) -> int:
        part = f'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n{number}\r\n'
        labels = 'Content-Disposition: form-data; name="labels"\r\n\r\na cat\r\n--b--\r\n'
        target, rest = ("search", "--b--\r\n") if number % 2 else ("classify", f"--b\r\n{labels}")
        headers = [("Content-Type", "multipart/form-data; boundary=b")]
        return server.ask(f"/api/{target}", method="POST", headers=headers, body=(part + rest).encode()).status

    with ThreadPoolExecutor(THREADS + 11) as pool:
        try:
            sent = [pool.submit(send, number) for number in range(THREADS + 10)]
            assert decoding.acquire(timeout=10)
            time.sleep(0.5)
            assert len(pool.submit(find, server, "a dog").result(5)) == 12
        finally:
            go.set()
        assert {one.result() for one in sent} == {422}


@given(sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_a_cache_never_holds_more_than_it_may_and_forgets_the_least_lately_used(sizes: list[tuple[int, int]]) -> None:
    cache: BoundedCache[int, int] = BoundedCache(max_bytes=100)
    known: dict[int, int] = {}
    for key, size in sizes:
        cache.put(key, size, size_bytes=size)
        known.pop(key, None)
        known[key] = size
        while sum(known.values()) > 100:
            del known[next(iter(known))]
        assert cache.size_bytes == sum(known.values()) <= 100
        assert [cache.get(key) for key in known] == list(known.values())
        assert len(cache) == len(known)


def test_long_questions_that_find_nothing_count_as_what_they_take(service: Service) -> None:
    long = ("x" * 10_000,) * 32
    kept = [
        asyncio.run(
            service.answer(Question(q=str(number), unwanted=long, conditions=(("camera", "none"),)), k=1, cursor=None)
        )
        for number in range(3)
    ]
    assert all(json.loads(one)["hits"] == [] for one in kept)
    for cache in (service._answers, service._pager._rankings):
        assert len(cache) * 320_000 <= cache.size_bytes


@given(
    rounds=st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "too long"]), min_size=1, max_size=4), min_size=1, max_size=6
    )
)
def test_batches_give_each_what_it_asked_for(rounds: list[list[str]]) -> None:
    encoder = Old()
    batcher = TextBatcher(encoder.encode_texts, metrics=Metrics())
    with ThreadPoolExecutor(6) as pool:
        for texts, answer in [(texts, pool.submit(batcher, texts)) for texts in rounds]:
            if "too long" in texts:
                with pytest.raises(QueryError):
                    answer.result()
            else:
                np.testing.assert_array_equal(answer.result(), FakeEncoder().encode_texts(texts))


def test_a_vector_that_is_remembered_keeps_none_that_was_encoded_with_it() -> None:
    batcher = TextBatcher(Old().encode_texts, metrics=Metrics())
    batcher(["a", "b", "c"])
    vector = batcher._known.get("b")
    assert vector is not None and vector.base is None


def test_an_index_that_is_not_there_is_told_when_the_service_opens(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFound):
        Service(load_settings({"index": str(tmp_path / "none")})).open()


def test_a_service_that_is_closed_waits_for_no_picture_and_begins_nothing(
    library: Path, encoders: dict[str, Old], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchengine.web.service.THREADS", 1)
    picture = (library / "photos" / "00.png").read_bytes()
    begun: list[str] = []
    with opened_service(library / "index", home=library) as service, ThreadPoolExecutor(1) as pool:
        service.decoders.thumbnail(picture, max_side_px=10)
        child = service.decoders._decoders[0]._child
        assert child
        os.kill(child._process.pid, signal.SIGSTOP)  # as if the picture took for ever

        def decode(_: Opened) -> None:
            begun.append("decoding")
            service.decoders.thumbnail(picture, max_side_px=10)

        async def ask() -> list[Any]:
            jobs = (decode, lambda _: begun.append("another"))
            return await asyncio.gather(*map(service.run, jobs), return_exceptions=True)

        asked = pool.submit(asyncio.run, ask())
        eventually(lambda: begun == ["decoding"] and service._pending == 2)
        started = time.monotonic()
        service.close()
        assert time.monotonic() - started < 5
        decoded, another = asked.result()
        assert isinstance(decoded, ImageError) and isinstance(another, asyncio.CancelledError)
        assert begun == ["decoding"]


# -- the process


@pytest.fixture(scope="module")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is searched with the encoder mini; its vectors are made by a fake one, which is there sooner."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "photos").mkdir()
    for number in range(4):
        painted(number).save(folder / "photos" / f"{number}.png")
    encoder = FakeEncoder(name="mini", dim=512)
    encoder.fingerprint = load_encoder("mini").fingerprint
    index(folder, encoder)
    return folder / "index"


@contextmanager
def process(index: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A `searchengine serve` of its own, and the line that it prints when it is ready."""
    command = [sys.executable, "-m", "searchengine", "serve", "--index", str(index), "--port", "0", "--json", *options]
    home = {name: str(index.parent) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout
            yield running, json.loads(running.stdout.readline())
        finally:
            running.kill()


def port_of(ready: dict[str, Any]) -> int:
    port = httpx.URL(ready["url"]).port
    assert port
    return port


def answered_though_it_ends(running: subprocess.Popen[str], port: int, number: signal.Signals) -> bytes:
    """The answer to a request whose body is half sent when the process is told to end."""
    body = json.dumps({"q": "a dog"}).encode()
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body[:5])
        time.sleep(0.3)
        running.send_signal(number)
        time.sleep(0.3)
        assert running.poll() is None
        connection.sendall(body[5:])
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


def test_a_service_tells_where_it_is_answers_at_once_and_ends_when_everything_is_answered(real_index: Path) -> None:
    with process(real_index) as (running, ready):
        assert ready == {"url": f"http://127.0.0.1:{port_of(ready)}/", "pid": running.pid}
        for _ in range(20):  # clients that go away while they are answered
            with socket.create_connection(("127.0.0.1", port_of(ready))) as connection:
                connection.sendall(b"GET /api/search?q=dog HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with httpx.Client(base_url=ready["url"]) as client:
            seconds = []
            for _ in range(10):
                started = time.monotonic()
                assert len(client.get("/api/search?q=dog").json()["hits"]) == 4
                seconds.append(time.monotonic() - started)
            assert min(seconds) < 0.02, "small answers do not wait for the client (TCP_NODELAY)"
        answer = answered_though_it_ends(running, port_of(ready), signal.SIGTERM)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert running.wait(20) == 0
        assert running.stderr and running.stderr.read() == ""


def test_ctrl_c_answers_what_is_under_way_and_exits_as_interrupted(real_index: Path) -> None:
    with process(real_index) as (running, ready):
        assert answered_though_it_ends(running, port_of(ready), signal.SIGINT).startswith(b"HTTP/1.1 200 OK")
        assert running.wait(20) == 130


def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    cli: Any, own_home: None, real_index: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = cli("serve", "--index", real_index, "--port", port)
    assert refused.code == 2
    assert f"127.0.0.1 port {port} cannot be listened on" in refused.err
    for host in ("0.0.0.0", "::"):
        outside = cli("serve", "--index", real_index, "--host", host, "--port", 0)
        assert outside.code == 2
        assert "--token" in outside.err and "--insecure" in outside.err
    missing = cli("serve", "--index", tmp_path / "none", "--port", 0)
    assert missing.code == 3
    assert cli("serve", "--index", real_index, "--token", "a b").code == 2
    assert cli("serve", "--index", real_index, "--host", "no such host", "--port", 0).code == 2
