"""One writer at a time in Milvus, too: a row that says who writes, and until when that holds unless it is renewed.

Milvus has no lock and no comparison on writing. So whoever wants to write says so, waits for as long as a write may
take, and looks whether the row is still its own; of two that ask at once, the later one stays. It looks again before
each of its writes. What is left of a process that was killed holds nobody up for longer than the lease, and not at all
on the machine where it ran.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from indexer.lock import is_dead, now
from indexer.replicas.milvus import LEASE
from searchengine.errors import IndexLocked, IndexUnusable
from searchengine.milvus.connection import REQUEST_SECONDS, Connection
from searchengine.milvus.schema import NOTHING, state_collection
from searchengine.text import printable

LEASE_SECONDS = 60.0  # the clocks of machines that write one index may differ by half of that
SETTLE_SECONDS = 1.0


class Lease:
    """Held as a context manager, renewed in the background. Raises IndexLocked while another process has it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._collection = state_collection(connection.name)
        self._holder = uuid.uuid4().hex
        self._since = now()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._refuse(self._read())
        self._write()
        if not self._connection.place.is_file:  # which one process at a time has open
            time.sleep(SETTLE_SECONDS)
            self.check()
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        with suppress(IndexUnusable):  # then it runs out by itself
            row = self._read()
            if row is not None and row.get("holder") == self._holder:
                with self._connection.errors_named():
                    self._connection.client.delete(self._collection, ids=[LEASE], timeout=REQUEST_SECONDS)

    def check(self) -> None:
        """Raises IndexLocked where another process took it: this one was held up for too long."""
        row = self._read()
        if row is None or row.get("holder") != self._holder:
            raise IndexLocked(
                f"another process took to writing the index at {self._connection.place.shown}{_described(row)}; what "
                "was done is kept, run this again when that has ended"
            )

    def _refuse(self, row: dict[str, Any] | None) -> None:
        """Raises IndexLocked where a process that may live holds it."""
        if row is None or float(row.get("until", 0)) < time.time() or is_dead(str(row.get("process"))):
            return
        raise IndexLocked(
            f"another process is writing the index at {self._connection.place.shown}{_described(row)}; wait for it, or "
            "end it"
        )

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 4):
            try:
                self.check()
                self._write()
            except IndexLocked:
                return
            except IndexUnusable:  # who writes meets it, too; it may pass until then
                continue

    def _read(self) -> dict[str, Any] | None:
        rows = self._connection.query(self._collection, f'name == "{LEASE}"', ("payload",), strong=True)
        try:
            row = json.loads(rows[0]["payload"]) if rows else None
        except ValueError:
            return None
        return row if isinstance(row, dict) else None

    def _write(self) -> None:
        payload = {
            "holder": self._holder,
            "process": f"process {os.getpid()} on {socket.gethostname()}",
            "since": self._since,
            "until": time.time() + LEASE_SECONDS,
        }
        row = {"name": LEASE, "payload": json.dumps(payload), "nothing": NOTHING}
        with self._connection.errors_named():
            self._connection.client.upsert(self._collection, [row], timeout=REQUEST_SECONDS)


def _described(row: dict[str, Any] | None) -> str:
    return f" ({printable(str(row.get('process')))}, since {printable(str(row.get('since')))})" if row else ""
