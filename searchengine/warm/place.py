"""Where a warm process listens: a socket in a folder that belongs to its user alone, named by what it answers for."""

from __future__ import annotations

import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from searchengine import __version__
from searchengine.errors import UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.settings import Settings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What the kernel takes, less the NUL byte at its end (unix(7)).
MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103
NAME_BYTES = len("00000000.sock")

Key = dict[str, str]


class Place(NamedTuple):
    """`key` is all that an answer depends on; the names of the files are a checksum of it."""

    key: Key
    folder: str

    @property
    def socket(self) -> str:
        return os.path.join(self.folder, f"{zlib.crc32(json.dumps(self.key).encode()):08x}.sock")

    @property
    def lock(self) -> str:
        return f"{self.socket.removesuffix('.sock')}.lock"


def is_supported() -> bool:
    import socket

    return fcntl is not None and hasattr(socket, "AF_UNIX") and hasattr(socket, "MSG_NOSIGNAL")


def key_of(settings: Settings) -> Key | None:
    """The program, the index and the settings that a search depends on; None where there is no index."""
    index = os.path.abspath(settings.index_folder)
    try:
        card = os.stat(os.path.join(index, "index.json"))  # written once: another file is another index
    except OSError:
        return None
    return {
        "version": __version__,
        "program": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        "python": sys.prefix,
        "index": index,
        "card": f"{card.st_dev} {card.st_ino}",
        "models": os.path.abspath(settings.models_folder),
        "device": settings.device,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def place_for(key: Key) -> Place | None:
    """The place for `key`, if there is a folder for it yet."""
    folder = next((folder for folder in private_folders() if not what_is_wrong_with(folder)), None)
    return Place(key, folder) if folder else None


def make_place(key: Key) -> Place:
    """The place for `key`, whose folder is made if need be. Raises UsageError where there cannot be one."""
    if not is_supported():
        raise UsageError("this system lacks the sockets that a warm process listens on; search without one")
    reasons = []
    for folder in private_folders():
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as error:
            reasons.append(f"{printable(folder)} cannot be made: {error.strerror}")
            continue
        wrong = what_is_wrong_with(folder)
        if not wrong:
            return Place(key, folder)
        reasons.append(f"{printable(folder)} {wrong}")
    raise UsageError(f"a warm process has no folder for its socket ({'; '.join(reasons)}); set XDG_RUNTIME_DIR")


def private_folders() -> Iterator[str]:
    """The folders that may hold sockets, best first: the user's runtime folder (XDG), then the user's cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and _is_own(runtime):  # it may be that of whom `sudo` was called by
        yield os.path.join(runtime, "searchengine")
    import platformdirs

    yield os.path.join(platformdirs.user_cache_path("searchengine", appauthor=False), "warm")


def what_is_wrong_with(folder: str) -> str | None:
    """Why no socket in this folder is to be trusted or can be named; None where it is the user's own, and safe."""
    if len(os.fsencode(folder)) + 1 + NAME_BYTES > MAX_PATH_BYTES:
        return f"has a name too long for a socket in it, of which {MAX_PATH_BYTES} bytes are the most"
    try:
        found = os.lstat(folder)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder, but a link or a file"
    if found.st_uid != os.geteuid():
        return f"belongs to another user ({found.st_uid})"
    if found.st_mode & 0o077:
        return f"is open to others (mode {found.st_mode & 0o777:o}, must be 700)"
    return None


@contextmanager
def taken(place: Place) -> Iterator[bool]:
    """Tries to be the one process of `place`; gives whether it is. The kernel's lock ends with the process."""
    while True:
        lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_file(lock, place.lock):  # whoever had it deleted it meanwhile
                continue
            try:
                yield True
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(place.lock)
            return
        finally:
            os.close(lock)


def _is_own(folder: str) -> bool:
    try:
        return os.stat(folder).st_uid == os.geteuid()
    except OSError:
        return False


def _is_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
