"""An index in Milvus as it is written: copied there and back, brought up to date through a staging index, and held by
one writer. Against Milvus Lite as a server, as a process of its own that can be killed, and as a file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder

import indexer
from indexer import staging
from indexer.checks.milvus import check_milvus
from indexer.copy import compare, copy
from indexer.reencode import reencode
from indexer.replicas import lease, milvus, milvus_writing
from indexer.replicas.lease import Lease
from indexer.replicas.local import LocalReplica
from indexer.replicas.milvus import LEASE, open_replica, read_state
from indexer.replicas.milvus_writing import WritableMilvusReplica, make_state_collection, open_for_writing
from indexer.replicas.staged import staging_folder
from indexer.staging import staged
from indexer.tags import TaggingRequest, write_tags
from indexer.verify import verify
from searchengine import open_index
from searchengine.errors import IndexFormatError, IndexLocked, IndexUnusable, ModelMismatch
from searchengine.milvus import connection
from searchengine.milvus.connection import Connection, MilvusPlace
from searchengine.milvus.schema import LAST_RUN, NOTHING, STATE, state_collection

ROOT = Path(__file__).parent.parent
STRANGE = b"\xff%'\" \xc3\xa9\n.png"


class Server:
    """Milvus Lite as a server, with its data in `folder`; the port stays when it is started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self._folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._is_listening)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_listening(self) -> bool:
        with closing(socket.socket()) as asking:
            return asking.connect_ex(("127.0.0.1", self.port)) == 0


