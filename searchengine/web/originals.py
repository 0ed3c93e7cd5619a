"""The file of an indexed photo, proven to be what was indexed.

Only an id leads to a file, and what is read is shown only if it has, byte for byte, the content that the index knows
the photo by. So whatever was put in the photo's place since (another file, a link to one that is none of the library's,
a pipe) is never shown. A link inside of a store counts only if it leads to a photo of the index.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from searchengine.index.photos import ImageRow
from searchengine.index.reader import Index

CHUNK_BYTES = 256 * 2**10
HEAD_BYTES = 32
REMEMBERED_HASHES = 4096

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
    """An open file. `content_hash`: sha256 of all of it. `media_type` is None where it is no picture browsers know."""

    file: io.FileIO
    size_bytes: int
    mtime_ns: int
    content_hash: bytes
    media_type: str | None

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
                status = os.fstat(self.file.fileno())
                if not data or (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
                    raise ConnectionAbortedError("a photo changed while it was being sent")
                start += len(data)
                yield data


class Originals:
    """Opens originals; remembers which files it has hashed, by what the kernel changes with every write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: OrderedDict[State, bytes] = OrderedDict()

    def open(self, row: ImageRow, *, index: Index) -> Original:
        """The file of the photo `row`, to be closed. Raises HTTPException 404 (not there), 409 (other content)."""
        file = _open(row, index=index)
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size != row.size_bytes:
                raise HTTPException(409, CHANGED)
            content_hash = self._hash(file)
            # Another size is told at once; of the same size, only a file of the same content is the photo.
            if index.vector_id_by_content(content_hash) != row.vector_id:
                raise HTTPException(409, CHANGED)
            file.seek(0)
            media_type = media_type_of(file.read(HEAD_BYTES))
        except OSError:
            file.close()
            raise HTTPException(404, NOT_THERE) from None
        except BaseException:
            file.close()
            raise
        return Original(
            file=file,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            content_hash=content_hash,
            media_type=media_type,
        )

    def read(self, row: ImageRow, *, index: Index) -> bytes:
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


def media_type_of(head: bytes) -> str | None:
    """The type of a file that begins with `head`, if it is a raster image that browsers may be told of."""
    return next((kind for pattern, kind in SIGNATURES if re.match(pattern, head, re.DOTALL)), None)


def _open(row: ImageRow, *, index: Index) -> io.FileIO:
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


def _state_of(file: io.FileIO) -> State:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
