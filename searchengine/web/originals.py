"""The file of an indexed photo, proven to be what was indexed.

Only an id leads to a file, and what is read is shown only if it has, byte for byte, the content that the index knows
the photo by. So whatever was put in the photo's place since (another file, a link to one that is none of the library's,
a pipe) is never shown. A link inside of a store counts only if it leads to a photo of the index.

A file in a folder is sent from where it lies. What is elsewhere (a bucket, an archive) is read whole by this process,
with its own credentials, and sent from a copy: a client never learns of the store more than its name.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException

from searchengine.errors import ImageError, OverloadError, SearchEngineError
from searchengine.index.photos import ImageRow
from searchengine.stores import HEAD_BYTES, LOCAL, KnownStores
from searchengine.web.caches import BoundedCache

if TYPE_CHECKING:
    from searchengine.index.protocol import PhotoIndex

CHUNK_BYTES = 256 * 2**10
REMEMBERED_HASHES = 4096

# Of photos that are not files of this machine: read at once, waiting for that, and kept for whoever asks again.
FETCHES_AT_ONCE = 8
MAX_WAITING = 256
KEPT_BYTES = 64 * 2**20
# A larger one is sent from a temporary file: its client may take its time.
IN_MEMORY_BYTES = 8 * 2**20

NOT_THERE = "the file of this photo is not there, or cannot be read; mount its disk, or index again"
CHANGED = "the file of this photo has changed since it was indexed; index again"

# Raster images only: what a browser may be told that a file is. No text that holds code begins like one of these.
SIGNATURES = (
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"RIFF.{4}WEBP", "image/webp"),
    (rb"\0\0\0.ftyp(avif|avis)", "image/avif"),
    (rb"\0\0\0.ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "image/heic"),
    (rb"(II[*+]\0|MM\0[*+])", "image/tiff"),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "image/bmp"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n", "image/jp2"),
)

State = tuple[int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Original:
    """An open file. `content_hash`: sha256 of all of it. `media_type` is None where it is no picture browsers know.

    `is_unchanged` tells whether it is still what was hashed.
    """

    file: IO[bytes]
    size_bytes: int
    mtime_ns: int
    content_hash: bytes
    media_type: str | None
    is_unchanged: Callable[[], bool]

    def close(self) -> None:
        self.file.close()

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`; the file is closed after them.

        Raises ConnectionAbortedError where the file changes meanwhile: its reader must not take it for whole.
        """
        with self.file:
            self.file.seek(start)
            while start < end:
                data = self.file.read(min(CHUNK_BYTES, end - start))
                if not data or not self.is_unchanged():
                    raise ConnectionAbortedError("a photo changed while it was being sent")
                start += len(data)
                yield data