def wait_for(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, for each commit waits for the disk."""
    with tempfile.TemporaryDirectory(dir=QUICK, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        server = Server(Path(name))
        yield server
        server.kill()


numbers = count(1)


@pytest.fixture
def address(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an index that is not there yet."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    return f"milvus://127.0.0.1:{server.port}/test_{next(numbers)}"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A dozen photos, an exact copy, a broken one and a name that is not UTF-8."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        painted(number).save(photos / f"{number}.png")
    (photos / "copy.png").write_bytes((photos / "3.png").read_bytes())
    (photos / "broken.png").write_bytes(b"no picture")
    os.rename(photos / "4.png", os.path.join(os.fsencode(photos), STRANGE))
    return photos


def index(photos: Path, folder: Path) -> indexer.Report:
    return indexer.build(folder, [photos], encoder=FakeEncoder(), isolated=False)


def index_there(photos: Path, address: str, root: Path) -> indexer.Report:
    """What `searchengine index --index ADDRESS` does on the machine whose staging indexes are below `root`."""
    with staged(address, root=root) as folder:
        return index(photos, folder)


def tag(folder: Path, *labels: str) -> None:
    request = TaggingRequest(labels=labels, templates=["{}"], top=2, min_probability=0.0)
    write_tags(folder, request, encoder=FakeEncoder())


def assert_same(folder: Path, address: str) -> None:
    """Photo by photo, vectors to the bit, and everything else."""
    with LocalReplica(folder) as one, open_replica(address) as other:
        assert len(compare(one, other)) == 0
        ids = [image_id for page in one.ids() for image_id in page]
        photos, matrix = one.photos(ids)
        copies, vectors = other.photos(ids)
        assert photos == copies
        assert matrix.tobytes() == vectors.tobytes()
        assert other.identity == one.identity
        assert dict(other.values()) == dict(one.values())
    assert check_milvus(address, root=folder.parent / "nowhere") == []


def dropped(address: str) -> None:
    """What docs/milvus.md tells who wants to begin anew, but for the staging index."""
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        collections = connection.client.list_collections()
        for collection in collections:
            if collection.startswith(f"{connection.name}_"):
                connection.client.drop_collection(collection)


def others(folder: Path, count: int) -> Path:
    """Photos that are none of the library."""
    folder.mkdir()
    for number in range(100, 100 + count):
        painted(number).save(folder / f"{number}.png")
    return folder


def commit_of(address: str) -> int:
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        state = read_state(connection)
        assert state is not None
        return state.commit


# -- copies ------------------------------------------------------------------------------------------------------------


def test_an_index_goes_to_milvus_and_comes_back_the_same(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    tag(tmp_path / "a", "dog", "a cat", "t%rée")
    report = copy(tmp_path / "a", address)
    assert (report.photos, report.added, report.failures, report.sampled) == (13, 13, 1, 13)
    assert_same(tmp_path / "a", address)
    copy(address, tmp_path / "b")
    assert_same(tmp_path / "b", address)
    assert verify(tmp_path / "b").problems == []
    assert copy(tmp_path / "a", tmp_path / "b").unchanged == 13


def test_an_index_in_a_file_is_there_when_it_is_opened_again(library: Path, tmp_path: Path) -> None:
    file = f"milvus://{tmp_path}/photos.db"
    index(library, tmp_path / "a")
    copy(tmp_path / "a", file)
    assert_same(tmp_path / "a", file)
    (library / "2.png").unlink()
    index(library, tmp_path / "a")
    assert copy(tmp_path / "a", file).deleted == 1
    assert_same(tmp_path / "a", file)


def test_a_later_copy_brings_only_what_changed(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    tag(tmp_path / "a", "dog", "cat")
    copy(tmp_path / "a", address)
    before = commit_of(address)
    again = copy(tmp_path / "a", address)
    assert (again.added, again.updated, again.deleted, again.unchanged) == (0, 0, 0, 13)
    assert commit_of(address) == before  # readers have nothing to look at anew
    (library / "5.png").unlink()
    (library / "6.png").rename(library / "moved.png")
    painted(99).save(library / "7.png")
    tag(tmp_path / "a", "cat", "house")
    index(library, tmp_path / "a")
    report = copy(tmp_path / "a", address)
    assert (report.added, report.updated, report.deleted) == (0, 12, 1)  # the tags of all were made anew
    assert commit_of(address) > before
    assert_same(tmp_path / "a", address)


def test_facts_that_are_longer_than_a_field_of_milvus_come_back(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    labels = [f"label number {number} with a rather long name" for number in range(1600)]
    tag(tmp_path / "a", *labels)
    copy(tmp_path / "a", address)
    assert_same(tmp_path / "a", address)
    tag(tmp_path / "a", "dog", *labels[:1500])
    copy(tmp_path / "a", address)
    assert_same(tmp_path / "a", address)


def test_an_index_in_milvus_of_another_encoder_is_refused(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    copy(tmp_path / "a", address)
    indexer.build(tmp_path / "b", [library], encoder=FakeEncoder(name="other"), isolated=False)
    with pytest.raises(ModelMismatch, match="is of the encoder other .* of fake"):
        copy(tmp_path / "b", address)
    with pytest.raises(ModelMismatch, match="is of the encoder fake .* of other"):
        copy(address, tmp_path / "b")


def test_an_open_reader_takes_no_vector_of_an_index_for_that_of_another_in_its_place(
    library: Path, tmp_path: Path, address: str
) -> None:
    index(library, tmp_path / "a")
    index(others(tmp_path / "others", 3), tmp_path / "b")
    copy(tmp_path / "a", address)
    with open_index(address) as there, open_index(tmp_path / "b") as local:
        assert there.vector(1).tobytes() != local.vector(1).tobytes()
        copy(tmp_path / "b", address, replace=True)
        there.snapshot()
        assert there.vector(1).tobytes() == local.vector(1).tobytes()


@pytest.mark.parametrize("name", [STATE, LAST_RUN])
def test_of_a_damaged_index_the_remedy_is_told_and_works(
    library: Path, tmp_path: Path, address: str, name: str
) -> None:
    index(library, tmp_path / "a")
    copy(tmp_path / "a", address)
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        row = {"name": name, "payload": "{", "nothing": NOTHING}
        connection.client.upsert(state_collection(connection.name), [row])
    with pytest.raises(IndexFormatError, match=f"drop its collections .* searchengine copy FOLDER {address}$"):
        copy(tmp_path / "a", address)
    dropped(address)
    copy(tmp_path / "a", address)
    assert_same(tmp_path / "a", address)


# Copies, or indexes through a staging index, and kills itself, as kill -9 does, at the n-th write to Milvus.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import indexer.copy
from indexer.replicas import milvus_writing
from indexer.tags import remove_tags
from test_milvus_index import index_there, staged

milvus_writing.WritableMilvusReplica.photos_per_write = 4
write, calls = milvus_writing.WritableMilvusReplica.write, []

def fatal(*arguments):
    calls.append(1)
    write(*arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

milvus_writing.WritableMilvusReplica.write = fatal
what, source, address, root = sys.argv[1:]
if what == "copy":
    indexer.copy.copy(source, address)
elif what == "index":
    index_there(Path(source), address, Path(root))
else:
    with staged(address, root=Path(root)) as folder:
        remove_tags(folder, ["dog"])
"""


def killed(what: str, source: Path, address: str, root: Path) -> None:
    script = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script, what, str(source), address, str(root)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL


def test_a_copy_that_was_killed_is_gone_on_with_at_once(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    copy(tmp_path / "a", address)
    for number in range(20, 32):
        painted(number).save(library / f"{number}.png")
    index(library, tmp_path / "a")
    killed("copy", tmp_path / "a", address, tmp_path)
    (problem,) = check_milvus(address, root=tmp_path)
    assert "has 21 photos with 20 vectors, where 13 with 12 were published" in problem.message
    with pytest.raises(IndexUnusable, match="has begun and not ended; wait for it, or run `searchengine index`"):
        copy(address, tmp_path / "back")
    report = copy(tmp_path / "a", address)  # its lease holds nobody up on the machine where it died
    assert (report.added, report.unchanged) == (4, 21)
    assert_same(tmp_path / "a", address)


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_writes(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    with staged(address, root=tmp_path / "one"):
        told = f"another process is writing the index at {address} .process {os.getpid()} on .*; wait for it"
        with pytest.raises(IndexLocked, match=told):
            copy(tmp_path / "a", address)
    copy(tmp_path / "a", address)


def write_lease(connection: Connection, **fields: object) -> None:
    row = {"holder": "another", "process": "process 1 on elsewhere", "since": "now", "until": time.time() + 60} | fields
    payload = {"name": LEASE, "payload": json.dumps(row), "nothing": NOTHING}
    connection.client.upsert(state_collection(connection.name), [payload])


def test_a_lease_that_ran_out_holds_nobody_up(address: str) -> None:
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        make_state_collection(connection)
        write_lease(connection)
        with pytest.raises(IndexLocked, match="process 1 on elsewhere, since now"):
            Lease(connection).__enter__()
        write_lease(connection, until=time.time() - 1)
        with Lease(connection) as held:
            held.check()


def test_who_lost_the_lease_writes_no_more(library: Path, tmp_path: Path, address: str) -> None:
    index(library, tmp_path / "a")
    with LocalReplica(tmp_path / "a") as source, open_for_writing(address, source.identity) as target:
        photos, matrix = source.photos([1, 2])
        target.write(photos, matrix)
        with closing(Connection(MilvusPlace.parse(address))) as other:
            write_lease(other)
        with pytest.raises(IndexLocked, match="took to writing"):
            target.write(*source.photos([3]))
        assert target.view().count() == 2


def test_of_two_that_ask_at_once_one_gets_the_lease(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        make_state_collection(connection)
    together, done = threading.Barrier(2), threading.Barrier(2)
    outcomes: list[str] = []

    def ask() -> None:
        with closing(Connection(MilvusPlace.parse(address))) as connection:
            together.wait(timeout=30)
            try:
                with Lease(connection):
                    outcomes.append("held")
                    done.wait(timeout=30)
            except IndexLocked:
                outcomes.append("locked")
                done.wait(timeout=30)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["held", "locked"]


# -- indexing into Milvus ----------------------------------------------------------------------------------------------


def test_an_index_in_milvus_is_kept_up_to_date_like_one_in_a_folder(
    library: Path, tmp_path: Path, address: str
) -> None:
    assert index_there(library, address, tmp_path / "one").added == 13
    index(library, tmp_path / "local")
    with LocalReplica(tmp_path / "local") as local, open_replica(address) as there:
        assert len(compare(local, there)) == 0  # as a run into a folder makes it
    (library / "5.png").unlink()
    (library / "6.png").rename(library / "moved.png")
    painted(99).save(library / "7.png")
    report = index_there(library, address, tmp_path / "one")
    assert (report.updated, report.moved, report.deleted, report.unchanged) == (1, 1, 1, 10)
    index(library, tmp_path / "local")
    with LocalReplica(tmp_path / "local") as local, open_replica(address) as there:
        assert len(compare(local, there)) == 0
    assert check_milvus(address, root=tmp_path / "one") == []


def test_a_run_without_changes_sends_no_photo_and_asks_for_none(
    library: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_there(library, address, tmp_path / "one")
    for name in ("write", "remove"):
        monkeypatch.delattr(WritableMilvusReplica, name)
    monkeypatch.delattr("indexer.replicas.milvus.MilvusReplica.digests")
    assert index_there(library, address, tmp_path / "one").unchanged == 13


def test_another_machine_takes_up_what_was_published(library: Path, tmp_path: Path, address: str) -> None:
    index_there(library, address, tmp_path / "one")
    painted(50).save(library / "50.png")
    told: list[str] = []
    with staged(address, root=tmp_path / "two", on_notice=told.append) as folder:
        report = index(library, folder)
    assert (report.added, report.unchanged) == (1, 13)
    assert told == [f"fetching what is in {address} and not on this machine"]
    painted(51).save(library / "51.png")
    report = index_there(library, address, tmp_path / "one")
    assert (report.added, report.unchanged) == (1, 14)
    with open_replica(address) as there:
        assert [image_id for page in there.ids() for image_id in page] == list(range(1, 16))
    assert check_milvus(address, root=tmp_path / "one") == []


def test_what_was_never_published_gives_way_to_what_another_machine_published(
    library: Path, tmp_path: Path, address: str
) -> None:
    index_there(library, address, tmp_path / "one")
    painted(50).save(library / "50.png")
    index(library, staging_folder(MilvusPlace.parse(address), tmp_path / "one") / "index")  # killed after this
    (library / "50.png").unlink()
    painted(51).save(library / "51.png")
    index_there(library, address, tmp_path / "two")
    assert index_there(library, address, tmp_path / "one").unchanged == 14
    with open_replica(address) as there:
        assert there.count() == 14
    assert check_milvus(address, root=tmp_path / "one") == []


def test_commits_are_published_while_a_run_goes_on(
    library: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PUBLISH_SECONDS", 0.05)
    monkeypatch.setattr(staging, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(staging, "WAIT_FOR_EACH_SECOND", 0.0)
    with staged(address, root=tmp_path / "one") as folder:
        index(library, folder)
        with closing(Connection(MilvusPlace.parse(address))) as reader:
            wait_for(lambda: (state := read_state(reader)) is not None and state.images == 13)


def test_what_a_killed_run_committed_is_published_by_the_next(library: Path, tmp_path: Path, address: str) -> None:
    index_there(library, address, tmp_path / "one")
    index(library, tmp_path / "local")
    for number in range(20, 32):
        painted(number).save(library / f"{number}.png")
    killed("index", library, address, tmp_path / "one")
    with open_replica(address) as there:
        assert there.count() == 21
    for number in range(20, 32):  # so that the staging index is what was published last, but not what is in Milvus
        (library / f"{number}.png").unlink()
    assert index_there(library, address, tmp_path / "one").deleted == 12
    with LocalReplica(tmp_path / "local") as local, open_replica(address) as there:
        assert len(compare(local, there)) == 0
    assert check_milvus(address, root=tmp_path / "one") == []


def test_another_machine_takes_up_half_a_publication_and_completes_it(
    library: Path, tmp_path: Path, address: str
) -> None:
    index_there(library, address, tmp_path / "one")
    with staged(address, root=tmp_path / "one") as folder:
        tag(folder, "dog", "cat")
    killed("forget a label", library, address, tmp_path / "one")
    (problem,) = check_milvus(address, root=tmp_path / "one")
    assert "a publication has begun and not ended" in problem.message
    assert index_there(library, address, tmp_path / "two").unchanged == 13
    assert check_milvus(address, root=tmp_path / "two") == []
    with open_replica(address) as there:
        assert all([label for label, _ in photo.tags] == ["cat"] for photo in there.photos(range(1, 14))[0])


def test_a_server_that_is_killed_during_a_run_costs_only_the_publication(
    library: Path, tmp_path: Path, address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_there(library, address, tmp_path / "one")
    for module in (connection, lease, milvus, milvus_writing, staging):
        monkeypatch.setattr(module, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    painted(50).save(library / "50.png")
    try:
        kept = r"does not answer .*; what was done is kept in .*, and the next command that writes publishes it"
        with pytest.raises(IndexUnusable, match=kept), staged(address, root=tmp_path / "one") as folder:
            server.kill()
            assert index(library, folder).added == 1
    finally:
        server.start()
        monkeypatch.undo()
    wait_for(lambda: index_again(library, address, tmp_path / "one"))
    with open_replica(address) as there:
        assert there.count() == 14
    assert check_milvus(address, root=tmp_path / "one") == []


def index_again(library: Path, address: str, root: Path) -> bool:
    """Whether it works: a client notices by and by that the server is back."""
    try:
        assert index_there(library, address, root).unchanged == 14
    except IndexUnusable:
        return False
    return True


def test_a_change_of_the_model_is_one_step_for_readers(library: Path, tmp_path: Path, address: str) -> None:
    index_there(library, address, tmp_path / "one")
    other = FakeEncoder(name="other", dim=24)
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        before = read_state(connection)
        with staged(address, root=tmp_path / "one") as folder:
            assert reencode(folder, encoder=other, isolated=False).swapped
            assert read_state(connection) == before
        after = read_state(connection)
        assert before and after
        assert (after.identity.fingerprint, after.identity.dim, after.images) == (other.fingerprint, 24, 13)
        assert connection.exists(after.collection)
        assert not connection.exists(before.collection)
    copy(address, tmp_path / "back")
    with open_index(tmp_path / "back") as opened:
        assert opened.identity.encoder == "other"
    with staged(address, root=tmp_path / "two") as folder, open_index(folder) as opened:
        assert opened.identity.encoder == "other"
    assert check_milvus(address, root=tmp_path / "two") == []


def test_tags_reach_milvus(library: Path, tmp_path: Path, address: str) -> None:
    index_there(library, address, tmp_path / "one")
    with staged(address, root=tmp_path / "one") as folder:
        tag(folder, "dog", "cat", "tree")
    with open_replica(address) as there, LocalReplica(folder) as local:
        photos, _ = there.photos(range(1, 14))
        assert photos == local.photos(range(1, 14))[0]
        assert all(len(photo.tags) == 2 for photo in photos)


def test_an_index_that_milvus_lost_is_published_again(library: Path, tmp_path: Path, address: str) -> None:
    index_there(library, address, tmp_path / "one")
    dropped(address)
    assert index_there(library, address, tmp_path / "one").unchanged == 13
    assert check_milvus(address, root=tmp_path / "one") == []


def test_what_was_published_to_an_index_that_is_gone_counts_for_nothing_in_a_new_one(
    library: Path, tmp_path: Path, address: str
) -> None:
    index_there(library, address, tmp_path / "one")
    dropped(address)
    index(others(tmp_path / "others", 13), tmp_path / "b")
    copy(tmp_path / "b", address)  # as many photos, by as many publications
    assert index_there(library, address, tmp_path / "one").added == 13
    with open_replica(address) as there:
        assert there.count() == 26
    assert check_milvus(address, root=tmp_path / "one") == []


@pytest.mark.parametrize("lost", ["index", "index/index.json", "index/metadata.sqlite", "published.sqlite"])
def test_of_a_staging_index_that_is_lost_or_damaged_nothing_is_lost_in_milvus(
    library: Path, tmp_path: Path, address: str, lost: str
) -> None:
    index_there(library, address, tmp_path / "one")
    place = staging_folder(MilvusPlace.parse(address), tmp_path / "one") / lost
    if place.is_dir():
        shutil.rmtree(place)
    elif lost == "published.sqlite":
        place.write_bytes(b"no database" * 500)
    else:
        place.unlink()
    report = index_there(others(tmp_path / "others", 1), address, tmp_path / "one")
    assert (report.added, report.deleted) == (1, 0)
    with open_replica(address) as there:
        assert [image_id for page in there.ids() for image_id in page] == list(range(1, 15))
    assert check_milvus(address, root=tmp_path / "one") == []


# -- verify and the command line ---------------------------------------------------------------------------------------


def spoil(address: str, *image_ids: int) -> None:
    """Other vectors than were published, of length 1 too."""
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        state = read_state(connection)
        assert state is not None
        rows = connection.query(state.collection, f"id in {list(image_ids)}", ("*",), strong=True)
        for row in rows:
            row["embedding"] = np.roll(np.array(row["embedding"], np.float32), 1)
        connection.client.upsert(state.collection, rows)


def test_verify_finds_a_photo_that_is_not_what_was_published_and_mends_it(
    library: Path, tmp_path: Path, address: str, cli: Cli, own_home: None
) -> None:
    root = tmp_path / "data-home" / "searchengine" / "milvus"
    index_there(library, address, root)
    assert cli("verify", "--index", address).out == "no problems\n"
    spoil(address, 3, 7)
    found = cli("verify", "--index", address, "--json")
    assert found.code == 1
    (result,) = found.lines
    assert {problem["kind"] for problem in result["problems"]} == {"photo"}
    assert len(result["problems"]) == 2
    mended = cli("verify", "--index", address, "--repair", "--json")
    assert (mended.code, mended.lines[0]["ok"], len(mended.lines[0]["repaired"])) == (0, True, 2)
    assert cli("verify", "--index", address, "--stores").code == 0
    index(library, tmp_path / "local")
    with LocalReplica(tmp_path / "local") as local, open_replica(address) as there:
        ids = range(1, 14)
        assert local.photos(ids)[1].tobytes() == there.photos(ids)[1].tobytes()


def test_what_no_machine_has_any_more_is_dropped_by_a_repair_and_indexed_again(
    library: Path, tmp_path: Path, address: str
) -> None:
    index_there(library, address, tmp_path / "one")
    spoil(address, 3)
    with pytest.raises(IndexUnusable, match="is not the same"), staged(address, root=tmp_path / "two"):
        pass
    with staged(address, root=tmp_path / "two", repair=True):
        pass
    assert index_there(library, address, tmp_path / "two").added == 1
    assert check_milvus(address, root=tmp_path / "two") == []


def test_the_commands_write_to_milvus(tmp_path: Path, address: str, cli: Cli, own_home: None) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        painted(number).save(photos / f"{number}.png")
    (counters,) = cli("index", photos, "--index", address, "--model", "mini", "--json").lines
    assert (counters["added"], counters["model"]) == (3, "mini")
    (status,) = cli("status", "--index", address, "--json").lines
    assert (status["images"], status["vectors"], status["model"]) == (3, 3, "mini")
    assert (status["index_kind"], status["dim"], status["last_run"]["added"]) == ("milvus", 512, 3)
    assert "by Milvus" in cli("status", "--index", address).out
    assert cli("classify", "--write-tags", "--labels", "dog,cat", "--index", address, "--model", "mini").code == 0
    assert {line["label"] for line in cli("tags", "--index", address, "--json").lines} == {"dog", "cat"}
    assert cli("compact", "--index", address).code == 0
    assert cli("compact", "--index", address, "--kind", "ivf").code == 2
    assert cli("tags", "--remove", "cat", "--index", address).code == 0
    (copied,) = cli("copy", address, tmp_path / "local", "--json").lines
    assert copied["photos"] == 3
    assert [line["label"] for line in cli("tags", "--index", tmp_path / "local", "--json").lines] == ["dog"]
