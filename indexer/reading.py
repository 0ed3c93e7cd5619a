"""The stage between crawl and encoder: threads read, hash and decode files ahead of the encoder.

Pillow decodes without the interpreter's lock, so threads use all cores and crops need not be copied between processes.
A content that the index has is never decoded again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from indexer.crawl import Change
from searchengine.decode import DecodeLimits, Photo, decode_bytes, inspect_bytes
from searchengine.errors import ImageError
from searchengine.index.schema import open_read_only
from searchengine.metadata import PhotoMetadata
from searchengine.stores import ImageStore


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """New content: to be encoded."""

    change: Change
    content_hash: bytes
    photo: Photo


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


class PhotoReader:
    """Reads files in order, at most `ahead` of them under way, with `workers` threads."""

    def __init__(self, *, known: KnownContent, image_size: int, limits: DecodeLimits, workers: int, ahead: int) -> None:
        self._known = known
        self._image_size = image_size
        self._limits = limits
        self._workers = workers
        self._ahead = ahead

    def read_all(self, store: ImageStore, changes: Iterable[Change]) -> Generator[Outcome, None, None]:
        """One outcome for each change, in their order. Closing the generator waits for the threads."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            under_way: deque[Future[Outcome]] = deque()
            try:
                for change in changes:
                    under_way.append(pool.submit(self._read, store, change))
                    if len(under_way) >= self._ahead:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, store: ImageStore, change: Change) -> Outcome:
        try:
            data = store.read(change.listed.key, max_bytes=self._limits.max_file_bytes)
        except ImageError as error:
            return Failed(change=change, reason=str(error), damaged=False)
        content_hash = hashlib.sha256(data).digest()
        try:
            if content_hash in self._known:
                metadata = inspect_bytes(data, limits=self._limits)
                return Known(change=change, content_hash=content_hash, metadata=metadata)
            photo = decode_bytes(data, image_size=self._image_size, limits=self._limits)
        except ImageError as error:
            return Failed(change=change, reason=str(error), damaged=True)
        return Decoded(change=change, content_hash=content_hash, photo=photo)
