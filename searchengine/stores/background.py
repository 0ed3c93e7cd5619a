"""Waiting for the network: coroutines waited for by a thread, and several waits at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from searchengine.stores.transfer import LONGEST_REQUEST_SECONDS, Busy

T = TypeVar("T")
U = TypeVar("U")


def wait_for(coroutine: Coroutine[None, None, T]) -> T:
    """Its result, from fsspec's event loop, which all stores share. Raises Busy after LONGEST_REQUEST_SECONDS."""
    import fsspec.asyn

    future = asyncio.run_coroutine_threadsafe(coroutine, fsspec.asyn.get_loop())
    try:
        return future.result(LONGEST_REQUEST_SECONDS)
    except TimeoutError:
        raise Busy("no answer in time") from None
    finally:
        future.cancel()


def map_at_once(work: Callable[[T], U], items: Iterable[T], *, threads: int) -> Iterator[U]:
    """The results in order. What is not begun when the iterator is closed never is, and nobody waits for the rest.

    A ThreadPoolExecutor would: at the end of the process, too, for a server that does not answer.
    """
    tasks = deque((item, Future[U]()) for item in items)
    futures = [future for _, future in tasks]

    def run() -> None:
        while tasks:
            try:
                item, future = tasks.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    for number in range(min(threads, len(tasks))):
        threading.Thread(target=run, name=f"network-{number}", daemon=True).start()
    try:
        for future in futures:
            yield future.result()
    finally:
        tasks.clear()
