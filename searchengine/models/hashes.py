"""The sha256 of weights, computed once: a file of 350 MB takes a quarter of a second, longer than the query after it.

Beside the weights, in `hashes.json`, it is remembered which file had which hash. What is remembered is believed while
the file's device, inode, size, time of content and time of change are what they were. The kernel sets the last at every
write, rename or copy, and no program can set it back, so other content is noticed even under the old size and mtime.
(Where there is no such time, as on Windows, mtime tells. A program that keeps the file mapped for writing can escape
both.)

- A file that changed within the last `SETTLED_NS` is hashed again each time: clocks tick, and a second change within a
  tick would not show.
- A file that changes while it is hashed is not remembered.
- It is believed only if this user owns it and nobody else may write it; whoever can, can as well change the index.
- It is kept only where the folder exists already: a query makes none.
- Programs that write at once lose each other's additions, never more: each puts a whole file in place of the other's.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchengine.models.published import sha256_of
from searchengine.stores.local import open_without_waiting

FILE = "hashes.json"
SETTLED_NS = 3 * 10**9  # FAT's clock ticks every two seconds, all others faster
MAX_FILE_BYTES = 2**20
MAX_KNOWN = 256


def remembered_sha256(path: Path, *, folder: Path | None) -> str:
    """The sha256 of a file, in hex. `folder` has `hashes.json`; None, or one that cannot be used, hashes it anew.

    Raises OSError where `path` cannot be read.
    """
    if folder is None:
        return sha256_of(path)
    state, key = state_of(path), os.path.abspath(path)
    match _known(folder).get(key):
        case [*told, str(sha256)] if told == state:
            return sha256
    sha256 = sha256_of(path)
    if state_of(path) == state and time.time_ns() - max(state[-2:]) > SETTLED_NS:
        with suppress(OSError):  # a folder that cannot be written to
            _remember(folder, key, [*state, sha256])
    return sha256


def state_of(path: Path) -> list[int]:
    """What changes when the file does: device, inode, size in bytes, mtime and ctime in ns. Raises OSError."""
    file = os.stat(path)
    return [file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns]


def _known(folder: Path) -> dict[str, Any]:
    """What is remembered; nothing, if it is not to be had or not to be believed."""
    with suppress(OSError, ValueError, RecursionError), open(folder / FILE, "rb", opener=open_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_FILE_BYTES:
            return {}
        if os.name == "posix" and not _is_ours_alone(facts):
            return {}
        known = json.loads(file.read(MAX_FILE_BYTES))
        return known if isinstance(known, dict) else {}
    return {}


def _is_ours_alone(file: os.stat_result) -> bool:
    return file.st_uid == os.geteuid() and not file.st_mode & 0o022


def _remember(folder: Path, key: str, value: list[Any]) -> None:
    """Raises OSError."""
    known = _known(folder) | {key: value}
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=FILE, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            json.dump(dict(list(known.items())[-MAX_KNOWN:]), file, indent=1)
        os.replace(temporary, folder / FILE)
    except BaseException:
        os.unlink(temporary)
        raise
