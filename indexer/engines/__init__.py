"""Embedding by several processes, on one machine or many (`index --device cuda:0,cuda:1`, `index --engine ray`).

The run crawls and is the only one to write; workers read, hash, decode and encode, each as a run of one process does.
An *engine* knows where workers can be and how to talk to them, and nothing else: `processes.py` starts processes here,
`ray.py` actors in a Ray cluster. What they say to each other is in `messages.py`; `worker.py` is the worker's
side of it, `crew.py` the run's, and `leases.py` who has which photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from indexer.engines.messages import EncoderSource, Setup, ToRun, ToWorker


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one worker can be. `name` is for people."""

    name: str
    device: str
    """What its encoder runs on, as torch names it."""
    cores: int
    """The processors that are its own."""
    share: float = 1.0
    """What part of its machine that is."""
    node: str = ""
    """Its machine, as the engine names it, where there are several."""


class Link(Protocol):
    """The run's end of what leads to one worker. Threads may share it; no method raises where the worker is gone."""

    def send(self, message: ToWorker) -> None: ...

    def end(self) -> None:
        """End the worker, whatever it does."""


class Engine(Protocol):
    """Starts workers and hears them. One run at a time uses it; it can be used again once it is closed."""

    @property
    def source(self) -> EncoderSource:
        """The encoder that the workers load."""

    def places(self) -> list[Place]:
        """One for each worker that there is room for, at least one. Raises SearchEngineError."""

    def start(self, place: Place, setup: Setup) -> Link:
        """Start a worker; what it says first is `Ready`. Raises SearchEngineError."""

    def hear(self, timeout_seconds: float) -> Sequence[tuple[Link, ToRun]]:
        """What workers have said, as soon as there is anything; `Lost` is the last of each that has ended."""

    def close(self) -> None:
        """End all workers."""
