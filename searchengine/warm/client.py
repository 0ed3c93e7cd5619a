"""To ask a warm process, if there is one, and to start one for the next who asks.

Whatever is wrong with the one that is there (it hangs, it died, it is of another version, it is none at all), the
answer is None, and whoever asked finds out for itself, as it would have without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from searchengine.errors import UsageError
from searchengine.hits import Hit
from searchengine.warm.place import (
    Key,
    Place,
    call_off,
    is_taken,
    key_of,
    make_place,
    place_for,
    private_folders,
    what_is_wrong_with,
)

if TYPE_CHECKING:
    import socket

    from searchengine.settings import Settings
    from searchengine.warm.protocol import Message

# One that lives greets within a millisecond; then it has time for the largest picture.
GREETING_SECONDS = 0.5
ANSWER_SECONDS = 10.0

# The path of who starts it, so that it is the same program, wherever it was found.
BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from searchengine.cli import main
main()
"""


def ask(search: Mapping[str, Any], settings: Settings, *, files: Sequence[str] = ()) -> list[Hit] | None:
    """The hits of a search, or None where no warm process answers it.

    `search` holds values for JSON, `files` are the absolute paths in it, which must mean the same to both processes.
    A search that fails there is none that was answered: whoever asks meets the error itself.
    """
    if settings.warm == "off":
        return None
    place = _place(settings)
    if place is None or not os.path.exists(place.socket):
        return None
    try:
        request = {"do": "answer", "search": search, "files": {path: identity_of_file(path) for path in files}}
        with _connected(place.socket) as connection:
            reply = _exchange(connection, request, key=place.key, seconds=ANSWER_SECONDS)
        return [Hit(**fields) for fields in reply["hits"]] if "hits" in reply else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def start_for_the_next(settings: Settings) -> None:
    """Start a warm process in the background, where the setting `warm` wants one and none is there or on its way.

    It shares nothing with this process: no terminal, no open file, no session. Where it cannot run, it ends unseen.
    """
    if settings.warm != "auto":
        return
    with suppress(OSError, UsageError):  # UsageError: it could listen nowhere
        key = key_of(settings)
        if key is not None and not is_taken(make_place(key).lock):
            _start(settings)


def all_running() -> Iterator[dict[str, Any]]:
    """What each warm process of this user says of itself; of one that does not answer, `pid` alone."""
    for _, connection in _connections():
        pid = _pid(connection)
        yield _told(connection, {"do": "status"}).get("status") or {"pid": pid}


def stop_all() -> Iterator[tuple[int | None, bool]]:
    """End each warm process of this user; gives (process id, whether it answered).

    One that does not answer is sent SIGTERM. One that does not listen yet, whose id nobody tells, is called off: it
    ends when it has loaded.
    """
    import signal

    listening = set()
    for path, connection in _connections():
        listening.add(path)
        pid = _pid(connection)
        answered = bool(_told(connection, {"do": "stop"}))
        if not answered and pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        yield pid, answered
    for lock in _files(".lock"):
        if f"{lock.removesuffix('.lock')}.sock" not in listening and call_off(lock):
            yield None, False


def identity_of_file(path: str) -> list[int]:
    """Device and inode: what an absolute path means to this process. Raises OSError where that is nothing."""
    if not os.path.isabs(path):
        raise ValueError(f"the path {path!r} is not absolute")
    found = os.stat(path)
    return [found.st_dev, found.st_ino]


def _place(settings: Settings) -> Place | None:
    key = key_of(settings)
    return place_for(key) if key else None


def _start(settings: Settings) -> None:
    import json
    import subprocess

    folders = {"SEARCHENGINE_INDEX": settings.index_folder, "SEARCHENGINE_MODELS": settings.models_folder}
    absolute = {name: os.path.abspath(folder) for name, folder in folders.items()}
    if os.environ.get("SEARCHENGINE_CONFIG"):
        absolute["SEARCHENGINE_CONFIG"] = os.path.abspath(os.environ["SEARCHENGINE_CONFIG"])
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # "" is the current folder
    subprocess.Popen(
        [sys.executable, "-P", "-c", BOOTSTRAP, path, "warm", "--device", settings.device],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=os.sep,  # no folder of the user's is kept busy
        env={**os.environ, **absolute},
    )


def _connections() -> Iterator[tuple[str, socket.socket]]:
    """Each socket of this user's that somebody listens on: its path, and a connection to it."""
    for path in _files(".sock"):
        with suppress(OSError), _connected(path) as connection:
            yield path, connection


def _files(suffix: str) -> Iterator[str]:
    """Of the folders that may hold sockets."""
    for folder in private_folders():
        if not what_is_wrong_with(folder):
            yield from (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(suffix))


@contextmanager
def _connected(socket_path: str) -> Iterator[socket.socket]:
    """Raises OSError where nobody of this user's listens."""
    import socket

    from searchengine.warm.protocol import is_ours

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(GREETING_SECONDS)
        connection.connect(socket_path)
        if not is_ours(connection):
            raise ConnectionRefusedError("another user listens there")
        yield connection


def _exchange(connection: socket.socket, request: Mapping[str, Any], *, key: Key | None, seconds: float) -> Message:
    """The answer of the one process that has this `key`, if any is given. Raises OSError, ValueError, KeyError."""
    from searchengine.warm import protocol

    greeting = protocol.receive(connection, max_bytes=protocol.MAX_GREETING_BYTES, seconds=GREETING_SECONDS)
    if key is not None and greeting["key"] != key:
        raise ValueError("it answers for something else")
    protocol.send(connection, request, max_bytes=protocol.MAX_REQUEST_BYTES, seconds=GREETING_SECONDS)
    return protocol.receive(connection, max_bytes=protocol.MAX_ANSWER_BYTES, seconds=seconds)


def _told(connection: socket.socket, request: Mapping[str, Any]) -> Message:
    """The answer of whichever process it is, empty where there is none."""
    try:
        return _exchange(connection, request, key=None, seconds=GREETING_SECONDS)
    except (OSError, ValueError):
        return {}


def _pid(connection: socket.socket) -> int | None:
    from searchengine.warm.protocol import peer

    other = peer(connection)
    return other[0] or None if other else None  # 0: it is in another container, where its id means something else
