"""Files of which any range can be read, and which tell when they are no longer what they were."""

from __future__ import annotations

import io
import os
import stat
from typing import TYPE_CHECKING, Protocol

from searchengine.errors import ImageError, StoreUnusable
from searchengine.stores import KnownStores, is_url
from searchengine.stores.addresses import canonical
from searchengine.stores.local import open_without_waiting
from searchengine.text import printable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class FileChanged(ImageError):
    """It is no longer the file that was opened; open it again."""


class NotThere(StoreUnusable):
    """It is gone, or never was: not merely out of reach."""


class RangedFile(Protocol):
    """One state of a file. Threads may share it."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def mtime_ns(self) -> int: ...

    @property
    def etag(self) -> str | None:
        """Another one for every other content; None where that cannot be promised."""

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only where the file ends.

        Raises FileChanged, and ImageError where they cannot be had.
        """

    def close(self) -> None: ...


class LocalFile:
    """Opened anew for every range, so that a thousand archives need no thousand descriptors."""

    def __init__(self, path: str) -> None:
        """Raises NotThere, StoreUnusable."""
        self._path = path
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotThere(f"{printable(path)} does not exist; check the path, or mount the disk it is on") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise StoreUnusable(f"{printable(path)} cannot be read: {_reason(error)}; check its permissions") from None
        if not stat.S_ISREG(status.st_mode):
            raise StoreUnusable(f"{printable(path)} is not a regular file; check the path")
        self.size_bytes, self.mtime_ns, self.device = status.st_size, status.st_mtime_ns, status.st_dev
        self.etag = f"{self.size_bytes:x}-{self.mtime_ns:x}"

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            with open(self._path, "rb", opener=open_without_waiting) as file:
                self._check(os.fstat(file.fileno()))
                file.seek(offset)
                data = file.read(max(0, min(length, self.size_bytes - offset)))
                self._check(os.fstat(file.fileno()))
        except OSError as error:
            raise ImageError(f"cannot be read: {_reason(error)}") from None
        return data

    def close(self) -> None:
        pass

    def _check(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise FileChanged("it changed while it was being read")


class RangedStream(io.RawIOBase):
    """A ranged file as the libraries want it that read from an open file. Raises OSError where it cannot be read."""

    def __init__(self, file: RangedFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = self._file.read_at(self._position, len(view))
        except ImageError as error:
            raise OSError(str(error)) from None
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_ranged(place: str, stores: KnownStores) -> RangedFile:
    """The file at a path, or at a URL by way of `stores`. Raises NotThere, StoreUnusable, UsageError."""
    if is_url(place):
        from searchengine.stores.remote import RemoteStore, open_binary

        host = stores.at(place)
        return open_binary(place, store=host if isinstance(host, RemoteStore) else None)
    return LocalFile(place)


def place_of(location: str) -> str:
    """The file that `location` names, as keys have it: an absolute path with links followed, or a URL.

    Raises UsageError for a URL that holds credentials, and for a name that no file can have.
    """
    if is_url(location):
        return canonical(location)
    try:
        return os.path.realpath(os.path.expanduser(location))
    except ValueError:
        raise StoreUnusable(f"no file can have the name {printable(location)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
