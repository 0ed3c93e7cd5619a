"""Pages of hits: photos are ranked once for a question, and every page of it is cut from that."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchengine.hits import MATCH, Hit
from searchengine.pictures import Picture
from searchengine.query import parse
from searchengine.query_tree import Query, Text, Vector, leaves_of
from searchengine.ranking import Ranked
from searchengine.vectors import check_unit_rows
from searchengine.web.answers import as_json
from searchengine.web.caches import BoundedCache
from searchengine.web.cursors import Cursor
from searchengine.web.metrics import Metrics
from searchengine.web.opened import DEPTHS, Opened
from searchengine.web.requests import Question

DEEPER = 8  # times as many, where the greatest of `DEPTHS` is not enough

RANKINGS_BYTES, OVERHEAD_BYTES = 64 * 2**20, 1000

Pictures = Callable[[Opened], Sequence[Picture]]


@dataclass(frozen=True)
class Page:
    """Some hits, where the next page begins, and how many of the best 1,000 photos match."""

    hits: list[Hit]
    cursor: str | None
    matches: int

    def json(self) -> bytes:
        return as_json({"hits": [vars(hit) for hit in self.hits], "cursor": self.cursor, "matches": self.matches})


@dataclass(frozen=True)
class Ranking:
    """The best photos for a question, and the places (n,) among them of those that pass its threshold.

    `is_cut`: there are more photos. `is_complete`: none of those would pass.
    """

    ranked: Ranked
    places: NDArray[np.intp]
    is_cut: bool
    is_complete: bool

    @property
    def matches(self) -> int | None:
        """How many of the best 1,000 photos match; None where so few are ranked that it cannot be told."""
        matching: list[bool] = (self.ranked.probabilities[: DEPTHS[-1]] >= MATCH).tolist()
        return None if self.is_cut and len(matching) < DEPTHS[-1] and matching[-1] else sum(matching)

    @property
    def size_bytes(self) -> int:
        ranked = self.ranked
        return sum(column.nbytes for column in (self.places, ranked.photos, ranked.scores, ranked.probabilities))


class Pager:
    """Cuts pages out of rankings, which it keeps for a while."""

    def __init__(self, *, metrics: Metrics) -> None:
        self._metrics = metrics
        self._rankings: BoundedCache[tuple[bytes, Question], Ranking] = BoundedCache(max_bytes=RANKINGS_BYTES)
        # More at a time would only take longer each, and as much more memory.
        self._turns = threading.BoundedSemaphore(os.cpu_count() or 1)

    def page(self, opened: Opened, question: Question, *, k: int, cursor: str | None, pictures: Pictures) -> Page:
        """The page of `k` hits that begins where `cursor` tells. Raises QueryError.

        `pictures` makes those that were sent with the question. Pages are cut from the ranking that the first one was
        cut from, also where the index has changed since; where that is no longer known, or too short, from a new one.
        """
        before = None if cursor is None else Cursor.read(cursor, question)
        offset = before.offset if before else 0
        state, ranking = self._ranking(opened, question, before, count=offset + k + 1, pictures=pictures)
        matches = before.matches if before else ranking.matches or 0
        places = ranking.places[offset : offset + k]
        following = Cursor(offset=offset + k, matches=matches, state=state)
        with self._metrics.timed("rows"):
            chosen = ranking.ranked[places]
            rows = opened.index.images(np.unique(chosen.photos))
            return Page(
                hits=chosen.hits(rows, ranks=(places + 1).tolist()),
                cursor=following.text(question) if len(ranking.places) > offset + k else None,
                matches=matches,
            )

    def _ranking(
        self, opened: Opened, question: Question, before: Cursor | None, *, count: int, pictures: Pictures
    ) -> tuple[bytes, Ranking]:
        """A ranking in which `count` photos pass, or all that do; and the state of the index that it is of."""

        def is_enough(ranking: Ranking) -> bool:
            tells = before is not None or ranking.matches is not None
            return tells and (ranking.is_complete or len(ranking.places) >= count)

        newest = opened.state()
        ranked_before = 0
        for state in (before.state, newest) if before else (newest,):
            known = self._rankings.get((state, question))
            if known is not None and is_enough(known):
                self._metrics.count_lookups("rankings", hits=1, misses=0)
                return state, known
            ranked_before = max(ranked_before, len(known.ranked) if known else 0)
        self._metrics.count_lookups("rankings", hits=0, misses=1)
        for depth in _depths():
            if depth >= count and depth > ranked_before:
                ranking = self._rank(opened, question, pictures, depth=depth)
                if is_enough(ranking):
                    break
        size_bytes = ranking.size_bytes + question.size_bytes + OVERHEAD_BYTES
        self._rankings.put((newest, question), ranking, size_bytes=size_bytes)
        return newest, ranking

    def _rank(self, opened: Opened, question: Question, pictures: Pictures, *, depth: int) -> Ranking:
        query = None if question.q is None else parse(question.q, files=False)
        filters, unwanted = question.filters(), question.unwanted
        ranker = opened.ranker
        # Texts come before the turn to search, so that those of many requests share a call of the encoder.
        ranker.text_vectors([*_texts_of(query), *unwanted])
        images: list[Picture | int] = [*question.like, *pictures(opened)]
        if question.vector is not None:
            vector = check_unit_rows(np.frombuffer(question.vector, np.float32)[None], dim=opened.index.dim)
            images.append(Picture(vector[0], None))

        def rank() -> Ranked:
            if query is not None:
                return ranker.rank_query(query, images=images, without=unwanted, count=depth, filters=filters)
            if question.is_vector:
                return ranker.rank_vectors(vector, count=depth, filters=filters)[0]
            return ranker.rank_combined(images=images, without=unwanted, count=depth, filters=filters)

        with self._turns, self._metrics.timed("search"):
            ranked = ranker.of_one_state(rank)
        is_sum = query is None or isinstance(query, Vector)
        return _judged(ranked, question.threshold, depth=depth, in_order_of_score=is_sum)


def _judged(ranked: Ranked, threshold: str | float, *, depth: int, in_order_of_score: bool) -> Ranking:
    is_cut = len(ranked) >= depth
    if threshold == "none":
        return Ranking(ranked, np.arange(len(ranked)), is_cut=is_cut, is_complete=not is_cut)
    passes = ranked.probabilities >= MATCH if threshold == "auto" else ranked.scores >= float(threshold)
    # With AND, OR and NOT photos come in the order of their probabilities, not of their scores.
    falls = threshold == "auto" or in_order_of_score
    is_complete = not is_cut or bool(falls and not passes[-1])
    return Ranking(ranked, np.flatnonzero(passes), is_cut=is_cut, is_complete=is_complete)


def _depths() -> Iterator[int]:
    yield from DEPTHS
    depth = DEPTHS[-1]
    while True:
        depth *= DEEPER
        yield depth


def _texts_of(query: Query | None) -> list[str]:
    return [] if query is None else [leaf.text for leaf in leaves_of(query) if isinstance(leaf, Text)]
