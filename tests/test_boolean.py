"""What a query with sums, AND, OR, NOT and filters finds, held against a computation that knows nothing of indexes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ann_data import clustered
from ann_data import library as rows_of_photos
from commandline import Cli, Outcome
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

import searchengine.boolean
import searchengine.index.reader
import searchengine.index.snapshot
from indexer.compact import compact
from indexer.pipeline import build
from searchengine import Hit, Searcher, open_index
from searchengine.boolean import Combination
from searchengine.cli.queries import SearchRequest, answer, asked_by
from searchengine.errors import QueryError, UsageError
from searchengine.filters import Filters
from searchengine.index.photos import ImageRow
from searchengine.query import And, Condition, Image, Not, Or, Photo, Query, Sum, Term, Text, leaves_of, parse

# -- a library with copies in several folders, dates and cameras -----------------------------------------------------

COUNT, TOTAL = 24, 29  # with copies


def make_library(folder: Path) -> Path:
    """Photos 0 to 23 in three folders; every fifth has a copy in the folder `copies`, every fourth no date."""
    for name in ("0", "1", "2", "copies"):
        (folder / name).mkdir(parents=True)
    for number in range(COUNT):
        exif = Pillow.Exif()
        exif[0x0110] = f"camera {number % 4}"
        if number % 4:
            exif.get_ifd(0x8769)[0x9003] = f"20{10 + number % 10}:05:01 12:00:00"
        path = folder / f"{number % 3}/{number:02}.png"
        painted(number % 20, width=40 + 5 * number).save(path, exif=exif.tobytes())
        if number % 5 == 0:
            shutil.copy2(path, folder / f"copies/{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests only read it, and the index."""
    return make_library(tmp_path_factory.mktemp("library") / "photos")


@pytest.fixture(scope="module")
def searcher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    index_folder = tmp_path_factory.mktemp("fake") / "index"
    encoder = FakeEncoder()
    build(index_folder, [photos], encoder=encoder, batch_size=7, isolated=False)
    with open_index(index_folder) as index:
        yield Searcher(index, encoder)


@pytest.fixture(scope="module")
def by_hand(searcher: Searcher) -> ByHand:
    return ByHand(searcher, list(searcher.index.images(np.arange(100)).values()))


# -- the same by hand ------------------------------------------------------------------------------------------------


def _is_filter(query: Query) -> bool:
    return all(isinstance(leaf, Condition) for leaf in leaves_of(query))


def _conjuncts(query: Query, negated: bool) -> Iterator[tuple[Query, bool]]:
    """What must all hold, each with whether it is its opposite that must."""
    match query:
        case Not(part):
            yield from _conjuncts(part, not negated)
        case And(parts) | Or(parts) if isinstance(query, And) != negated:
            for part in parts:
                yield from _conjuncts(part, negated)
        case _:
            yield query, negated


