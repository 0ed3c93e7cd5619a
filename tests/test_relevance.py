"""How surely a hit is a match: the library's own scores are the yardstick."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from indexer import build
from searchengine import Searcher, open_index
from searchengine.relevance import MATCH, THRESHOLD, relevance, standard_distance
from searchengine.vectors import UsualScores

USUAL = UsualScores(centre=0.073, spread=0.066)


def normal_scores(count: int, *, centre: float = 0.2, spread: float = 0.05) -> np.ndarray:
    return np.random.default_rng(0).normal(centre, spread, count).astype(np.float32)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1), st.lists(st.floats(-1, 1, width=32), max_size=50))
def test_relevance_is_a_probability_and_rises_with_the_score(scores: list[float], background: list[float]) -> None:
    rising = np.sort(np.asarray(scores, np.float32))
    found = relevance(rising, background=np.asarray(background, np.float32), usual=USUAL)
    assert found.shape == rising.shape
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(np.diff(found) >= 0)


def test_a_photo_of_the_bulk_is_no_match_and_one_far_above_it_is() -> None:
    bulk = normal_scores(5000)
    middle, far = relevance(np.array([0.2, 0.5], np.float32), background=bulk, usual=USUAL)
    assert middle < 0.05
    assert far > 0.95
    at_threshold = relevance(np.array([0.2 + THRESHOLD * 0.05], np.float32), background=bulk, usual=USUAL)
    np.testing.assert_allclose(at_threshold, MATCH, atol=0.05)


def test_the_scale_of_the_scores_does_not_matter_in_a_large_library() -> None:
    bulk = normal_scores(20_000)
    hits = np.array([0.25, 0.3, 0.4], np.float32)
    squeezed = standard_distance(hits / 4, background=bulk / 4, usual=USUAL)
    np.testing.assert_allclose(squeezed, standard_distance(hits, background=bulk, usual=USUAL), rtol=0.02)


def test_many_matches_do_not_hide_each_other() -> None:
    bulk = normal_scores(4000)
    matches = np.full(1000, 0.6, np.float32)
    assert np.all(relevance(matches, background=np.concatenate([bulk, matches]), usual=USUAL) > 0.95)


def test_a_library_of_one_photo_is_judged_by_what_is_usual() -> None:
    far = np.array([USUAL.centre + 6 * USUAL.spread], np.float32)
    near = np.array([USUAL.centre], np.float32)
    assert relevance(far, background=far, usual=USUAL)[0] > MATCH
    assert relevance(near, background=near, usual=USUAL)[0] < MATCH
    assert relevance(near, background=np.empty(0, np.float32), usual=USUAL)[0] < MATCH


def test_hits_carry_the_relevance_that_the_whole_index_gives_them(photos: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    build(tmp_path / "i", [photos], encoder=encoder)
    with open_index(tmp_path / "i") as index:
        hits = Searcher(index, encoder).search("anything", k=5)
        scores = index.sample_vectors(100) @ encoder.encode_texts(["anything"])[0]
    expected = relevance(
        np.array([hit.score for hit in hits], np.float32), background=scores, usual=encoder.usual_scores
    )
    np.testing.assert_allclose([hit.relevance for hit in hits], expected, atol=1e-5)
