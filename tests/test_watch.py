"""Keeping an index up to date: real files, the system's real events, and the command line as a process of its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import filelock
import pytest
from commandline import Cli
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st
from remote_servers import serving

import indexer.events
import indexer.watch
from indexer.events import MAX_DELAY_SECONDS, MAX_HOLD_SECONDS, SETTLE_SECONDS, STILL_WRITING_SECONDS, Changes, topmost
from indexer.report import Report
from searchengine.cli.index import _printer
from searchengine.errors import IndexFormatError, StoreUnusable, UsageError
from searchengine.index.reader import Index

# watchdog hears of a folder twice, by its own event and by that of the folder that it came in.
pytestmark = pytest.mark.filterwarnings("ignore:Callback with id:RuntimeWarning")

ROOT = Path(__file__).parent.parent
Start = Callable[..., "Watching"]


def until(true: Callable[[], Any], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Watching:
    """A watch in a thread of its own, and what it told."""

    def __init__(self, index: Path, stores: list[Path], options: dict[str, Any]) -> None:
        self.index = index
        self.reports: list[Report] = []
        self.skipped: list[str] = []
        self.notices: list[str] = []
        self.error: BaseException | None = None
        self.stop = threading.Event()
        self._arguments = (index, stores)
        self._options = {"encoder": FakeEncoder(), "isolated": False, "workers": 1} | options
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        try:
            indexer.watch.watch(
                *self._arguments,
                on_update=self.reports.append,
                on_skip=lambda key, reason: self.skipped.append(f"{key}: {reason}"),
                on_notice=self.notices.append,
                stop=self.stop,
                **self._options,
            )
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def names(self) -> set[str]:
        return set(self.rows())

    def rows(self) -> dict[str, int]:
        """Names of the photos that a reader sees now, and their ids."""
        with Index(self.index) as opened:
            ids = [int(i) for segment in opened.snapshot().segments for i in segment.ids]
            rows = [row for rows in opened.images_of(ids).values() for row in rows]
        return {os.path.basename(row.key): row.id for row in rows}

    def runs(self) -> int:
        connection = sqlite3.connect(self.index / "metadata.sqlite")
        try:
            return int(connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0])
        finally:
            connection.close()

    def sum(self, counter: str) -> int:
        return sum(getattr(report, counter) for report in list(self.reports))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "album").mkdir(parents=True)
    return tmp_path / "photos"


@pytest.fixture
def start(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(*stores, ...) watches the folder, or the stores, and returns after the first run; it settles quickly."""
    monkeypatch.setattr(indexer.events, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(indexer.watch, "TICK_SECONDS", 0.02)
    started: list[Watching] = []

    def run(*stores: Path, index: Path = tmp_path / "index", **options: Any) -> Watching:
        started.append(Watching(index, list(stores) or [folder], options))
        until(lambda: started[-1].reports or started[-1].ended)
        return started[-1]

    yield run
    for watching in started:
        watching.end()


def photo(path: Path, seed: int) -> Path:
    painted(seed).save(path)
    return path


# -- what happens to photos ------------------------------------------------------------------------------------------


def test_photos_that_come_change_move_and_go_are_taken_up(start: Start, folder: Path) -> None:
    photo(folder / "old.png", 1)
    watching = start()
    assert watching.names() == {"old.png"}
    photo(folder / "album" / "new.png", 2)
    until(lambda: watching.names() == {"old.png", "new.png"})
    before = watching.rows()
    photo(folder / "album" / "new.png", 3)
    until(lambda: watching.sum("updated") == 1)
    (folder / "album" / "new.png").rename(folder / "moved.png")
    until(lambda: "moved.png" in watching.names())
    assert watching.rows() == {"old.png": before["old.png"], "moved.png": before["new.png"]}
    (folder / "old.png").unlink()
    until(lambda: watching.names() == {"moved.png"})
    until(lambda: (watching.sum("added"), watching.sum("moved"), watching.sum("deleted")) == (2, 1, 1))
    assert not watching.notices


def test_a_folder_that_is_moved_keeps_its_vectors_and_a_deleted_one_goes(start: Start, folder: Path) -> None:
    (folder / "trip" / "day").mkdir(parents=True)
    for number in range(3):
        photo(folder / "trip" / "day" / f"{number}.png", number)
    watching = start()
    before = watching.rows()
    (folder / "trip").rename(folder / "album" / "journey")
    until(lambda: watching.sum("moved") == 3)
    assert watching.rows() == before
    photo(folder / "album" / "journey" / "day" / "later.png", 9)
    until(lambda: "later.png" in watching.names())
    shutil.rmtree(folder / "album")
    until(lambda: not watching.names())
    assert watching.sum("added") == 4


def test_a_photo_moved_from_one_watched_folder_to_another_keeps_its_vector(start: Start, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "archive").mkdir()
    photo(tmp_path / "inbox" / "a.png", 1)
    watching = start(tmp_path / "inbox", tmp_path / "archive")
    (tmp_path / "inbox" / "a.png").rename(tmp_path / "archive" / "a.png")
    until(lambda: len(watching.reports) == 2)
    assert watching.reports[1].moved == 1
    assert not watching.reports[1].deleted


def test_a_pattern_stands_for_the_archives_that_it_names(start: Start, folder: Path, tmp_path: Path) -> None:
    for name in ("1.zip", "2.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(photo(tmp_path / "a.png", len(name)), f"{name}.png")
    watching = start(tmp_path / "{1..2}.zip", folder)
    assert watching.names() == {"1.zip.png", "2.zip.png"}
    assert not watching.notices


def test_a_store_far_away_is_not_asked_when_a_folder_changes(start: Start, folder: Path) -> None:
    with serving(_Links) as port:
        watching = start(f"http://127.0.0.1:{port}/", folder)  # type: ignore[arg-type]
        asked = _Links.asked
        photo(folder / "a.png", 1)
        until(lambda: watching.sum("added"))
        assert asked == _Links.asked > 0


class _Links(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        _Links.asked += 1
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else b'<a href="b.txt">a page with a link</a>')

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_tree_that_arrives_at_once_is_found_whole(start: Start, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep" / "deeper").mkdir(parents=True)
    for number, part in enumerate(["elsewhere", "elsewhere/deep", "elsewhere/deep/deeper"]):
        photo(tmp_path / part / f"{number}.png", number)
    watching = start()
    shutil.copytree(tmp_path / "elsewhere", folder / "copied")
    until(lambda: watching.names() == {"0.png", "1.png", "2.png"})
    (tmp_path / "elsewhere").rename(folder / "moved in")
    until(lambda: watching.sum("added") == 6)
    photo(folder / "moved in" / "deep" / "3.png", 3)
    until(lambda: "3.png" in watching.names())


def test_a_photo_that_is_written_slowly_appears_once_and_whole(start: Start, folder: Path, tmp_path: Path) -> None:
    data = photo(tmp_path / "photo.png", 1).read_bytes()
    (folder / "other").mkdir()
    watching = start()
    photo(folder / "other" / "quick.png", 2)
    with open(folder / "album" / "slow.png", "wb", buffering=0) as file:
        for part in range(4):
            file.write(data[part * len(data) // 4 : (part + 1) * len(data) // 4])
            time.sleep(0.35)
        until(lambda: watching.names() == {"quick.png"})
    until(lambda: watching.names() == {"quick.png", "slow.png"})
    until(lambda: watching.sum("added") == 2)  # a run tells of itself after its commit
    assert (watching.sum("updated"), watching.skipped) == (0, [])
    with Index(watching.index) as opened:
        assert not list(opened.failed_photos())


def test_a_copy_of_hundreds_of_photos_is_a_few_runs(start: Start, folder: Path, tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", 1)
    watching = start()
    for number in range(300):
        shutil.copyfile(source, folder / "album" / f"{number}.png")
        time.sleep(0.003)
    until(lambda: len(watching.names()) == 300)
    assert watching.runs() <= 4


def test_names_that_are_not_utf_8_are_heard_of(start: Start, folder: Path, tmp_path: Path) -> None:
    album = os.fsencode(folder) + b"/alb\xffum"
    os.mkdir(album)
    watching = start()
    shutil.copyfile(os.fsencode(photo(tmp_path / "photo.png", 1)), album + b"/caf\xe9.png")
    until(lambda: watching.names() == {os.fsdecode(b"caf\xe9.png")})
    os.remove(album + b"/caf\xe9.png")
    until(lambda: not watching.names())


# -- what causes no run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["album/photos.index", "."])
def test_an_index_among_the_photos_does_not_watch_itself(start: Start, folder: Path, index: str) -> None:
    watching = start(index=folder / index)
    photo(folder / "a.png", 1)
    until(lambda: len(watching.reports) == 2)
    time.sleep(0.8)
    assert watching.runs() == 2


def test_what_is_not_looked_at_causes_no_run(start: Start, folder: Path, tmp_path: Path) -> None:
    for name in (".hidden", "node_modules", "drafts"):
        (folder / name).mkdir()
    (tmp_path / "outside").mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    seen = photo(folder / "seen.png", 0)
    watching = start(exclude=["drafts/*"])
    for name in (".hidden/a.png", ".b.png", "node_modules/c.png", "drafts/d.png", "link/e.png"):
        photo(folder / name, 1)
    (folder / "notes.txt").write_text("no photo")
    (folder / "video.mp4").write_bytes(b"no photo")
    seen.read_bytes()
    time.sleep(0.8)
    assert watching.runs() == 1


def test_a_run_that_changed_nothing_is_not_told(start: Start, folder: Path) -> None:
    seen = photo(folder / "seen.png", 0)
    watching = start()
    os.utime(seen, ns=(1, os.stat(seen).st_mtime_ns))
    until(lambda: watching.runs() == 2)
    assert len(watching.reports) == 1


# -- when things do not work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "max_user_watches"), (errno.EMFILE, "max_user_instances"), (errno.ENOSYS, "")]
)
def test_without_events_everything_is_listed_now_and_then(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(indexer.events.BaseObserver, "schedule", refuse)
    watching = start(scan_every_seconds=0.2)
    photo(folder / "a.png", 1)
    until(lambda: watching.names() == {"a.png"})
    assert len(watching.notices) == 1
    assert remedy in watching.notices[0]


def test_more_folders_than_the_system_watches_are_told_and_listed_now_and_then(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inotify = pytest.importorskip("watchdog.observers.inotify_c")
    add, added = inotify.inotify_add_watch, []

    def add_a_few(*arguments: Any) -> int:
        added.append(arguments)
        if len(added) <= 3:
            return int(add(*arguments))
        inotify.ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(inotify, "inotify_add_watch", add_a_few)
    for name in "abcdef":
        (folder / name).mkdir()
    watching = start(scan_every_seconds=0.5)
    photo(folder / "f" / "unheard.png", 1)
    until(lambda: watching.names() == {"unheard.png"})
    assert ["max_user_watches" in notice for notice in watching.notices] == [True]


def test_events_that_were_lost_are_made_up_for_by_a_scan(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.watch, "MAX_DELAY_SECONDS", 0.5)
    monkeypatch.setattr(indexer.events.Listener, "on_any_event", lambda self, event: None)
    watching = start()
    photo(folder / "a.png", 1)
    logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; filesystem events were lost")
    until(lambda: watching.names() == {"a.png"})


def test_an_index_that_another_process_writes_is_waited_for(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.watch, "RETRY_SECONDS", 0.3)
    watching = start()
    with filelock.FileLock(watching.index / "lock"):
        photo(folder / "a.png", 1)
        until(lambda: watching.notices)
        photo(folder / "b.png", 2)
        time.sleep(0.7)
    until(lambda: watching.names() == {"a.png", "b.png"})
    assert ["another process is writing" in notice for notice in watching.notices] == [True]


def test_a_folder_that_vanishes_loses_nothing_and_is_watched_again(
    start: Start, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.watch, "SCAN_SOON_SECONDS", 0.3)
    monkeypatch.setattr(indexer.watch, "MAX_DELAY_SECONDS", 0.3)
    (tmp_path / "other").mkdir()
    photo(folder / "a.png", 1)
    watching = start(folder, tmp_path / "other")
    folder.rename(tmp_path / "away")
    photo(tmp_path / "other" / "b.png", 2)
    until(lambda: watching.notices)
    until(lambda: watching.names() == {"a.png", "b.png"})
    (tmp_path / "away").rename(folder)
    photo(folder / "c.png", 3)
    until(lambda: "c.png" in watching.names())
    monkeypatch.setattr(indexer.watch, "MAX_DELAY_SECONDS", 600)
    photo(folder / "d.png", 4)
    until(lambda: watching.names() == {"a.png", "b.png", "c.png", "d.png"})
    assert len(watching.notices) == 1
    assert not watching.sum("deleted")


def test_a_folder_that_is_deleted_and_made_again_is_watched_again(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.watch, "SCAN_SOON_SECONDS", 0.3)
    monkeypatch.setattr(indexer.watch, "MAX_DELAY_SECONDS", 0.3)
    watching = start()
    shutil.rmtree(folder)
    until(lambda: watching.notices)
    folder.mkdir()
    photo(folder / "a.png", 1)
    until(lambda: watching.names() == {"a.png"})
    monkeypatch.setattr(indexer.watch, "MAX_DELAY_SECONDS", 600)
    photo(folder / "b.png", 2)
    until(lambda: watching.names() == {"a.png", "b.png"})


def test_each_file_that_cannot_be_used_is_told_once(start: Start, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no photo")
    watching = start(scan_every_seconds=0.2, retry_failed=True)
    until(lambda: watching.runs() >= 3)
    photo(folder / "broken.png", 1)
    until(lambda: watching.names() == {"broken.png"})
    assert len(watching.skipped) == 1


def test_a_broken_index_ends_it(start: Start, folder: Path) -> None:
    photo(folder / "a.png", 1)
    watching = start()
    for segment in (watching.index / "segments").iterdir():
        segment.unlink()
    photo(folder / "b.png", 2)
    until(lambda: watching.ended)
    assert isinstance(watching.error, IndexFormatError)


@pytest.mark.parametrize(
    ("stores", "options", "kind"),
    [("photos", {}, UsageError), (["absent"], {}, StoreUnusable), (["."], {"scan_every_seconds": 0}, UsageError)],
)
def test_what_makes_no_sense_is_refused_at_the_start(
    tmp_path: Path, stores: Any, options: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        indexer.watch.watch(tmp_path / "index", stores, encoder=FakeEncoder(), **options)


# -- when a run is due -----------------------------------------------------------------------------------------------


def test_a_run_waits_for_rest() -> None:
    changes = Changes()
    assert changes.due(100) == []
    changes.touched("/p/a", 100)
    changes.touched("/p/b", 100.5)
    assert changes.due(100.5 + SETTLE_SECONDS / 2) == []
    assert changes.due(100.5 + SETTLE_SECONDS) == ["/p/a/", "/p/b/"]
    assert changes.due(200) == []


def test_a_stream_of_events_without_a_pause_is_cut() -> None:
    changes, runs = Changes(), 0
    for tick in range(1000):
        changes.touched(f"/p/{tick}", tick / 10)
        runs += bool(changes.due(tick / 10))
    assert runs == pytest.approx(100 / MAX_DELAY_SECONDS, abs=1)


def test_a_folder_waits_for_a_file_that_is_being_written_but_not_for_ever() -> None:
    changes = Changes()
    changes.touched("/p", 0)
    changes.touched("/q", 0)
    due = {}
    for now in range(100):
        changes.touched("/p/busy", now)
        changes.writing("/p/busy/file.jpg", now)
        for folder in changes.due(now):
            due.setdefault(folder, now)
    assert (due["/q/"], due["/p/"]) == (MAX_DELAY_SECONDS, MAX_HOLD_SECONDS)


@pytest.mark.parametrize("closed", [True, False])
def test_a_file_is_at_rest_once_it_is_closed_or_nothing_is_heard_of_it(closed: bool) -> None:
    changes = Changes()
    changes.touched("/p", 0)
    changes.writing("/p/file.jpg", 0)
    if closed:
        changes.at_rest("/p/file.jpg")
    assert bool(changes.due(STILL_WRITING_SECONDS - 1)) == closed
    assert bool(changes.due(STILL_WRITING_SECONDS)) == (not closed)


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "a!", "a0"]), max_size=4).map(lambda parts: "/".join(["", *parts])))
)
def test_the_topmost_folders_hold_all_and_none_holds_another(folders: list[str]) -> None:
    found = topmost(folders)
    assert all(any(os.path.join(folder, "").startswith(top) for top in found) for folder in folders)
    assert not any(a != b and a.startswith(b) for a in found for b in found)
    assert len(set(found)) == len(found)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_home")
def test_the_command_line_finds_a_new_photo_within_seconds_and_ctrl_c_keeps_everything(
    folder: Path, tmp_path: Path
) -> None:
    photo(folder / "a.png", 1)
    index = tmp_path / "index"
    options = ["--index", index, "--model", "mini", "--watch", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "searchengine", "index", folder, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert json.loads(process.stdout.readline())["added"] == 1
        time.sleep(0.3)
        used = cpu_seconds(process.pid)
        time.sleep(1.5)
        assert cpu_seconds(process.pid) - used <= 0.1, "an idle watch takes next to no time"
        started = time.monotonic()
        photo(folder / "album" / "b.png", 2)
        assert json.loads(process.stdout.readline())["added"] == 1
        assert time.monotonic() - started < 5
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr
        told = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert "watching for changes" in told
    assert "what was committed is kept" in told
    assert "Traceback" not in told
    with Index(index) as opened:
        assert len(opened.snapshot()) == 2


def test_people_read_a_summary_first_and_then_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    tell = _printer(False)
    tell(Report(scanned=3, unchanged=3).as_dict())
    tell(Report(scanned=2, added=1, moved=1, deleted=2).as_dict())
    first, second = capsys.readouterr().out.splitlines()
    assert first == "nothing to do; 3 unchanged"
    assert re.fullmatch(r"\d\d:\d\d:\d\d  1 added, 1 moved, 2 deleted", second)


def cpu_seconds(pid: int) -> float:
    if not os.path.exists(f"/proc/{pid}/stat"):
        pytest.skip("this system has no /proc")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("options", [["--watch", "--dry-run"], ["--scan-every", "5"], ["--watch", "--scan-every", "0"]])
def test_options_that_make_no_sense_together_are_refused(cli: Cli, folder: Path, options: list[str]) -> None:
    outcome = cli("index", folder, *options)
    assert outcome.code == 2
    assert "--scan-every" in outcome.err or "--dry-run" in outcome.err


@pytest.mark.usefixtures("own_home")
def test_retry_failed_reads_a_failed_file_again(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no photo")
    options = ["--index", tmp_path / "index", "--model", "mini"]
    assert "skipped" in cli("index", folder, *options).err
    assert "skipped" not in cli("index", folder, *options).err
    assert "skipped" in cli("index", folder, *options, "--retry-failed").err
