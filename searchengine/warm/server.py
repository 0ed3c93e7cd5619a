"""The warm process itself: it listens, answers each who asks on a thread of its own, and ends when it is of no use.

That is when no search has come for `idle_seconds`, when it is told to (a request, `stop`), when the index is gone or
another one has its place, when weights have changed, and when its socket is gone, so that nobody could find it.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from searchengine.errors import IndexUnusable, ModelUnusable
from searchengine.warm import protocol
from searchengine.warm.client import identity_of_file
from searchengine.warm.place import Place

# Those beyond are sent away, and find out for themselves.
MAX_CLIENTS = 16
REQUEST_SECONDS = 5.0
CHECK_SECONDS = 1.0

Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]


class WarmServer:
    """Listens at `place` from the start; the caller has it `taken`. `run` serves until the end.

    `answer` gives the hits of a search and is called from several threads at a time; `is_current` tells whether the
    place still means what it did. Raises OSError where there can be no socket.
    """

    def __init__(self, place: Place, *, answer: Answer, is_current: Callable[[], bool], idle_seconds: float) -> None:
        self._place = place
        self._answer = answer
        self._is_current = is_current
        self._idle_seconds = idle_seconds
        self._started = self._last_search = time.monotonic()
        self._searches = 0
        self._lock = threading.Lock()
        self._clients: set[threading.Thread] = set()
        self._waker, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._listener = _listen(place.socket)
        self._file = identity_of_file(place.socket)

    def run(self) -> None:
        """Serve until there is a reason to end; then what is being answered is answered, and the socket deleted."""
        with selectors.DefaultSelector() as selector, self._listener, self._waker, self._wake:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            try:
                while self._is_wanted():
                    seconds = CHECK_SECONDS if self._clients else min(CHECK_SECONDS, self._seconds_left())
                    ready = [key.fileobj for key, _ in selector.select(seconds)]
                    if self._waker in ready:
                        break
                    if self._listener in ready:
                        self._accept()
            finally:
                self._hide()
            for client in list(self._clients):
                client.join(REQUEST_SECONDS)

    def stop(self) -> None:
        """Have `run` end soon; may be called from any thread and from a signal handler."""
        with suppress(OSError):  # it is on its way, or it has ended
            self._wake.send(b".")

    def _seconds_left(self) -> float:
        return max(0.0, self._idle_seconds - (time.monotonic() - self._last_search))

    def _is_wanted(self) -> bool:
        if self._seconds_left() == 0 and not self._clients:
            return False
        return self._has_its_socket() and self._is_current()

    def _has_its_socket(self) -> bool:
        try:
            return identity_of_file(self._place.socket) == self._file
        except OSError:
            return False

    def _hide(self) -> None:
        if self._has_its_socket():
            with suppress(FileNotFoundError):  # the other thread was quicker
                os.unlink(self._place.socket)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # whoever it was has gone
            return
        except OSError:  # no more files may be open: whoever it is still waits, and selecting would not
            time.sleep(0.05)
            return
        client = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        try:
            if len(self._clients) >= MAX_CLIENTS or not protocol.is_ours(connection):
                raise ConnectionRefusedError
            self._clients.add(client)
            client.start()
        except (OSError, RuntimeError):  # RuntimeError: this account may have no more threads
            self._clients.discard(client)
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError, ValueError):
                greeting = {"key": self._place.key}
                protocol.send(connection, greeting, max_bytes=protocol.MAX_GREETING_BYTES, seconds=REQUEST_SECONDS)
                request = protocol.receive(connection, max_bytes=protocol.MAX_REQUEST_BYTES, seconds=REQUEST_SECONDS)
                reply = self._reply_to(request)
                try:
                    self._send(connection, reply)
                except ValueError:  # more hits than a message may hold
                    self._send(connection, DECLINED)
        finally:
            self._clients.discard(threading.current_thread())

    def _send(self, connection: socket.socket, reply: Mapping[str, Any]) -> None:
        protocol.send(connection, reply, max_bytes=protocol.MAX_ANSWER_BYTES, seconds=REQUEST_SECONDS)

    def _reply_to(self, request: protocol.Message) -> Mapping[str, Any]:
        match request:
            case {"do": "answer", "search": dict(search), "files": dict(files)}:
                return self._reply_to_search(search, files)
            case {"do": "status"}:
                return {"status": self._status()}
            case {"do": "stop"}:
                self._hide()
                self.stop()
                return {"stopping": True}
        return DECLINED

    def _reply_to_search(self, search: dict[str, Any], files: dict[str, Any]) -> Mapping[str, Any]:
        with self._counted():
            try:
                if not self._is_current():
                    self.stop()
                    return DECLINED
                if any(identity_of_file(path) != known for path, known in files.items()):
                    return DECLINED
                hits = self._answer(search)
                if not self._is_current():  # what was mapped may have changed meanwhile
                    self.stop()
                    return DECLINED
                return {"hits": hits}
            except (IndexUnusable, ModelUnusable):
                self.stop()
                return DECLINED
            except Exception:  # it may lie with this process alone; whoever asked finds out, and can show it
                return DECLINED

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._searches += 1
                self._last_search = time.monotonic()

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        key = self._place.key
        return {
            "pid": os.getpid(),
            "index": key["index"],
            "device": key["device"],
            "version": key["version"],
            "searches": self._searches,
            "running_seconds": round(now - self._started),
            "ends_in_seconds": round(self._seconds_left()),
        }


DECLINED = {"declined": True}


def _listen(path: str) -> socket.socket:
    with suppress(FileNotFoundError):  # of one that died
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(MAX_CLIENTS)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
