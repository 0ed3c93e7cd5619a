"""What zip and tar archives have in common. They are read in place: nothing is ever extracted.

A key is ARCHIVE!/member. A member's name is a name and nothing else: one that is absolute, or leads upwards, leads
nowhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

from searchengine.errors import ImageError, StoreUnusable, UsageError
from searchengine.stores import INSIDE, KnownStores, Listed, Mount, StoredPhoto, Unlistable, home_of, is_url
from searchengine.stores.contents import Entry, Malformed, Outdated
from searchengine.stores.local import MAX_INTEGER, is_skipped
from searchengine.stores.ranged import FileChanged, LocalFile, NotThere, RangedFile, open_ranged
from searchengine.stores.recorded import ATTEMPTS, Recorded
from searchengine.text import printable

Result = TypeVar("Result")

REMOTE_READS_AT_ONCE = 16


class ArchiveStore(Recorded):
    name: str

    def __init__(self, location: str, *, must_exist: bool = True, stores: KnownStores | None = None) -> None:
        """Raises NotThere, StoreUnusable, UsageError."""
        super().__init__(location, stores=stores)
        self.prefix = self.place + INSIDE
        if home_of(self.prefix) != self.place:
            raise UsageError(f"{printable(location)} is an archive in a folder named like one; rename the folder")
        self.reads_at_once = REMOTE_READS_AT_ONCE if is_url(self.place) else 0
        if must_exist:
            try:
                self._check(open_ranged(self.place, self._stores))
            except (Malformed, ImageError) as error:
                raise StoreUnusable(f"{printable(self.place)} cannot be opened: {error}") from None

    def scan(self, prefix: str | None = None) -> Iterator[Listed]:
        """One state of the archive. Hidden names, SKIPPED_FOLDERS, links and devices are left out.

        Where there is more in it than can be told, what can be told comes first, and then all of it is Unlistable.
        """
        file, contents = self._current(anew=True)
        if isinstance(file, LocalFile):
            yield Mount(self.prefix, file.device & MAX_INTEGER)
        try:
            if next(contents.below(""), None) is None and not contents.trouble:
                raise StoreUnusable(f"there is nothing in {printable(self.place)}; check whether it is whole")
            for entry in contents.below((prefix or self.prefix).removeprefix(self.prefix)):
                yield self._stored(entry)
        except Outdated:
            raise StoreUnusable(f"{printable(self.place)} changed while it was being listed") from None
        if contents.trouble:
            yield Unlistable(self.prefix, contents.trouble)

    def look(self, key: str) -> StoredPhoto | None:
        """What a listing says of one member; None where it is gone. Raises ImageError where that cannot be told."""
        try:
            _, entry = self._find(self._name(key))
        except NotThere:
            return None
        except StoreUnusable as error:
            raise ImageError(str(error)) from None
        return None if entry is None else self._stored(entry)

    def is_gone(self, key: str) -> bool:
        return not self.is_there(key)

    def is_there(self, key: str) -> bool:
        try:
            return self.look(key) is not None
        except ImageError:
            return True

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        def whole(file: RangedFile, entry: Entry) -> tuple[StoredPhoto, bytes]:
            # Neither what is packed nor what comes out of it: a small bomb costs as little as a large file.
            if max(entry.size_bytes or 0, entry.stored_bytes) > max_bytes:
                raise ImageError(f"larger than the limit of {max_bytes:,} bytes (setting max_file_bytes)")
            return self._stored(entry), self._unpacked(file, entry)

        return self._attempt(key, whole)

    def head(self, key: str) -> bytes:
        return self._attempt(key, self._head)

    # -- reading -----------------------------------------------------------------------------------------------

    def _attempt(self, key: str, job: Callable[[RangedFile, Entry], Result]) -> Result:
        """What `job` makes of a member, all of one state of the archive. Raises ImageError."""
        for _ in range(ATTEMPTS):
            try:
                file, entry = self._find(self._name(key))
            except StoreUnusable as error:
                raise ImageError(f"cannot be read: {error}") from None
            if entry is None:
                raise ImageError("cannot be read: it is not in its archive")
            if entry.trouble:
                raise ImageError(entry.trouble)
            try:
                return job(file, entry)
            except FileChanged:
                self._forget(file)
        raise ImageError("cannot be read: its archive changes all the time")

    def _name(self, key: str) -> str:
        """However the archive is spelt in the key: a link may lead to it."""
        return key[len(home_of(key)) + len(INSIDE) :]

    def _stored(self, entry: Entry) -> StoredPhoto:
        return StoredPhoto(self.prefix + entry.name, entry.size_bytes or 0, entry.mtime_ns, entry.etag)

    # -- what a kind of archive tells --------------------------------------------------------------------------

    @abstractmethod
    def _check(self, file: RangedFile) -> None:
        """Raises Malformed, ImageError."""

    @abstractmethod
    def _unpacked(self, file: RangedFile, entry: Entry) -> bytes:
        """All of a member, and no byte more than its size. Raises ImageError."""

    @abstractmethod
    def _head(self, file: RangedFile, entry: Entry) -> bytes:
        """The first HEAD_BYTES of a member. Raises ImageError."""


def is_hidden(name: str) -> bool:
    """As in a folder: `./a.jpg` and `../a.jpg` are names like any other."""
    return any(is_skipped(part) for part in name.split("/") if part not in (".", ".."))
