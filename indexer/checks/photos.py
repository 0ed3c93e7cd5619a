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
from searchengine.errors import ImageError
from searchengine.stores import StoredPhoto, is_there, read_photo
from searchengine.stores.local import MAX_INTEGER
from searchengine.text import printable

AHEAD = 64  # photos under way for each thread

Outcome = Problem | str | None  # a folder that is gone stands for all photos in it

INDEX = "run `searchengine index`"


class _Photo(NamedTuple):
    id: int
    store: str
    listed: StoredPhoto
    content_hash: bytes


def check_photos(
    connection: sqlite3.Connection, *, max_bytes: int, workers: int, on_progress: Callable[[int, int], None]
) -> Iterator[Problem]:
    """Reads every photo, in `workers` threads. What is listed among the failures is known not to be readable."""
    total = int(connection.execute("SELECT count(*) FROM images").fetchone()[0])
    lost: Counter[str] = Counter()
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
            elif outcome is not None:
                lost[outcome] += 1

        try:
            for photo in _photos(connection):
                under_way.append(pool.submit(_check, photo, max_bytes))
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
            message=f"this folder is gone or empty, with {count:,} photos that the index knows",
            remedy=f"mount the disk that it is on; or, if they are to go from the index, {INDEX}",
        )


def _photos(connection: sqlite3.Connection) -> Iterator[_Photo]:
    query = """
        SELECT images.id, store, key, size_bytes, mtime_ns, content_hash
        FROM images JOIN vectors ON vectors.id = images.vector_id
        WHERE NOT EXISTS (SELECT 1 FROM failures WHERE failures.store = images.store AND failures.key = images.key)
        ORDER BY images.id
    """
    for number, store, key, size_bytes, mtime_ns, content_hash in connection.execute(query):
        name = key.decode("utf-8", "surrogateescape")
        yield _Photo(number, store.decode(), StoredPhoto(name, size_bytes, mtime_ns), content_hash)


def _check(photo: _Photo, max_bytes: int) -> Outcome:
    key = photo.listed.key
    try:
        if _listed_now(key) != photo.listed:
            return _problem(photo, "changed since it was indexed", INDEX)
        data = read_photo(photo.store, key, max_bytes=max_bytes)
    except (OSError, ImageError) as error:
        if not is_there(photo.store, key):
            return _gone(photo)
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        return _problem(photo, reason, "check its permissions and the disk")
    if hashlib.sha256(data).digest() != photo.content_hash:
        return _problem(
            photo,
            "has the size and time that were indexed, but another content",
            "the disk may be failing: check it, and compare the photo with a backup; if it was changed on purpose, "
            f"`touch` it and {INDEX}",
        )
    return None


def _listed_now(key: str) -> StoredPhoto:
    """As the store would list it."""
    status = os.stat(key)
    return StoredPhoto(key, status.st_size, min(status.st_mtime_ns, MAX_INTEGER))


def _gone(photo: _Photo) -> Outcome:
    """A photo that is gone from a folder that holds anything; else the topmost folder that is gone or empty, which may
    be where a disk used to be mounted."""
    folder = os.path.dirname(photo.listed.key)
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is not None:
                return _problem(photo, "is gone", INDEX, DropRows("images", [photo.id]))
    except OSError:
        while not os.path.exists(above := os.path.dirname(folder)) and above != folder:
            folder = above
    return folder


def _problem(photo: _Photo, message: str, remedy: str, fix: DropRows | None = None) -> Problem:
    return Problem(kind="photo", object=printable(photo.listed.key), message=message, remedy=remedy, fix=fix)
