"""The child's side of `isolation.py`: a process that decodes the photos it is sent until its input ends.

The limit on memory is Linux's RLIMIT_DATA, which counts what is allocated (setrlimit(2)), not the address space that
threads and allocators set aside; elsewhere there is none. Without `signal.setitimer` (Windows) a thread watches time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import struct
from dataclasses import asdict
from enum import IntEnum
from typing import Any

from searchengine import __version__, shared_memory
from searchengine.decode import (
    NONSENSE,
    OUT_OF_MEMORY,
    UNDECODABLE,
    DecodeLimits,
    decode_crop,
    inspect_bytes,
    open_image,
    thumbnail,
)
from searchengine.errors import ImageError
from searchengine.formats import load_plugins
from searchengine.metadata import PhotoMetadata

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

REQUEST = struct.Struct("!IBIQ")  # its number; a Work; a side in pixels, or 0; size of the photo in bytes
ANSWER = struct.Struct("!II")  # the number of the request; size in bytes of what is said in JSON
READY = f"searchengine {__version__} is ready".encode()  # the program may be replaced while its parent runs
PIPE_BYTES = 2**20  # as much as Linux grants everyone (fs.pipe-max-size); small pipes cost a switch per 64 KiB
EXIT_OUT_OF_MEMORY = 77
EXIT_PERHAPS_OUT_OF_MEMORY = 78

# Some decoders do not tell want of memory from damage. None was seen to take more than this.
MOST_BYTES_A_PIXEL = 32


class Work(IntEnum):
    """What to do with a photo. The metadata with a thumbnail are its own: width and height."""

    INSPECT = 0
    CROP = 1
    THUMBNAIL = 2


def serve(limits_by_name: dict[str, Any], shared: int | None) -> None:
    """Answer requests on descriptor 0 on descriptor 1, within `DecodeLimits(**limits_by_name)`.

    `shared`: the descriptor of memory that the parent shares; photos and pixels that fit into it go through it.
    """
    limits = DecodeLimits(**limits_by_name)
    memory = shared_memory.attach(shared)
    with open(os.devnull, "r+b") as null:
        requests, answers = os.fdopen(os.dup(0), "rb", buffering=PIPE_BYTES), os.fdopen(os.dup(1), "wb", buffering=0)
        # What a decoder prints must not get among the answers.
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    load_plugins(threads=1)  # as many processes as there are workers: each has one processor
    _restrict(max_memory_bytes=limits.max_memory_bytes)
    try:
        answers.write(READY)
        while header := requests.read(REQUEST.size):
            number, work, side_px, size = REQUEST.unpack(header)
            data = bytes(memory[:size]) if size <= len(memory) else requests.read(size)
            if len(data) < size:
                return
            _set_timer(limits.max_seconds)
            answer, pixels = _answer(data, work=Work(work), side_px=side_px, limits=limits)
            _set_timer(0)
            encoded = json.dumps(answer).encode()
            if len(pixels) <= len(memory):
                memory[: len(pixels)], pixels = pixels, b""
            _write(answers, b"".join((ANSWER.pack(number, len(encoded)), encoded, pixels)))
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except (BrokenPipeError, struct.error):
        pass  # the parent has ended


def _answer(data: bytes, *, work: Work, side_px: int, limits: DecodeLimits) -> tuple[dict[str, Any], bytes]:
    try:
        if work is Work.INSPECT:
            return asdict(inspect_bytes(data, limits=limits)), b""
        if work is Work.THUMBNAIL:
            small = thumbnail(data, max_side_px=side_px, limits=limits)
            return asdict(PhotoMetadata(width=small.width, height=small.height)), small.tobytes()
        crop, metadata = decode_crop(data, image_size=side_px, limits=limits)
        return asdict(metadata), crop.tobytes()
    except ImageError as error:
        reason = str(error)
    if reason == OUT_OF_MEMORY:
        os._exit(EXIT_OUT_OF_MEMORY)
    if reason in (UNDECODABLE, NONSENSE) and _may_be_too_large(data, limits=limits):
        os._exit(EXIT_PERHAPS_OUT_OF_MEMORY)
    return {"reason": reason}, b""


def _may_be_too_large(data: bytes, *, limits: DecodeLimits) -> bool:
    try:
        width, height = open_image(data, limits=limits).size
    except ImageError:
        return False
    return width * height * MOST_BYTES_A_PIXEL > limits.max_memory_bytes


def _write(pipe: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


def _set_timer(seconds: float) -> None:
    """End the process in so many seconds, whatever it does then; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _restrict(*, max_memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent that ignores or blocks it hands that down
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        idle_bytes = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = idle_bytes + max_memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
