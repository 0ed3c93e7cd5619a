"""Searching: ranks, pages, filters, queries by image, and what a query may not be."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import painted
from fakes import FakeEncoder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_reader import random_rows

from indexer.compact import compact
from indexer.pipeline import build
from searchengine import Hit, Searcher, open_index
from searchengine.errors import IndexFormatError, ModelMismatch, QueryError, SearchEngineError, UsageError
from searchengine.filters import Filters
from searchengine.index.reader import Index
from searchengine.vectors import check_unit_rows, normalise


def make_library(folder: Path) -> None:
    """Thirty photos; of 25 to 29 there are two copies each, and all that are named x* look the same. And an index."""
    for name in ("0", "1", "2", "same"):
        (folder / "photos" / name).mkdir(parents=True)
    for number in range(30):
        painted(number).save(folder / f"photos/{number % 3}/{number:02}.png")
    for number in range(25, 30):
        shutil.copy2(folder / f"photos/{number % 3}/{number:02}.png", folder / f"photos/copy-{number:02}.png")
    for number in range(6):
        exif = Image.Exif()
        exif[0x0110] = f"camera {number}"
        painted(99).save(folder / f"photos/same/x{number}.png", exif=exif.tobytes())
    build(folder / "index", [folder / "photos"], encoder=FakeEncoder(), batch_size=7, isolated=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests only read it."""
    folder = tmp_path_factory.mktemp("library")
    make_library(folder)
    return folder


@pytest.fixture
def searcher(library: Path) -> Iterator[Searcher]:
    encoder = FakeEncoder()
    with open_index(library / "index") as index:
        yield Searcher(index, encoder)


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Searcher]:
    """The same in a folder of the test's own."""
    make_library(tmp_path)
    encoder = FakeEncoder()
    with open_index(tmp_path / "index") as index:
        yield Searcher(index, encoder)


def paths(hits: list[Any]) -> list[str]:
    return [hit.path for hit in hits]


def test_hits_come_best_first_with_ranks_from_one(searcher: Searcher) -> None:
    hits = searcher.search("a dog on a beach", k=12)
    assert [hit.rank for hit in hits] == list(range(1, 13))
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= hit.relevance <= 1 for hit in hits)
    assert {(hit.width, hit.height, hit.store) for hit in hits} == {(60, 40, "local")}


def test_a_search_ranks_all_photos_as_their_vectors_say(searcher: Searcher) -> None:
    query = searcher.text_vector("blue")
    hits = searcher.search("blue", k=1000)
    assert len(hits) == len(set(paths(hits))) == 41
    for hit in hits:
        row = searcher.index.image(hit.id)
        assert row is not None
        assert hit.score == pytest.approx(float(searcher.index.vector(row.vector_id) @ query), abs=1e-6)


@given(text=st.text(min_size=1).filter(str.strip), size=st.integers(1, 15))
@settings(max_examples=25)
def test_pages_put_together_are_one_big_page(searcher: Searcher, text: str, size: int) -> None:
    together = searcher.search(text, k=45)
    pages = [hit for offset in range(0, 45, size) for hit in searcher.search(text, k=size, offset=offset)]
    assert [(hit.rank, hit.path) for hit in pages] == [(hit.rank, hit.path) for hit in together]


