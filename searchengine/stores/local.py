"""Photos in a local folder. Keys are absolute paths, so that overlapping folders never list a photo twice.

Names that are not UTF-8 travel as Python's surrogate escapes (PEP 383) and reach the disk unchanged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from searchengine.errors import ImageError, StoreUnusable
from searchengine.stores import HEAD_BYTES, LOCAL, Listed, Mount, StoredPhoto, Unlistable
from searchengine.text import printable

# Folders of thumbnails and program files that no photo library means: Synology, NodeJS.
SKIPPED_FOLDERS = frozenset({"@eaDir", "node_modules"})


# As far as SQLite's integers reach: as a time the year 2262, and some file systems hold later ones.
MAX_INTEGER = 2**63 - 1


class LocalStore:
    name = LOCAL
    reads_at_once = 0

    def __init__(self, location: str) -> None:
        self.root = Path(os.path.realpath(os.path.expanduser(location)))
        shown = printable(location)
        try:
            mode = os.stat(self.root).st_mode
        except FileNotFoundError:
            raise StoreUnusable(
                f"the folder {shown} does not exist; check the path, or mount the disk it is on"
            ) from None
        except OSError as error:
            raise StoreUnusable(f"the folder {shown} cannot be read: {error.strerror}; check its permissions") from None
        if not stat.S_ISDIR(mode):
            raise StoreUnusable(f"{shown} is a file, not a folder; give the folder that holds it")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise StoreUnusable(f"the folder {shown} cannot be read; check its permissions")
        self.prefix = os.path.join(self.root, "")
        self._second_look: tuple[str, frozenset[str]] = ("", frozenset())

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """Depth first, without recursion; hidden names, SKIPPED_FOLDERS and special files are left out.

        Links to files inside the folder count as files; links to folders, and links that lead out, are not followed.
        """
        prefix = prefix or self.prefix
        try:
            if not self._reaches(prefix):
                return
        except OSError as error:
            yield Unlistable(prefix, error.strerror or str(error))
            return
        pending = [(prefix.rstrip(os.sep) or os.sep, -1)]
        while pending:
            folder, device_above = pending.pop()
            try:
                device = _device(os.stat(folder))
                if device != device_above:
                    yield Mount(os.path.join(folder, ""), device)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        yield from self._look_at(entry, device, pending)
            except OSError as error:
                yield Unlistable(os.path.join(folder, ""), error.strerror or str(error))

    def is_gone(self, key: str) -> bool:
        """Some file systems leave a file out of a listing that is replaced meanwhile, as editors do when they save.

        So its folder is listed once more; that listing is kept for those who are asked for next.
        """
        if not self.is_there(key):
            return True
        folder = os.path.dirname(key)
        if self._second_look[0] != folder:
            try:
                names = frozenset(item.key for item in self._files_in(folder))
            except OSError:
                return False
            self._second_look = (folder, names)
        return key not in self._second_look[1]

    def is_there(self, key: str) -> bool:
        try:
            os.lstat(key)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError):
            pass
        return True

    def _files_in(self, folder: str) -> Iterator[StoredPhoto]:
        if self._reaches(os.path.join(folder, "")):
            with os.scandir(folder) as entries:
                for entry in entries:
                    for item in self._look_at(entry, 0, []):
                        if isinstance(item, StoredPhoto):
                            yield item

    def _reaches(self, prefix: str) -> bool:
        """Whether a listing of the whole store comes by the folder `prefix`."""
        folder = str(self.root)
        for name in prefix.removeprefix(self.prefix).split(os.sep)[:-1]:
            folder = os.path.join(folder, name)
            try:
                if is_skipped(name) or not stat.S_ISDIR(os.lstat(folder).st_mode):
                    return False
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def look(self, key: str) -> StoredPhoto | None:
        try:
            status = os.stat(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        return _stored(key, status)

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        return _read(key, max_bytes=max_bytes)

    def head(self, key: str) -> bytes:
        try:
            with open(key, "rb", buffering=0, opener=open_without_waiting) as file:
                return file.read(HEAD_BYTES)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None

    def _look_at(
        self, entry: os.DirEntry[str], device: int, pending: list[tuple[str, int]]
    ) -> Iterator[StoredPhoto | Unlistable]:
        if is_skipped(entry.name):
            return
        try:
            if entry.is_dir(follow_symlinks=False):
                pending.append((entry.path, device))
                return
            if entry.is_symlink() and not os.path.realpath(entry.path).startswith(self.prefix):
                return
            status = entry.stat()
        except (FileNotFoundError, NotADirectoryError):
            return  # it vanished between listing and looking, or it is a dangling link
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link that leads to itself dangles too
                yield Unlistable(entry.path, error.strerror or str(error))
            return
        if stat.S_ISREG(status.st_mode):
            yield _stored(entry.path, status)


def is_skipped(name: str) -> bool:
    """Whether a file or folder of that name, without those above it, is left out of every listing."""
    return name.startswith(".") or name in SKIPPED_FOLDERS


def read_local(path: str, *, max_bytes: int) -> bytes:
    """The bytes of a regular file, at most `max_bytes`, all of one moment. Raises ImageError with the reason."""
    return _read(path, max_bytes=max_bytes)[1]


def _read(path: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ImageError("not a regular file")
            # Not read(max_bytes + 1): that takes the memory for a file of the limit's size before it reads.
            too_large = before.st_size > max_bytes
            data = b"" if too_large else file.read()
            after = os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if too_large or len(data) > max_bytes:
        raise ImageError(f"larger than the limit of {max_bytes:,} bytes (setting max_file_bytes)")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageError("it changed while it was being read")
    return _stored(path, after), data


def open_without_waiting(path: str, flags: int) -> int:
    """An opener for `open`: a fifo that took a file's place since it was listed must not hang who reads it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def local_device(path: str) -> int | None:
    """The device of the nearest folder above, or of `path` itself, that is there."""
    while True:
        try:
            return _device(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            above = os.path.dirname(path.rstrip(os.sep))
            if above == path:
                return None
            path = above
        except OSError:
            return None


def _stored(path: str, status: os.stat_result) -> StoredPhoto:
    return StoredPhoto(path, status.st_size, min(status.st_mtime_ns, MAX_INTEGER))


def _device(status: os.stat_result) -> int:
    return status.st_dev & MAX_INTEGER
