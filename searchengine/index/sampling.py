"""Which vectors stand for all of an index: a draw by a hash of their ids, the same in every process and every store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from searchengine.index.segments import Ids


def lasting_sample(ids: Ids, size: int) -> NDArray[np.intp]:
    """Places of at most `size` of the `ids` (n,), drawn such that a few more ids change the draw only a little.

    Drawn are those with the least hash.
    """
    if len(ids) <= size:
        return np.arange(len(ids))
    return np.argpartition(hashes(ids), size)[:size]


def hashes(ids: Ids) -> NDArray[np.uint64]:
    """The multiplicative hash of Knuth, with 2^64 divided by the golden ratio, of each of the ids (n,)."""
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    return mixed
