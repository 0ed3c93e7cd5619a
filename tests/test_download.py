"""Downloads against a real server on loopback that truncates, stalls, lies, redirects and changes its mind."""

from __future__ import annotations

import email.utils
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from searchengine.errors import ModelNotFound, ModelUnusable, WeightsError
from searchengine.models import download as downloading
from searchengine.models import http
from searchengine.models.download import TRIES, can_download, download
from searchengine.models.published import PUBLISHED, PublishedFile

ROOT = Path(__file__).parent.parent
CONTENT = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)
SIZE = len(CONTENT)


class Request(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.ranges.append(self.headers.get("Range"))
        script = self.server.script
        answer = script.pop(0) if len(script) > 1 else script[0]
        with suppress(ConnectionError):
            answer(self)

    def first_byte(self) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def begin(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, body: bytes) -> None:
        self.server.sent_bytes += len(body)
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


Answer = Callable[[Request], None]


class Server(ThreadingHTTPServer):
    """Answers one request after the other as its script says; the last line of the script stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.script: list[Answer] = [serve()]
        self.paths: list[str] = []
        self.ranges: list[str | None] = []
        self.sent_bytes = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def serve(content: bytes = CONTENT, *, until: int = SIZE, etag: str = '"a"') -> Answer:
    """As a server should, with ranges; the connection ends before byte `until`."""

    def answer(request: Request) -> None:
        start = request.first_byte()
        if request.headers.get("Range"):
            extent = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.begin(206, Content_Range=extent, Content_Length=len(content) - start, ETag=etag)
        else:
            request.begin(200, Content_Length=len(content), ETag=etag)
        request.send(content[start:until])

    return answer


def ignore_ranges(request: Request) -> None:
    request.begin(200, Content_Length=SIZE)
    request.send(CONTENT)


def status(code: int, **headers: Any) -> Answer:
    return lambda request: request.begin(code, **headers)


def refuse_ranges(request: Request) -> None:
    if request.headers.get("Range"):
        request.begin(416, Content_Range=f"bytes */{SIZE}")
    else:
        serve()(request)


def begin_at(start: int) -> Answer:
    """Answers a request for a range with another one."""

    def answer(request: Request) -> None:
        request.begin(206, Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}", Content_Length=SIZE - start)
        request.send(CONTENT[start:])

    return answer


def stall(after: int = 0) -> Answer:
    def answer(request: Request) -> None:
        start = request.first_byte()
        if after:
            request.begin(206 if start else 200, Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}")
            request.send(CONTENT[start : start + after])
        request.server.closing.wait(60)

    return answer


def drip(request: Request) -> None:
    request.begin(200, Content_Length=SIZE)
    for byte in CONTENT[:200]:
        if request.server.closing.wait(0.02):
            return
        request.send(bytes([byte]))


def too_much(request: Request) -> None:
    """No length is promised, and the body goes on beyond the file's end."""
    request.begin(200)
    request.send(CONTENT + OTHER)


def hang_up(request: Request) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


def talk_nonsense(request: Request) -> None:
    request.wfile.write(b"\x00\x1b[31m nonsense\r\n\r\n")


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def published_at(*urls: str) -> PublishedFile:
    return PublishedFile(
        name="clip-test",
        architecture="ViT-T/1",
        urls=tuple(f"{url}/tiny.pt" for url in urls),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=SIZE,
        dim=8,
        licence="MIT",
    )


class Run:
    """A download into a folder of its own; `waits` are the pauses it would have made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models"
        self.final = self.folder / "clip-test.pt"
        self.part = self.folder / "clip-test.pt.part"
        self.waits: list[float] = []
        self.notices: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def has_part(self, content: bytes) -> Run:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part.write_bytes(content)
        return self

    def __call__(self, file: PublishedFile, **options: Any) -> Path:
        return download(
            file,
            folder=self.folder,
            on_progress=lambda done, total: self.progress.append((done, total)),
            on_notice=self.notices.append,
            sleep=self.waits.append,
            **{"stall_seconds": 0.3} | options,
        )

    def arrived(self) -> bool:
        return self.final.is_file() and self.final.read_bytes() == CONTENT and not self.part.exists()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# -- when all goes well ----------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_progress_counts_its_bytes(server: Server, run: Run) -> None:
    assert run(published_at(server.url)) == run.final
    assert run.arrived()
    assert server.ranges == [None]
    assert run.progress[0] == (0, SIZE)
    assert run.progress[-1] == (SIZE, SIZE)
    assert run.progress == sorted(run.progress)


def test_a_file_that_is_here_is_not_fetched_again(server: Server, run: Run) -> None:
    run.folder.mkdir()
    run.final.write_bytes(CONTENT)
    assert run(published_at(server.url)) == run.final
    assert run(published_at(server.url), offline=True) == run.final
    assert server.paths == []


def test_a_damaged_file_under_the_final_name_is_replaced(server: Server, run: Run) -> None:
    run.folder.mkdir()
    run.final.write_bytes(OTHER)
    run(published_at(server.url))
    assert run.arrived()


def test_offline_nothing_is_asked_and_the_way_by_hand_is_told(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(ModelNotFound, match=r"offline.*get http://\S+/tiny\.pt .*searchengine models import FILE"):
        run(published_at(server.url), offline=True)
    assert not run.folder.exists()


# -- breaks ----------------------------------------------------------------------------------------------------------


def test_a_truncated_download_is_resumed_where_it_ended(server: Server, run: Run) -> None:
    server.script = [serve(until=30_000), serve(until=70_000), serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert server.ranges == [None, "bytes=30000-", "bytes=70000-"]
    assert server.sent_bytes == SIZE
    assert len(run.waits) == 2
    assert "ended after 30,000 of 100,000 bytes; trying again in" in run.notices[0]


@settings(max_examples=60)
@given(have=st.integers(0, SIZE), damaged=st.booleans())
def test_a_part_of_any_length_is_completed_and_a_damaged_one_fetched_anew(have: int, damaged: bool) -> None:
    folder = Path(tempfile.mkdtemp(dir=QUICK))
    try:
        with running() as server:
            run = Run(folder).has_part((OTHER if damaged else CONTENT)[:have])
            run(published_at(server.url))
            assert run.arrived()
            if have == 0 or not damaged:
                assert server.sent_bytes == SIZE - have
            else:
                assert server.sent_bytes == SIZE + (SIZE - have), "what was missing, then all of it once more"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "again",
    [ignore_ranges, begin_at(10_000), begin_at(0), begin_at(50_000), refuse_ranges],
    ids=["ignores ranges", "begins earlier", "begins at 0", "begins later", "416"],
)
def test_a_server_that_does_not_go_on_where_it_is_asked_to_still_gives_the_file(
    server: Server, run: Run, again: Answer
) -> None:
    server.script = [serve(until=30_000), again, again if again is refuse_ranges else serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert "sha256" not in "".join(run.notices), "no other file's bytes were taken for this one's"


def test_a_part_larger_than_the_file_is_thrown_away(server: Server, run: Run) -> None:
    run.has_part(CONTENT + b"more")(published_at(server.url))
    assert run.arrived()
    assert server.ranges == [None]


@pytest.mark.parametrize("answer", [stall(), stall(after=5_000), hang_up, talk_nonsense])
def test_a_server_that_stalls_hangs_up_or_talks_nonsense_is_asked_again(
    server: Server, run: Run, answer: Answer
) -> None:
    server.script = [answer, serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert len(server.paths) == 2
    assert "\x1b" not in "".join(run.notices)


def test_a_server_that_drips_is_not_waited_for(server: Server, run: Run) -> None:
    server.script = [drip, serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert "sends next to nothing" in run.notices[0]


@pytest.mark.parametrize("code", [500, 502, 503, 504, 429, 408])
def test_a_passing_refusal_is_waited_out(server: Server, run: Run, code: int) -> None:
    server.script = [status(code), status(code), serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert 0.5 <= run.waits[0] <= 1 <= run.waits[1] <= 2, "waits double, with jitter"


def test_a_server_says_when_to_come_again_but_not_at_any_price(server: Server, run: Run) -> None:
    in_20_s = email.utils.formatdate(time.time() + 20, usegmt=True)
    server.script = [
        status(429, Retry_After=7),
        status(503, Retry_After=10**9),
        status(503, Retry_After=in_20_s),
        status(503, Retry_After="soon"),
        serve(),
    ]
    run(published_at(server.url))
    assert run.waits[:2] == [7, 60]
    assert 17 <= run.waits[2] <= 20
    assert run.waits[3] <= 8


def test_tries_end_and_what_came_is_kept_for_the_next_run(server: Server, run: Run) -> None:
    server.script = [serve(until=40_000), status(500)]
    with pytest.raises(ModelNotFound, match=r"answers 500 .*searchengine models import FILE"):
        run(published_at(server.url))
    assert len(server.paths) == TRIES
    assert len(run.waits) == TRIES - 1
    assert run.part.read_bytes() == CONTENT[:40_000]
    server.script = [serve()]
    run(published_at(server.url))
    assert server.ranges[-1] == "bytes=40000-"
    assert run.arrived()


def test_a_long_download_may_break_often_as_long_as_it_gets_on(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "PROGRESS_BYTES", 9_000)
    server.script = [serve(until=10_000 * step) for step in range(1, 11)]
    run(published_at(server.url))
    assert run.arrived()
    assert len(server.paths) == 10 > TRIES


def test_a_server_that_ignores_ranges_and_always_breaks_is_given_up(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "PROGRESS_BYTES", 9_000)

    def broken(request: Request) -> None:
        request.begin(200, Content_Length=SIZE)
        request.send(CONTENT[:60_000])

    server.script = [broken]
    with pytest.raises(ModelNotFound):
        run(published_at(server.url))
    assert len(server.paths) <= TRIES + 1


# -- answers that are final ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403, 404, 410, 204])
def test_a_final_refusal_is_not_asked_again(server: Server, run: Run, code: int) -> None:
    server.script = [status(code)]
    with pytest.raises(ModelNotFound, match=f"clip-test cannot be downloaded: {server.url}/tiny.pt answers {code}"):
        run(published_at(server.url))
    assert (len(server.paths), run.waits) == ((1, []) if code != 204 else (TRIES, run.waits))


@pytest.mark.parametrize("size", [0, 50, SIZE - 1, SIZE + 1, 10**15])
def test_a_file_of_another_size_is_not_even_begun(server: Server, run: Run, size: int) -> None:
    server.script = [status(200, Content_Length=size)]
    with pytest.raises(ModelNotFound, match=r"offers a file of .* bytes, expected 100,000"):
        run(published_at(server.url))
    assert not run.part.exists()
    assert len(server.paths) == 1


def test_reading_stops_at_the_published_size(server: Server, run: Run) -> None:
    server.script = [too_much]
    run(published_at(server.url))
    assert run.arrived()


def test_nobody_there_is_told_with_the_way_by_hand(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ModelNotFound, match=r"(?i)connection refused.*models import FILE.*SEARCHENGINE_MODELS"):
            run(published_at(url))
    assert len(run.waits) == TRIES - 1


# -- wrong bytes -----------------------------------------------------------------------------------------------------


def test_wrong_bytes_are_fetched_once_more_and_then_refused(server: Server, run: Run) -> None:
    server.script = [serve(OTHER)]
    found, expected = hashlib.sha256(OTHER).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(WeightsError, match=f"{server.url}/tiny.pt .*{found}.*{expected}.*models import FILE"):
        run(published_at(server.url))
    assert server.ranges == [None, None]
    assert not run.part.exists()
    assert not run.final.exists()


def test_a_file_that_changes_between_two_tries_is_fetched_anew(server: Server, run: Run) -> None:
    server.script = [serve(OTHER, until=30_000, etag='"old"'), serve(etag='"new"'), serve(etag='"new"')]
    run(published_at(server.url))
    assert run.arrived()
    assert server.ranges == [None, "bytes=30000-", None]


ANSWERS: list[Answer] = [
    serve(),
    serve(until=20_000),
    serve(OTHER),
    serve(OTHER, until=60_000),
    serve(CONTENT + b"more"),
    ignore_ranges,
    too_much,
    begin_at(0),
    begin_at(90_000),
    hang_up,
    talk_nonsense,
    status(200),
    status(206),
    status(206, Content_Range="bytes 1-0/*"),
    status(206, Content_Range="bytes 0-5/" + "9" * 400),
    status(302, Location="/again"),
    status(302, Location="ftp://127.0.0.1/x"),
    status(302, Location="http://[::1"),
    status(404),
    status(416),
    status(503, Retry_After="-5"),
    stall(after=50_000),
]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=7))
def test_whatever_a_server_does_no_wrong_bytes_get_the_final_name(script: list[Answer]) -> None:
    folder = Path(tempfile.mkdtemp(dir=QUICK))
    try:
        with running() as server:
            server.script = list(script)
            run = Run(folder)
            try:
                run(published_at(server.url), stall_seconds=0.05)
            except ModelUnusable:
                assert not run.final.exists()
            else:
                assert run.arrived()
            assert not run.part.exists() or run.part.stat().st_size <= SIZE
    finally:
        shutil.rmtree(folder)


# -- redirects, mirrors, proxies -------------------------------------------------------------------------------------


def test_a_redirect_is_followed_and_a_download_resumed_behind_it(server: Server, run: Run) -> None:
    elsewhere = status(302, Location="/elsewhere.pt")
    server.script = [elsewhere, serve(until=30_000), elsewhere, serve()]
    run(published_at(server.url))
    assert run.arrived()
    assert server.paths[1::2] == ["/elsewhere.pt", "/elsewhere.pt"]
    assert server.ranges[-1] == "bytes=30000-"


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "/tiny.pt"])
def test_a_redirect_leads_only_to_http_and_not_in_circles(server: Server, run: Run, target: str) -> None:
    server.script = [status(302, Location=target)]
    with pytest.raises(ModelNotFound):
        run(published_at(server.url))
    assert not run.part.exists()


def test_a_redirect_never_leads_from_https_to_http() -> None:
    request = urllib.request.Request("https://weights.invalid/a")
    arguments = (None, 302, "Found", {})
    with pytest.raises(urllib.error.URLError, match="from https to http:"):
        http._Redirects().redirect_request(request, *arguments, "http://weights.invalid/b")  # type: ignore[arg-type]
    kept = http._Redirects().redirect_request(request, *arguments, "https://weights.invalid/b")  # type: ignore[arg-type]
    assert kept is not None


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "nonsense"])
def test_nothing_but_http_is_opened(run: Run, url: str) -> None:
    with pytest.raises(ModelNotFound):
        run(published_at(url))


def test_a_mirror_is_asked_first_by_the_files_published_name(server: Server, run: Run) -> None:
    with running() as publisher:
        run(published_at(publisher.url), mirror=server.url + "/weights/")
        assert run.arrived()
        assert (server.paths, publisher.paths) == (["/weights/tiny.pt"], [])


@pytest.mark.parametrize("answer", [status(404), status(500), serve(OTHER), serve(until=9_000), serve(b"short")])
def test_where_a_mirror_fails_the_publisher_is_asked(server: Server, run: Run, answer: Answer) -> None:
    server.script = [answer]
    with running() as publisher:
        run(published_at(publisher.url), mirror=server.url)
        assert run.arrived()
        assert (len(server.paths), len(publisher.paths)) == (1, 1)


def test_the_proxy_that_the_environment_names_is_used(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    run(published_at("http://weights.invalid"))
    assert run.arrived()
    assert server.paths == ["http://weights.invalid/tiny.pt"]


def test_no_proxy_is_used_for_hosts_that_are_excepted(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    run(published_at(server.url))
    assert run.arrived()


# -- the disk, other processes, sudden ends --------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_at_once(server: Server, run: Run) -> None:
    run.folder.mkdir()
    run.part.symlink_to("/dev/full")
    with pytest.raises(ModelNotFound, match=r"cannot be stored in .*No space left.*SEARCHENGINE_MODELS"):
        run(published_at(server.url))
    assert (len(server.paths), run.waits) == (1, [])


def test_a_folder_that_cannot_be_made_is_told(server: Server, run: Run) -> None:
    run.folder.write_text("a file is in the way")
    with pytest.raises(ModelNotFound, match="cannot be stored in"):
        run(published_at(server.url))
    assert server.paths == []


def in_another_process(file: PublishedFile, folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from searchengine.models.download import download\nfrom searchengine.models.published import PublishedFile\n"
        f"print(download({file!r}, folder=Path({str(folder)!r}), on_notice=lambda m: print(m, file=sys.stderr)))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_download_is_resumed_by_the_next_process(server: Server, run: Run) -> None:
    server.script = [stall(after=70_000), serve()]
    process = in_another_process(published_at(server.url), run.folder)
    with process:
        wait_for(lambda: run.part.exists() and run.part.stat().st_size > 0)
        process.send_signal(signal.SIGKILL)
    have = run.part.stat().st_size
    assert not run.final.exists()
    run(published_at(server.url))
    assert run.arrived()
    assert server.ranges == [None, f"bytes={have}-"]


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(server: Server, run: Run) -> None:
    go_on = threading.Event()

    def slowly(request: Request) -> None:
        request.begin(200, Content_Length=SIZE)
        request.send(CONTENT[:50_000])
        go_on.wait(20)
        request.send(CONTENT[50_000:])

    server.script = [slowly]
    first = in_another_process(published_at(server.url), run.folder)
    wait_for(lambda: len(server.paths) == 1)
    second = in_another_process(published_at(server.url), run.folder)
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    go_on.set()
    for process in (first, second):
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, out.strip()) == (0, str(run.final))
    assert len(server.paths) == 1
    assert run.arrived()


# -- whether it can be had at all ------------------------------------------------------------------------------------


def test_a_file_on_offer_is_seen_without_fetching_it(server: Server) -> None:
    assert can_download(published_at(server.url))
    assert server.ranges == ["bytes=0-0"]
    server.script = [ignore_ranges]
    assert can_download(published_at("http://127.0.0.1:9", server.url))
    assert can_download(published_at("http://127.0.0.1:9"), mirror=server.url)


@pytest.mark.parametrize(
    "answer", [status(404), status(503), serve(b"a page to log in"), hang_up, talk_nonsense, status(302, Location="/")]
)
def test_what_is_not_on_offer_is_seen_at_once(server: Server, answer: Answer) -> None:
    server.script = [answer]
    started = time.monotonic()
    assert not can_download(published_at(server.url))
    assert time.monotonic() - started < 1


def test_a_server_that_stalls_is_given_up_at_the_deadline(server: Server) -> None:
    server.script = [stall()]
    started = time.monotonic()
    assert not can_download(published_at(server.url), deadline_seconds=0.3)
    assert time.monotonic() - started < 1


def test_a_name_server_that_stalls_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def look_up(*arguments: object, **options: object) -> list[object]:
        over.wait(30)
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    started = time.monotonic()
    assert not can_download(published_at("http://weights.invalid"), deadline_seconds=0.3)
    assert time.monotonic() - started < 1
    over.set()


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PUBLISHED.values(), ids=PUBLISHED)
def test_each_published_file_is_pinned_and_its_publishers_url_holds_its_hash(file: PublishedFile) -> None:
    assert re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert len(file.urls) == len(set(file.urls)) >= 1
    for url in file.urls:
        assert url.startswith("https://")
        assert url.split("/")[-2:] == [file.sha256, file.published_as]
    assert file.size_bytes > 300_000_000
    assert len({other.sha256 for other in PUBLISHED.values()}) == len(PUBLISHED)
