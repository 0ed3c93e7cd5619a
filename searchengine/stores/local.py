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
from searchengine.stores import StoredPhoto, Unlistable
from searchengine.text import printable

LOCAL = "local"

# Folders of thumbnails and program files that no photo library means: Synology, NodeJS.
SKIPPED_FOLDERS = frozenset({"@eaDir", "node_modules"})


# The year 2262, as far as SQLite's integers reach; some file systems hold later times.
MAX_MTIME_NS = 2**63 - 1


class LocalStore:
    name = LOCAL

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

    def scan(self) -> Iterator[StoredPhoto | Unlistable]:
        """Depth first, without recursion; hidden names, SKIPPED_FOLDERS and special files are left out.

        Links to files inside the folder count as files; links to folders, and links that lead out, are not followed.
        """
        pending = [str(self.root)]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        yield from self._look_at(entry, pending)
            except OSError as error:
                yield Unlistable(os.path.join(folder, ""), error.strerror or str(error))

    def read(self, key: str, *, max_bytes: int) -> bytes:
        return read_local(key, max_bytes=max_bytes)

    def _look_at(self, entry: os.DirEntry[str], pending: list[str]) -> Iterator[StoredPhoto | Unlistable]:
        if entry.name.startswith("."):
            return
        try:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in SKIPPED_FOLDERS:
                    pending.append(entry.path)
                return
            if entry.is_symlink() and not os.path.realpath(entry.path).startswith(self.prefix):
                return
            status = entry.stat()
        except FileNotFoundError:
            return  # it vanished between listing and looking, or it is a dangling link
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link that leads to itself dangles too
                yield Unlistable(entry.path, error.strerror or str(error))
            return
        if stat.S_ISREG(status.st_mode):
            yield StoredPhoto(entry.path, status.st_size, min(status.st_mtime_ns, MAX_MTIME_NS))


def read_local(path: str, *, max_bytes: int) -> bytes:
    """The bytes of a regular file, at most `max_bytes`. Raises ImageError with the reason."""
    try:
        # O_NONBLOCK: a fifo that took a photo's place between listing and reading must not hang the run.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            # Not read(max_bytes + 1): that takes the memory for a file of the limit's size before it reads.
            too_large = status.st_size > max_bytes
            data = b"" if too_large else file.read()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if too_large or len(data) > max_bytes:
        raise ImageError(f"larger than the limit of {max_bytes:,} bytes (setting max_file_bytes)")
    return data