FILTERS = st.sampled_from(
    [None, Filters(camera="CAMERA"), Filters(min_side=40), Filters(orientation="portrait"), Filters(max_size_bytes=300)]
)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 120),
    filters=FILTERS,
    without=st.sets(st.integers(1, 40), max_size=5),
)
@settings(max_examples=40)
def test_pages_of_any_sizes_neither_overlap_nor_lose_a_photo(
    searcher: Searcher, sizes: list[int], seed: int, filters: Filters | None, without: set[int]
) -> None:
    """Among them are copies, photos of equal score, and the ones that a query leaves out."""
    vector = searcher.image_vector(painted(seed))
    together = searcher.search_vector(vector, k=100, filters=filters, without=without)
    rows = [searcher.index.image(hit.id) for hit in together]
    assert not without & {row.vector_id for row in rows if row}
    passing = searcher.index.images_of(np.arange(1, 50).tolist(), filters=filters)
    assert len(together) == sum(len(photos) for vector_id, photos in passing.items() if vector_id not in without)
    assert together == sorted(
        together, key=lambda hit: (-hit.score, next(row.vector_id for row in rows if row and row.id == hit.id), hit.id)
    )
    pages: list[Hit] = []
    while page := searcher.search_vector(
        vector, k=sizes[len(pages) % len(sizes)], offset=len(pages), filters=filters, without=without
    ):
        pages += page
    assert [(hit.rank, hit.id) for hit in pages] == [(hit.rank, hit.id) for hit in together]
    assert [hit.score for hit in pages] == pytest.approx([hit.score for hit in together], abs=1e-6)


def test_pages_of_equal_photos_never_overlap(searcher: Searcher, library: Path) -> None:
    image = library / "photos" / "same" / "x3.png"
    together = paths(searcher.search_image(painted(99), k=41))
    assert {Path(path).name for path in together[:6]} == {f"x{number}.png" for number in range(6)}
    for size in (1, 2, 4, 5):
        pages = [
            path
            for offset in range(0, 41, size)
            for path in paths(searcher.search_image(painted(99), k=size, offset=offset))
        ]
        assert pages == together
    without = [path for path in together if path != str(image)]
    assert [paths(searcher.search_image(image, k=1, offset=offset))[0] for offset in range(40)] == without


def test_an_offset_past_the_end_finds_nothing(searcher: Searcher) -> None:
    assert searcher.search("x", offset=41) == []
    assert searcher.search("x", k=10**9, offset=10**9) == []
    assert len(searcher.search("x", k=10**9, offset=40)) == 1


def test_a_filter_narrows_before_it_counts(searcher: Searcher, library: Path) -> None:
    everything = paths(searcher.search("green", k=100))
    filters = Filters(under=str(library / "photos" / "2"))
    hits = searcher.search("green", k=10, filters=filters)
    assert paths(hits) == [path for path in everything if "/photos/2/" in path][:10]
    assert len(hits) == 10
    assert searcher.search("green", filters=Filters(camera="none such")) == []
    assert len(searcher.search("green", k=3, filters=Filters(camera="CAMERA"))) == 3


def test_of_two_copies_only_the_one_that_passes_the_filter_is_found(searcher: Searcher, library: Path) -> None:
    hits = searcher.search("green", k=100, filters=Filters(under=str(library / "photos" / "1")))
    assert len(hits) == 10
    assert not [path for path in paths(hits) if "copy-" in path]


def test_similar_photos_do_not_include_the_photo_or_its_copies(searcher: Searcher, library: Path) -> None:
    row = searcher.index.image_by_key("local", str(library / "photos" / "2" / "26.png"))
    assert row is not None
    hits = searcher.similar(row.id, k=100)
    assert len(hits) == 39
    assert not [path for path in paths(hits) if path.endswith("26.png")]
    assert len(searcher.similar(row.id, k=5)) == 5


def test_an_indexed_picture_finds_others_under_whatever_name(
    searcher: Searcher, tmp_path: Path, library: Path, encoder: FakeEncoder
) -> None:
    photo = library / "photos" / "0" / "03.png"
    elsewhere = tmp_path / "elsewhere.bin"
    shutil.copyfile(photo, elsewhere)
    before = len(searcher.encoder.batches)  # type: ignore[attr-defined]
    for query in (photo, str(photo), elsewhere):
        hits = searcher.search_image(query, k=100)
        assert len(hits) == 40
        assert str(photo) not in paths(hits)
    assert len(searcher.encoder.batches) == before, "its vector is known"  # type: ignore[attr-defined]


