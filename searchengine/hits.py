"""What a search gives: one photo found, and from which relevance on it counts as a match."""

from __future__ import annotations

from dataclasses import dataclass

# From this relevance on, a hit counts as a match (searchengine/relevance.py).
MATCH = 0.5


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One photo found. `rank` counts from 1; `score` is the cosine to the query, higher is better.

    `relevance` in [0, 1] is the probability that the photo is a match; from `MATCH` on it counts as one.
    """

    rank: int
    score: float
    relevance: float
    id: int
    store: str
    path: str
    taken_at: str | None
    width: int
    height: int
