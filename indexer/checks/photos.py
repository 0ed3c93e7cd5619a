"""Whether the photos that an index knows are still there, and still what was indexed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from indexer.checks.problems import DropRows, Problem
from searchengine.errors import ImageError, StoreUnusable
from searchengine.stores import LOCAL, KnownStores, Mount, StoredPhoto, device_of
from searchengine.text import printable

AHEAD = 64  # photos under way for each thread

Outcome = Problem | str | None  # a folder where no disk is mounted, or a store, stands for all photos in it

INDEX = "run `searchengine index`"
FORGET = "`searchengine verify --stores --repair`"


class _Photo(NamedTuple):
    id: int
    store: str
    listed: StoredPhoto
    content_hash: bytes
    mount: Mount | None
    """The file system that it is on, as far as that was recorded."""


def check_photos(
    connection: sqlite3.Connection, *, max_bytes: int, workers: int, on_progress: Callable[[int, int], None]
) -> Iterator[Problem]:
    """Reads every photo, in `workers` threads. What is listed among the failures is known not to be readable."""
    total = int(connection.execute("SELECT count(*) FROM images").fetchone()[0])
    lost: Counter[str] = Counter()
    stores = KnownStores()
    unusable: dict[str, str] = {}
    unchecked: Counter[str] = Counter()
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        under_way: deque[Future[Outcome]] = deque()
        done = 0

        def oldest() -> Iterator[Problem]:
            nonlocal done
            outcome = under_way.popleft().result()
            done += 1
            on_progress(done, total)
            if isinstance(outcome, Problem):
                yield outcome
            elif outcome in unusable:
                unchecked[str(outcome)] += 1
            elif outcome is not None:
                lost[outcome] += 1

        try:
            for photo in _photos(connection):
                under_way.append(pool.submit(_check, photo, stores, unusable, max_bytes))
                if len(under_way) >= AHEAD * workers:
                    yield from oldest()
            while under_way:
                yield from oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for folder, count in sorted(lost.items()):
        yield Problem(
            kind="photo",
            object=printable(folder),
            message=f"the disk with {count:,} photos that the index knows is not mounted here",
            remedy="mount it; or, to forget them, run `searchengine index` on the folder above with --exclude",
        )
    for place, count in sorted(unchecked.items()):
        yield Problem(
            kind="photo",
            object=printable(place),
            message=f"{count:,} photos were not checked: {unusable[place]}",
            remedy="verify again when it can be reached",
        )


def _photos(connection: sqlite3.Connection) -> Iterator[_Photo]:
    query = """
        SELECT images.id, store, key, size_bytes, mtime_ns, content_hash
        FROM images JOIN vectors ON vectors.id = images.vector_id
        WHERE NOT EXISTS (SELECT 1 FROM failures WHERE failures.store = images.store AND failures.key = images.key)
        ORDER BY images.id
    """
    mounts = _mounts(connection)
    for number, store, key, size_bytes, mtime_ns, content_hash in connection.execute(query):
        name = key.decode("utf-8", "surrogateescape")
        above = (name[: position + 1] for position in range(len(name) - 1, -1, -1) if name[position] == os.sep)
        mount = next((mounts[store, prefix] for prefix in above if (store, prefix) in mounts), None)
        yield _Photo(number, store.decode(), StoredPhoto(name, size_bytes, mtime_ns), content_hash, mount)


def _mounts(connection: sqlite3.Connection) -> dict[tuple[bytes, str], Mount]:
    """By store and prefix; an older version recorded none."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'mounts'").fetchone():
        return {}
    rows = connection.execute("SELECT store, prefix, device FROM mounts")
    named = ((store, prefix.decode("utf-8", "surrogateescape"), device) for store, prefix, device in rows)
    return {(store, prefix): Mount(prefix, device) for store, prefix, device in named}


def _check(photo: _Photo, stores: KnownStores, unusable: dict[str, str], max_bytes: int) -> Outcome:
    """`unusable`: why nothing can be had of a store, by its prefix; nothing more is asked of it."""
    store = stores.of(photo.store, photo.listed.key)
    if store.prefix in unusable:
        return store.prefix
    try:
        listed, data = store.read(photo.listed.key, max_bytes=max_bytes)
    except StoreUnusable as error:
        unusable[store.prefix] = str(error)
        return store.prefix
    except ImageError as error:
        if not store.is_there(photo.listed.key):
            return _gone(photo)
        return _problem(photo, str(error), "check its permissions and the disk")
    if hashlib.sha256(data).digest() == photo.content_hash:
        return None
    if (listed.size_bytes, listed.mtime_ns) != (photo.listed.size_bytes, photo.listed.mtime_ns):
        return _problem(photo, "changed since it was indexed", INDEX)
    return _problem(
        photo,
        "has the size and time that were indexed, but another content",
        "the disk may be failing: check it, and compare the photo with a backup; if it was changed on purpose, "
        f"`touch` it and {INDEX}",
    )


def _gone(photo: _Photo) -> Outcome:
    """A photo that is gone from its file system; else the place where that used to be mounted."""
    if photo.mount is None and photo.store == LOCAL:
        return os.path.dirname(photo.listed.key)
    if photo.mount is None or photo.mount.device == device_of(photo.store, photo.listed.key):
        return _problem(photo, "is gone", f"{INDEX}, or {FORGET}", DropRows("images", [photo.id]))
    return photo.mount.prefix


def _problem(photo: _Photo, message: str, remedy: str, fix: DropRows | None = None) -> Problem:
    return Problem(kind="photo", object=printable(photo.listed.key), message=message, remedy=remedy, fix=fix)
