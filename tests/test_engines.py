"""Several workers: they find what one process finds, whatever becomes of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from conftest import painted
from fakes import FakeEncoder
from hostile import children, is_alive, needs_proc, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from workers import BlindSource, FakeSource, FlakySource

import indexer.engines.crew
import indexer.engines.leases
from indexer.crawl import Change
from indexer.engines import Place
from indexer.engines.leases import LOSSES_OF_A_LEASE, Leased, Leases
from indexer.engines.messages import Answer, Question, Setup, ToRun, ToWorker
from indexer.engines.processes import ProcessEngine
from indexer.engines.ray import RayEngine
from indexer.engines.worker import AskedContent, Worker
from indexer.pipeline import build
from indexer.report import Report, StageClock
from searchengine.errors import ModelMismatch, ModelNotFound, SearchEngineError, StoreUnusable, UsageError
from searchengine.index.reader import Index
from searchengine.index.schema import connect_for_reading, failures, images, vectors
from searchengine.models.devices import devices_of, pick_device, suitable_batch
from searchengine.models.registry import load_encoder
from searchengine.stores import StoredPhoto

PHOTOS = 120


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small photos, two of them copies of others, and a file that is none."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(PHOTOS - 2):
        painted(number, width=24, height=20).save(folder / f"{number:03}.png")
    shutil.copyfile(folder / "003.png", folder / "copy-of-003.png")
    shutil.copyfile(folder / "004.png", folder / "copy-of-004.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more of it")
    return folder


@pytest.fixture(scope="module")
def alone(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index that one process makes of it."""
    index = tmp_path_factory.mktemp("alone") / "index"
    build(index, [library], encoder=FakeEncoder(), isolated=False)
    return index


@pytest.fixture(autouse=True)
def small_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer.engines.leases, "SMALLEST_LEASE_PHOTOS", 8)


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return FakeSource(name="fake", log=tmp_path / "log")


class Logged:
    """What the encoders of a `FakeSource` did: how many photos, by process."""

    def __init__(self, source: FakeSource) -> None:
        lines = source.log.read_text().splitlines() if source.log.exists() else []
        self.batches = [(int(pid), int(photos)) for pid, _, photos in map(str.split, lines)]

    @property
    def processes(self) -> set[int]:
        return {pid for pid, _ in self.batches}

    @property
    def photos(self) -> int:
        return sum(photos for _, photos in self.batches)


def content_of(index: Path) -> dict[str, Any]:
    """All of an index but its ids and the order of its rows."""
    engine = connect_for_reading(index / "metadata.sqlite")
    with engine.begin() as connection, Index(index) as opened:
        rows = connection.execute(images.select().join(vectors).add_columns(vectors.c.content_hash)).mappings().all()
        embeddings = [opened.vector(row["vector_id"]) for row in rows]
        return {
            "photos": {
                row["key"]: (
                    {name: value for name, value in row.items() if name not in ("id", "vector_id")},
                    embedding.tobytes(),
                )
                for row, embedding in zip(rows, embeddings, strict=True)
            },
            "failures": sorted((row.key, row.reason) for row in connection.execute(failures.select())),
            "number": len(rows),
        }


def counters(report: Report) -> dict[str, Any]:
    return {name: value for name, value in report.as_dict().items() if "second" not in name}


class ThreadEngine:
    """Workers as threads of this process, at places of their own."""

    def __init__(self, source: FakeSource, *, places: int = 2) -> None:
        self.source = source
        self.number = places
        self.said: SimpleQueue[tuple[ThreadLink, ToRun]] = SimpleQueue()
        self.links: list[ThreadLink] = []

    def places(self) -> list[Place]:
        return [Place(name=f"bench {number}", device="cpu", cores=1) for number in range(self.number)]

    def start(self, place: Place, setup: Setup) -> ThreadLink:
        self.links.append(ThreadLink(setup, self.said))
        return self.links[-1]

    def hear(self, timeout_seconds: float) -> list[tuple[ThreadLink, ToRun]]:
        try:
            return [self.said.get(timeout=timeout_seconds)]
        except Empty:
            return []

    def close(self) -> None:
        for link in self.links:
            link.end()


class ThreadLink:
    def __init__(self, setup: Setup, said: SimpleQueue[tuple[ThreadLink, ToRun]]) -> None:
        self.worker = Worker(setup, send=lambda message: said.put((self, message)))
        self.thread = threading.Thread(target=self.worker.run, daemon=True)
        self.thread.start()

    def send(self, message: ToWorker) -> None:
        self.worker.hear(message)

    def end(self) -> None:
        self.worker.end()


