"""Children that are killed at a chosen call, and the calls that count: what could leave a disk half written.

A child is forked from this process, which has imported everything and runs no thread, so it starts within milliseconds.
Calls are seen by Python's audit hooks (open, rename, mkdir, sqlite3.connect...), by wrappers of what has none (fsync,
FAISS, each SQL statement, COMMIT, ROLLBACK), and, where SQLite is a shared library, by its own seam for fault
injection: `xSetSystemCall` of its unix VFS (https://www.sqlite.org/c3ref/vfs.html) shows each write of the database,
the log and the checkpoint. A killed write leaves half of its bytes.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

import indexer.segments

AUDITED = ("open", "os.", "shutil.", "sqlite3.connect", "subprocess.")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Kill:
    """Kill -9 at the `number`-th call of all, or of those called `name`."""

    number: int
    name: str | None = None


class Calls:
    """Counts the calls of this process by name, and kills it at the one that `kill` names."""

    def __init__(self, note: Path, kill: Kill | None = None) -> None:
        self.names: Counter[str] = Counter()
        self._note = note
        self._kill = kill
        self._process = os.getpid()
        self._numbers = itertools.count(1)
        self._of_that_name = itertools.count(1)

    def __call__(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        """`half` does the first half of a call that is killed within."""
        if os.getpid() != self._process:
            return  # a decoding process, forked from this one
        number = next(self._numbers)
        self.names[name] += 1
        if self._kill is None:
            return
        if self._kill.name is not None:
            number = next(self._of_that_name) if self._kill.name == name else 0
        if number == self._kill.number:
            half()
            self._process = 0  # the note is no call that counts
            self._note.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """From here on every call counts; there is no way back, so only a child does this."""
        self._watch_files()
        self._watch_sql()
        watch_sqlite(self)
        sys.addaudithook(lambda event, _: self(event) if event.startswith(AUDITED) else None)

    def _watch_files(self) -> None:
        os.fsync = self._around("fsync", os.fsync)
        os.replace = self._around("replace", os.replace)
        faiss.write_index = self._half_written("write_index", faiss.write_index, file=1)
        indexer.segments.write_rows = self._half_written("write_rows", indexer.segments.write_rows, file=0)

    def _watch_sql(self) -> None:
        def statement(step: str) -> Callable[..., None]:
            return lambda connection, cursor, text, *_: self(f"{step} {_verb(text)}")

        sa.event.listen(sa.Engine, "before_cursor_execute", statement("before"))
        sa.event.listen(sa.Engine, "after_cursor_execute", statement("after"))
        DefaultDialect.do_commit = self._around("COMMIT", DefaultDialect.do_commit)  # type: ignore[method-assign]
        DefaultDialect.do_rollback = self._around("ROLLBACK", DefaultDialect.do_rollback)  # type: ignore[method-assign]

    def _half_written(self, name: str, write: Callable[..., Any], *, file: int) -> Callable[..., Any]:
        """`write`, whose argument number `file` names the file."""

        def written(*arguments: Any, **options: Any) -> Any:
            def half() -> None:
                write(*arguments, **options)
                os.truncate(arguments[file], os.path.getsize(arguments[file]) // 2)

            self(name, half)
            result = write(*arguments, **options)
            self(f"after {name}")
            return result

        return written

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self(f"before {name}")
            result = function(*arguments, **options)
            self(f"after {name}")
            return result

        return wrapped


def _verb(statement: str) -> str:
    """INSERT images, PRAGMA user_version, BEGIN..."""
    words = re.findall(r"\w+", statement)
    name = next((b for a, b in itertools.pairwise(words) if a in {"INTO", "FROM", "UPDATE", "TABLE", "PRAGMA"}), "")
    return f"{words[0]} {name}".strip()


class _Vfs(ctypes.Structure):
    """sqlite3_vfs, https://www.sqlite.org/c3ref/vfs.html"""

    _fields_ = (
        ("version", ctypes.c_int),
        ("file_bytes", ctypes.c_int),
        ("max_path", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("methods", ctypes.c_void_p * 13),
        ("set_system_call", ctypes.c_void_p),
        ("get_system_call", ctypes.c_void_p),
        ("next_system_call", ctypes.c_void_p),
    )


_Write = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True
)
_Truncate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64, use_errno=True)
_Set = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_Get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_kept: list[object] = []  # what SQLite calls must not be collected


def sqlite_library() -> str | None:
    """The file of the SQLite that Python uses; None where it is part of Python, or this is not Linux."""
    sqlite3.connect(":memory:").close()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*libsqlite3\S*", maps)
    return found[0] if found else None


def watch_sqlite(calls: Calls) -> None:
    path = sqlite_library()
    if path is None:
        return
    library = ctypes.CDLL(path)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(None)
    get, set_ = _Get(vfs.contents.get_system_call), _Set(vfs.contents.set_system_call)

    def hook(name: bytes, kind: Any, make: Callable[[Any], Callable[..., int]]) -> None:
        address = get(vfs, name)
        if address:
            callback = kind(make(kind(address)))
            _kept.append(callback)
            set_(vfs, name, ctypes.cast(callback, ctypes.c_void_p))

    def writing(original: Any) -> Callable[..., int]:
        def write(file: int, data: int, size: int, offset: int) -> int:
            calls("sqlite write", lambda: original(file, data, size // 2, offset))
            return int(original(file, data, size, offset))

        return write

    def truncating(original: Any) -> Callable[..., int]:
        def truncate(file: int, size: int) -> int:
            calls("sqlite truncate")
            return int(original(file, size))

        return truncate

    hook(b"pwrite", _Write, writing)
    hook(b"pwrite64", _Write, writing)
    hook(b"ftruncate", _Truncate, truncating)


class Child:
    """A forked child that runs `function` and leaves what it returns, as JSON, in a file beside its `log`."""

    def __init__(self, function: Callable[[], Any], *, log: Path) -> None:
        self._answer = log.with_suffix(".json")
        self._answer.unlink(missing_ok=True)
        self.started = time.monotonic()
        self.id = os.fork()
        if self.id == 0:
            self._run(function, log)

    def _run(self, function: Callable[[], Any], log: Path) -> None:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            self._answer.write_text(json.dumps(function()))
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.id, number)

    def is_alive(self) -> bool:
        """Whether it still runs; its end is left for `wait` to see."""
        return os.waitid(os.P_PID, self.id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, *, seconds: float) -> tuple[int, Any]:
        """(exit status, negative for a signal; what the function returned). Kills a child that takes longer."""
        deadline = self.started + seconds
        while True:
            ended, status = os.waitpid(self.id, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        return code, json.loads(self._answer.read_text()) if code == 0 and self._answer.exists() else None


def adopt_orphans() -> None:
    """What a killed child leaves running becomes a child of this process, so that it can be seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans(*, seconds: float) -> list[int]:
    """The processes that are still there after `seconds`; they are killed."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if not ended:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
    own = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    for process in own:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return own
