"""Workers as processes of this machine, one a device.

They are fresh processes, not forks, which a CUDA context does not survive. Each end of a socket is `multiprocessing`'s
Connection. A worker whose run has ended, in whatever way, reads the end of its input and ends too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from indexer.engines import Place
from indexer.engines.messages import EncoderSource, Lost, Setup, ToRun, ToWorker
from searchengine.errors import SearchEngineError, UsageError

# The parent's own path, so that the child finds what the parent found, wherever that was.
BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from indexer.engines.processes import work
work(int(sys.argv[2]))
"""
ENDS_WITHIN_SECONDS = 5.0


class ProcessEngine:
    """One worker for each of `devices`, which may name one twice; they share the machine's processors out."""

    def __init__(self, source: EncoderSource, *, devices: Sequence[str]) -> None:
        """Raises UsageError where the system cannot do it."""
        if os.name != "posix":
            raise UsageError("several devices need Linux or macOS here; give --device one")
        self.source = source
        self._devices = devices
        self._links: list[ProcessLink] = []

    def places(self) -> list[Place]:
        number = len(self._devices)
        cores = max(1, (os.cpu_count() or 1) // number)
        return [Place(name=device, device=device, cores=cores, share=1 / number) for device in self._devices]

    def start(self, place: Place, setup: Setup) -> ProcessLink:
        link = ProcessLink(setup, cores=place.cores)
        self._links = [*self._links, link]  # anew, because another thread may be looking at it
        return link

    def hear(self, timeout_seconds: float) -> list[tuple[ProcessLink, ToRun]]:
        links = {link.connection: link for link in self._links}
        said = [
            (links[ready], links[ready].receive())
            for ready in wait(list(links), timeout_seconds)
            if isinstance(ready, Connection)
        ]
        gone = [link for link, message in said if isinstance(message, Lost)]
        if gone:
            self._links = [link for link in self._links if link not in gone]
        return said

    def close(self) -> None:
        for link in self._links:
            link.end()
        for link in self._links:
            link.wait()
        self._links = []


class ProcessLink:
    """A process, and the run's end of the socket to it. Raises SearchEngineError where none can be started."""

    def __init__(self, setup: Setup, *, cores: int) -> None:
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # "" is the current folder
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self._sending = threading.Lock()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOTSTRAP, path, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
                env={**os.environ, "OMP_NUM_THREADS": str(cores), "OPENBLAS_NUM_THREADS": str(cores)},
            )
        except OSError as error:
            self.connection.close()
            raise SearchEngineError(
                f"no process to encode photos in can be started: {error.strerror}; check the limits on processes and "
                "memory of this account (ulimit -a)"
            ) from None
        finally:
            theirs.close()
        self.send(setup)

    def send(self, message: ToWorker | Setup) -> None:
        with contextlib.suppress(OSError), self._sending:  # it is gone, which `receive` will tell
            self.connection.send(message)

    def receive(self) -> ToRun:
        try:
            message: ToRun = self.connection.recv()
        except (EOFError, OSError):
            message = Lost(self._how_it_ended())
        if isinstance(message, Lost):
            self.end()
            self.wait()
        return message

    def end(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()
        self.connection.close()

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its end and goes on
            self._process.wait(timeout=ENDS_WITHIN_SECONDS)
        code = self._process.poll() or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def work(descriptor: int) -> None:
    """The worker's side: until nobody is there to talk to."""
    from indexer.engines.worker import Worker

    connection = Connection(descriptor)
    sending = threading.Lock()

    def send(message: ToRun) -> None:
        with sending:
            connection.send(message)

    worker = Worker(connection.recv(), send=send)
    thread = threading.Thread(target=worker.run, name="work")
    thread.start()
    try:
        while True:
            worker.hear(connection.recv())
    except (EOFError, OSError):
        worker.end()
    thread.join()
