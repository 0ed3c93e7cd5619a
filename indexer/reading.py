"""The stage between crawl and encoder: threads read, hash and decode files ahead of the encoder.

A content that the index has is never decoded again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Container, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import LifoQueue
from typing import Protocol

from indexer.crawl import Change
from indexer.fetching import FetchPool
from indexer.report import StageClock
from searchengine.decode import DecodeLimits, Photo, decode_bytes, inspect_bytes
from searchengine.errors import ImageError
from searchengine.index.schema import open_read_only
from searchengine.isolation import DecoderKilled, IsolatedDecoder
from searchengine.metadata import PhotoMetadata

STOP_IS_SEEN_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """New content: to be encoded."""

    change: Change
    content_hash: bytes
    photo: Photo

    @property
    def metadata(self) -> PhotoMetadata:
        return self.photo.metadata


@dataclass(frozen=True, kw_only=True)
class Known:
    """Its content is in the index, or on the way there."""

    change: Change
    content_hash: bytes
    metadata: PhotoMetadata


@dataclass(frozen=True, kw_only=True)
class Failed:
    """`damaged` tells broken content from a file that could just not be read now."""

    change: Change
    reason: str
    damaged: bool


Outcome = Decoded | Known | Failed


class KnownContent:
    """Which contents the index has or is about to have; asked by the decoding threads."""

    def __init__(self, database: Path) -> None:
        self._connection = open_read_only(database)
        # Its inner pages: what else SQLite would keep of these tables, the system has in memory anyway.
        self._connection.execute("PRAGMA cache_size = -512")
        self._lock = threading.Lock()
        self._pending: set[bytes] = set()

    def __contains__(self, content_hash: object) -> bool:
        with self._lock:
            if content_hash in self._pending:
                return True
            query = "SELECT 1 FROM vectors WHERE content_hash = ?"
            return self._connection.execute(query, (content_hash,)).fetchone() is not None

    def add(self, content_hash: bytes) -> None:
        with self._lock:
            self._pending.add(content_hash)

    def keep_pending(self, hashes: set[bytes]) -> None:
        """All but `hashes` is in the tables now."""
        with self._lock:
            self._pending &= hashes

    def close(self) -> None:
        self._connection.close()


class Decoder(Protocol):
    """What the threads decode with, one of them at a time. Both raise ImageError."""

    def decode_bytes(self, data: bytes, *, image_size: int) -> Photo: ...

    def inspect_bytes(self, data: bytes) -> PhotoMetadata: ...

    def close(self) -> None: ...


class InProcessDecoder:
    """Decodes in the thread that asks; neither time nor memory is limited."""

    def __init__(self, *, limits: DecodeLimits) -> None:
        self._limits = limits

    def decode_bytes(self, data: bytes, *, image_size: int) -> Photo:
        return decode_bytes(data, image_size=image_size, limits=self._limits)

    def inspect_bytes(self, data: bytes) -> PhotoMetadata:
        return inspect_bytes(data, limits=self._limits)

    def close(self) -> None:
        pass


class PhotoReader:
    """Reads files in order, at most `ahead` of them under way, with `workers` threads and as many decoders.

    Of stores that have files read at once, that many more are under way, each fetched by a thread of its own, so that
    the network's delay is waited for many times at once. They share the decoders.

    `isolated`: photos are decoded in processes of their own (searchengine/isolation.py).
    """

    def __init__(
        self,
        *,
        known: Container[bytes],
        image_size: int,
        limits: DecodeLimits,
        workers: int,
        ahead: int,
        isolated: bool,
        clock: StageClock | None = None,
    ) -> None:
        self._known = known
        self._image_size = image_size
        self._limits = limits
        self._workers = workers
        self._ahead = ahead
        self._isolated = isolated
        self._clock = clock or StageClock(workers=workers)

    def read_all(self, changes: Iterable[Change], *, stop: threading.Event) -> Generator[Outcome, None, None]:
        """One outcome for each change, in their order, until `stop` is set.

        Raises SearchEngineError where no process can be started, StoreUnusable where a store does not answer any more.

        Closing the generator ends the processes at once, with what they are doing, and waits for the threads, though
        not for those that fetch.
        """
        kind = IsolatedDecoder if self._isolated else InProcessDecoder
        decoders: list[Decoder] = [kind(limits=self._limits) for _ in range(self._workers)]
        # The one put back last is the next to be taken: where one is enough, the others never start.
        idle: LifoQueue[Decoder] = LifoQueue()
        for decoder in decoders:
            idle.put(decoder)
        fetchers: FetchPool[Outcome] = FetchPool()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            under_way: deque[Future[Outcome]] = deque()
            try:
                for change in changes:
                    read = partial(self._read, change, idle)
                    if at_once := change.store.reads_at_once:
                        self._clock.fetchers = max(self._clock.fetchers, at_once)
                        under_way.append(fetchers.submit(read, size_bytes=change.listed.size_bytes, threads=at_once))
                    else:
                        under_way.append(pool.submit(read))
                    if len(under_way) >= self._ahead + at_once:
                        if not _is_done(under_way[0], stop):
                            return
                        yield under_way.popleft().result()
                while under_way and _is_done(under_way[0], stop):
                    yield under_way.popleft().result()
            finally:
                fetchers.close()
                pool.shutdown(wait=False, cancel_futures=True)
                for decoder in decoders:
                    decoder.close()

    def _read(self, change: Change, idle: LifoQueue[Decoder]) -> Outcome:
        try:
            # What was listed may be another file by now: what is recorded of a photo is of the moment of its content.
            with self._clock.working("fetch" if change.store.reads_at_once else "read"):
                listed, data = change.store.read(change.listed.key, max_bytes=self._limits.max_file_bytes)
        except ImageError as error:
            return Failed(change=change, reason=str(error), damaged=False)
        change = replace(change, listed=listed)
        with self._clock.working("hash"):
            content_hash = hashlib.sha256(data).digest()
        is_known = content_hash in self._known
        decoder = idle.get()
        try:
            with self._clock.working("decode"):
                if is_known:
                    metadata = decoder.inspect_bytes(data)
                    return Known(change=change, content_hash=content_hash, metadata=metadata)
                photo = decoder.decode_bytes(data, image_size=self._image_size)
        except ImageError as error:
            # What was decoded before is not damaged, nor is what its decoder had no chance to judge.
            damaged = not is_known and not isinstance(error, DecoderKilled)
            return Failed(change=change, reason=str(error), damaged=damaged)
        finally:
            idle.put(decoder)
        return Decoded(change=change, content_hash=content_hash, photo=photo)


def _is_done(future: Future[Outcome], stop: threading.Event) -> bool:
    """Wait for it, and no longer once `stop` is set: a photo may keep its decoder busy for a minute."""
    while not future.done():
        if stop.is_set():
            return False
        wait([future], timeout=STOP_IS_SEEN_SECONDS)
    return True
