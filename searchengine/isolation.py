"""Decoding in a process of its own: a photo that crashes its decoder, hangs it or eats memory costs that photo alone.

This is the parent's side; `decoder_process.py` is the child's. They talk over pipes, one photo at a time: a `REQUEST`
and the photo's bytes one way; an `ANSWER`, a little JSON and the pixels of a decoded photo the other. On Linux, bytes
and pixels lie in memory that both share, unless they are too many. Nothing that the child says is executed or taken
unchecked, for a hostile photo may have taken it over: all that it can do then is tell wrong sizes and pixels, of that
photo and of those after it. That memory it can write at any time, but not cut off.

The limits hold on either side. In the child the kernel ends it when its time is up, even where its parent is gone by
then, and grants it `max_memory_bytes` beyond what it takes when idle; the parent waits a little longer than that and
kills it. A child whose parent has ended, in whatever way, reads the end of its input and ends too.

A child that did something before may have come to harm by that. So what fails in it in a crash, or for want of memory,
is tried once more in a fresh one before it is put down to the photo.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import datetime
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from searchengine import shared_memory
from searchengine.decode import DecodeLimits, Photo
from searchengine.decoder_process import (
    ANSWER,
    EXIT_OUT_OF_MEMORY,
    EXIT_PERHAPS_OUT_OF_MEMORY,
    PIPE_BYTES,
    READY,
    REQUEST,
    Work,
)
from searchengine.errors import ImageError, SearchEngineError
from searchengine.metadata import PhotoMetadata

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_ANSWER_BYTES = 16 * 2**10

START_SECONDS = 60.0
GRACE_SECONDS = 5.0
OUT_OF_MEMORY = {EXIT_OUT_OF_MEMORY: "needs", EXIT_PERHAPS_OUT_OF_MEMORY: "is damaged, or needs"}

# The parent's own path, so that the child finds what the parent found, wherever that was.
BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from searchengine.decoder_process import serve
serve(*json.loads(sys.argv[2]))
"""

# Each child has one processor. glibc keeps 16 MiB of what a photo took for the next one (mallopt(3)): to get those
# pages from the kernel anew costs a fifth of decoding a small photo.
KEPT_BYTES = str(16 * 2**20)
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": KEPT_BYTES,
    "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES,
}

TEXT, ANGLE = (str, type(None)), (float, type(None))
KINDS = {"width": (int,), "height": (int,), "taken_at": TEXT, "camera": TEXT, "latitude": ANGLE, "longitude": ANGLE}


