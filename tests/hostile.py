"""Hostile photos, decoders with holes in them, and a look at processes (on Linux)."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="processes are looked at in Linux's /proc"
)

# Loaded by every Python that finds it on its path: what a decoder with a hole in it would do, on certain bytes.
SITECUSTOMIZE = """
import io, os, re, signal, PIL.Image
real = PIL.Image.open
def hostile(file, **options):
    data = file.getvalue()
    word, _, rest = data.partition(b":")
    if word == b"ABORT":
        os.abort()
    if word == b"SEGFAULT":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"EXIT":
        os._exit(5)
    if word == b"HANG":
        re.match("(a+)+$", "a" * 60 + "b")  # for ages, in C, with the interpreter's lock
    if word == b"SLEEP":
        import time
        if rest:
            os.close(os.open(rest, os.O_CREAT | os.O_WRONLY))
        while True:
            time.sleep(1)
    if word == b"LIE":
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, rest)
            except OSError:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pause()
    if word == b"ONCE":
        name, _, rest = rest.partition(b":")
        if not os.path.exists(name):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
            os.abort()
        file = io.BytesIO(rest)
    return real(file, **options)
PIL.Image.open = hostile
"""


def children(pid: int | str = "self") -> list[int]:
    """The child processes of a process, zombies too."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def large_png(side: int, *, filter_type: int = 0) -> bytes:
    """A legal picture of `side` x `side` black pixels, in little more than a thousandth of their bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (bytes([filter_type]) + bytes(3 * side)) * 50
    compressor = zlib.compressobj(1)
    body = b"".join(compressor.compress(rows) for _ in range(side // 50)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
