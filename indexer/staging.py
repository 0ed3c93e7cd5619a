"""How an index in Milvus is written: as an ordinary one in a folder, the staging index, which is then published.

Whatever writes an index (`index`, `reencode`, `classify --write-tags`, `compact`, `verify --repair`) writes the
staging index, with all that holds for it: one commit point, resumed runs, photos that move. After commits, not more
often than every PUBLISH_SECONDS, and in the end, what differs goes to Milvus (copy.py). So a run that is killed, or
that Milvus does not answer, loses nothing but time: what was committed is published by the next one.

Beside the staging index lies what it corresponds to: the number of the commit in Milvus. Where Milvus has another one,
another machine has written meanwhile, and the staging index is first brought up to that; what it had and never
published is dropped. A machine without a staging index fetches all once.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from indexer.checks.milvus import damaged_ids
from indexer.copy import make_same
from indexer.replicas.lease import Lease
from indexer.replicas.local_writing import Diverged, WritableLocalReplica
from indexer.replicas.milvus import MilvusReplica, is_whole, read_state
from indexer.replicas.milvus_writing import WritableMilvusReplica, make_state_collection, new_commit
from indexer.replicas.staged import StagedReplica, Standing, read_standing, staging_folder, write_standing
from searchengine.errors import IndexFormatError, IndexLocked, IndexNotFound, IndexUnusable, SearchEngineError
from searchengine.index.commits import Commits, Version
from searchengine.index.layout import IndexPaths, make_folder, read_identity
from searchengine.milvus.connection import REQUEST_SECONDS, Connection, MilvusPlace
from searchengine.text import printable

PUBLISH_SECONDS = 20.0
LOOK_SECONDS = 0.5  # how often the publisher looks for commits
# A publication compares all photos; so that it takes no more than a tenth of a run's time, the next one waits.
WAIT_FOR_EACH_SECOND = 9.0

OnNotice = Callable[[str], None]


@contextmanager
def staged(
    address: str,
    *,
    root: Path,
    on_notice: OnNotice = lambda message: None,
    repair: bool = False,
) -> Iterator[Path]:
    """The folder of the staging index, as new as the index in Milvus, for whatever writes indexes.

    It need not be there yet: then there is no index. It is published meanwhile and in the end, also where that is by an
    error. Nobody else writes the index in Milvus as long. `repair` first drops from Milvus what is not
    what was published, and compares all in the end.

    Raises IndexLocked while another process writes it, IndexUnusable where Milvus does not answer, UsageError.
    """
    place = MilvusPlace.parse(address)
    with closing(Connection(place, create=True)) as connection:
        make_state_collection(connection)
        with Lease(connection) as lease:
            with closing(Staging(connection, lease, staging_folder(place, root), on_notice=on_notice)) as staging:
                if repair:
                    staging.drop_damaged()
                staging.catch_up()
                with staging.publishing():
                    yield staging.index


class Staging:
    """A staging index in `folder`, of the index at `connection`, held by this process through `lease`."""

    def __init__(self, connection: Connection, lease: Lease, folder: Path, *, on_notice: OnNotice) -> None:
        self.index = folder / "index"
        self._published = folder / "published.sqlite"
        self._connection = connection
        self._lease = lease
        self._on_notice = on_notice
        self._commits = Commits(IndexPaths(self.index).database)
        self._last_published: Version | None = None  # of the commits of the staging index
        make_folder(folder)

    def close(self) -> None:
        self._commits.close()

    def drop_damaged(self) -> None:
        """Let what is damaged in Milvus be published again, if the staging index has it."""
        state, standing = read_state(self._connection), read_standing(self._published)
        if state is None:
            return
        damaged = damaged_ids(MilvusReplica(self._connection, state.identity))
        if standing and standing.reached <= state.commit <= standing.begun:  # what was published is not there any more
            write_standing(self._published, Standing(standing.reached, max(standing.begun, standing.reached + 1)))
        with self._connection.errors_named():
            for image_id in damaged:
                self._connection.client.delete(state.collection, ids=[image_id], timeout=REQUEST_SECONDS)

    def catch_up(self) -> None:
        """Bring the staging index up to the one in Milvus, unless it is that, or newer."""
        state, standing = read_state(self._connection), read_standing(self._published)
        if state is None or (self._has_index() and standing and standing.reached <= state.commit <= standing.begun):
            return
        write_standing(self._published, None)
        if self.index.exists() and not self._has_index():
            shutil.rmtree(self.index)
        source = MilvusReplica(self._connection, state.identity)
        self._on_notice(f"fetching what is in {source.shown} and not on this machine")
        try:
            self._fetch(source, verified=is_whole(state))
        except (Diverged, IndexFormatError):  # it has what was never published, or is damaged
            shutil.rmtree(self.index)
            self._fetch(source, verified=is_whole(state))
        with StagedReplica(self.index, published=self._published) as fetched:
            # What half a publication left is compared with the staging index when that is published.
            fetched.remember(Standing(state.commit, state.commit + (not is_whole(state))), None)

    def _has_index(self) -> bool:
        """Whether there is a staging index at all. What is left of one without card or tables is of no use."""
        paths = IndexPaths(self.index)
        return paths.identity.exists() and paths.database.exists()

    def _fetch(self, source: MilvusReplica, *, verified: bool) -> None:
        try:
            if read_identity(self.index) != source.identity:  # its model was changed
                shutil.rmtree(self.index)
        except IndexNotFound:
            pass
        with WritableLocalReplica(self.index, identity=source.identity) as target:
            make_same(source, target, replace=True, verified=verified)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Publishes what is committed, in the background, until the context ends; then the rest."""
        ended = threading.Event()
        publisher = threading.Thread(target=self._publish_until, args=(ended,), name="publisher", daemon=True)
        publisher.start()
        try:
            yield
        finally:
            ended.set()
            publisher.join()
            try:
                self._publish()
            except (IndexUnusable, sqlite3.Error) as error:
                kind = type(error) if isinstance(error, IndexUnusable) else IndexUnusable
                raise kind(
                    f"{error}; what was done is kept in {printable(str(self.index))}, and the next command that writes "
                    "publishes it"
                ) from None

    def _publish_until(self, ended: threading.Event) -> None:
        last_began = last_ended = time.monotonic()
        told = False
        while not ended.wait(LOOK_SECONDS):
            pause = max(PUBLISH_SECONDS, WAIT_FOR_EACH_SECOND * (last_ended - last_began))
            if time.monotonic() - last_ended < pause:
                continue
            last_began = time.monotonic()
            try:
                self._publish()
                told = False
            except IndexLocked:  # what remains is published, or refused, in the end
                return
            except (SearchEngineError, sqlite3.Error) as error:
                if not told:
                    self._on_notice(f"{error}; it is tried again, and what is done meanwhile is kept")
                told = True
            last_ended = time.monotonic()

    def _publish(self) -> None:
        try:
            commit_of_staging = self._commits.version()
            read_identity(self.index)
        except (IndexFormatError, IndexNotFound):  # there is none yet
            return
        if commit_of_staging == self._last_published:
            return
        state, standing = read_state(self._connection), read_standing(self._published)
        commit = state.commit if state else new_commit()
        write_standing(self._published, Standing(commit, commit + 3))  # a publication raises it twice, to even and odd
        with StagedReplica(self.index, published=self._published) as source:
            is_known = state and state.identity == source.identity and standing == Standing(commit, commit)
            differences = source.differences() if is_known else None
            target = WritableMilvusReplica(self._connection, self._lease, source.identity, first_commit=commit)
            make_same(source, target, differences=differences, replace=True)
            state = read_state(self._connection)
            commit = state.commit if state else 0
            source.remember(Standing(commit, commit), differences)
        self._last_published = commit_of_staging