class IsolatedDecoder:
    """Decodes as `decode_bytes`, `inspect_bytes` and `thumbnail` do, in a process that the first photo starts.

    One photo at a time; `close` may be called from any thread, and what is under way then fails at once. Every method
    raises SearchEngineError where no process can be started.
    """

    def __init__(self, *, limits: DecodeLimits) -> None:
        self._limits = limits
        self._child: _Child | None = None
        self._busy = threading.Lock()
        self._closed = False

    def decode_bytes(self, data: bytes, *, image_size: int) -> Photo:
        """Decode an encoded picture. Raises ImageError with a reason that a person understands."""
        metadata, pixels = self._ask(data, work=Work.CROP, side_px=image_size)
        return Photo(pixels=pixels, metadata=metadata)

    def inspect_bytes(self, data: bytes) -> PhotoMetadata:
        """Size and EXIF. Raises ImageError."""
        return self._ask(data, work=Work.INSPECT)[0]

    def thumbnail(self, data: bytes, *, max_side_px: int) -> NDArray[np.uint8]:
        """The whole picture, upright, uint8 RGB (height, width, 3), sides at most `max_side_px`. Raises ImageError."""
        return self._ask(data, work=Work.THUMBNAIL, side_px=max_side_px)[1]

    def close(self) -> None:
        """End the process."""
        self._closed = True
        if child := self._child:  # which the thread that it works for may give up meanwhile
            child.kill()
        with self._busy:
            self._discard()

    def _ask(self, data: bytes, *, work: Work, side_px: int = 0) -> tuple[PhotoMetadata, NDArray[np.uint8]]:
        with self._busy:
            while True:
                fresh = self._child is None
                if self._child is None:
                    self._child = _Child(self._limits)
                if self._closed:
                    self._discard()
                    raise ImageError("decoding it was interrupted")
                try:
                    return self._child.ask(data, work=work, side_px=side_px)
                except _Fatal as error:
                    self._discard()
                    if fresh or error.is_final or self._closed:
                        raise error.kind(str(error)) from None

    def _discard(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class DecoderKilled(ImageError):
    """The process was killed from outside, as when memory runs out on the machine: no word on the photo."""


class _Fatal(Exception):
    """The child ended, or is not to be used again; the reason. `is_final`: a fresh one would do no better."""

    def __init__(self, reason: str, *, is_final: bool = False, kind: type[ImageError] = ImageError) -> None:
        super().__init__(reason)
        self.is_final = is_final
        self.kind = kind


class _Child:
    """One process and the pipes to it."""

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = limits
        self._number = 0  # of the last request
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # "" is the current folder
        self._memory, shared = shared_memory.create()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOTSTRAP, path, json.dumps([asdict(limits), shared])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the parent
                env={**os.environ, **ENVIRONMENT},
                pass_fds=() if shared is None else (shared,),
            )
        except OSError as error:
            raise SearchEngineError(
                f"no process to decode photos in can be started: {error.strerror}; check the limits on processes, "
                "open files and memory of this account (ulimit -a), or have fewer workers"
            ) from None
        finally:
            if shared is not None:
                os.close(shared)
        self._input = cast(IO[bytes], self._process.stdin)
        self._output = cast(IO[bytes], self._process.stdout)
        for pipe in (self._input, self._output):
            if hasattr(select, "poll"):
                os.set_blocking(pipe.fileno(), False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                with contextlib.suppress(OSError):  # it goes beyond what this account may have
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            if self._receive(len(READY), time.monotonic() + START_SECONDS) != READY:
                raise EOFError
        except (EOFError, OSError):
            raise SearchEngineError(
                f"a process to decode photos in does not start ({_named(self.end())}); "
                "`python -c 'import searchengine.decoder_process'` may tell why"
            ) from None

    def ask(self, data: bytes, *, work: Work, side_px: int) -> tuple[PhotoMetadata, NDArray[np.uint8]]:
        """The answer to one photo; uint8 pixels (height, width, 3), if any are asked for. Raises ImageError, _Fatal."""
        self._number = (self._number + 1) % 2**32
        started = time.monotonic()
        deadline = started + self._limits.max_seconds + GRACE_SECONDS
        try:
            request = REQUEST.pack(self._number, work, side_px, len(data))
            if len(data) <= len(self._memory):
                self._memory[: len(data)] = data
                self._send(request, deadline)
            else:
                self._send(request + data[:PIPE_BYTES], deadline)  # together: the child is woken once
                self._send(memoryview(data)[PIPE_BYTES:], deadline)
            number, length = ANSWER.unpack(self._receive(ANSWER.size, deadline))
            if number != self._number:
                raise ValueError
            answer = json.loads(self._receive(min(length, MAX_ANSWER_BYTES), deadline))
            metadata = _checked(answer, max_pixels=self._limits.max_pixels)
            height, width = (metadata.height, metadata.width) if work is Work.THUMBNAIL else (side_px, side_px)
            if max(height, width) > side_px:
                raise ValueError
            size = height * width * 3
            pixels = self._memory[:size] if size <= len(self._memory) else self._receive(size, deadline)
            return metadata, np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)
        except (EOFError, OSError):  # TimeoutError among them
            raise self._end_as_failure(seconds=time.monotonic() - started) from None
        except (ValueError, TypeError, RecursionError):
            raise _Fatal("crashes its decoder (which answers nonsense)") from None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Kill the process if it has not ended; its exit code, negative for a signal."""
        self._process.kill()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()
        shared_memory.release(self._memory)
        return self._process.wait()

    def _end_as_failure(self, *, seconds: float) -> _Fatal:
        if seconds < self._limits.max_seconds:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its pipes and goes on, or is about to end
                self._process.wait(timeout=1)
        code = self.end()
        if seconds >= self._limits.max_seconds:
            limit = f"{self._limits.max_seconds:,} s to decode (setting max_decode_seconds)"
            return _Fatal(f"takes longer than {limit}", is_final=True)
        if code in OUT_OF_MEMORY:
            limit = f"{self._limits.max_memory_bytes // 2**20:,} MiB of memory to decode"
            return _Fatal(f"{OUT_OF_MEMORY[code]} more than {limit} (setting max_decode_memory_bytes)")
        if _named(code) == "SIGKILL":
            return _Fatal("its decoder was killed, as happens when memory runs out", kind=DecoderKilled)
        return _Fatal(f"crashes its decoder ({_named(code)})")

    def _send(self, data: bytes | memoryview, deadline: float) -> None:
        view = memoryview(data)
        while view:
            sent = self._input.write(view)
            if sent is None:
                _wait(self._input, select.POLLOUT, deadline)
            view = view[sent or 0 :]

    def _receive(self, size: int, deadline: float) -> bytearray:
        """Raises EOFError, TimeoutError."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            received = self._output.readinto(view)  # type: ignore[attr-defined]
            if received == 0:
                raise EOFError
            if received is None:
                _wait(self._output, select.POLLIN, deadline)
            view = view[received or 0 :]
        return data


def _wait(pipe: IO[bytes], event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0, math.ceil(1000 * (deadline - time.monotonic())))):
        raise TimeoutError


def _named(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def _checked(answer: Any, *, max_pixels: int) -> PhotoMetadata:
    """What the child says of a photo. Raises ImageError with its reason; ValueError, TypeError if it makes no sense."""
    if type(answer) is not dict:
        raise TypeError
    reason = answer.get("reason")
    if type(reason) is str and reason.isprintable():
        raise ImageError(reason)
    if answer.keys() != KINDS.keys() or any(type(answer[name]) not in kinds for name, kinds in KINDS.items()):
        raise TypeError
    metadata = PhotoMetadata(**answer)
    if not (metadata.width > 0 and 0 < metadata.width * metadata.height <= max_pixels):
        raise ValueError
    if metadata.taken_at and datetime.fromisoformat(metadata.taken_at).isoformat() != metadata.taken_at:
        raise ValueError
    if metadata.camera and not metadata.camera.isprintable():
        raise ValueError
    if not (abs(metadata.latitude or 0) <= 90 and abs(metadata.longitude or 0) <= 180):
        raise ValueError
    return metadata
