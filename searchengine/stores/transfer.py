"""What a remote store is asked, and the ways in which it may answer. Each kind of store has its own `RemoteFiles`."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from searchengine.stores import StoredPhoto
from searchengine.text import printable

TIMEOUT_SECONDS = 30.0
"""For a connection, and for each silence within an answer."""
LONGEST_REQUEST_SECONDS = 300.0
CONNECTIONS = 64

# The answers below 500 that another time may be different (RFC 9110): time-out, too early, too many requests.
PASSING = frozenset({408, 425, 429})
NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


class TransferFailure(Exception):
    """Why a request brought nothing, in words without URLs: these may hold secrets."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


class Missing(TransferFailure):
    """There is no such file, for sure."""

    def __init__(self) -> None:
        super().__init__("there is no such file")


class Refused(TransferFailure):
    """Asking again is of no use."""


class Changed(TransferFailure):
    """It is not the file that it was."""

    def __init__(self) -> None:
        super().__init__("it changed while it was being read")


class TooLarge(TransferFailure):
    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"larger than the limit of {max_bytes:,} bytes (setting max_file_bytes)")


class Busy(TransferFailure):
    """Another time may be different. `wait_seconds`: how long the store says to wait; 0 where it says nothing."""

    def __init__(self, reason: str, *, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a listing. `names` are keys of files of which the listing tells nothing more."""

    photos: Sequence[StoredPhoto] = ()
    names: Sequence[str] = ()
    folders: Sequence[str] = ()
    next_token: str | None = None


class RemoteFiles(Protocol):
    """The requests of one kind of store, each tried once; threads share it. All raise TransferFailure."""

    @property
    def reads_at_once(self) -> int: ...

    @property
    def lists_exactly(self) -> bool:
        """Whether a file that a whole listing lacks is gone for sure."""

    def list_page(self, prefix: str, token: str | None) -> Page:
        """What is below `prefix`, or directly in it with the folders there; from `token` of the page before on."""

    def has_any(self, prefix: str) -> bool:
        """Whether there is anything below `prefix`."""

    def stat(self, key: str) -> StoredPhoto: ...

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        """Bytes `start` to `stop`, fewer only at the end of the file, and what the file was at that moment.

        The body is not taken of a file that is larger than `max_bytes`, or not the `expected` one.
        """


def check_before_body(photo: StoredPhoto, *, max_bytes: int, expected: StoredPhoto | None) -> None:
    """Raises TooLarge, Changed."""
    if expected is not None and _mark(photo) != _mark(expected):
        raise Changed
    if photo.size_bytes > max_bytes:
        raise TooLarge(max_bytes)


def check_length(data: bytes, *, size_bytes: int, start: int, stop: int) -> None:
    """Raises Busy for a body that was cut off: the next try may bring all of it."""
    if len(data) != max(min(stop, size_bytes) - start, 0):
        raise Busy("the answer was cut off")


def _mark(photo: StoredPhoto) -> tuple[int, int, str]:
    return photo.size_bytes, photo.mtime_ns, photo.etag or ""


def status_failure(status: int, reason: str, *, wait_seconds: float = 0.0, remedy: str = "") -> TransferFailure:
    """What an HTTP status above 400 means. `reason` is the server's name for it, `remedy` is told with a refusal."""
    told = f"the answer is {status} {reason}".rstrip()
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return Missing()
    if status == HTTPStatus.PRECONDITION_FAILED:
        return Changed()
    if status in PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Busy(told, wait_seconds=wait_seconds)
    if remedy and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        told = f"{told}; {remedy}"
    return Refused(told)


def network_failure(error: BaseException) -> TransferFailure:
    """What an exception of a connection means; of others, their kind alone is told."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror) and cause.errno in NO_SUCH_NAME:
            return Refused("there is no such host; check the address")
        if "Certificate" in type(cause).__name__:
            return Refused("its certificate is not valid for that name")
    for cause in _causes(error):
        if isinstance(cause, TimeoutError):
            return Busy("no answer in time")
        if isinstance(cause, OSError) and cause.errno:
            told = os.strerror(cause.errno) if cause.errno > 0 else cause.strerror
            return Busy(f"the connection failed: {told}")
    return Busy(f"the connection failed: {type(error).__name__}")


def _causes(error: BaseException) -> list[BaseException]:
    """The exception, and those that it came from."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        cause = pending.pop()
        if cause is not None and cause not in found:
            found.append(cause)
            pending += [cause.__cause__, cause.__context__, getattr(cause, "os_error", None)]
    return found