def test_a_picture_in_memory_finds_its_like(searcher: Searcher, library: Path) -> None:
    assert searcher.search_image(painted(3), k=1)[0].path == str(library / "photos" / "0" / "03.png")


def test_texts_and_pictures_are_combined_into_one_unit_vector(searcher: Searcher) -> None:
    vector = searcher.combine(texts=["a", "b"], images=[painted(1)], without=["c"])
    check_unit_rows(vector[None], dim=16)
    assert float(vector @ searcher.text_vector("a")) > float(vector @ searcher.text_vector("c"))
    np.testing.assert_allclose(searcher.combine(texts=["a"]), searcher.text_vector("a"), atol=1e-6)
    with pytest.raises(QueryError):
        searcher.combine(without=["c"])


# -- several pictures ------------------------------------------------------------------------------------------------


def test_several_pictures_find_what_is_near_the_mean_of_their_vectors(searcher: Searcher) -> None:
    pictures = [painted(1000), painted(1001)]
    mean = normalise(np.mean([searcher.image_vector(picture) for picture in pictures], axis=0)[None])[0]
    assert searcher.search_images(pictures, k=50) == searcher.search_vector(mean, k=50)


def test_no_picture_of_the_query_is_in_the_answer_nor_a_copy_of_one(searcher: Searcher, library: Path) -> None:
    first = library / "photos" / "2" / "26.png"  # there is a copy
    second = library / "photos" / "0" / "03.png"
    row = searcher.index.image_by_key("local", str(second))
    same = searcher.index.image_by_key("local", str(library / "photos" / "same" / "x0.png"))
    assert row is not None
    assert same is not None
    everything = searcher.search("x", k=100)
    for images in ([first, second], [str(first), row.id], [np.int64(row.id), first], [first, row.id, first]):
        hits = searcher.search_images(images, k=100)  # type: ignore[arg-type]
        assert len(hits) == len(everything) - 3
        assert not {Path(path).name for path in paths(hits)} & {"26.png", "copy-26.png", "03.png"}
        assert len(searcher.search_images(images, k=38)) == 38  # type: ignore[arg-type]
    combined = searcher.search_combined(texts=["x"], images=[first], without=["y"], k=100)
    assert len(combined) == len(everything) - 2
    filtered = searcher.search_images([same.id], k=3, filters=Filters(camera="camera"))
    assert [Path(path).name for path in paths(filtered)] == ["x1.png", "x2.png", "x3.png"]


def test_a_query_without_any_part_is_refused(searcher: Searcher) -> None:
    for call in (lambda: searcher.search_images([]), lambda: searcher.search_combined(without=["x"])):
        with pytest.raises(QueryError, match="the query is empty"):
            call()


@pytest.mark.parametrize("image_id", [0, -1, 999, 2**63, 10**40])
def test_an_id_that_is_none_is_refused(searcher: Searcher, image_id: int) -> None:
    with pytest.raises(QueryError, match="no photo with id"):
        searcher.search_images([1, image_id])


