"""Tuning an `ann/` until queries find what exact search finds, and measuring the recall that others get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from searchengine.index import exact
from searchengine.index.ann import Ann, AnnParameters
from searchengine.index.table import Rows, VectorTable
from searchengine.vectors import FloatMatrix, normalise

SEED = 2
TUNING_QUERIES, MEASURING_QUERIES = 128, 64
PART_FOR_MARGIN = 2  # every second tuning query: each reads all codes
MISSES = (0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.0005, 0.0)
# How far queries are moved at random, in lengths of a vector: 1.5 and 3 leave cosines of 0.55 and 0.32, as texts have.
DISTANCES = (0.0, 1.5, 3.0)
TOP = 10
CODES_LOOKED_AT = 20_000
MARGIN_SHARES = {"scan": (1.0,), "ivf": (0.999, 1.0)}
# `scan` is for those who want all but exact answers, whatever they ask: its margin goes beyond all that was seen.
ROOM = {"scan": 1.2, "ivf": 1.0}


def tuned(untuned: Ann, table: VectorTable) -> AnnParameters:
    """With the least margin and largest `miss` that reach the recall, and the recall that they give other queries."""
    rng = np.random.default_rng(SEED)
    chosen = rng.choice(table.living_rows, min(TUNING_QUERIES + MEASURING_QUERIES, table.living), replace=False)
    share = len(chosen) * TUNING_QUERIES // (TUNING_QUERIES + MEASURING_QUERIES)
    tuning = _Examples(table, chosen[:share] if share else chosen, rng)
    measuring = _Examples(table, chosen[share:], rng)
    kind, target = untuned.parameters.kind, untuned.parameters.recall_target
    for margin_share in MARGIN_SHARES[kind]:
        margin = ROOM[kind] * tuning.margin(untuned, share=margin_share)
        untuned.parameters = replace(untuned.parameters, margin=margin)
        for miss in (0.0,) if kind == "scan" else MISSES:
            enough = tuning.recall(untuned, miss=miss) >= target
            if enough:
                break
        if enough:
            break
    recall = measuring.recall(untuned, miss=miss)
    return replace(untuned.parameters, miss=miss, recall_at_10=round(recall, 4))


class _Examples:
    """Queries at several distances from the photos, and what exact search finds for them."""

    def __init__(self, table: VectorTable, rows: Rows, rng: np.random.Generator) -> None:
        self._table = table
        near = table.gather(rows)
        away = rng.standard_normal(near.shape).astype(np.float32)
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        self._queries = [normalise(near + distance * away) for distance in DISTANCES]
        # A photo finds itself, which is no art: it does not count.
        self._own = table.ids[rows]
        found = exact.search(table, np.concatenate(self._queries), k=TOP + 1)
        self._true = [found[start : start + len(rows)] for start in range(0, len(found), len(rows))]

    def margin(self, searched: Ann, *, share: float) -> float:
        """How far below the last of the best their codes may put them: enough for this share of them."""
        deficits = []
        for queries, found in zip(self._queries, self._true, strict=True):
            for query, (scores, true) in list(zip(queries, found, strict=True))[::PART_FOR_MARGIN]:
                by_code, ids = searched.scores_by_code(query, count=CODES_LOOKED_AT)
                of_best = by_code[np.isin(ids, true)]
                lost = np.full(len(true) - len(of_best), by_code.min())
                deficits.append(scores[-1] - np.concatenate([of_best, lost]))
        return max(0.0, float(np.quantile(np.concatenate(deficits), share))) + exact.ROUNDING

    def recall(self, searched: Ann, *, miss: float) -> float:
        """Recall@10 at that distance where it is least."""
        return min(
            float(
                np.mean(
                    [
                        self._recall(searched, query, true, own, miss=miss)
                        for query, (_, true), own in zip(queries, found, self._own, strict=True)
                    ]
                )
            )
            for queries, found in zip(self._queries, self._true, strict=True)
        )

    def _recall(self, searched: Ann, query: FloatMatrix, true: Rows, own: int, *, miss: float) -> float:
        rows, scores = searched.candidates(self._table, query, k=TOP + 1, miss=miss)
        found = exact.rank(self._table, query, rows, scores, k=TOP + 1)[1]
        expected = true[true != own][:TOP]
        return float(np.isin(expected, found).mean()) if len(expected) else 1.0