class ByHand:
    """Vectors and probabilities as the grammar's document defines them, a photo at a time."""

    def __init__(self, searcher: Searcher, rows: list[ImageRow]) -> None:
        self.searcher = searcher
        self.rows = rows
        self._photos = np.stack([searcher.index.vector(row.vector_id) for row in rows])
        self._known: dict[Query, dict[int, float]] = {}

    def vector(self, query: Query) -> np.ndarray:
        match query:
            case Text(text):
                return self.searcher.text_vector(text)
            case Image(picture) | Photo(picture):
                return self.searcher.image_vector(picture)
            case Sum(terms):
                total = sum(term.weight * self.vector(term.part).astype(float) for term in terms)
                return np.asarray(total / np.linalg.norm(total), np.float32)
        raise AssertionError(query)

    def probability(self, query: Query, row: ImageRow, *, negated: bool = False) -> float:
        match query:
            case Not(part):
                return self.probability(part, row, negated=not negated)
            case And() | Or() if isinstance(query, And) != negated:
                judged, passes = [], 1.0
                for part, opposite in _conjuncts(query, negated):
                    found = self.probability(part, row, negated=opposite)
                    if _is_filter(part):
                        passes *= found
                    else:
                        judged.append(found)
                return passes * (math.prod(judged) ** (1 / len(judged)) if judged else 1)
            case And(parts) | Or(parts):
                return 1 - math.prod(1 - self.probability(part, row, negated=negated) for part in parts)
        found = self._of_leaf(query, row)
        return 1 - found if negated else found

    def _of_leaf(self, query: Query, row: ImageRow) -> float:
        match query:
            case Condition("under", folder):
                return float(row.key.startswith(f"{folder}/"))
            case Condition("camera", part):
                return float(row.camera is not None and part.lower() in row.camera.lower())
            case Condition("after", moment):
                return float(row.taken_at is not None and row.taken_at >= moment)
        if query not in self._known:
            vector = self.vector(query)
            kind = "image" if any(isinstance(leaf, Image | Photo) for leaf in leaves_of(query)) else "text"
            scores = (self._photos @ vector).astype(np.float32)
            found = self.searcher.ranker._background.relevance(vector, scores, kind=kind)  # type: ignore[arg-type]
            self._known[query] = dict(zip((photo.id for photo in self.rows), found.tolist(), strict=True))
        return self._known[query][row.id]

    def check(self, query: Query, hits: list[Hit]) -> None:
        """Every photo that may be found is, once, in the order of its probability, with the right one."""
        narrowing = [part for part in query.parts if _is_filter(part)] if isinstance(query, And) else []
        rows = [row for row in self.rows if all(self.probability(part, row) == 1 for part in narrowing)]
        pictures = [leaf for leaf in leaves_of(query) if isinstance(leaf, Image | Photo)]
        vector_of = {row.key: row.vector_id for row in self.rows} | {row.id: row.vector_id for row in self.rows}
        left_out = {vector_of[leaf.path if isinstance(leaf, Image) else leaf.id] for leaf in pictures}
        expected = {row.id: self.probability(query, row) for row in rows if row.vector_id not in left_out}
        assert sorted(hit.id for hit in hits) == sorted(expected)
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        for hit in hits:
            assert hit.relevance == pytest.approx(expected[hit.id], abs=5e-6)
        assert [hit.relevance for hit in hits] == sorted((hit.relevance for hit in hits), reverse=True)


# -- laws ------------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from("red blue green sky".split()).map(Text)


@st.composite
def queries(draw: st.DrawFn, photos: Path) -> Query:
    leaves = st.one_of(
        TEXTS,
        TEXTS,
        st.sampled_from([Image(str(photos / "0/00.png")), Image(str(photos / "copies/05.png")), Photo(3)]),
        st.builds(lambda a, b: Sum((Term(2, a), Term(-0.5, b))), TEXTS, st.just(Text("dark"))),
        st.sampled_from(["0", "1", "copies"]).map(lambda name: Condition("under", str(photos / name))),
        st.sampled_from(["2013", "2016", "2018"]).map(lambda year: Condition("after", year)),
        st.sampled_from(["CAMERA 1", "2"]).map(lambda part: Condition("camera", part)),
    )

    def tree(depth: int) -> Query:
        kind = draw(st.sampled_from(["leaf", "not", "and", "or"] if depth else ["leaf"]))
        if kind == "leaf":
            return draw(leaves)
        if kind == "not":
            return Not(tree(depth - 1))
        parts = tuple(tree(depth - 1) for _ in range(draw(st.integers(2, 3))))
        return And(parts) if kind == "and" else Or(parts)

    return Or((draw(TEXTS), tree(3))) if draw(st.booleans()) else And((Not(draw(TEXTS)), Not(tree(3))))


