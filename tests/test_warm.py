"""The warm process: whoever asks it gets what the plain way gives, and the plain way wherever anything is amiss."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import Cli
from conftest import painted

from indexer.writer import IndexWriter, NewPhoto
from searchengine import load_encoder
from searchengine.cli.queries import SearchRequest, find
from searchengine.cli.warm import _serve_at
from searchengine.errors import UsageError
from searchengine.metadata import PhotoMetadata
from searchengine.models.mini import parts
from searchengine.models.registry import weights_files
from searchengine.settings import Settings, load_settings
from searchengine.stores import StoredPhoto
from searchengine.warm import client, place, protocol
from searchengine.warm import server as server_module
from searchengine.warm.place import Place, is_taken, key_of, make_place, place_for, taken

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "searchengine"]
TOPICS = "dog cat car tree beach bird cake train boat horse".split()

# Serves fakes: arguments are an index, seconds until idle and, if any, what each search costs in seconds.
FAKE_SERVER = textwrap.dedent("""
    import signal, sys, threading, time
    from searchengine.errors import IndexFormatError, StoreUnusable
    from searchengine.settings import load_settings
    from searchengine.warm.place import key_of, make_place, taken
    from searchengine.warm import server as warm_server
    from searchengine.warm.server import WarmServer

    warm_server.CHECK_SECONDS = 0.1

    def answer(search):
        time.sleep(search.get("seconds", 0))
        match search.get("then"):
            case "refuse":
                raise StoreUnusable("too many open files")  # which whoever asked may not lack
            case "break":
                raise ZeroDivisionError
            case "change the weights":
                changed.append(True)
            case "lose the index":
                raise IndexFormatError("gone")
            case "flood":
                return [{"path": "x" * 2**20}] * 70
        hit = dict(rank=1, score=0.1, relevance=0.5, id=7, store="local", taken_at=None, width=1, height=2)
        return [{**hit, "path": search["path"]}]

    changed = []

    settings = load_settings({"index": sys.argv[1]})
    place = make_place(key_of(settings))
    with taken(place) as free:
        assert free
        is_current = lambda: key_of(settings) == place.key and not changed
        server = WarmServer(place, answer=answer, is_current=is_current, idle_seconds=float(sys.argv[2]))
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        print("ready", flush=True)
        server.run()
""")


@pytest.fixture(autouse=True)
def runtime_folder(own_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a runtime folder of its own, where it finds only its own processes."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "GREETING_SECONDS", 5.0)  # on a machine that runs more than this
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of an index that is no more than its identity card."""
    folder = tmp_path / "fake.index"
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    return load_settings({"index": str(folder)})


@contextmanager
def fake_server(settings: Settings, *, idle_seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", FAKE_SERVER, str(settings.index_folder), str(idle_seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def server(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    with fake_server(settings) as process:
        yield process


def own_place(settings: Settings) -> Place:
    key = key_of(settings)
    assert key is not None
    return make_place(key)


# -- one who asks ----------------------------------------------------------------------------------------------


def test_a_name_that_is_no_text_comes_back_as_it_was(server: subprocess.Popen[str], settings: Settings) -> None:
    hits = client.ask({"path": "/ü/\udcff\n\U0001f600"}, settings)
    assert hits is not None
    assert (hits[0].path, hits[0].score, hits[0].taken_at) == ("/ü/\udcff\n\U0001f600", 0.1, None)


def test_what_it_cannot_answer_is_left_to_who_asked(server: subprocess.Popen[str], settings: Settings) -> None:
    for then in ("refuse", "break", "flood"):
        assert client.ask({"then": then}, settings) is None
    assert client.ask({"path": "x"}, settings) is not None


@pytest.mark.parametrize("then", ["lose the index", "change the weights"])
def test_it_ends_when_what_it_answers_from_is_of_no_use(
    server: subprocess.Popen[str], settings: Settings, then: str
) -> None:
    assert client.ask({"then": then, "path": "x"}, settings) is None
    assert server.wait(5) == 0
    assert os.listdir(own_place(settings).folder) == []


def test_several_are_answered_at_once(server: subprocess.Popen[str], settings: Settings) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.ask, {"path": str(n), "seconds": 0.5}, settings) for n in range(8)]
        paths = [hits[0].path for hits in (future.result() for future in asked) if hits]
    assert paths == [str(n) for n in range(8)]
    assert time.monotonic() - started < 3


