"""How a long run ends on request: after a commit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from searchengine.cli.output import notice_from_signal


@contextmanager
def ctrl_c_stops() -> Iterator[threading.Event]:
    """The first Ctrl-C, or a request to terminate, ends the run after a commit; the second ends it at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        notice_from_signal("stopping after a commit; once more stops at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
