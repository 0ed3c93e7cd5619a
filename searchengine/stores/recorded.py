"""A file whose contents are recorded, once for each state of it: an archive, or a list."""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from searchengine.errors import ImageError, StoreUnusable
from searchengine.stores import KnownStores
from searchengine.stores.contents import Contents, Entry, Malformed, Outdated, contents_of
from searchengine.stores.ranged import LocalFile, RangedFile, open_ranged, place_of
from searchengine.text import printable

ATTEMPTS = 3  # while it is being replaced under its reader


class Recorded(ABC):
    """`place`: its path or URL, as keys have it."""

    def __init__(self, location: str, *, stores: KnownStores | None = None) -> None:
        """What is far away is asked by way of `stores`. Raises UsageError, StoreUnusable."""
        self.place = place_of(location)
        self._stores = stores or KnownStores()
        self._lock = threading.Lock()
        self._file: RangedFile | None = None
        self._contents: Contents | None = None

    @abstractmethod
    def _entries(self, file: RangedFile, state: str) -> Iterator[Entry]:
        """What is in it, in its order. `state` is another text for every other content of the file.

        Raises CutShort, Malformed, ImageError, OSError.
        """

    def _find(self, name: str) -> tuple[RangedFile, Entry | None]:
        """The entry of that name, and the state of the file that has it.

        Raises NotThere, StoreUnusable, also where it may be in a part that cannot be told.
        """
        for _ in range(ATTEMPTS):
            file, contents = self._current()
            try:
                entry = contents.find(name)
            except Outdated:  # another process has recorded another state
                self._forget(file)
                continue
            if entry is None and contents.trouble:
                raise StoreUnusable(f"{printable(self.place)}: {contents.trouble}")
            return file, entry
        raise StoreUnusable(f"{printable(self.place)} changes all the time; index again when it is at rest")

    def _current(self, *, anew: bool = False) -> tuple[RangedFile, Contents]:
        """As it is; a place far away that is not asked `anew`, as it was last. Raises NotThere, StoreUnusable."""
        with self._lock:
            file = self._opened(anew=anew)
            if self._contents is None:
                # What nothing tells the changes of is another each time.
                state = file.etag or secrets.token_hex()
                try:
                    self._contents = contents_of(
                        self.place,
                        state=state,
                        is_lasting=file.etag is not None,
                        entries=self._entries(file, state),
                    )
                except (Malformed, ImageError, OSError) as error:
                    raise StoreUnusable(f"{printable(self.place)} cannot be listed: {error}") from None
            return file, self._contents

    def _forget(self, file: RangedFile) -> None:
        with self._lock:
            if self._file is file:
                file.close()
                self._file, self._contents = None, None

    def _opened(self, *, anew: bool) -> RangedFile:
        if self._file is None or anew or isinstance(self._file, LocalFile):
            file = open_ranged(self.place, self._stores)
            if self._file is not None and file.etag is not None and file.etag == self._file.etag:
                file.close()
            else:
                if self._file is not None:
                    self._file.close()
                self._file, self._contents = file, None
        return self._file
