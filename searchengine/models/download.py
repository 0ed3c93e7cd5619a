"""Published weights over HTTP: resumed, tried again, and given their final name only with the right sha256.

What has arrived is kept in NAME.part and taken up again with a Range request (RFC 9110, section 14). The pinned sha256
is the validator of a resumed file: an ETag differs from mirror to mirror and would not survive a killed process.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from searchengine.errors import ModelNotFound, WeightsError
from searchengine.index.layout import publish
from searchengine.models.http import TransferFailed, network_errors, open_range
from searchengine.models.published import PublishedFile, sha256_of
from searchengine.text import printable

TRIES = 5  # in a row without progress
PROGRESS_BYTES = 2**20
FIRST_WAIT_SECONDS = 1.0
STALL_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1024
CHUNK_BYTES = 2**18
# The whole answer of `--model auto` is promised within five seconds.
PROBE_SECONDS = 3.0

OnProgress = Callable[[int, int], None]  # (done_bytes, total_bytes)
OnNotice = Callable[[str], None]


class _WrongBytes(TransferFailed):
    pass


def download(
    file: PublishedFile,
    *,
    folder: Path,
    mirror: str = "",
    offline: bool = False,
    on_progress: OnProgress = lambda done_bytes, total_bytes: None,
    on_notice: OnNotice = lambda message: None,
    stall_seconds: float = STALL_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The verified file in `folder`, fetched unless it is there. `mirror` is a base URL that is tried first.

    Proxies come from HTTP_PROXY, HTTPS_PROXY and NO_PROXY. While another process downloads the same file, this one
    waits for it. Raises ModelNotFound where it cannot be had or stored, WeightsError where other bytes come than the
    published ones; both say how to bring the file by hand.
    """
    final = file.stored_in(folder)
    if file.is_whole(final):
        return final
    if offline:
        raise ModelNotFound(f"{file.name} is not here and the setting offline forbids to fetch it; {_by_hand(file)}")
    with _storage_errors(file, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(final, on_notice):
            if not file.is_whole(final):
                part = _fetch(
                    file,
                    final.with_name(final.name + ".part"),
                    urls=_urls(file, mirror),
                    on_progress=on_progress,
                    on_notice=on_notice,
                    stall_seconds=stall_seconds,
                    sleep=sleep,
                )
                publish(part, final)
    return final


def can_download(file: PublishedFile, *, mirror: str = "", deadline_seconds: float = PROBE_SECONDS) -> bool:
    """Whether some URL offers `file`, as far as can be found out before the deadline, whatever the network does."""
    urls = _urls(file, mirror)
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            open_range(url, size_bytes=file.size_bytes, byte_range="0-0", stall_seconds=deadline_seconds)[0].close()
            answers.put(True)
        except TransferFailed:
            answers.put(False)

    # A look-up of a name cannot be given a time limit, a thread that nobody waits for can be left behind.
    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    end = time.monotonic() + deadline_seconds
    for _ in urls:
        try:
            if answers.get(timeout=max(0.0, end - time.monotonic())):
                return True
        except queue.Empty:
            return False
    return False


def _fetch(
    file: PublishedFile,
    part: Path,
    *,
    urls: list[str],
    on_progress: OnProgress,
    on_notice: OnNotice,
    stall_seconds: float,
    sleep: Callable[[float], None],
) -> Path:
    """Complete `part`, asking one URL after the other. It holds the published bytes when this returns."""
    if file.is_whole(part):
        return part
    if _size(part) >= file.size_bytes:
        part.unlink()
    furthest, tries, turn, wrong = _size(part), 0, 0, 0
    reasons: dict[str, str] = {}
    while True:
        url = urls[turn % len(urls)]
        try:
            _transfer(url, part, file, on_progress=on_progress, stall_seconds=stall_seconds)
            _check(part, file)
            return part
        except TransferFailed as error:
            reasons[url] = str(error)
            wrong += isinstance(error, _WrongBytes)
            if error.anew:
                part.unlink(missing_ok=True)
            if error.final:
                urls = [other for other in urls if other != url]
            elif _size(part) >= furthest + PROGRESS_BYTES:
                furthest, tries = _size(part), 1
            else:
                tries, turn = tries + 1, turn + 1
            if not urls or tries == TRIES or wrong == 2:
                told = "; ".join(f"{printable(url)} {reason}" for url, reason in reasons.items())
                kind = WeightsError if wrong == 2 else ModelNotFound
                raise kind(f"{file.name} cannot be downloaded: {told}; {_by_hand(file)}") from None
            if not error.final:
                wait_seconds = max(error.wait_seconds, FIRST_WAIT_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1))
                on_notice(f"downloading {file.name}: the server {error}; trying again in {wait_seconds:.0f} s")
                sleep(wait_seconds)


def _transfer(url: str, part: Path, file: PublishedFile, *, on_progress: OnProgress, stall_seconds: float) -> None:
    """Append to `part` what it lacks, from the byte on where the server begins. Raises TransferFailed."""
    have = _size(part)
    response, done = open_range(
        url, size_bytes=file.size_bytes, byte_range=f"{have}-" if have else "", stall_seconds=stall_seconds
    )
    with response, open(part, "ab") as out:
        if done > have:
            raise TransferFailed(f"sends what follows byte {done:,}, asked for byte {have:,}", anew=True)
        if done < have:
            out.truncate(done)
        on_progress(done, file.size_bytes)
        mark, marked_at = done, time.monotonic()
        while done < file.size_bytes:
            with network_errors():
                chunk = response.read1(min(CHUNK_BYTES, file.size_bytes - done))
            if not chunk:
                raise TransferFailed(f"ended after {done:,} of {file.size_bytes:,} bytes")
            out.write(chunk)
            done += len(chunk)
            on_progress(done, file.size_bytes)
            if time.monotonic() - marked_at > stall_seconds:
                if done - mark < stall_seconds * SLOWEST_BYTES_PER_SECOND:
                    raise TransferFailed(f"sends next to nothing after {done:,} of {file.size_bytes:,} bytes")
                mark, marked_at = done, time.monotonic()


def _check(part: Path, file: PublishedFile) -> None:
    found = sha256_of(part)
    if found != file.sha256:
        raise _WrongBytes(f"gives bytes with sha256 {found}, expected {file.sha256}", anew=True)


@contextmanager
def _one_at_a_time(final: Path, on_notice: OnNotice) -> Iterator[None]:
    lock = filelock.FileLock(final.with_name(final.name + ".lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        on_notice(f"another process is downloading {final.stem}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage_errors(file: PublishedFile, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelNotFound(
            f"{file.name} cannot be stored in {printable(str(folder))}: {error.strerror or error}; it takes "
            f"{file.size_bytes / 2**20:,.0f} MiB: free space, fix permissions, or let SEARCHENGINE_MODELS name another"
        ) from error


def _urls(file: PublishedFile, mirror: str) -> list[str]:
    return [f"{mirror.rstrip('/')}/{file.published_as}"] * bool(mirror) + list(file.urls)


def _by_hand(file: PublishedFile) -> str:
    return (
        f"get {file.urls[0]} by other means and run: searchengine models import FILE "
        f"(or set SEARCHENGINE_MODELS to a folder that has it as {file.name}.pt)"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