class Originals:
    """Opens originals; remembers which files it has hashed, by what the kernel changes with every write.

    What it gives is to be closed. It raises HTTPException 404 (not there), 409 (other content).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: OrderedDict[State, bytes] = OrderedDict()
        self._stores = KnownStores()
        self._fetches = CapacityLimiter(FETCHES_AT_ONCE)
        self._kept: BoundedCache[ImageRow, bytes] = BoundedCache(max_bytes=KEPT_BYTES)

    def open(self, row: ImageRow, *, index: PhotoIndex) -> Original:
        """The photo `row`, wherever it is; one that is not a file of this machine may take its time."""
        if row.store == LOCAL:
            return self._open_file(row, index=index)
        original = self._fetch(row)
        try:
            prove(original, row, index=index)
        except BaseException:
            original.close()
            raise
        return original

    async def fetch(self, row: ImageRow) -> Original:
        """A photo that is not a file of this machine, not proven yet. Waits for no thread of the service.

        Raises OverloadError where too many wait already.
        """
        if self._fetches.statistics().tasks_waiting >= MAX_WAITING:
            raise OverloadError(f"{MAX_WAITING} photos are waited for already; ask again later")
        return await to_thread.run_sync(self._fetch, row, limiter=self._fetches)

    def _fetch(self, row: ImageRow) -> Original:
        data = self._kept.get(row)
        if data is None:
            data = self._read(row)
            self._kept.put(row, data, size_bytes=len(data))
        file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115  # its reader closes it
        file.write(data)
        return Original(
            file=file,
            size_bytes=len(data),
            mtime_ns=row.mtime_ns,
            content_hash=hashlib.sha256(data).digest(),
            media_type=media_type_of(data[:HEAD_BYTES]),
            is_unchanged=lambda: True,
        )

    def _read(self, row: ImageRow) -> bytes:
        """No byte more than the index says that there are."""
        store = self._stores.of(row.store, row.key)
        try:
            data = store.read(row.key, max_bytes=row.size_bytes)[1]
        except ImageError:
            try:
                now = store.look(row.key)
            except SearchEngineError:
                now = None
            is_other = now is not None and now.size_bytes != row.size_bytes
            raise HTTPException(409 if is_other else 404, CHANGED if is_other else NOT_THERE) from None
        except SearchEngineError:
            raise HTTPException(404, NOT_THERE) from None
        if len(data) != row.size_bytes:
            raise HTTPException(409, CHANGED)
        return data

    def _open_file(self, row: ImageRow, *, index: PhotoIndex) -> Original:
        file = _open(row, index=index)
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size != row.size_bytes:
                raise HTTPException(409, CHANGED)
            content_hash = self._hash(file)
            file.seek(0)
            original = Original(
                file=file,
                size_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                content_hash=content_hash,
                media_type=media_type_of(file.read(HEAD_BYTES)),
                is_unchanged=lambda: _size_and_time(file) == (status.st_size, status.st_mtime_ns),
            )
            # Another size is told at once; of the same size, only a file of the same content is the photo.
            prove(original, row, index=index)
        except OSError:
            file.close()
            raise HTTPException(404, NOT_THERE) from None
        except BaseException:
            file.close()
            raise
        return original

    def read(self, row: ImageRow, *, index: PhotoIndex) -> bytes:
        """All of the file. Raises as `open` does."""
        original = self.open(row, index=index)
        try:
            return b"".join(original.chunks(0, original.size_bytes))
        except OSError:  # ConnectionAbortedError among them
            raise HTTPException(409, CHANGED) from None

    def _hash(self, file: io.FileIO) -> bytes:
        state = _state_of(file)
        with self._lock:
            if state in self._hashes:
                self._hashes.move_to_end(state)
                return self._hashes[state]
        found = hashlib.file_digest(file, "sha256").digest()
        if _state_of(file) == state:
            with self._lock:
                self._hashes[state] = found
                while len(self._hashes) > REMEMBERED_HASHES:
                    self._hashes.popitem(last=False)
        return found


def prove(original: Original, row: ImageRow, *, index: PhotoIndex) -> None:
    """Raises HTTPException 409 where it is not the content that the index knows the photo by."""
    if index.vector_id_by_content(original.content_hash) != row.vector_id:
        raise HTTPException(409, CHANGED)


def media_type_of(head: bytes) -> str | None:
    """The type of a file that begins with `head`, if it is a raster image that browsers may be told of."""
    return next((kind for pattern, kind in SIGNATURES if re.match(pattern, head, re.DOTALL)), None)


def _open(row: ImageRow, *, index: PhotoIndex) -> io.FileIO:
    real = os.path.realpath(row.key)
    if real != row.key:  # the photo, or a folder above it, is a link
        linked = index.image_by_key(row.store, real)
        if linked is None or linked.vector_id != row.vector_id:
            raise HTTPException(409, CHANGED)
    try:
        return io.FileIO(real, "rb", opener=_open_without_following)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise HTTPException(404, NOT_THERE) from None


def _open_without_following(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _size_and_time(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _state_of(file: io.FileIO) -> State:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
