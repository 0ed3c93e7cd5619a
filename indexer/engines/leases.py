"""Which photos are leased to workers, and leased again where a worker is lost.

A lease is lost in part: only what its worker has not told of is given out again. A photo may be what ended the worker,
so a lease that has cost `LOSSES_OF_A_LEASE` of them is taken apart: its photos are given out one by one, each to a
worker that has nothing else, and one that costs its worker even then is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from indexer.crawl import Change
from indexer.engines.messages import Lease, LeasedPhoto
from indexer.reading import Failed

LEASE_PHOTOS = 512
SMALLEST_LEASE_PHOTOS = 32
# One that is worked on, and one that follows without a gap.
LEASES_OF_A_WORKER = 2
LOSSES_OF_A_LEASE = 3


@dataclass(kw_only=True, eq=False)
class Leased:
    """What of a lease is not told yet, by position.

    `unread`: photos that its worker says it cannot read, kept back until it is known whose fault that is: a worker that
    has `read` others of the lease sees what it shall see. `doubted`: it was given out before, and nothing was read.
    """

    photos: dict[int, Change]
    number: int = 0
    losses: int = 0
    doubted: bool = False
    alone: bool = False
    read: bool = False
    unread: dict[int, Failed] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return len(self.photos) == len(self.unread)

    def message(self) -> Lease:
        return Lease(
            self.number,
            {
                position: LeasedPhoto(change.store.name, change.listed, change.known)
                for position, change in self.photos.items()
            },
        )


class Leases:
    """Cuts about `total` changes into leases."""

    def __init__(self, changes: Iterator[Change], *, total: int) -> None:
        self._changes = changes
        self._left = total
        self._again: deque[Leased] = deque()
        self._last_number = 0
        self._all_cut = False

    @property
    def all_given(self) -> bool:
        return self._all_cut and not self._again

    def next(self, *, workers: int, alone: bool) -> Leased | None:
        """What to do next, if anything. `alone`: whether it may be what wants a worker for itself."""
        lease = self._lost(alone=alone) or self._cut(workers)
        if lease:
            self._last_number += 1
            lease.number = self._last_number
        return lease

    def give_again(self, lease: Leased) -> list[Change]:
        """What is left of a lease whose worker was lost; gives back what shall not be tried any more."""
        if lease.alone:
            return list(lease.photos.values())
        lease.losses += 1
        lease.read = False
        lease.unread.clear()
        if lease.losses < LOSSES_OF_A_LEASE:
            self._again.appendleft(lease)
        else:
            self._again.extend(Leased(photos={at: change}, alone=True) for at, change in lease.photos.items())
        return []

    def doubt(self, lease: Leased) -> None:
        """Have it tried once more: its photos may have been written while they were read."""
        lease.doubted = True
        lease.unread.clear()
        self._again.appendleft(lease)

    def _lost(self, *, alone: bool) -> Leased | None:
        for lease in self._again:
            if alone or not lease.alone:
                self._again.remove(lease)
                return lease
        return None

    def _cut(self, workers: int) -> Leased | None:
        # Towards the end leases get smaller, so that all workers end at about the same time.
        share = self._left // (2 * LEASES_OF_A_WORKER * max(1, workers))
        photos = dict(enumerate(islice(self._changes, min(max(share, SMALLEST_LEASE_PHOTOS), LEASE_PHOTOS))))
        self._left = max(0, self._left - len(photos))
        self._all_cut = not photos
        return Leased(photos=photos) if photos else None
