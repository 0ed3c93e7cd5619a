"""What a run counts and tells while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Stage = Literal["list", "fetch", "read", "hash", "decode", "encode", "write"]
STAGES: tuple[Stage, ...] = ("list", "fetch", "read", "hash", "decode", "encode", "write")


class StageClock:
    """How long each stage of a run has worked, and which of them the others wait for.

    `fetchers` threads fetch from stores that are no disks, `workers` read, hash and decode, `encoders` encode; one
    lists and writes.
    """

    def __init__(self, *, workers: int = 1, encoders: int = 1) -> None:
        self.fetchers = 1
        self.workers = workers
        self.encoders = encoders
        self._lock = threading.Lock()
        self._seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.restart()

    def restart(self) -> None:
        """What was before does not count for `busiest`: while stores are listed, nothing else works."""
        self._started = time.monotonic()
        self._before = self.seconds()

    @contextmanager
    def working(self, stage: Stage) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - started)

    def add(self, stage: Stage, seconds: float) -> None:
        """It has worked so long, here or in another process."""
        with self._lock:
            self._seconds[stage] += seconds

    def seconds(self) -> dict[Stage, float]:
        """Of all threads of a stage together. Stages work at once, so these add up to more than the run took."""
        with self._lock:
            return dict(self._seconds)

    def busiest(self) -> tuple[Stage, float] | None:
        """The stage that sets the pace, and the share of its time that it works: 1 where nothing holds it up.

        None while none has done anything. A stage that others wait for always works; those that wait do not.
        """
        elapsed = max(time.monotonic() - self._started, 1e-9)
        worked = {stage: seconds - self._before[stage] for stage, seconds in self.seconds().items()}
        in_workers: tuple[Stage, ...] = ("read", "hash", "decode")
        shares: dict[Stage, float] = {
            "fetch": worked["fetch"] / self.fetchers,
            max(in_workers, key=worked.__getitem__): sum(worked[stage] for stage in in_workers) / self.workers,
            "encode": worked["encode"] / self.encoders,
            "write": worked["write"],
        }
        stage = max(shares, key=shares.__getitem__)
        return (stage, min(1.0, shares[stage] / elapsed)) if shares[stage] else None


@dataclass(kw_only=True)
class Report:
    """What a run did: scanned = added + updated + moved + unchanged + failed.

    `duplicates` counts those of the added and updated photos that are exact copies of other photos in the index.
    `ignored` counts files that are no photos, by their names or, where these have no extension, their content.
    `unlistable` counts folders that could not be listed, from which nothing was deleted.
    `images_per_second` is the rate at which photos were embedded.
    `seconds_by_stage` is how long each stage worked, in all of its threads; they work at once.
    """

    scanned: int = 0
    added: int = 0
    updated: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    duplicates: int = 0
    failed: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    model: str = ""
    unlistable: int = 0
    ignored: int = 0
    seconds_by_stage: dict[Stage, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True)
class ReencodeReport:
    """`vectors` that the index needs; `embedded` of them by this run, `resumed` ones were there before it.

    Of photos whose indexed content nobody has any more: `updated` ones were embedded as they are now, `deleted` ones
    are gone and `failed` ones could not be used, and both left the index; `unreadable` ones could just not be read.
    `swapped`: whether the index is of the new model now.
    """

    model: str
    fingerprint: str
    vectors: int = 0
    embedded: int = 0
    resumed: int = 0
    updated: int = 0
    deleted: int = 0
    failed: int = 0
    unreadable: int = 0
    swapped: bool = False
    seconds: float = 0.0
    images_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: `done` of `total` files that are new or changed.

    `busiest`: the stage that sets the pace, and the share of its time that it works (see StageClock); None before any.
    """

    done: int
    total: int
    busiest: tuple[Stage, float] | None = None


OnProgress = Callable[[Progress], None]
OnSkip = Callable[[str, str], None]  # (key, reason)
