"""Threads that fetch photos from stores that are not disks: many wait at once, within a limit on what they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

MAX_BYTES_UNDER_WAY = 256 * 2**20

T = TypeVar("T")
Task = tuple[Callable[[], T], int, "Future[T]"]


class FetchPool(Generic[T]):
    """Work is begun in the order in which it comes. What is held at a time is at most `max_bytes`, or one file.

    Its threads are daemons: nobody waits for a request that hangs when a run is stopped.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES_UNDER_WAY) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._room = threading.Condition()
        self._turn = threading.Lock()
        self._closed = False
        self._threads = 0
        self._tasks: SimpleQueue[Task[T] | None] = SimpleQueue()

    def submit(self, work: Callable[[], T], *, size_bytes: int, threads: int) -> Future[T]:
        """Have `work`, which holds `size_bytes` while it goes on, done by one of `threads` threads or more."""
        future: Future[T] = Future()
        self._tasks.put((work, min(size_bytes, self._max_bytes), future))
        if self._threads < threads:
            self._threads += 1
            threading.Thread(target=self._run, name=f"fetch-{self._threads}", daemon=True).start()
        return future

    def close(self) -> None:
        """Begin nothing more. What goes on ends by itself, and its results are dropped."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        for _ in range(self._threads):
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            work, size_bytes, future = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._give_back(size_bytes)

    def _next(self) -> Task[T] | None:
        """The next task, once there is room for it; None once the pool is closed."""
        with self._turn:  # else small files would overtake a large one for as long as any come
            task = self._tasks.get()
            if task is None:
                return None
            with self._room:
                self._room.wait_for(lambda: self._closed or self._free_bytes >= task[1])
                self._free_bytes -= task[1]
                return None if self._closed else task

    def _give_back(self, size_bytes: int) -> None:
        with self._room:
            self._free_bytes += size_bytes
            self._room.notify_all()