def test_a_file_that_is_another_one_there_is_left_to_who_asked(
    server: subprocess.Popen[str], settings: Settings, tmp_path: Path
) -> None:
    picture = tmp_path / "x.jpg"
    picture.write_bytes(b"x")
    search = {"path": "x"}
    assert client.ask(search, settings, files=[str(picture)]) is not None
    assert client.ask(search, settings, files=[str(picture), "/proc/self/comm"]) is None
    assert client.ask(search, settings, files=["x.jpg"]) is None
    assert client.ask(search, settings, files=[str(tmp_path / "none")]) is None
    assert client.ask(search, settings, files=[f"{picture}\0"]) is None


def test_off_asks_nobody(server: subprocess.Popen[str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_WARM", "off")
    assert client.ask({"path": "x"}, load_settings({"index": str(settings.index_folder)})) is None


def test_other_settings_another_index_another_version_find_another_place(
    server: subprocess.Popen[str], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(settings.index_folder)
    other = shutil.copytree(index, tmp_path / "other.index")
    for flags in ({"index": str(other)}, {"index": index, "device": "cpu"}, {"index": index, "models": str(tmp_path)}):
        assert client.ask({"path": "x"}, load_settings(flags)) is None
    for patched, name, value in ((place, "__version__", "0.0.0"), (sys, "prefix", "/elsewhere")):
        with monkeypatch.context() as context:
            context.setattr(patched, name, value)
            assert client.ask({"path": "x"}, settings) is None
    with monkeypatch.context() as context:
        context.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert client.ask({"path": "x"}, settings) is None
    assert client.ask({"path": "x"}, settings) is not None


def test_one_place_has_one_name_and_settings_that_do_not_matter_do_not(settings: Settings, tmp_path: Path) -> None:
    index = str(settings.index_folder)
    for flags in ({"index": index, "workers": 3}, {"index": f"{index}/../fake.index/"}):
        assert own_place(load_settings(flags)).socket == own_place(settings).socket


# -- nobody there, or nobody that can be trusted ---------------------------------------------------------------------


def test_nobody_there_is_no_answer(settings: Settings) -> None:
    assert client.ask({"path": "x"}, settings) is None
    own_place(settings)
    assert client.ask({"path": "x"}, settings) is None


def test_no_index_is_no_answer(tmp_path: Path) -> None:
    assert client.ask({"path": "x"}, load_settings({"index": str(tmp_path / "none")})) is None


def test_one_that_was_killed_is_no_answer_and_its_place_can_be_taken_again(settings: Settings) -> None:
    with fake_server(settings) as first:
        first.kill()
        first.wait()
        assert os.path.exists(own_place(settings).socket)
        assert client.ask({"path": "x"}, settings) is None
        with fake_server(settings):
            assert client.ask({"path": "x"}, settings) is not None


def test_one_that_hangs_costs_half_a_second(
    server: subprocess.Popen[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    with monkeypatch.context() as context:
        context.setattr(client, "GREETING_SECONDS", 0.5)
        started = time.monotonic()
        assert client.ask({"path": "x"}, settings) is None
        assert time.monotonic() - started < 1.5
    os.kill(server.pid, signal.SIGCONT)
    assert client.ask({"path": "x"}, settings) is not None


def test_one_that_hangs_over_a_search_costs_only_so_long(
    server: subprocess.Popen[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    assert client.ask({"path": "x", "seconds": 2}, settings) is None


def frame(text: str) -> bytes:
    return struct.pack("!I", len(text)) + text.encode()


@contextmanager
def impostor(path: str, says: list[bytes]) -> Iterator[None]:
    """Listens at `path`, says one thing after another to whoever comes, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(BrokenPipeError):
                    for piece in says:
                        connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


GREETING = b"the right greeting"


@pytest.mark.parametrize(
    "says",
    [
        [],
        [b"\x00"],
        [b"HTTP/1.1 200 OK\r\n\r\n"],
        [os.urandom(4096)],
        [struct.pack("!I", 2**32 - 1)],
        [frame("")],
        [frame("[]")],
        [frame("{}")],
        [frame("[" * 60_000)],
        [frame('{"key": "no"}'), frame('{"hits": []}')],
        [GREETING],
        [GREETING, frame("{}")],
        [GREETING, frame('{"hits": 7}')],
        [GREETING, frame('{"hits": [7]}')],
        [GREETING, frame('{"hits": [{"rank": 1}]}')],
    ],
)
def test_whatever_else_is_said_on_the_socket_is_no_answer(settings: Settings, says: list[bytes]) -> None:
    own = own_place(settings)
    greeting = frame(json.dumps({"key": own.key}))
    with impostor(own.socket, [greeting if piece is GREETING else piece for piece in says]):
        assert client.ask({"path": "x"}, settings) is None


def test_a_process_of_another_user_is_no_answer(
    server: subprocess.Popen[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "peer", lambda _: (server.pid, os.geteuid() + 1))
    assert client.ask({"path": "x"}, settings) is None
    monkeypatch.setattr(protocol, "peer", lambda _: (server.pid, os.geteuid()))
    assert client.ask({"path": "x"}, settings) is not None


def test_a_folder_that_others_may_enter_is_not_used(
    server: subprocess.Popen[str], settings: Settings, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runtime_folder / "searchengine"
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o755, 0o770, 0o701):
        folder.chmod(mode)
        assert client.ask({"path": "x"}, settings) is None
    folder.chmod(0o700)
    with monkeypatch.context() as context:
        context.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert client.ask({"path": "x"}, settings) is None
    assert client.ask({"path": "x"}, settings) is not None


def test_a_folder_that_is_a_link_is_not_used_and_the_next_one_is(
    settings: Settings, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runtime_folder / "elsewhere").mkdir(mode=0o700)
    (runtime_folder / "searchengine").symlink_to("elsewhere")
    with tempfile.TemporaryDirectory() as cache:  # short enough for a socket in it, which pytest's own may not be
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert own_place(settings).folder == os.path.join(cache, "searchengine", "warm")


def test_where_no_folder_will_do_the_reasons_are_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.environ["XDG_CACHE_HOME"], "x" * 100))
    assert own_place(settings).folder.startswith(os.environ["XDG_RUNTIME_DIR"])
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative/is/no/use")
    with pytest.raises(UsageError, match=r"a name too long for a socket.*; set XDG_RUNTIME_DIR"):
        own_place(settings)
    key = key_of(settings)
    assert key is not None
    assert place_for(key) is None


def test_without_a_home_nobody_is_asked_and_nobody_started(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object, **__: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    started: list[Settings] = []
    monkeypatch.setattr(client, "_start", started.append)
    client.start_for_the_next(replace(settings, warm="auto"))
    assert len(started) == 1
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    for user_cache_path in (no_home, lambda *_, **__: Path("~/.cache/searchengine")):
        monkeypatch.setattr("platformdirs.user_cache_path", user_cache_path)
        assert client.ask({"path": "x"}, settings) is None
        client.start_for_the_next(replace(settings, warm="auto"))
        with pytest.raises(UsageError, match=r"\(there is no home folder\)"):
            own_place(settings)
    assert len(started) == 1


def test_who_looks_whether_one_is_on_its_way_hinders_none(settings: Settings) -> None:
    own = own_place(settings)
    assert not is_taken(own.lock)
    assert os.listdir(own.folder) == []
    with open(own.lock, "w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, [looking, fcntl.LOCK_UN]).start()
        with taken(own) as is_still_ours:
            assert is_still_ours and is_still_ours()
            assert is_taken(own.lock)
    assert os.listdir(own.folder) == []


def test_one_that_does_not_listen_yet_is_called_off_and_another_can_take_its_place(settings: Settings) -> None:
    own = own_place(settings)
    with ExitStack() as second_ends:
        with taken(own) as first:
            assert first and first()
            assert list(client.stop_all()) == [(None, False)]
            assert not first()
            second = second_ends.enter_context(taken(own))
            assert second and second() and not first()
        assert second(), "the end of the first is not that of the second"
    assert os.listdir(own.folder) == []
    assert list(client.stop_all()) == []


def test_where_no_more_files_may_be_open_the_server_waits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_module.WarmServer(
        own_place(settings), answer=lambda _: [], is_current=lambda: True, idle_seconds=60
    )
    waits: list[float] = []

    def accept(number: int) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        context.setattr(server_module.time, "sleep", waits.append)
        for number in (errno.EAGAIN, errno.EMFILE):
            context.setattr(server, "_listener", SimpleNamespace(accept=partial(accept, number)))
            server._accept()
            assert len(waits) == (number == errno.EMFILE)
    server.stop()
    server.run()


# -- its end ---------------------------------------------------------------------------------------------------


def test_it_ends_when_nobody_asks(settings: Settings) -> None:
    with fake_server(settings, idle_seconds=0.8) as process:
        time.sleep(0.5)
        assert client.ask({"path": "x"}, settings) is not None
        time.sleep(0.5)
        assert process.poll() is None
        assert next(client.all_running())["searches"] == 1
        assert process.wait(5) == 0
    assert os.listdir(own_place(settings).folder) == []


@pytest.mark.parametrize("gone", ["index.json", "another index.json", "the socket"])
def test_it_ends_when_nobody_could_use_it(server: subprocess.Popen[str], settings: Settings, gone: str) -> None:
    card, socket_path = settings.index_folder / "index.json", own_place(settings).socket
    if gone == "the socket":
        os.unlink(socket_path)
    elif gone == "index.json":
        card.unlink()
    else:
        (settings.index_folder / "new").write_text("{}")
        os.replace(settings.index_folder / "new", card)
    assert client.ask({"path": "x"}, settings) is None
    assert server.wait(5) == 0
    assert not os.path.exists(socket_path)


def test_what_is_being_answered_is_answered_before_the_end(server: subprocess.Popen[str], settings: Settings) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask, {"path": "x", "seconds": 0.5}, settings)
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert asked.result() is not None
    assert server.wait(5) == 0


def test_one_who_says_nonsense_harms_nobody(server: subprocess.Popen[str], settings: Settings) -> None:
    for says in (b"", b"\0\0", frame("[]"), frame('{"do": "dance"}'), frame("[" * 10_000), struct.pack("!I", 2**31)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(own_place(settings).socket)
            connection.sendall(says)
    assert client.ask({"path": "x"}, settings) is not None


def test_those_beyond_its_limit_are_sent_away(server: subprocess.Popen[str], settings: Settings) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(16)]
    for connection in silent:
        connection.connect(own_place(settings).socket)
        connection.recv(1)  # it has been let in
    assert client.ask({"path": "x"}, settings) is None
    for connection in silent:
        connection.close()
    deadline = time.monotonic() + 5
    while client.ask({"path": "x"}, settings) is None:
        assert time.monotonic() < deadline


# -- the command line --------------------------------------------------------------------------------------------


def add_photos(index: Path, photos: dict[Path, str]) -> None:
    """Index pictures as what a text describes, so that no image tower is needed."""
    encoder = load_encoder("mini")
    with IndexWriter(index, encoder=encoder) as writer:
        for seed, (path, topic) in enumerate(photos.items(), start=len(topic_of(index))):
            painted(seed).save(path)
            content = hashlib.sha256(path.read_bytes()).digest()
            writer.add_vectors([content], encoder.encode_texts([f"a photo of a {topic}"]))
            listed = StoredPhoto(key=str(path), size_bytes=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns)
            writer.add_photo(
                NewPhoto(
                    store="local",
                    listed=listed,
                    content_hash=content,
                    metadata=PhotoMetadata(width=60, height=40, taken_at=f"20{seed:02}-01-01T00:00:00"),
                )
            )
        writer.commit(report={}, finished=True)
    (index / "topics.json").write_text(json.dumps(topic_of(index) | {str(path): name for path, name in photos.items()}))


def topic_of(index: Path) -> dict[str, str]:
    file = index / "topics.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten pictures, and their index in `photos.index`."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "photos").mkdir()
    add_photos(folder / "photos.index", {folder / "photos" / f"{topic}.png": topic for topic in TOPICS})
    return folder


@pytest.fixture
def library_here(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(library / "photos.index"))
    monkeypatch.chdir(library / "photos")
    return library


@contextmanager
def warm_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`searchengine warm`, started in another folder than that of who asks, and ready."""
    command = [*PROGRAM, "warm", "--json", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Who runs the tests may have told to ignore Ctrl-C, as `nohup` does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout
            ready = json.loads(process.stdout.readline())
            assert ready["pid"] == process.pid
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], Any], *, seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def searches_answered(cli: Cli) -> int:
    return sum(line["searches"] for line in cli("warm", "--status", "--json").lines)


def test_the_command_line_gives_the_same_with_it_and_without(
    cli: Cli, library_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library_here / "photos" / "broken.jpg").write_bytes(b"no picture")
    answered: list[list[str]] = [
        ["search", "a photo of a dog", "-k", "3", "--json"],
        ["search", "a photo of a dog", "--offset", "8"],
        ["search", "a", "cake", "--not", "cat", "--after", "2003", "--near", "0,0,1", "--json"],
        ["search", "a boat", "-0"],
        ["search", "./dog.png", "--json"],
        ["search", "a bird", "--like", "cat.png", "--like", "../photos/car.png", "--json"],
        ["search", "a bird", "--before", "1999"],
        ["search", "x " * 60_000],
        ["similar", "3", "--json"],
        ["similar", "4711"],
        ["similar", "cake.png", "-k", "2"],
        ["similar", "broken.jpg"],
        ["search", "x", "--under", "."],
        ["search", "x", "--under", ".."],
        ["search", "x", "--under", "dog.png"],
    ]
    left_to_who_asks = [["similar", "none.jpg"], ["search", "x", "-k", "0"]]
    monkeypatch.setenv("SEARCHENGINE_WARM", "off")
    plain = [cli(*arguments) for arguments in answered + left_to_who_asks]
    assert {outcome.code for outcome in plain} == {0, 1, 2}
    monkeypatch.delenv("SEARCHENGINE_WARM")
    with warm_process() as process:
        assert [cli(*arguments) for arguments in answered] == plain[: len(answered)]
        assert searches_answered(cli) == len(answered)

        requests = [SearchRequest(texts=(f"a photo of a {topic}",), k=3) for topic in TOPICS]
        with ThreadPoolExecutor(8) as pool:
            at_once = list(pool.map(lambda request: find(request, load_settings()), requests))
        assert at_once == [find(request, replace(load_settings(), warm="off")) for request in requests]
        assert searches_answered(cli) == len(answered) + len(requests)

        assert [cli(*arguments) for arguments in left_to_who_asks] == plain[len(answered) :]

        again = cli("warm")
        assert (again.code, again.out) == (2, "")
        assert "runs already" in again.err

        process.kill()
        process.wait()
        assert cli(*answered[0]) == plain[0]
        assert cli("warm", "--status", "--json").lines == []


def test_who_asks_loads_nothing_heavy_and_new_photos_are_seen(
    cli: Cli, library_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Path(shutil.copytree(library_here / "photos.index", tmp_path / "photos.index"))
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(index))
    run = textwrap.dedent("""
        import atexit, json, runpy, sys
        import searchengine.warm.client
        searchengine.warm.client.GREETING_SECONDS = 5.0
        atexit.register(lambda: print(json.dumps(list(sys.modules)), file=sys.stderr))
        sys.argv = "searchengine search giraffe -k 1 --format paths --threshold none".split()
        runpy.run_module("searchengine", run_name="__main__")
    """)
    with warm_process() as process:
        add_photos(index, {tmp_path / "giraffe.png": "giraffe"})  # nothing hinders the one who writes
        done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path / 'giraffe.png'}\n"
        loaded = {module.split(".")[0] for module in json.loads(done.stderr.splitlines()[-1])}
        assert "click" in loaded
        assert not loaded & {"numpy", "faiss", "sqlalchemy", "sqlite3", "torch", "PIL", "tokenizers", "subprocess"}
        assert searches_answered(cli) == 1

        assert cli("compact").code == 0
        if sys.platform == "linux":  # it keeps no room on the disk that a compaction made free
            until(lambda: "(deleted)" not in Path(f"/proc/{process.pid}/maps").read_text())
        assert cli("search", "giraffe", "-k", "1", "-0", "--threshold", "none").out == f"{tmp_path / 'giraffe.png'}\0"
        assert searches_answered(cli) == 2

        stopped = cli("warm", "--stop", "--json")
        assert (stopped.code, stopped.lines) == (0, [{"pid": process.pid, "answered": True}])
        assert process.wait(5) == 0
        assert "no warm process" in cli("warm", "--stop").err


def test_it_is_current_only_as_long_as_its_weights_are_what_they_were(
    library_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    current: list[bool] = []

    class Server:
        def __init__(self, place: Place, *, is_current: Callable[[], bool], **_: object) -> None:
            self.is_current = is_current

        def run(self) -> None:
            current.append(self.is_current())
            weights.write_bytes(b"12")  # in place
            current.append(self.is_current())
            weights.unlink()
            current.append(self.is_current())

    assert parts.paths()[1] in weights_files("mini", models_folder=tmp_path)
    monkeypatch.setattr("searchengine.models.registry.weights_files", lambda *_, **__: [weights])
    monkeypatch.setattr(server_module, "WarmServer", Server)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = load_settings()
    for is_still_ours in (lambda: True, lambda: False):
        weights.write_bytes(b"1")
        _serve_at(own_place(settings), settings, is_still_ours=is_still_ours, as_json=True)
    assert current == [True, False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_auto_starts_one_for_the_next_and_shares_nothing_with_it(
    cli: Cli, library_here: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_WARM", "auto")
    monkeypatch.setenv("SEARCHENGINE_INDEX", "../photos.index")
    monkeypatch.setenv("SEARCHENGINE_WARM_IDLE_SECONDS", "20")
    command = [*PROGRAM, "search", "a dog", "-k", "1", "--format", "paths", "--threshold", "none"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    first = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    # These would wait for its end, were their pipes open in it.
    outcomes = [(*process.communicate(timeout=20), process.returncode) for process in first]
    assert outcomes == [(f"{library_here / 'photos' / 'dog.png'}\n", "", 0)] * 2
    [running] = until(lambda: cli("warm", "--status", "--json").lines)
    pid = running["pid"]
    try:
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == [os.devnull] * 3
        assert running["ends_in_seconds"] <= 20

        assert cli(*command[3:]).out == outcomes[0][0]
        assert searches_answered(cli) == 1
        assert len(cli("warm", "--status", "--json").lines) == 1

        monkeypatch.setattr(client, "GREETING_SECONDS", 0.5)
        os.kill(pid, signal.SIGSTOP)
        assert cli("warm", "--status", "--json").lines == [{"pid": pid}]
        assert f"process {pid} does not answer" in cli("warm", "--status").out
        assert cli("warm", "--stop", "--json").lines == [{"pid": pid, "answered": False}]
        os.kill(pid, signal.SIGCONT)
        until(lambda: os.listdir(runtime_folder / "searchengine") == [])
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_without_an_index_or_with_a_bad_flag_it_says_so(cli: Cli, tmp_path: Path, library_here: Path) -> None:
    missing = cli("warm", "--index", tmp_path / "none")
    assert missing.code == 3
    assert "there is no index at" in missing.err
    assert cli("warm", "--idle-seconds", "0").code == 2
    assert cli("warm", "--stop", "--status").code == 2
    assert "SEARCHENGINE_WARM" in cli("warm", "--help").out


def test_where_the_system_lacks_such_sockets_it_says_so_and_searches_do_without(
    cli: Cli, library_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    monkeypatch.setenv("SEARCHENGINE_WARM", "auto")
    refused = cli("warm")
    assert refused.code == 2
    assert "lacks the sockets" in refused.err
    assert cli("search", "a dog", "-k", "1").code == 0


def test_ctrl_c_ends_it_as_it_ends_every_command(library_here: Path) -> None:
    with warm_process() as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