@given(data=st.data())
@settings(max_examples=40)
def test_a_query_means_what_it_says(
    searcher: Searcher, photos: Path, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    monkeypatch.setattr(searchengine.boolean, "ROWS_AT_A_TIME", 10)
    query = data.draw(queries(photos))
    hits = searcher.search_query(str(query), k=100)
    by_hand.check(query, hits)
    size = data.draw(st.integers(4, 12))
    pages = [hit for offset in range(0, 30, size) for hit in searcher.search_query(query, k=size, offset=offset)]
    assert pages == hits


@given(data=st.data())
@settings(max_examples=12)
def test_the_laws_of_logic_hold(searcher: Searcher, photos: Path, data: Any) -> None:
    a, b, c = (data.draw(queries(photos)) for _ in range(3))

    def found(query: Query) -> dict[int, float]:
        hits = searcher.search_query(query, k=100)  # filters joined to all of a query leave out what others find with 0
        return {hit.id: pytest.approx(hit.relevance, abs=1e-9) for hit in hits if hit.relevance}

    assert found(Not(Not(a))) == found(a)
    assert found(Not(And((a, b)))) == found(Or((Not(a), Not(b))))
    assert found(Not(Or((a, b)))) == found(And((Not(a), Not(b))))
    assert found(And((a, a))) == found(a)
    for kind in (And, Or):
        assert found(kind((a, b))) == found(kind((b, a)))
        assert found(kind((kind((a, b)), c))) == found(kind((a, kind((b, c)))))


def test_a_photo_of_which_each_part_is_a_match_is_a_match_of_all(
    searcher: Searcher, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        searcher.ranker._background, "relevance", lambda vector, scores, *, kind: np.full(len(scores), 0.6)
    )
    folder = photos / "copies"
    for query, relevance in {
        "red AND sky": 0.6,
        "red AND sky AND blue AND NOT (NOT green OR NOT dark)": 0.6,
        "red AND NOT sky": math.sqrt(0.6 * 0.4),
        "red AND (sky OR blue)": math.sqrt(0.6 * 0.84),
        "red OR sky AND blue": 1 - 0.4 * 0.4,
        "NOT (red AND sky)": 1 - 0.36,
        "NOT (red OR sky)": 0.4,
    }.items():
        found = [hit.relevance for hit in searcher.search_query(query, k=100)]
        assert found == pytest.approx([relevance] * TOTAL), query
    for hit in searcher.search_query(f"red AND under:{folder} OR dark - sky", k=100):  # a filter makes nothing likelier
        assert hit.relevance == pytest.approx(0.84 if hit.path.startswith(f"{folder}/") else 0.6)


# -- what is left out, what is let in --------------------------------------------------------------------------------


def paths(hits: list[Hit], photos: Path) -> list[str]:
    return [str(Path(hit.path).relative_to(photos)) for hit in hits]


def test_a_plain_text_is_found_as_by_search(searcher: Searcher, photos: Path) -> None:
    for text in ("a red dog", 'a sign that says "stop"', "2:1", " blue "):
        assert searcher.search_query(text, k=7, offset=2) == searcher.search(text, k=7, offset=2)
    assert searcher.search_query('"rock - paper"', k=40) == searcher.search("rock - paper", k=40)
    assert searcher.search("rock - paper", k=40) != searcher.search_query("rock - paper", k=40)
    picture = photos / "0" / "03.png"
    assert searcher.search_query(str(picture), k=40) == searcher.search_image(picture, k=40)
    with pytest.raises(QueryError, match="the query is empty"):
        searcher.search_query("  ")


def test_a_sum_is_searched_as_one_unit_vector(searcher: Searcher) -> None:
    total = 2 * searcher.text_vector("red") + searcher.image_vector(7) - 0.5 * searcher.text_vector("sky")
    vector = total / np.linalg.norm(total)
    (row,) = searcher.index.images(np.array([7])).values()
    expected = searcher.search_vector(vector, k=100, without=[row.vector_id])
    hits = searcher.search_query("2:red + id:7 - 0.5:sky", k=100)
    assert [hit.id for hit in hits] == [hit.id for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert searcher.search_query('3:"red"', k=100) == searcher.search("red", k=100)
    assert searcher.search_query('-1:"red"', k=100)[-1].id == searcher.search("red", k=1)[0].id


@pytest.mark.parametrize(
    "query", ["red - red", "red + -1:red", "0:red + 0:sky", "(red - red) AND sky", "red AND -1:red OR x"]
)
def test_a_sum_that_cancels_is_told(searcher: Searcher, query: str) -> None:
    if query.endswith("x"):  # the sum of what is wanted is not nothing here
        assert searcher.search_query(query)
        return
    with pytest.raises(QueryError, match="cancel each other"):
        searcher.search_query(query)


def test_a_score_is_the_cosine_to_what_is_wanted(searcher: Searcher) -> None:
    red, sky = searcher.text_vector("red"), searcher.text_vector("sky")
    both = (red + sky) / np.linalg.norm(red + sky)
    for query, direction in {
        "red AND sky": both,
        "red OR sky AND NOT blue": both,
        "red AND NOT sky": red,
        "NOT (sky AND NOT red)": red,
        "NOT red AND NOT sky": -both,
        "red AND NOT (red AND sky)": red,
    }.items():
        for hit in searcher.search_query(query, k=100):
            (row,) = searcher.index.images(np.array([hit.id])).values()
            assert hit.score == pytest.approx(float(searcher.index.vector(row.vector_id) @ direction), abs=1e-6)


def test_of_two_copies_a_filter_judges_each_by_itself(searcher: Searcher, photos: Path) -> None:
    folder = photos / "copies"
    everything = {str(file.relative_to(photos)) for file in photos.rglob("*.png")}
    copies = {name for name in everything if name.startswith("copies/")}
    assert set(paths(searcher.search_query(f"red AND under:{folder}", k=100), photos)) == copies
    assert set(paths(searcher.search_query(f"red AND NOT under:{folder}", k=100), photos)) == everything - copies
    nested = searcher.search_query(f"under:{folder} OR red AND blue", k=100)
    assert set(paths(nested[: len(copies)], photos)) == copies
    assert {hit.relevance for hit in nested[: len(copies)]} == {1.0}
    assert set(paths(nested, photos)) == everything


def test_filters_joined_to_all_narrow_as_the_options_do(searcher: Searcher, photos: Path) -> None:
    expected = searcher.search("red", k=100, filters=Filters(after="2012", camera="1", under=str(photos / "1")))
    assert expected
    query = f'red AND after:2012 AND camera:1 AND under:"{photos}/1"'
    assert searcher.search_query(query, k=100) == expected
    assert searcher.search_query("red AND camera:1", k=100, filters=Filters(after="2012", under=str(photos / "1")))
    assert searcher.search_query("red AND after:2012 AND after:2016", k=100) == searcher.search(
        "red", k=100, filters=Filters(after="2016")
    )
    either = searcher.search_query("red AND (camera:1 OR camera:2) AND NOT after:2015", k=100)
    rows = searcher.index.images(np.array([hit.id for hit in either]))
    assert {row.camera for row in rows.values()} == {"camera 1", "camera 2"}
    assert all(row.taken_at is None or row.taken_at < "2015" for row in rows.values())


def test_a_photo_without_a_date_passes_no_date_but_passes_the_opposite(searcher: Searcher) -> None:
    undated = {row.id for row in searcher.index.images(np.arange(100)).values() if row.taken_at is None}
    assert undated
    for query in ("red AND NOT after:2000", "red AND NOT (after:2000 AND camera:camera)"):
        assert {hit.id for hit in searcher.search_query(query, k=100)} == undated
    assert not undated & {hit.id for hit in searcher.search_query("red AND (after:2000 OR camera:none)", k=100)}


def test_filters_alone_are_no_query(searcher: Searcher) -> None:
    for query in ("after:2000", "after:2000 AND NOT (camera:x OR before:2020)"):
        with pytest.raises(QueryError, match="nothing but filters"):
            searcher.search_query(query)


def test_pictures_and_texts_beside_a_query_add_to_a_sum_and_to_nothing_else(searcher: Searcher) -> None:
    assert searcher.search_query("red AND after:2012", images=[3], without=["sky"], k=9) == searcher.search_combined(
        texts=["red"], images=[3], without=["sky"], k=9, filters=Filters(after="2012")
    )
    for options in ({"images": [3]}, {"without": ["sky"]}):
        with pytest.raises(QueryError, match="write them into it"):
            searcher.search_query("red OR blue", **options)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused(searcher: Searcher) -> None:
    with pytest.raises(QueryError, match="no photo with id 999"):
        searcher.search_query("red AND id:999")
    with pytest.raises(QueryError, match="/none/x cannot be a query"):
        searcher.search_query("red AND NOT image:/none/x")
    with pytest.raises(UsageError, match="k is 0"):
        searcher.search_query("red AND blue", k=0)


def test_any_number_may_be_asked_for(searcher: Searcher) -> None:
    assert len(searcher.search_query("red AND NOT blue", k=10**9)) == TOTAL
    assert len(searcher.search_query("red AND NOT blue", k=10**9, offset=TOTAL - 1)) == 1
    assert searcher.search_query("red AND NOT blue", offset=10**9) == []
    assert searcher.search_query("red AND NOT blue AND camera:none") == []


def test_photos_are_told_apart_where_none_match_or_all_do(
    searcher: Searcher, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every product of probabilities is 0, or every 1 less such a product 1, as floating point has it."""

    def relevance(vector: Any, scores: Any, *, kind: str) -> Any:
        return (1e-30 * np.exp(8 * scores.astype(float))).astype(np.float32)

    monkeypatch.setattr(searcher.ranker._background, "relevance", relevance)
    red, blue = searcher.text_vector("red"), searcher.text_vector("blue")
    matches = {}
    for row in by_hand.rows:
        photo = searcher.index.vector(row.vector_id)
        matches[row.id] = math.exp(8 * float(photo @ red)), math.exp(8 * float(photo @ blue))
    for query, order in {
        "red AND blue": lambda red, blue: -red * blue,
        "red OR blue": lambda red, blue: -red - blue,
        "NOT red AND NOT blue": lambda red, blue: red + blue,
        "NOT red OR NOT blue": lambda red, blue: red * blue,
    }.items():
        found = [order(*matches[hit.id]) for hit in searcher.search_query(query, k=100)]
        assert found == pytest.approx(sorted(found), rel=1e-5)
        assert len({round(value, 3) for value in found}) > 10


def test_a_commit_during_a_search_makes_it_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        painted(number).save(tmp_path / f"photos/{number}.png")
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    best, attempts = Combination.best, []

    def delayed(self: Combination, count: int) -> Any:
        found = best(self, count)
        if not attempts:
            (tmp_path / "photos/0.png").unlink()
            painted(7).save(tmp_path / "photos/7.png")
            build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
        attempts.append(count)
        return found

    with open_index(tmp_path / "index") as index:
        searcher = Searcher(index, FakeEncoder())
        monkeypatch.setattr(Combination, "best", delayed)
        hits = searcher.search_query("red AND NOT blue")
    assert len(attempts) == 2
    assert {Path(hit.path).stem for hit in hits} == set("123457")


# -- large libraries -------------------------------------------------------------------------------------------------

MANY, DIM = 4000, 32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Searcher, Searcher]]:
    """The same photos without `ann/`, and with one that is used as if they were a million."""
    folder = tmp_path_factory.mktemp("large")
    rows_of_photos(folder / "flat", np.array_split(clustered(MANY, DIM, seed=0)[0], 2))
    shutil.copytree(folder / "flat", folder / "fast")
    encoder = FakeEncoder(dim=DIM)
    with pytest.MonkeyPatch.context() as patch:
        for module in (searchengine.index.reader, searchengine.index.snapshot):
            patch.setattr(module, "COMPARED_AT_MOST", 50)
        patch.setattr(searchengine.index.reader, "NEAREST", 100)
        patch.setattr(searchengine.boolean, "ROWS_AT_A_TIME", 1500)
        compact(folder / "fast", kind="scan")
        with open_index(folder / "flat") as flat, open_index(folder / "fast") as fast:
            assert fast.snapshot().ann is not None
            yield Searcher(flat, encoder), Searcher(fast, encoder)


LARGE_QUERIES = [
    "id:17 AND id:18",
    "id:17 AND red",
    "id:17 OR id:300",
    "id:17 AND NOT id:300",
    "(id:17 OR id:40) AND NOT (red AND id:9)",
    "NOT red",
    "id:17 OR NOT red",
    "id:17 AND min-side:1",
    "id:17 AND (id:18 OR under:/photos)",
    "id:17 AND (id:18 OR camera:none)",
]


@pytest.mark.parametrize("query", LARGE_QUERIES)
def test_a_large_library_answers_as_if_every_photo_were_compared(large: tuple[Searcher, Searcher], query: str) -> None:
    flat, fast = large
    expected = [hit.id for hit in flat.search_query(query, k=300)]
    assert len(expected) == 300
    for k in (1, 10, 100, 300):
        found = [hit.id for hit in fast.search_query(query, k=k)]
        assert len(found) == k
        assert len(set(found) & set(expected[:k])) >= 0.97 * k
    pages = [hit.id for offset in range(0, 300, 60) for hit in fast.search_query(query, k=60, offset=offset)]
    assert pages == [hit.id for hit in fast.search_query(query, k=300)]
    assert len(set(pages)) == 300


def test_only_where_the_nearest_do_not_tell_is_every_photo_compared(
    large: tuple[Searcher, Searcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    worth_it = Combination._worth_it

    def counted(self: Combination, rows: Any, count: int) -> Any:
        compared.append(len(rows))
        return worth_it(self, rows, count)

    monkeypatch.setattr(Combination, "_worth_it", counted)
    _, fast = large
    fast.search_query("id:17 OR id:300", k=10)
    fast.search_query("id:17 AND NOT id:300", k=10)
    assert compared == []
    fast.search_query("NOT red")
    assert compared == [MANY]
    fast.search_query("id:17 AND NOT id:300", k=2000)
    assert compared == [MANY, MANY - 2]


# -- as a request, and from the command line -------------------------------------------------------------------------


def test_a_query_is_parsed_where_its_paths_mean_something_and_answered_anywhere(
    searcher: Searcher, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    request = asked_by("./0/00.png AND NOT red AND under:1")
    monkeypatch.chdir("/")
    assert request.files() == [str(photos / "0/00.png")]
    travelled = SearchRequest.from_dict(json.loads(json.dumps(replace(request, k=5, offset=1).as_dict())))
    expected = And((Image(str(photos / "0/00.png")), Not(Text("red")), Condition("under", str(photos / "1"))))
    assert parse(travelled.expression or "") == expected
    assert answer(travelled, searcher) == searcher.search_query(expected, k=5, offset=1)
    assert asked_by("a dog") == asked_by('"a dog"') == SearchRequest(texts=("a dog",))
    assert asked_by("a t-shirt: 2:1") == SearchRequest(texts=("a t-shirt: 2:1",))
    assert asked_by("") == SearchRequest()
    assert asked_by("id:7") == SearchRequest(pictures=(7,))
    assert asked_by(str(photos / "0/00.png")) == SearchRequest(pictures=(str(photos / "0/00.png"),))


@pytest.fixture(scope="module")
def coco(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """129 real photos in two folders, and their index by mini."""
    from searchengine import load_encoder

    folder = tmp_path_factory.mktemp("coco")
    for number, photo in enumerate(sorted((data / "coco_cc" / "images").iterdir())):
        target = folder / "photos" / "ab"[number % 2] / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, target)
    build(folder / "index", [folder / "photos"], encoder=load_encoder("mini"), isolated=False)
    return folder


@pytest.fixture
def run(cli: Cli, coco: Path, own_home: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")
    monkeypatch.setenv("SEARCHENGINE_WARM", "off")

    def with_index(*arguments: str | Path) -> Outcome:
        return cli("search", *arguments, "--index", coco / "index", "--json")

    return with_index


def test_real_photos_are_found_as_computed_by_hand(run: Any, coco: Path) -> None:
    from searchengine import load_encoder

    with open_index(coco / "index") as index:
        searcher = Searcher(index, load_encoder("mini"))
        rows = list(index.images(np.arange(1000)).values())
        assert len(rows) == 129
        by_hand = ByHand(searcher, rows)
        for query in (
            '"a dog" AND "a person"',
            '"a dog" AND NOT "a person"',
            "NOT (a dog OR a cat)",
            "2:a bus + a street - people",
            f"(a dog OR a cat) AND under:{coco}/photos/a",
            f"a dog OR a train AND NOT under:{coco}/photos/a",
            f"{rows[0].key} AND NOT a person",
        ):
            outcome = run(query, "-k", "200")
            assert outcome.code == 0, outcome.err
            by_hand.check(parse(query), [Hit(**line) for line in outcome.lines])
            assert run(query, "-k", "7", "--offset", "5").lines == outcome.lines[5:12]


def test_of_real_photos_the_first_are_what_was_asked_for(run: Any, data: Path) -> None:
    told = {
        photo["file_name"].split("/")[-1]: " ".join(photo["captions"]).lower()
        for photo in json.loads((data / "coco_cc" / "captions.json").read_text("utf-8"))
    }

    def first(query: str, count: int) -> list[str]:
        return [told[Path(line["path"]).name] for line in run(query, "-k", str(count)).lines]

    assert sum("cat" in text or "dog" in text for text in first("a cat OR a dog", 5)) >= 4
    assert sum("train" in text or "bus" in text for text in first("a train OR a bus", 4)) >= 3
    assert not any("cat" in text.split() for text in first("a dog AND NOT a cat", 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a dog AND",), "column 7 of the query: AND needs something after it"),
        (("a", "dog", "AND", "after:soon"), "column 11 of the query: after: 'soon' is no date"),
        (("a dog AND ./none.jpg",), "there is no picture ./none.jpg"),
        (("after:2023",), "nothing but filters"),
        (("a dog - a dog",), "cancel each other"),
        (("a dog OR a cat", "--not", "grass"), "write them into it"),
    ],
)
def test_a_query_that_makes_no_sense_is_one_line_on_standard_error(
    run: Any, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.startswith("searchengine: ")
    assert outcome.err.count("\n") == 1


@given(st.lists(st.sampled_from([*'abXY"-+:() ', "AND", "OR", "NOT", "2:", "id:", "after:2023", "./x"]), max_size=9))
def test_no_expression_is_taken_for_plain_text(pieces: list[str]) -> None:
    """`asked_by` looks for signs of an expression before it loads the grammar."""
    text = "".join(pieces)
    try:
        expected = parse(text)
    except QueryError as error:
        with pytest.raises(QueryError) as caught:
            asked_by(text)
        assert str(caught.value) == str(error)
        return
    request = asked_by(text)
    if isinstance(expected, Text):
        assert request == SearchRequest(texts=(expected.text,) if text else ())
    elif isinstance(expected, Photo):
        assert request == SearchRequest(pictures=(expected.id,))
    else:
        assert parse(request.expression or "") == expected


def test_plain_text_never_loads_the_grammar() -> None:
    script = (
        "import sys; from searchengine.cli.queries import asked_by; asked_by('a man-made, black-and-white t-shirt');"
        "print(sorted(m for m in sys.modules if m.startswith('searchengine.query')), 'numpy' in sys.modules);"
        "asked_by('a AND b'); print('searchengine.query' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] False", "True False"]