def test_a_photo_that_is_dropped_in_the_middle_of_a_query_by_it_is_no_crash(
    searcher: Searcher, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the row of a photo and its vector, another process deletes and compacts."""
    photo = library / "photos" / "0" / "03.png"
    row = searcher.index.image_by_key("local", str(photo))
    assert row is not None

    def gone(self: Index, vector_id: int) -> Any:
        raise KeyError(vector_id)

    monkeypatch.setattr(Index, "vector", gone)
    with pytest.raises(QueryError, match="no photo with id"):
        searcher.similar(row.id)
    assert searcher.search_image(photo, k=1)[0].path == str(photo)


# -- many queries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [None, Filters(camera="camera"), Filters(camera="none such")])
def test_many_queries_at_once_find_what_each_finds_alone(searcher: Searcher, filters: Filters | None) -> None:
    texts = ["red", "green", "blue", "red"]
    together = searcher.search_many(texts, k=7, offset=2, filters=filters)
    assert len(together) == 4
    for text, hits in zip(texts, together, strict=True):
        alone = searcher.search(text, k=7, offset=2, filters=filters)
        assert [(hit.rank, hit.path) for hit in hits] == [(hit.rank, hit.path) for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-6)
        assert [hit.relevance for hit in hits] == pytest.approx([hit.relevance for hit in alone], abs=1e-4)


def test_many_queries_are_one_pass_over_the_vectors(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    search = Index.search

    def counted(self: Index, queries: Any, **options: Any) -> Any:
        passes.append(len(queries))
        return search(self, queries, **options)

    monkeypatch.setattr(Index, "search", counted)
    searcher.search_many([f"text {number}" for number in range(50)])
    assert passes == [50]


def test_pages_follow_the_ranks_of_an_approximate_index(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may find a near photo late; pages are cut from its order, which does not depend on how much is asked for."""
    true_scores, true_ids = searcher.index.search(searcher.text_vector("x")[None], k=100)
    late = np.r_[1:20, 0, 20 : true_ids.shape[1]]

    def rank(self: Index, query: Any, *, k: int, among: Any = None, depths: Any = None) -> Any:
        return true_scores[0][late][:k], true_ids[0][late][:k]

    approximate = replace(searcher.index.snapshot(), ann=object())  # type: ignore[arg-type]
    monkeypatch.setattr(Index, "snapshot", lambda self: approximate)
    monkeypatch.setattr(Index, "rank", rank)
    together = searcher.search("x", k=100)
    pages = [hit for offset in range(0, 45, 4) for hit in searcher.search("x", k=4, offset=offset)]
    assert pages == together
    assert len(together) == 41
    assert together[0].score < max(hit.score for hit in together)
    assert searcher.search_many(["x", "x"], k=100) == [together, together]


def test_no_queries_find_nothing(searcher: Searcher) -> None:
    assert searcher.search_many([]) == []
    with pytest.raises(QueryError, match="the query is empty"):
        searcher.search_many(["red", " "])


# -- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vector",
    [
        np.ones(16, np.float32),
        np.zeros(16, np.float32),
        np.full(16, np.nan, np.float32),
        np.full(16, np.inf, np.float32),
        random_rows(1, 8)[0],
        random_rows(1, 16),
        np.float32(1),
    ],
)
def test_what_is_no_unit_vector_of_this_index_is_refused(searcher: Searcher, vector: Any) -> None:
    with pytest.raises(UsageError):
        searcher.search_vector(vector)
    with pytest.raises(UsageError):
        searcher.search_vectors(np.stack([random_rows(1, 16)[0], vector]) if vector.shape == (16,) else vector.T)


@pytest.mark.parametrize(("k", "offset"), [(0, 0), (-1, 0), (1, -1)])
def test_a_page_that_makes_no_sense_is_refused(searcher: Searcher, k: int, offset: int) -> None:
    for call in (searcher.search, searcher.search_image, searcher.similar):
        with pytest.raises(UsageError, match="k must be at least 1"):
            call("x" if call != searcher.similar else 1, k=k, offset=offset)  # type: ignore[operator]
    with pytest.raises(UsageError):
        searcher.search_many(["x", "y"], k=k, offset=offset)


@pytest.mark.parametrize("text", ["", "  \n\t", "x" * 100_001])
def test_an_empty_or_endless_query_is_refused(searcher: Searcher, text: str) -> None:
    with pytest.raises(QueryError):
        searcher.search(text)


