"""Where a warm process listens: a socket in a folder that belongs to its user alone, named by what it answers for."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
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
# Far longer than anybody looks whether a place is taken.
LOOK_SECONDS = 0.2

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
    why = "; ".join(reasons) or "there is no home folder"
    raise UsageError(f"a warm process has no folder for its socket ({why}); set XDG_RUNTIME_DIR")


def private_folders() -> Iterator[str]:
    """The folders that may hold sockets, best first: the user's runtime folder (XDG), then the user's cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and _is_own(runtime):  # it may be that of whom `sudo` was called by
        yield os.path.join(runtime, "searchengine")
    import platformdirs

    with suppress(RuntimeError):  # this user has no home
        cache = platformdirs.user_cache_path("searchengine", appauthor=False)
        if cache.is_absolute():  # some versions leave the ~ there instead
            yield os.path.join(cache, "warm")


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
def taken(place: Place) -> Iterator[Callable[[], bool] | None]:
    """Tries to be the one process of `place`; gives None if another is, else a function that tells whether it still is.

    The kernel's lock ends with the process. Deleting the file calls it off, which needs no process id.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(LOOK_SECONDS / 10)
                    continue
                yield None
                return
            if not _is_file(lock, place.lock):  # whoever had it deleted it meanwhile
                continue
            try:
                yield partial(_is_file, lock, place.lock)
            finally:
                if _is_file(lock, place.lock):
                    with suppress(FileNotFoundError):  # it is being called off
                        os.unlink(place.lock)
            return
        finally:
            os.close(lock)


def is_taken(lock_path: str) -> bool:
    """Whether some process is the one of a place, or about to be; raises OSError where that cannot be found out.

    To look is to hold the lock for a moment, which is why `taken` tries for longer than that.
    """
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def call_off(lock_path: str) -> bool:
    """End whichever process is about to be the one of a place; gives whether there is one."""
    try:
        called_off = is_taken(lock_path)
        if called_off:
            os.unlink(lock_path)
    except OSError:
        return False
    return called_off


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
