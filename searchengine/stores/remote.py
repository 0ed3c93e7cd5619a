"""Photos in a bucket, on a server, behind a URL: one store for all of them, over the `RemoteFiles` of each kind.

A key is the photo's whole URL. Nothing secret is part of it: logins come from where each kind of store has its own.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from functools import partial

from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.stores import HEAD_BYTES, Listed, StoredPhoto, Unlistable, home_of
from searchengine.stores.addresses import canonical
from searchengine.stores.background import map_at_once
from searchengine.stores.local import MAX_INTEGER, is_skipped
from searchengine.stores.ranged import FileChanged, NotThere, RangedFile
from searchengine.stores.retry import retried
from searchengine.stores.transfer import Busy, Changed, Missing, Page, Refused, RemoteFiles, TooLarge, TransferFailure
from searchengine.text import printable

PART_BYTES = 8 * 2**20
PARTS_AT_ONCE = 4
NAMES_AT_ONCE = 1000
SETTLED_NS = 3 * 10**9
ATTEMPTS_AT_OPENING = 3

# What a scheme needs: the extra, and packages that it brings.
NEEDS = {
    "s3": ("s3", "s3fs"),
    "gs": ("gcs", "aiohttp", "google.auth"),
    "az": ("azure", "adlfs"),
    "abfs": ("azure", "adlfs"),
    "abfss": ("azure", "adlfs"),
    "sftp": ("sftp", "asyncssh"),
    "http": ("http", "aiohttp"),
    "https": ("http", "aiohttp"),
}


class RemoteStore:
    """The folder at a URL, by default of a place that must be there; else nothing is asked before it is needed.

    Raises UsageError for a URL with a secret in it or without the extra that it needs, StoreUnusable.
    """

    def __init__(self, location: str, *, must_exist: bool = True) -> None:
        self.prefix = canonical(location)
        self.name, _, rest = self.prefix.partition("://")
        if not rest.partition("/")[0]:
            raise UsageError(f"{printable(self.prefix)} names no bucket or host; write {self.name}://NAME/FOLDER")
        if "?" in rest and self.name in ("http", "https"):
            raise UsageError(f"{printable(self.prefix)} is no folder; give the address of a page with links, without ?")
        if not self.prefix.endswith("/"):
            self.prefix += "/"
        self._shown = printable(self.prefix)
        self._files = _open_files(self.prefix)
        self.reads_at_once = self._files.reads_at_once
        if must_exist:
            self._check_that_it_exists()

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """Page by page. What is hidden is left out as in a local folder."""
        pending: list[tuple[str, str | None]] = [(prefix or self.prefix, None)]
        while pending:
            folder, token = pending.pop()
            try:
                page = retried(partial(self._files.list_page, folder, token))
            except Missing:
                if folder == self.prefix:
                    raise NotThere(f"there is nothing at {self._shown}; check the name") from None
                continue
            except Refused as failure:
                if folder == self.prefix:
                    raise StoreUnusable(self._unusable(failure)) from None
                yield Unlistable(folder, str(failure))
                continue
            except TransferFailure as failure:
                raise StoreUnusable(self._unusable(failure)) from None
            if folder == self.prefix and token is None and self._is_nothing(page):
                raise NotThere(f"there is nothing at {self._shown}; check the name")
            yield from (photo for photo in page.photos if self._is_listed(photo.key))
            yield from self._looked_at([name for name in page.names if self._is_listed(name)])
            pending += [(folder, None) for folder in page.folders if self._is_listed(folder)]
            if page.next_token:
                pending.append((folder, page.next_token))

    def look(self, key: str) -> StoredPhoto | None:
        """The file as `scan` would list it; None where it is gone for sure.

        Raises ImageError where that cannot be told, StoreUnusable where the store does not answer at all.
        """
        try:
            return retried(partial(self._files.stat, key))
        except Missing:
            return None
        except TransferFailure as failure:
            raise self._trouble(failure) from None

    def is_gone(self, key: str) -> bool:
        return self._files.lists_exactly or not self.is_there(key)

    def is_there(self, key: str) -> bool:
        try:
            return self.look(key) is not None
        except (ImageError, StoreUnusable):
            return True

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        """What is larger than PART_BYTES comes in parts, some at once, all of the same entity tag.

        Raises StoreUnusable where the store does not answer at all any more.
        """
        try:
            photo, data = self._part(key, 0, PART_BYTES, max_bytes=max_bytes)
            if photo.size_bytes > len(data):
                data += self._range(photo, len(data), photo.size_bytes)
        except TransferFailure as failure:
            raise self._trouble(failure) from None
        return photo, data

    def head(self, key: str) -> bytes:
        try:
            return self._part(key, 0, HEAD_BYTES)[1]
        except TransferFailure as failure:
            raise self._trouble(failure) from None

    def read_range(self, photo: StoredPhoto, start: int, stop: int) -> bytes:
        """Bytes of a file that must still be what it was as `photo`. Raises FileChanged, and as `read` does."""
        try:
            return self._range(photo, start, min(stop, photo.size_bytes))
        except TransferFailure as failure:
            raise self._trouble(failure) from None

    def _range(self, photo: StoredPhoto, start: int, stop: int) -> bytes:
        starts = range(start, stop, PART_BYTES)

        def part(at: int) -> bytes:
            return self._part(photo.key, at, min(at + PART_BYTES, stop), expected=photo)[1]

        if len(starts) <= 1:
            return b"".join(map(part, starts))
        return b"".join(map_at_once(part, starts, threads=PARTS_AT_ONCE))

    def _part(
        self, key: str, start: int, stop: int, *, max_bytes: int = MAX_INTEGER, expected: StoredPhoto | None = None
    ) -> tuple[StoredPhoto, bytes]:
        return retried(partial(self._files.get, key, start, stop, max_bytes=max_bytes, expected=expected))

    def _looked_at(self, keys: Sequence[str]) -> Iterator[Listed]:
        for first in range(0, len(keys), NAMES_AT_ONCE):
            some = keys[first : first + NAMES_AT_ONCE]
            for listed in map_at_once(self._look_or_tell, some, threads=self.reads_at_once):
                if listed is not None:
                    yield listed

    def _look_or_tell(self, key: str) -> Listed | None:
        try:
            return self.look(key)
        except ImageError as error:
            return Unlistable(key, str(error))

    def _is_nothing(self, page: Page) -> bool:
        """Whether there is not one name in the place itself: more likely a disk is not mounted than all deleted."""
        may_be_empty = self._files.lists_exactly and self.prefix == home_of(self.prefix)
        return not (page.photos or page.names or page.folders or page.next_token or may_be_empty)

    def _is_listed(self, key: str) -> bool:
        return not any(map(is_skipped, key.removeprefix(self.prefix).split("/")))

    def _trouble(self, failure: TransferFailure) -> ImageError | StoreUnusable:
        """The error for a file. Where the whole store is at fault, a run must end, not fail with each of a million."""
        match failure:
            case Changed():
                return FileChanged(str(failure))
            case TooLarge():
                return ImageError(str(failure))
            case Busy() | Refused():
                try:
                    self._files.has_any(self.prefix)
                except (Busy, Refused) as reason:
                    return StoreUnusable(self._unusable(reason))
                except TransferFailure:
                    pass
        return ImageError(f"cannot be read: {failure}")

    def _check_that_it_exists(self) -> None:
        try:
            found = retried(partial(self._files.has_any, self.prefix), attempts=ATTEMPTS_AT_OPENING)
            missing = not found and self.prefix != home_of(self.prefix)  # a bucket may well be empty
        except Missing:
            missing = True
        except TransferFailure as failure:
            raise StoreUnusable(self._unusable(failure)) from None
        if missing:
            raise NotThere(f"there is nothing at {self._shown}; check the name")

    def _unusable(self, failure: TransferFailure) -> str:
        return f"{self._shown} cannot be read: {failure}"


class RemoteFile:
    """One state of a file at a URL: a RangedFile (searchengine/stores/ranged.py)."""

    def __init__(self, location: str, *, store: RemoteStore | None = None) -> None:
        """By way of `store`, where there is one for its bucket or host. Raises NotThere, StoreUnusable, UsageError."""
        key = canonical(location)
        self._store = store or RemoteStore(home_of(key), must_exist=False)
        try:
            photo = self._store.look(key)
        except ImageError as error:
            raise StoreUnusable(f"{printable(key)} {error}") from None
        if photo is None:
            raise NotThere(f"there is nothing at {printable(key)}; check the address")
        self._photo = photo
        self.size_bytes, self.mtime_ns = photo.size_bytes, photo.mtime_ns
        self.etag = photo.etag or _tag_of_time(photo)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._store.read_range(self._photo, offset, offset + length)

    def close(self) -> None:
        pass


def open_binary(location: str, *, store: RemoteStore | None = None) -> RangedFile:
    """The file at a URL, read by ranges, by way of `store`. Raises NotThere, StoreUnusable, UsageError."""
    return RemoteFile(location, store=store)


def _tag_of_time(photo: StoredPhoto) -> str | None:
    """Size and time, as for a photo there; a time that has just been may yet become that of two states."""
    is_settled = 0 < photo.mtime_ns < time.time_ns() - SETTLED_NS
    return f"{photo.size_bytes:x}-{photo.mtime_ns:x}" if is_settled else None


def _open_files(prefix: str) -> RemoteFiles:
    scheme = prefix.partition("://")[0]
    _check_packages(scheme)
    match scheme:
        case "file" | "local":
            raise UsageError(f"{printable(prefix)}: give the path of a folder on this machine without {scheme}://")
        case "s3":
            from searchengine.stores.s3 import S3Files

            return S3Files()
        case "gs":
            from searchengine.stores.gs import GsFiles

            return GsFiles()
        case "http" | "https":
            from searchengine.stores.http import HttpFiles

            return HttpFiles()
        case "sftp":
            from searchengine.stores.sftp import SftpFiles

            return SftpFiles(prefix)
        case _:
            from searchengine.stores.filesystem import FilesystemFiles

            return FilesystemFiles(prefix)


def _check_packages(scheme: str) -> None:
    extra, *packages = NEEDS.get(scheme, ("all",))
    try:
        for package in ("fsspec", *packages):
            importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"{scheme}:// needs the extra {extra}; install it with: pip install 'searchengine[{extra}]'"
        ) from None