def test_a_query_that_is_no_picture_names_it(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_text("hello")
    for name in ("no.jpg", "missing.jpg"):
        with pytest.raises(QueryError, match=name):
            searcher.search_image(tmp_path / name)
    with pytest.raises(QueryError, match="no photo with id 999"):
        searcher.similar(999)


def test_another_encoder_is_refused_by_name(searcher: Searcher) -> None:
    with pytest.raises(ModelMismatch, match=r"made by encoder fake .*not by other"):
        Searcher(searcher.index, FakeEncoder(name="other"))


def test_deleted_photos_are_not_found(changing: Searcher, tmp_path: Path) -> None:
    gone = changing.search("red", k=3)
    for hit in gone:
        Path(hit.path).unlink()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
    hits = changing.search("red", k=100)
    assert len(hits) == 38
    assert not set(paths(hits)) & set(paths(gone))
    assert len(changing.search("red", k=5)) == 5


def test_an_empty_index_answers_every_search(tmp_path: Path, encoder: FakeEncoder) -> None:
    (tmp_path / "photos").mkdir()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=encoder)
    with open_index(tmp_path / "index") as index:
        searcher = Searcher(index, encoder)
        assert searcher.search("x") == []
        assert searcher.search("x", filters=Filters(camera="x")) == []
        assert searcher.search_image(painted(1)) == []
        assert searcher.search_images([painted(1), painted(2)], k=10**6) == []
        assert searcher.search_many(["x", "y"]) == [[], []]
        with pytest.raises(QueryError):
            searcher.similar(1)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_segment_is_a_clear_error(changing: Searcher, tmp_path: Path, kept: int) -> None:
    segment = max((tmp_path / "index" / "segments").iterdir())
    content = segment.read_bytes()
    replacement = tmp_path / "truncated"
    replacement.write_bytes(content[:kept])
    replacement.replace(segment)
    with open_index(tmp_path / "index") as index:
        truncated = Searcher(index, changing.encoder)
        for call in (truncated.search, lambda text: truncated.search_many([text, text])):
            with pytest.raises(IndexFormatError, match="verify --repair"):
                call("x")


def test_searches_while_an_index_is_compacted_find_all_or_say_why(changing: Searcher, tmp_path: Path) -> None:
    found: list[set[str]] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            with contextlib.suppress(SearchEngineError):
                found.append(set(paths(changing.search("x", k=100))))

    expected = set(paths(changing.search("x", k=100)))
    thread = threading.Thread(target=search)
    thread.start()
    try:
        for number in range(5):
            photo = tmp_path / "photos" / "new.png"
            painted(500 + number).save(photo)
            build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
            compact(tmp_path / "index")
    finally:
        done.set()
        thread.join()
    assert len(found) > 5
    assert {len(names - {str(photo)}) for names in found} == {len(expected)}
    assert set(paths(changing.search("x", k=100))) == expected | {str(photo)}


@pytest.mark.parametrize("step", ["search", "photos_of", "images"])
def test_a_search_never_sees_half_of_a_commit(
    changing: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A commit that comes between any two steps replaces a photo; a search sees it before or after."""
    for number in range(30):
        (tmp_path / "photos" / f"{number % 3}" / f"{number:02}.png").unlink()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
    photo = tmp_path / "photos" / "same" / "x0.png"
    assert len(changing.search("x", k=100)) == 11
    uninterrupted = getattr(Index, step)
    commits = iter(range(1))

    def interrupted(self: Index, *arguments: Any, **options: Any) -> Any:
        for number in commits:
            painted(1000 + number, width=64).save(photo)
            build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
        return uninterrupted(self, *arguments, **options)

    monkeypatch.setattr(Index, step, interrupted)
    hits = changing.search("x", k=100)
    assert len(hits) == len(set(paths(hits))) == 11


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=5))
@example([[0.0, 0.0, 1e-162]])
def test_normalised_rows_pass_the_check(rows: list[list[float]]) -> None:
    matrix = np.array(rows)
    if (np.linalg.norm(matrix, axis=1) == 0).any():
        with pytest.raises(UsageError):
            normalise(matrix)
    else:
        assert check_unit_rows(normalise(matrix), dim=3).dtype == np.float32