# -- processes of this machine ---------------------------------------------------------------------------------------


def test_two_processes_make_the_index_that_one_makes(library: Path, alone: Path, tmp_path: Path) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", seconds=0.05, together=2)
    reports = [
        build(tmp_path / name, [library], encoder=FakeEncoder(), batch_size=8, isolated=False, engine=engine)
        for name, engine in (("one", None), ("two", ProcessEngine(source, devices=["cpu", "cpu"])))
    ]
    assert content_of(tmp_path / "two") == content_of(alone)
    assert counters(reports[1]) == counters(reports[0])
    assert reports[1].duplicates == 2
    assert reports[1].seconds_by_stage["encode"] > 0
    assert len(Logged(source).processes) == 2
    assert os.getpid() not in Logged(source).processes
    assert not children(), "its workers go on"


@needs_proc
def test_a_killed_process_costs_no_photo_and_doubles_none(library: Path, alone: Path, tmp_path: Path) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", seconds=0.05, together=2)
    killed: list[int] = []

    def kill_one(progress: object) -> None:
        processes = Logged(source).processes
        if len(processes) == 2 and not killed:
            killed.append(max(processes))
            os.kill(killed[0], signal.SIGKILL)

    build(
        tmp_path / "index",
        [library],
        encoder=FakeEncoder(),
        batch_size=4,
        isolated=False,
        engine=ProcessEngine(source, devices=["cpu", "cpu"]),
        on_progress=kill_one,
    )
    assert killed
    assert content_of(tmp_path / "index") == content_of(alone)
    assert Logged(source).photos < 2 * PHOTOS, "all was done again"


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from fakes import FakeEncoder
from workers import FakeSource
import indexer.engines.leases, indexer.pipeline
from indexer.engines.processes import ProcessEngine
from indexer.engines.ray import RayEngine
indexer.engines.leases.SMALLEST_LEASE_PHOTOS = 8
indexer.pipeline.COMMIT_EVERY_PHOTOS = 16
source = FakeSource(name="fake", log=Path({log!r}), seconds={seconds})
indexer.pipeline.build({index!r}, [{library!r}], encoder=FakeEncoder(), batch_size=4, isolated=False, engine={engine})
"""


def driver(engine: str, *, source: FakeSource, seconds: float, index: Path, library: Path) -> list[str]:
    """The command for a run of its own process."""
    tests = Path(__file__).parent
    places = {"tests": str(tests), "root": str(tests.parent), "log": str(source.log)}
    script = DRIVER.format(**places, engine=engine, seconds=seconds, index=str(index), library=str(library))
    return [sys.executable, "-c", script]


@needs_proc
def test_a_killed_run_takes_its_workers_along_and_the_next_one_goes_on_from_its_last_commit(
    library: Path, alone: Path, source: FakeSource, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    engine = "ProcessEngine(source, devices=['cpu', 'cpu'])"
    run = subprocess.Popen(driver(engine, source=source, seconds=0.3, index=index, library=library))
    try:
        wait_until(lambda: (index / "index.json").exists() and Index(index).count_images() > 0, seconds=30)
    finally:
        run.kill()
        run.wait()
    workers = Logged(source).processes
    assert workers
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    before = Logged(source).photos
    report = build(index, [library], encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))
    assert 0 < report.added < PHOTOS
    assert Logged(source).photos - before <= report.added
    assert content_of(index) == content_of(alone)


def test_a_worker_that_sees_no_photo_is_told_from_photos_that_are_gone(library: Path, tmp_path: Path) -> None:
    source = BlindSource(name="fake", log=tmp_path / "log")
    skipped: list[str] = []
    with pytest.raises(StoreUnusable, match=r"^cpu cannot read .*No such file.*same name on every machine"):
        build(
            tmp_path / "index",
            [library],
            encoder=FakeEncoder(),
            isolated=False,
            engine=ProcessEngine(source, devices=["cpu"]),
            on_skip=lambda key, reason: skipped.append(key),
        )
    assert not skipped
    assert content_of(tmp_path / "index")["failures"] == []


def test_a_photo_that_cannot_be_read_for_a_moment_is_no_sign_of_a_worker_that_sees_none(
    library: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(library / "003.png", tmp_path / "photos")
    engine = ProcessEngine(FlakySource(name="fake", log=tmp_path / "log"), devices=["cpu"])
    report = build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False, engine=engine)
    assert (report.added, report.failed) == (1, 0)


def test_a_process_that_cannot_start_ends_the_run_with_the_reason(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", fails="start")
    with pytest.raises(SearchEngineError, match=r"no worker is left; the last one, on cpu, ended: SIGKILL"):
        build(
            tmp_path / "index",
            [library],
            encoder=FakeEncoder(),
            isolated=False,
            engine=ProcessEngine(source, devices=["cpu"]),
        )
    assert not children()


# -- what any engine's workers do ------------------------------------------------------------------------------------


def test_a_photo_that_ends_every_worker_costs_itself_alone(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(library, folder)
    Image.new("RGB", (24, 20)).save(folder / "050-black.png")
    source = FakeSource(name="fake", log=tmp_path / "log", fails="raise")
    reasons: dict[str, str] = {}
    report = build(
        tmp_path / "index",
        [folder],
        encoder=FakeEncoder(),
        batch_size=4,
        isolated=False,
        engine=ThreadEngine(source),
        on_skip=reasons.__setitem__,
    )
    assert (report.added, report.failed) == (PHOTOS, 2)
    assert reasons[str(folder / "050-black.png")] == (
        "each process that took it up ended (RuntimeError: the device is gone)"
    )
    healthy = ThreadEngine(FakeSource(name="fake", log=tmp_path / "log"))
    again = build(tmp_path / "index", [folder], encoder=FakeEncoder(), isolated=False, engine=healthy)
    assert (again.added, again.failed) == (1, 1)


def test_a_place_where_every_worker_ends_is_given_up_and_what_is_done_stays(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (24 + number, 20)).save(folder / f"black-{number:02}.png")
    shutil.copyfile(library / "001.png", folder / "a.png")
    source = FakeSource(name="fake", log=tmp_path / "log", fails="raise")
    with pytest.raises(SearchEngineError, match="no worker is left; the last one, on bench 0, ended: RuntimeError"):
        build(
            tmp_path / "index",
            [folder],
            encoder=FakeEncoder(),
            batch_size=1,
            isolated=False,
            engine=ThreadEngine(source, places=1),
        )
    assert content_of(tmp_path / "index")["number"] == 1


def test_a_worker_that_says_nothing_any_more_is_replaced(
    library: Path, alone: Path, source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.engines.crew, "SILENT_SECONDS", 0.6)
    engine = ThreadEngine(source)
    start, hung = engine.start, []

    def start_deaf(place: Place, setup: Setup) -> ThreadLink:
        link = start(place, setup)
        if not hung:
            hung.append(link)
            monkeypatch.setattr(link, "send", lambda message: None)
        return link

    monkeypatch.setattr(engine, "start", start_deaf)
    build(tmp_path / "index", [library], encoder=FakeEncoder(), batch_size=8, isolated=False, engine=engine)
    assert content_of(tmp_path / "index") == content_of(alone)
    assert len(engine.links) == 3


def test_where_no_worker_ever_starts_the_run_ends(
    library: Path, source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer.engines.crew, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(Worker, "run", lambda self: None)
    with pytest.raises(SearchEngineError, match="no worker has started"):
        build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))


def test_where_the_workers_cannot_be_heard_any_more_the_run_ends(
    library: Path, source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ThreadEngine(source)

    def fail(timeout_seconds: float) -> Any:
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr(engine, "hear", fail)
    with pytest.raises(SearchEngineError, match="cannot be heard any more: the cluster is gone"):
        build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=engine)


@pytest.mark.parametrize(("fails", "reason"), [("disk", "OSError: Input"), ("machine", "a process to decode")])
def test_a_worker_whose_machine_fails_is_replaced_until_its_place_is_given_up(
    fails: str, reason: str, library: Path, tmp_path: Path
) -> None:
    engine = ThreadEngine(FakeSource(name="fake", log=tmp_path / "log", fails=fails), places=1)
    with pytest.raises(SearchEngineError, match=f"no worker is left; the last one, on bench 0, ended: {reason}"):
        build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=engine)
    assert len(engine.links) == 2


def test_content_that_is_known_is_not_encoded_again(library: Path, source: FakeSource, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    shutil.copytree(library, photos)

    def run() -> Report:
        engine = ThreadEngine(source, places=1)
        return build(index, [photos], encoder=FakeEncoder(), batch_size=8, isolated=False, engine=engine)

    assert run().added == PHOTOS
    assert Logged(source).photos == PHOTOS - 2, "a copy was encoded, too"
    ids = {photo: image_id for image_id, photo in names_of(index)}
    (photos / "away").mkdir()
    for name in ("007.png", "008.png"):
        (photos / name).rename(photos / "away" / name)
    shutil.copyfile(photos / "010.png", photos / "away" / "one-more.png")
    report = run()
    assert (report.moved, report.added, report.duplicates, report.deleted) == (2, 1, 1, 0)
    assert Logged(source).photos == PHOTOS - 2
    after = {photo: image_id for image_id, photo in names_of(index)}
    assert after["away/007.png"] == ids["007.png"]


def names_of(index: Path) -> list[tuple[int, str]]:
    with connect_for_reading(index / "metadata.sqlite").begin() as connection:
        return [(row.id, row.key.partition("photos/")[2]) for row in connection.execute(images.select())]


def test_workers_open_archives_and_lists_by_their_names(library: Path, source: FakeSource, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for number in range(20):
            archive.write(library / f"{number:03}.png", f"inside/{number:03}.png")
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{library}/{number:03}.png\n" for number in range(20, 40)))
    stores = [tmp_path / "some.zip", tmp_path / "list.csv"]
    build(tmp_path / "one", stores, encoder=FakeEncoder(), isolated=False)
    report = build(tmp_path / "two", stores, encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))
    assert (report.added, report.failed) == (40, 0)
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


def test_ctrl_c_commits_what_is_done_and_the_next_run_goes_on(library: Path, alone: Path, tmp_path: Path) -> None:
    source, stop = FakeSource(name="fake", log=tmp_path / "log", seconds=0.02), threading.Event()
    engine = ThreadEngine(source)
    with pytest.raises(KeyboardInterrupt):
        build(
            tmp_path / "index",
            [library],
            encoder=FakeEncoder(),
            batch_size=4,
            isolated=False,
            engine=engine,
            on_progress=lambda progress: stop.set() if progress.done >= 8 else None,
            stop=stop,
        )
    done = content_of(tmp_path / "index")["number"]
    assert 0 < done < PHOTOS
    for link in engine.links:
        link.thread.join(timeout=20)
        assert not link.thread.is_alive(), "a worker goes on"
    report = build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))
    assert report.unchanged == done
    assert content_of(tmp_path / "index") == content_of(alone)


def test_an_encoder_that_cannot_be_loaded_ends_the_run_and_tells_where(library: Path, tmp_path: Path) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", fails="load")
    with pytest.raises(ModelNotFound, match=r"^bench \d: the weights are not here"):
        build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))


def test_an_encoder_of_other_weights_is_refused(library: Path, tmp_path: Path) -> None:
    source = FakeSource(name="other", log=tmp_path / "log")
    with pytest.raises(ModelMismatch, match=r"^bench \d: the encoder other is another one here"):
        build(tmp_path / "index", [library], encoder=FakeEncoder(), isolated=False, engine=ThreadEngine(source))


def test_a_run_with_nothing_to_do_starts_no_worker(alone: Path, library: Path, source: FakeSource) -> None:
    engine = ThreadEngine(source)
    report = build(alone, [library], encoder=FakeEncoder(), isolated=False, engine=engine)
    assert report.unchanged == PHOTOS
    assert not engine.links


def change(number: int) -> Change:
    store: Any = type("Named", (), {"name": "local"})()
    return Change(store=store, listed=StoredPhoto(f"/{number}", size_bytes=1, mtime_ns=1), known=False)


@settings(max_examples=60)
@given(total=st.integers(1, 200), draw=st.data())
def test_whatever_is_lost_each_photo_is_told_once_or_given_up_alone(total: int, draw: st.DataObject) -> None:
    leases = Leases(iter(map(change, range(total))), total=total)
    told: list[str] = []
    given_up: list[str] = []
    at_work: list[Leased] = []
    for _ in range(4000):
        lease = leases.next(workers=2, alone=not at_work) if len(at_work) < 2 else None
        if lease is not None:
            at_work.append(lease)
        elif not at_work:
            break
        else:
            lease = at_work.pop(0)
            some = draw.draw(st.integers(0, len(lease.photos)))
            told += [lease.photos.pop(position).listed.key for position in list(lease.photos)[:some]]
            if lease.photos:
                left = leases.give_again(lease)
                assert not left or (lease.alone and len(left) == 1)
                given_up += [photo.listed.key for photo in left]
    assert leases.all_given
    assert sorted(told + given_up) == sorted(f"/{number}" for number in range(total))


def test_a_lease_is_taken_apart_when_it_has_cost_three_workers() -> None:
    leases = Leases(iter(map(change, range(5))), total=5)
    for _ in range(LOSSES_OF_A_LEASE):
        lease = leases.next(workers=1, alone=True)
        assert lease is not None
        assert len(lease.photos) == 5
        assert leases.give_again(lease) == []
    assert leases.next(workers=1, alone=False) is None, "it is for a worker that has nothing else"
    singles = [leases.next(workers=1, alone=True) for _ in range(5)]
    assert [list(single.photos) for single in singles if single] == [[0], [1], [2], [3], [4]]


def test_threads_that_ask_at_once_share_a_question_and_each_gets_its_own_answer() -> None:
    questions: list[Question] = []

    def reply(message: ToRun) -> None:
        assert isinstance(message, Question)
        questions.append(message)
        time.sleep(0.01)
        asked.answer(Answer(frozenset(content for content in message.hashes if content[0] % 2)))

    asked = AskedContent(reply)
    contents = [bytes([number]) for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(asked.__contains__, contents))
    assert answers == [bool(content[0] % 2) for content in contents]
    assert len(questions) < 64
    assert sorted(content for question in questions for content in question.hashes) == contents


def test_nobody_waits_for_an_answer_when_the_run_is_gone() -> None:
    asked = AskedContent(lambda message: None)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(asked.__contains__, content) for content in (b"a", b"b")]
        asked.end()
        assert [future.result(timeout=20) for future in waiting] == [False, False]


def test_the_pace_of_several_encoders_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StageClock(workers=4, encoders=2)
    started = time.monotonic()
    monkeypatch.setattr("indexer.report.time.monotonic", lambda: started + 10)
    clock.add("encode", 16)
    clock.add("decode", 12)
    busiest = clock.busiest()
    assert busiest is not None
    assert busiest[0] == "encode"
    assert busiest[1] == pytest.approx(0.8, abs=0.01)


# -- the command line ------------------------------------------------------------------------------------------------


def test_devices_are_shared_out_and_everything_else_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cpu,cpu") == ["cpu", "cpu"]
    assert devices_of("auto") == ["auto"] or len(devices_of("auto")) > 1
    assert str(pick_device("cpu,cuda:7")) == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices_of("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of("cuda:1") == ["cuda:1"]
    assert (suitable_batch("cpu"), suitable_batch("cuda:1")) == (32, 256)


def test_without_a_gpu_a_run_does_not_load_torch_before_there_is_something_to_do(own_home: None) -> None:
    script = (
        "import sys; from searchengine.cli import index; from searchengine.settings import load_settings\n"
        "settings = load_settings({})\n"
        "assert index._devices(settings) and index._batch_size(settings)\n"
        "print('torch' in sys.modules, index._may_have_gpus('auto'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded, may_have_gpus = done.stdout.split()
    assert loaded == may_have_gpus


@pytest.mark.parametrize(("precision", "device", "batch_size"), [("fp32", "auto", 256), ("int8", "cpu", 32)])
def test_integers_are_encoded_on_cpus_where_there_are_gpus(
    cli: Cli,
    own_home: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: str,
    batch_size: int,
) -> None:
    monkeypatch.setattr("searchengine.cli.index._may_have_gpus", lambda device: device != "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    taken: list[Any] = []

    def build(folder: Path, stores: object, *, engine: Any, batch_size: int, **options: object) -> None:
        taken.extend((engine, batch_size))
        raise UsageError("enough")

    monkeypatch.setattr("indexer.pipeline.build", build)
    run = ("index", tmp_path, "--index", tmp_path / "i", "--model", "mini", "--precision", precision)
    assert cli(*run, "--engine", "ray").code == 2
    assert (taken[0]._device, taken[1]) == (device, batch_size)
    assert cli(*run).code == 2
    assert (taken[2] is None) == (precision == "int8")


def test_two_processes_with_mini_give_the_bits_of_one(
    cli: Cli, own_home: None, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("one", ()), ("two", ("--device", "cpu,cpu"))):
        done = cli("index", photos, "--index", tmp_path / name, "--model", "mini", "--json", *options)
        assert done.code == 0, done.err
        assert done.lines[0]["added"] == 12
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


def test_a_vector_of_mini_does_not_depend_on_what_is_beside_it() -> None:
    encoder = load_encoder("mini", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (19, 260, 260, 3), dtype=np.uint8)
    together = encoder.encode_pixels(pixels)
    apart = [encoder.encode_pixels(pixels[start : start + size]) for start, size in ((0, 1), (1, 2), (3, 5), (8, 11))]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "spark"], "neither local nor ray"),
        (["--engine", "ray", "--watch"], "--watch is for --engine local"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray gives out the devices"),
        (["--device", "cpu,gpu"], "device"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Cli, own_home: None, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = cli("index", photos, "--index", tmp_path / "index", "--model", "mini", *options)
    assert done.code == 2
    assert message in done.err


def test_without_ray_the_message_names_the_extra(source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'searchengine\[ray\]'"):
        RayEngine(source)


# -- Ray -------------------------------------------------------------------------------------------------------------


def once_more(start: Callable[[], Any]) -> Any:
    """Ray forks, then runs Python in the child, which hangs at times where there are threads, as other tests leave."""
    before = set(children())
    try:
        return start()
    except RuntimeError:
        for child in set(children()) - before:
            os.kill(child, signal.SIGKILL)
        return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the workers' encoder
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        nodes = once_more(lambda: Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False}))
        nodes.other = once_more(lambda: nodes.add_node(**node))
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        nodes.shutdown()


def test_two_nodes_of_a_ray_cluster_make_the_index_that_one_process_makes(
    cluster: Any, library: Path, alone: Path, tmp_path: Path
) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", seconds=0.05, together=2)
    report = build(
        tmp_path / "index",
        [library],
        encoder=FakeEncoder(),
        batch_size=4,
        isolated=False,
        engine=RayEngine(source),
    )
    assert content_of(tmp_path / "index") == content_of(alone)
    assert (report.added, report.duplicates, report.failed) == (PHOTOS, 2, 1)
    assert len(Logged(source).processes) == 2


def test_a_ray_node_that_is_killed_costs_no_photo_and_doubles_none(
    cluster: Any, library: Path, alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = FakeSource(name="fake", log=tmp_path / "log", seconds=0.05, together=2)
    killing: list[threading.Thread] = []

    def kill_one(progress: object) -> None:
        if len(Logged(source).processes) == 2 and not killing:
            kill = lambda: cluster.remove_node(cluster.other, allow_graceful=False)  # noqa: E731
            killing.append(threading.Thread(target=kill))
            killing[0].start()

    build(
        tmp_path / "index",
        [library],
        encoder=FakeEncoder(),
        batch_size=2,
        isolated=False,
        engine=RayEngine(source),
        on_progress=kill_one,
    )
    assert killing
    killing[0].join(timeout=60)
    assert content_of(tmp_path / "index") == content_of(alone)
    assert capfd.readouterr().out == "", "standard output is for results"


def test_without_a_cluster_a_run_starts_one_that_asks_for_a_token_and_says_nothing(
    library: Path, alone: Path, source: FakeSource, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    command = driver("RayEngine(source)", source=source, seconds=0, index=index, library=library)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short name, for sockets
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"HOME": folder, "RAY_TMPDIR": folder, "PYTHONPATH": str(Path(__file__).parent)}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
        assert (Path(folder) / ".ray" / "auth_token").is_file()
    assert content_of(index) == content_of(alone)


def test_a_cluster_of_its_own_listens_on_loopback_and_tells_nobody_of_itself(
    source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    started: dict[str, Any] = {}

    def refuse(**options: Any) -> None:
        started.update(options, usage=os.environ["RAY_USAGE_STATS_ENABLED"])
        raise RuntimeError("that is enough")

    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(SearchEngineError, match="that is enough"):
        RayEngine(source).places()
    assert (started["address"], started["_node_ip_address"]) == ("local", "127.0.0.1")
    assert (started["usage"], started["include_dashboard"]) == ("0", False)


def test_word_of_a_cluster_that_has_ended_is_not_believed(source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[Any] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options["address"]))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for address in ("127.0.0.1:9", None):
        monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder, told=address: told)
        engine = RayEngine(source)
        with pytest.raises(SearchEngineError, match="no processor to give"):
            engine.places()
        engine.close()
    assert started == ["local", "local"]


def test_a_cluster_that_is_not_there_is_an_error_that_says_so_at_once(
    library: Path, source: FakeSource, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(SearchEngineError, match=r"no Ray cluster can be used at ray://127.0.0.1:9 .*ray start --head"):
        build(
            tmp_path / "index",
            [library],
            encoder=FakeEncoder(),
            isolated=False,
            engine=RayEngine(source, address="ray://127.0.0.1:9"),
        )
    assert time.monotonic() - started < 15
