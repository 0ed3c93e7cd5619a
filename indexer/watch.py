"""Keeping an index up to date while photos come, change and go (`searchengine index --watch`).

Events of the file system say where something changed, and only those folders are listed again. A scan of everything
now and then finds what no event told: changes on network disks, by other names of a file, while a disk was away.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from indexer.engines import Engine
from indexer.events import MAX_DELAY_SECONDS, Changes, Listener
from indexer.pipeline import build
from indexer.report import OnProgress, OnSkip, Report
from indexer.scope import Globs
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import IndexLocked, StoreUnusable, UsageError
from searchengine.index.layout import index_folder
from searchengine.stores import ImageStore, is_url, open_stores
from searchengine.stores.local import LocalStore
from searchengine.text import printable
from searchengine.vectors import Encoder

SCAN_EVERY_SECONDS = 600.0
# Where events cannot be had, or a folder is away.
SCAN_SOON_SECONDS = 60.0
# While another process writes the index.
RETRY_SECONDS = 5.0
# How often the clock is looked at; waiting on an event would wait for it with signals, too.
TICK_SECONDS = 0.25
# Beyond so many changed folders, listing everything is less work.
MAX_FOLDERS = 200

OnUpdate = Callable[[Report], None]
OnNotice = Callable[[str], None]


def watch(
    index: str | os.PathLike[str],
    stores: Sequence[str | os.PathLike[str]],
    *,
    encoder: Encoder,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    batch_size: int = 32,
    limits: DecodeLimits = DEFAULT_LIMITS,
    isolated: bool = True,
    engine: Engine | None = None,
    retry_failed: bool = False,
    scan_every_seconds: float = SCAN_EVERY_SECONDS,
    on_progress: OnProgress = lambda progress: None,
    on_skip: OnSkip = lambda key, reason: None,
    on_update: OnUpdate = lambda report: None,
    on_notice: OnNotice = lambda message: None,
    stop: threading.Event | None = None,
) -> None:
    """Bring `index` up to date with `stores` as `indexer.build` does, then keep it so until `stop` is set.

    A change is taken up within seconds: once nothing has happened for a second and no photo is being written, or ten
    seconds after the first event at the latest. Every `scan_every_seconds` everything is listed again, for network
    disks give no events; where the system gives none at all, `on_notice` says why and this is done each minute. The
    index is locked only while it is being updated.

    `on_update` gets the report of the first run and of each later one that changed something; `on_skip` each file and
    reason once. `engine` is for scans of everything; a few changes are taken up sooner by this process. `retry_failed`
    holds for the first run. A folder that vanishes, or an index that another process
    writes, is a notice, and tried again.

    Raises what `indexer.build` does: StoreUnusable only at the start, IndexLocked never.
    """
    if not scan_every_seconds > 0:
        raise UsageError(f"scan_every_seconds is {scan_every_seconds}; it must be more than 0")
    open_stores(stores)
    stop = stop or threading.Event()
    told: set[tuple[str, str]] = set()

    def skip_once(key: str, reason: str) -> None:
        if (key, reason) not in told:
            told.add((key, reason))
            on_skip(key, reason)

    def update(there: Sequence[str], within: Sequence[str] | None, retry: bool) -> Report:
        return build(
            index,
            there,
            encoder=encoder,
            include=include,
            exclude=exclude,
            workers=workers,
            batch_size=batch_size,
            limits=limits,
            isolated=isolated,
            engine=None if within else engine,
            retry_failed=retry,
            within=within,
            on_progress=on_progress,
            on_skip=skip_once,
            stop=stop,
        )

    changes = Changes()
    globs = Globs(include=tuple(include), exclude=tuple(exclude))
    listener = Listener(changes, index=index_folder(index), globs=globs)
    watcher = _Watcher(
        [os.fspath(store) for store in stores],
        update=update,
        changes=changes,
        listener=listener,
        scan_every_seconds=scan_every_seconds,
        retry_failed=retry_failed,
        on_update=on_update,
        on_notice=on_notice,
        stop=stop,
    )
    try:
        watcher.keep_up()
    except KeyboardInterrupt:
        if not stop.is_set():
            raise
    finally:
        listener.close()


class _Watcher:
    """The state of one `watch`: when the next run is due, and what does not work now."""

    def __init__(
        self,
        stores: Sequence[str],
        *,
        update: Callable[[Sequence[str], Sequence[str] | None, bool], Report],
        changes: Changes,
        listener: Listener,
        scan_every_seconds: float,
        retry_failed: bool,
        on_update: OnUpdate,
        on_notice: OnNotice,
        stop: threading.Event,
    ) -> None:
        self.stores = stores
        self.update = update
        self.changes = changes
        self.listener = listener
        self.scan_every_seconds = scan_every_seconds
        self.retry_failed = retry_failed
        self.on_update = on_update
        self.on_notice = on_notice
        self.stop = stop
        self.troubles: dict[str, str] = {}
        self.last_scan = self.next_scan = -math.inf
        self.is_first = True

    def keep_up(self) -> None:
        while not self.stop.is_set():
            now = time.monotonic()
            missed = self.listener.missed_some and now - self.last_scan >= MAX_DELAY_SECONDS
            if missed or now >= self.next_scan:
                self._scan()
            elif folders := self.changes.due(now):
                everything = len(folders) > MAX_FOLDERS
                # A store far away, which may not answer, has no part in what changed in folders.
                there = self._stores_there(with_remote=everything)
                done = self._run(there, within=None if everything else folders)
                self.next_scan = min(self.next_scan, time.monotonic() + self._pause(done))
            else:
                time.sleep(TICK_SECONDS)

    def _scan(self) -> None:
        """A run over everything. What happens after it has begun, events tell."""
        there = self._stores_there()
        self._listen(store for stores in there.values() for store in stores)
        self.changes.forget()
        self.last_scan = time.monotonic()
        done = self._run(there, within=None)
        self.next_scan = time.monotonic() + self._pause(done)

    def _pause(self, done: bool) -> float:
        if not done:
            return RETRY_SECONDS
        return min(self.scan_every_seconds, SCAN_SOON_SECONDS if self.troubles else math.inf)

    def _run(self, there: Iterable[str], *, within: Sequence[str] | None) -> bool:
        """Whether the index could be brought up to date with the stores that are there."""
        if not there:
            return True
        try:
            report = self.update(list(there), within, self.retry_failed)
        except (IndexLocked, StoreUnusable) as error:
            self._tell("index", str(error))
            return False
        self.troubles.pop("index", None)
        if self.is_first or report.added or report.updated or report.moved or report.deleted:
            self.on_update(report)
        self.is_first = self.retry_failed = False
        return True

    def _stores_there(self, *, with_remote: bool = True) -> dict[str, list[ImageStore]]:
        """By location, which may be a pattern of names."""
        there = {}
        for location in self.stores:
            if is_url(location) and not with_remote:
                continue
            try:
                there[location] = open_stores([location])
            except StoreUnusable as error:
                self._tell(location, f"{error}; until then, what the index knows of it stays")
            else:
                self.troubles.pop(location, None)
        return there

    def _listen(self, stores: Iterable[ImageStore]) -> None:
        folders = [str(store.root) for store in stores if isinstance(store, LocalStore)]
        if "events" not in self.troubles and self.listener.hears(folders):
            return
        try:
            self.listener.listen(folders)
        except OSError as error:
            pause = min(self.scan_every_seconds, SCAN_SOON_SECONDS)
            self._tell("events", f"{_no_events(error)}; until then all is listed again every {pause:.0f} s")
        else:
            self.troubles.pop("events", None)

    def _tell(self, what: str, message: str) -> None:
        if self.troubles.get(what) != message:
            self.troubles[what] = message
            self.on_notice(message)


def _no_events(error: OSError) -> str:
    """Why not all changes will be heard of, and the remedy."""
    if error.errno == errno.ENOSPC:
        return (
            "there are more folders than the system lets you watch; raise that limit, with "
            "`sysctl fs.inotify.max_user_watches=1000000`"
        )
    if error.errno == errno.EMFILE:
        return (
            "too many programs watch files, or have them open; end some, or raise that limit, with "
            "`sysctl fs.inotify.max_user_instances=1000`"
        )
    return (
        f"the system tells of no changes in {printable(error.filename or 'these folders')} ({error.strerror or error})"
    )
