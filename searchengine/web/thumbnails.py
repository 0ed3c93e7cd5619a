"""Small copies of photos for the page: made once, in the isolated decoder, and kept on disk up to a limit.

A file in the cache is named by what the index knows of a photo (store, key, size, time, and its vector where a store
may tell no time), the same that tells the indexer an unchanged one. So a photo that changes gets another thumbnail; one
whose disk is away keeps the one it had.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from searchengine.errors import OverloadError
from searchengine.index.photos import ImageRow
from searchengine.index.schema import encode_key
from searchengine.stores import LOCAL
from searchengine.web.decoders import DecoderPool

SIZES_PX = (160, 320, 640, 1280, 1920)
MEDIA_TYPE = "image/jpeg"
JPEG_QUALITY = 82
DEFAULT_MAX_BYTES = 512 * 2**20
MAX_WAITING = 512
WORKERS = 8  # which mostly wait: for a store, or for one of the few processes that decode
SUFFIX = ".jpg"


class Thumbnails:
    """The cache in `folder`, which takes at most `max_bytes` there; those used longest ago go first.

    Without a folder that can be written, every thumbnail is made anew.
    """

    def __init__(self, *, folder: Path, decoders: DecoderPool, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder = folder
        self._decoders = decoders
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # the event loop takes it: never held while anything is done on the disk
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="thumbnails")
        self._under_way: dict[str, Future[bytes]] = {}
        self._keeping = threading.Lock()
        self._sizes: OrderedDict[str, int] | None = None  # bytes by name, those used longest ago first
        self._total_bytes = 0

    def cached(self, name: str) -> bytes | None:
        """The JPEG of that name, if there is one."""
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None
        with suppress(OSError):
            os.utime(self._folder / name)
        with self._keeping:
            if self._sizes is not None and name in self._sizes:
                self._sizes.move_to_end(name)
        return data

    def make(self, name: str, *, max_side_px: int, read: Callable[[], bytes]) -> Future[bytes]:
        """The JPEG of the photo that `read` gives: made once, however many ask for it meanwhile.

        The future raises what `read` raises, and ImageError. Raises OverloadError where too many wait already.
        """
        with self._lock:
            if name not in self._under_way:
                if len(self._under_way) >= MAX_WAITING:
                    raise OverloadError(f"{MAX_WAITING} thumbnails are being made already; ask again later")
                self._under_way[name] = self._workers.submit(self._make, name, max_side_px, read)
            return self._under_way[name]

    def close(self) -> None:
        """End the threads; what waits is not made any more."""
        self._workers.shutdown(cancel_futures=True)

    def _make(self, name: str, max_side_px: int, read: Callable[[], bytes]) -> bytes:
        try:
            jpeg = self.cached(name)  # another may have made it since it was looked for
            if jpeg is None:
                jpeg = _encoded(self._decoders.thumbnail(read(), max_side_px=max_side_px))
                with suppress(OSError):  # a full disk, or a folder that is not ours to write to
                    self._keep(name, jpeg)
            return jpeg
        finally:
            with self._lock:
                del self._under_way[name]

    def _keep(self, name: str, jpeg: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._folder / f".{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_bytes(jpeg)
            os.replace(temporary, self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        with self._keeping:
            if self._sizes is None:
                self._sizes = _listed(self._folder)
                self._total_bytes = sum(self._sizes.values())
            self._total_bytes += len(jpeg) - self._sizes.pop(name, 0)
            self._sizes[name] = len(jpeg)
            while self._total_bytes > self._max_bytes:
                oldest, size_bytes = self._sizes.popitem(last=False)
                self._total_bytes -= size_bytes
                (self._folder / oldest).unlink(missing_ok=True)


def size_for(side_px: int) -> int:
    """The size that is made for those who ask for `side_px`: the next larger, or the largest."""
    return next((size for size in SIZES_PX if size >= side_px), SIZES_PX[-1])


def name_of(row: ImageRow, *, max_side_px: int) -> str:
    """The name of its thumbnail's file, and of what it shows (an ETag)."""
    facts = [row.store, row.key, str(row.size_bytes), str(row.mtime_ns)]
    facts += [] if row.store == LOCAL else [str(row.vector_id)]
    known = b"\0".join(map(encode_key, facts))
    return f"{hashlib.blake2b(known, digest_size=20).hexdigest()}-{max_side_px}{SUFFIX}"


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _listed(folder: Path) -> OrderedDict[str, int]:
    """Bytes by name of what the cache holds already, those used longest ago first."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX):
                    found.append((status.st_mtime_ns, entry.name, status.st_size))
    return OrderedDict((name, size_bytes) for _, name, size_bytes in sorted(found))
