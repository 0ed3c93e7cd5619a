"""How surely a hit is a match: the library's own scores are the yardstick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from indexer import build
from searchengine import Searcher, open_index
from searchengine.cli.output import divided, line_after_matches, percent, print_table
from searchengine.cli.page import render_page
from searchengine.cli.sheet import AMBER, draw_sheet
from searchengine.hits import MATCH, Hit
from searchengine.index.reader import Index
from searchengine.index.sampling import lasting_sample
from searchengine.relevance import (
    CONSTANTS,
    USUAL_LIKENESS,
    Background,
    Kind,
    likeness_of,
    line_of_matches,
    relevance,
)
from searchengine.vectors import UsualScores, normalise

USUAL = UsualScores(centre=0.2, spread=0.05)
KINDS: list[Kind] = ["text", "image"]

a_score = st.floats(-1, 1, width=32)


def normal_scores(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(USUAL.centre, USUAL.spread, count).astype(np.float32)


def judged(scores: list[float] | np.ndarray, background: np.ndarray, *, kind: Kind = "text", size: int | None = None):
    hits = np.asarray(scores, np.float32)
    return relevance(hits, background=background, usual=USUAL, likeness=USUAL, size=size, kind=kind)


@given(st.lists(a_score, min_size=1), st.lists(a_score, max_size=50), st.sampled_from([*KINDS, None]))
def test_relevance_is_a_probability_and_never_falls_where_the_score_rises(
    scores: list[float], background: list[float], kind: Kind | None
) -> None:
    rising = np.sort(np.asarray(scores, np.float32))
    found = relevance(rising, background=np.asarray(background, np.float32), usual=USUAL, kind=kind)
    assert found.shape == rising.shape
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(np.diff(found) >= 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [60, 1000, 4096])
def test_chance_alone_rarely_makes_a_match(count: int, kind: Kind) -> None:
    libraries = [normal_scores(count, seed=seed) for seed in range(40)]
    assert sum(judged(scores, scores, kind=kind).max() >= MATCH for scores in libraries) <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matching", [0.01, 0.1, 0.4])
def test_what_stands_out_from_the_bulk_matches_be_it_little_or_much(matching: float, kind: Kind) -> None:
    bulk = normal_scores(1000)
    matches = np.random.default_rng(1).normal(0.55, 0.02, int(1000 * matching)).astype(np.float32)
    library = np.concatenate([bulk, matches])
    assert judged(matches, library, kind=kind).min() > MATCH
    assert (judged(bulk, library, kind=kind) >= MATCH).mean() < 0.02


def test_a_single_photo_that_stands_far_out_matches_alone() -> None:
    bulk = normal_scores(1000)
    alone, next_best = judged([0.55, float(bulk.max())], np.append(bulk, np.float32(0.55)))
    assert alone > MATCH > next_best


def test_a_photo_that_the_sample_lacks_must_stand_out_the_more_the_larger_the_library_is() -> None:
    bulk = normal_scores(4096)
    lines = [
        line_of_matches(best=3.0, excess=-0.2, size=size, constants=CONSTANTS["text"]) for size in (4096, 10**5, 10**6)
    ]
    assert lines == sorted(lines)
    assert lines[2] < lines[0] + 2
    assert judged([0.58], bulk, size=10**6)[0] > MATCH


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_itself_is_no_part_of_its_background(kind: Kind) -> None:
    bulk = normal_scores(500)
    hits = [0.35, 0.3, 0.2]
    np.testing.assert_array_equal(
        judged(hits, np.append(bulk, np.float32(1.0)), kind=kind), judged(hits, bulk, kind=kind)
    )


def test_a_few_photos_more_move_no_relevance_far() -> None:
    bulk = np.append(normal_scores(1000), np.float32([0.45, 0.44, 0.43, 0.42, 0.41, 0.4]))
    hits = np.linspace(0.2, 0.5, 50)
    before = judged(hits, bulk)
    after = judged(hits, np.append(bulk, normal_scores(30, seed=9)))
    assert np.abs(after - before).max() < 0.05


def test_a_text_whose_bulk_lies_far_above_what_is_usual_finds_matches_in_a_library_of_one_topic() -> None:
    topic = np.random.default_rng(0).normal(USUAL.centre + 4 * USUAL.spread, USUAL.spread, 300).astype(np.float32)
    assert judged(topic, topic)[topic.argmax()] > MATCH


@pytest.mark.parametrize("background", [[], [0.6], [0.2], [0.2, 0.6]])
def test_a_tiny_library_is_judged_by_what_is_usual(background: list[float]) -> None:
    near, far = judged([USUAL.centre, USUAL.centre + 8 * USUAL.spread], np.asarray(background, np.float32))
    assert near < MATCH < far


def test_what_a_query_is_shows_in_how_near_it_lies_to_photos_at_large() -> None:
    likeness = UsualScores(centre=0.5, spread=0.1)
    for kind, centre in (("text", 0.2), ("image", 0.5)):
        bulk = (normal_scores(500) + np.float32(centre - USUAL.centre)).astype(np.float32)
        hits = np.sort(bulk)[-10:] + np.float32(0.1)
        told, guessed = (
            relevance(hits, background=bulk, usual=USUAL, likeness=likeness, kind=given) for given in (kind, None)
        )
        np.testing.assert_array_equal(told, guessed)


def test_likeness_is_that_of_pairs_and_leans_on_what_is_usual_where_there_are_few() -> None:
    rng = np.random.default_rng(0)
    photos = normalise(rng.standard_normal((400, 64)) + 1.0)
    centre, spread = likeness_of(photos)
    pairs = (photos @ photos.T)[np.triu_indices(400, 1)]
    assert centre == pytest.approx(np.median(pairs), abs=0.02)
    assert spread == pytest.approx(pairs.std(), abs=0.02)
    assert likeness_of(photos[:0]) == USUAL_LIKENESS
    assert likeness_of(photos[:1]) == pytest.approx(USUAL_LIKENESS)


@given(st.integers(0, 3000), st.integers(0, 100), st.integers(1, 2000))
def test_a_lasting_sample_has_the_size_that_is_asked_for_and_changes_little(count: int, more: int, size: int) -> None:
    ids = np.arange(1, count + 1, dtype=np.int64) * 3
    before = ids[lasting_sample(ids, size)]
    longer = np.arange(1, count + more + 1, dtype=np.int64) * 3
    after = longer[lasting_sample(longer, size)]
    assert len(set(before.tolist())) == len(before) == min(count, size)
    # Who was drawn and is so no more gave way to one that came.
    assert len(np.setdiff1d(before, after)) <= len(np.setdiff1d(after, ids))


def test_a_lasting_sample_is_spread_over_all_ids() -> None:
    drawn = lasting_sample(np.arange(100_000, dtype=np.int64), 4096)
    assert np.histogram(drawn, bins=10, range=(0, 100_000))[0].min() > 300


@pytest.fixture
def index(photos: Path, tmp_path: Path) -> Iterator[Index]:
    build(tmp_path / "i", [photos], encoder=FakeEncoder())
    with open_index(tmp_path / "i") as opened:
        yield opened


def test_hits_carry_the_relevance_that_the_whole_index_gives_them(index: Index) -> None:
    encoder = FakeEncoder()
    hits = Searcher(index, encoder).search("anything", k=5)
    sample = index.sample_vectors(100)
    expected = relevance(
        np.array([hit.score for hit in hits], np.float32),
        background=sample @ encoder.encode_texts(["anything"])[0],
        usual=encoder.usual_scores,
        likeness=likeness_of(sample),
    )
    np.testing.assert_allclose([hit.relevance for hit in hits], expected, atol=1e-5)


def test_relevance_neither_depends_on_how_many_hits_are_asked_for_nor_on_who_asked_before(index: Index) -> None:
    searcher = Searcher(index, FakeEncoder())
    all_of_it = [hit.relevance for hit in searcher.search("one", k=9)]
    searcher.search("two", k=3)
    assert [hit.relevance for hit in searcher.search("one", k=2)] == all_of_it[:2]
    assert [hit.relevance for hit in Searcher(index, FakeEncoder()).search("one", k=3, offset=4)] == all_of_it[4:7]


def test_a_background_follows_the_commits_of_its_index(index: Index, photos: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    background = Background(index, encoder.usual_scores)
    query, scores = encoder.encode_texts(["x"])[0], np.float32([0.3, 0.1])
    before = background.relevance(query, scores)
    for photo in sorted(photos.rglob("*.jpg")):
        photo.unlink()
    build(tmp_path / "i", [photos], encoder=encoder)
    after = background.relevance(query, scores)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, Background(index, encoder.usual_scores).relevance(query, scores))


def hits(*relevances: float, first_rank: int = 1) -> list[Hit]:
    facts = {"score": 0.3, "store": "local", "path": "/none/x.jpg", "taken_at": None, "width": 4, "height": 3}
    return [
        Hit(rank=rank, id=rank, relevance=relevance, **facts)  # type: ignore[arg-type]
        for rank, relevance in enumerate(relevances, start=first_rank)
    ]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (hits(0.9, 0.5, 0.499), "matches end here"),
        (hits(0.4, 0.1), "nothing here is surely a match; these come nearest"),
        (hits(0.4, 0.1, first_rank=11), "all matches come before these"),
        (hits(0.9, 0.5), None),
        ([], None),
    ],
)
def test_table_page_and_contact_sheet_say_where_matches_end_or_that_there_are_none(
    found: list[Hit], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    matches, others = divided(found, match=MATCH)
    assert [*matches, *others] == found
    assert line_after_matches(matches, others) == line
    page = render_page(found, title="x", match=MATCH)
    assert page.count('<p class="line">') == (line is not None)
    assert line is None or page.index(line) < page.index(f"<b>{others[0].rank} ")
    if found:
        print_table(found, match=MATCH)
        rows = capsys.readouterr().out.splitlines()[1:]
        lines = [place for place, row in enumerate(rows) if row.startswith("----")]
        assert lines == ([len(matches)] if line else [])
        assert line is None or rows[lines[0]] == f"---- {line}"
    amber = tuple(bytes.fromhex(AMBER[1:]))
    sheet = np.asarray(draw_sheet(found, title="x", match=MATCH))
    longest = (sheet == amber).all(axis=2).sum(axis=1).max()
    assert (longest > sheet.shape[1] // 4) == (line is not None)


def test_a_title_may_be_anything_that_a_query_may_be() -> None:
    for title in ("a dog\nand a cat", "\x1b[2J", "caf\udce9"):
        for found in (hits(0.9, 0.1), []):
            assert draw_sheet(found, title=title, match=MATCH).width > 0
            assert "\x1b" not in render_page(found, title=title, match=MATCH)


def test_what_is_shown_as_one_half_is_a_match() -> None:
    assert percent(0.4999) == "49%"
    assert percent(MATCH) == "50%"
    assert percent(1.0) == "100%"
