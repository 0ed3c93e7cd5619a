"""What the file system tells of changes, gathered until it has come to rest.

watchdog listens, by inotify, FSEvents or ReadDirectoryChangesW. Like a store it follows no links, and it hands on names
that are not UTF-8 as Python's surrogate escapes.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_MODIFIED,
    DirAttribEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from indexer.scope import Globs
from searchengine.formats import EXTENSIONS
from searchengine.index.layout import IndexPaths
from searchengine.stores.local import SKIPPED_FOLDERS

# Events this close together belong to one run: both ends of a move, a copy of many photos.
SETTLE_SECONDS = 1.0
# A stream of events without a pause this long is cut by a run all the same.
MAX_DELAY_SECONDS = 10.0
# A file is being written until it is closed. Not every system tells that, so silence this long counts as closed.
STILL_WRITING_SECONDS = 5.0
# A folder waits this long at most for files that are being written below it.
MAX_HOLD_SECONDS = 30.0

# Reading photos, which the index itself does, is none of them.
EVENTS: list[type[FileSystemEvent]] = [
    DirAttribEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]


class Changes:
    """Folders in which something happened, until they are due to be listed again. Times are `time.monotonic`'s."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[str, float] = {}  # when the first change came
        self._written: dict[str, float] = {}  # files that are being written: when last heard of
        self._last = 0.0

    def touched(self, folder: str, now: float) -> None:
        with self._lock:
            self._folders.setdefault(folder, now)
            self._last = now

    def writing(self, file: str, now: float) -> None:
        with self._lock:
            self._written[file] = now

    def at_rest(self, file: str) -> None:
        with self._lock:
            self._written.pop(file, None)

    def forget(self) -> None:
        """Everything is about to be listed."""
        with self._lock:
            self._folders.clear()

    def due(self, now: float) -> list[str]:
        """Take the folders that are due, none of them inside another; often there is none."""
        with self._lock:
            self._written = {
                file: heard for file, heard in self._written.items() if now - heard < STILL_WRITING_SECONDS
            }
            busy = {folder for file in self._written for folder in _folders_above(file)}
            ready = {
                folder: first
                for folder, first in self._folders.items()
                if folder not in busy or now - first >= MAX_HOLD_SECONDS
            }
            if not ready:
                return []
            if now - self._last < SETTLE_SECONDS and now - min(ready.values()) < MAX_DELAY_SECONDS:
                return []
            for folder in ready:
                del self._folders[folder]
        return topmost(ready)


class Listener(FileSystemEventHandler):
    """Hears what happens below some folders, and notes in `changes` what concerns an index of them.

    Hidden names, files that are no photos or that the globs leave out do not, nor does the index itself, which may lie
    among the photos.
    """

    def __init__(self, changes: Changes, *, index: Path, globs: Globs) -> None:
        self._changes = changes
        self._index = IndexPaths(Path(os.path.realpath(index)))
        self._globs = globs
        self._roots: dict[str, tuple[int, int] | None] = {}
        self._mounts = b""
        self._observer: BaseObserver | None = None
        self._warnings = _Warnings()

    def listen(self, roots: Sequence[str]) -> None:
        """Hear of what happens below `roots` from now on, and of nothing else.

        Raises OSError where that cannot be had for all of them; what can be heard is heard nevertheless.
        """
        self.close()
        self._roots = {root: _identity(root) for root in roots}
        self._mounts = _mounts()
        logging.getLogger("watchdog").addHandler(self._warnings)
        self._observer = Observer()
        self._observer.start()
        for root in roots:
            self._observer.schedule(self, root, recursive=True, event_filter=EVENTS)
        if roots and sys.platform == "linux":
            _ask_for_one_more(roots[0])

    def hears(self, roots: Iterable[str]) -> bool:
        """Whether it listens to these very folders, and has missed nothing that it knows of."""
        listens = self._observer is not None and not self.missed_some
        return listens and self._roots == {root: _identity(root) for root in roots} and self._mounts == _mounts()

    @property
    def missed_some(self) -> bool:
        """Whether events were lost, or a folder vanished: only a listing of everything tells what changed."""
        emitters = self._observer.emitters if self._observer else ()
        return self._warnings.came or not all(emitter.is_alive() for emitter in emitters)

    def close(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
        logging.getLogger("watchdog").removeHandler(self._warnings)
        self._warnings.came = False
        self._roots = {}

    def on_any_event(self, event: FileSystemEvent) -> None:
        now = time.monotonic()
        for path in (os.fsdecode(event.src_path), os.fsdecode(event.dest_path)):
            if not path or self._is_own(path) or not self._is_looked_at(path, is_folder=event.is_directory):
                continue
            self._changes.touched(path if event.is_directory else os.path.dirname(path), now)
            if event.event_type == EVENT_TYPE_MODIFIED:
                self._changes.writing(path, now)
            else:
                self._changes.at_rest(path)

    def _is_own(self, path: str) -> bool:
        """Whether it is a file of the index. If its folder holds photos too, only what has a name like a photo's is."""
        folder = os.path.join(self._index.folder, "")
        if any(os.path.join(root, "").startswith(folder) for root in self._roots):
            return path == str(self._index.lock)
        return path.startswith(folder) or path == str(self._index.folder)

    def _is_looked_at(self, path: str, *, is_folder: bool) -> bool:
        """Whether a crawl would come by it."""
        extension = os.path.splitext(path)[1].lower()
        if not is_folder and extension and extension not in EXTENSIONS:
            return False
        for root in self._roots:
            prefix = os.path.join(root, "")
            if path != root and not path.startswith(prefix):
                continue
            below = path.removeprefix(root).removeprefix(os.sep)
            if any(name.startswith(".") or name in SKIPPED_FOLDERS for name in below.split(os.sep)):
                continue
            if is_folder or (self._globs.includes(below) and not self._globs.excludes(below)):
                return True
        return False


class _Warnings(logging.Handler):
    """watchdog tells of lost events (an overflow of the system's queue) in its log alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.came = False

    def emit(self, record: logging.LogRecord) -> None:
        self.came = True


def topmost(folders: Iterable[str]) -> list[str]:
    """Those that are not below another one of them."""
    found: list[str] = []
    for folder in sorted(os.path.join(folder, "") for folder in folders):
        if not found or not folder.startswith(found[-1]):
            found.append(folder)
    return found


def _folders_above(file: str) -> Iterator[str]:
    folder = os.path.dirname(file)
    while folder != file:
        yield folder
        file, folder = folder, os.path.dirname(folder)


def _ask_for_one_more(folder: str) -> None:
    """Raises OSError if the system has no watch left: then watchdog has left folders out without a word."""
    probe = Observer()
    probe.start()
    try:
        probe.schedule(FileSystemEventHandler(), folder)
    finally:
        probe.stop()
        probe.join()


def _identity(folder: str) -> tuple[int, int] | None:
    """Tells a folder from another one that took its name."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _mounts() -> bytes:
    """What is mounted where: what is mounted later below a folder is not listened to. Empty where that is not told."""
    try:
        return Path("/proc/self/mounts").read_bytes()
    except OSError:
        return b""
