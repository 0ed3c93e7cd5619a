"""Searching: ranks, pages, filters, queries by image, and what a query may not be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_reader import random_rows

from indexer.pipeline import build
from searchengine import Searcher, open_index
from searchengine.errors import ModelMismatch, QueryError, UsageError
from searchengine.index.filters import Filters
from searchengine.index.reader import Index
from searchengine.vectors import check_unit_rows, normalise

Paint = Callable[..., Path]


@pytest.fixture
def searcher(tmp_path: Path, paint: Paint) -> Iterator[Searcher]:
    """Thirty photos; of 25 to 29 there are two copies each, and all that are named x* look the same."""
    for number in range(30):
        paint(f"photos/{number % 3}/{number:02}.png", number)
    for number in range(25, 30):
        shutil.copy2(tmp_path / f"photos/{number % 3}/{number:02}.png", tmp_path / f"photos/copy-{number:02}.png")
    for number in range(6):
        image = painted(99)
        (tmp_path / "photos" / "same").mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0110] = f"camera {number}"
        image.save(tmp_path / "photos" / "same" / f"x{number}.png", exif=exif.tobytes())
    encoder = FakeEncoder()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=encoder, batch_size=7)
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


def test_pages_of_equal_photos_never_overlap(searcher: Searcher, tmp_path: Path) -> None:
    image = tmp_path / "photos" / "same" / "x3.png"
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


def test_a_filter_narrows_before_it_counts(searcher: Searcher, tmp_path: Path) -> None:
    everything = paths(searcher.search("green", k=100))
    filters = Filters(under=str(tmp_path / "photos" / "2"))
    hits = searcher.search("green", k=10, filters=filters)
    assert paths(hits) == [path for path in everything if "/photos/2/" in path][:10]
    assert len(hits) == 10
    assert searcher.search("green", filters=Filters(camera="none such")) == []
    assert len(searcher.search("green", k=3, filters=Filters(camera="CAMERA"))) == 3


def test_of_two_copies_only_the_one_that_passes_the_filter_is_found(searcher: Searcher, tmp_path: Path) -> None:
    hits = searcher.search("green", k=100, filters=Filters(under=str(tmp_path / "photos" / "1")))
    assert len(hits) == 10
    assert not [path for path in paths(hits) if "copy-" in path]


def test_similar_photos_do_not_include_the_photo_or_its_copies(searcher: Searcher, tmp_path: Path) -> None:
    row = searcher.index.image_by_key("local", str(tmp_path / "photos" / "2" / "26.png"))
    assert row is not None
    hits = searcher.similar(row.id, k=100)
    assert len(hits) == 39
    assert not [path for path in paths(hits) if path.endswith("26.png")]
    assert len(searcher.similar(row.id, k=5)) == 5


def test_an_indexed_picture_finds_others_under_whatever_name(
    searcher: Searcher, tmp_path: Path, encoder: FakeEncoder
) -> None:
    photo = tmp_path / "photos" / "0" / "03.png"
    elsewhere = tmp_path / "elsewhere.bin"
    shutil.copyfile(photo, elsewhere)
    before = len(searcher.encoder.batches)  # type: ignore[attr-defined]
    for query in (photo, str(photo), elsewhere):
        hits = searcher.search_image(query, k=100)
        assert len(hits) == 40
        assert str(photo) not in paths(hits)
    assert len(searcher.encoder.batches) == before, "its vector is known"  # type: ignore[attr-defined]


def test_a_picture_in_memory_finds_its_like(searcher: Searcher, tmp_path: Path) -> None:
    assert searcher.search_image(painted(3), k=1)[0].path == str(tmp_path / "photos" / "0" / "03.png")


def test_texts_and_pictures_are_combined_into_one_unit_vector(searcher: Searcher) -> None:
    vector = searcher.combine(texts=["a", "b"], images=[painted(1)], without=["c"])
    check_unit_rows(vector[None], dim=16)
    assert float(vector @ searcher.text_vector("a")) > float(vector @ searcher.text_vector("c"))
    np.testing.assert_allclose(searcher.combine(texts=["a"]), searcher.text_vector("a"), atol=1e-6)
    with pytest.raises(QueryError):
        searcher.combine(without=["c"])


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


@pytest.mark.parametrize(("k", "offset"), [(0, 0), (-1, 0), (1, -1)])
def test_a_page_that_makes_no_sense_is_refused(searcher: Searcher, k: int, offset: int) -> None:
    with pytest.raises(UsageError):
        searcher.search("x", k=k, offset=offset)


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


def test_deleted_photos_are_not_found(searcher: Searcher, tmp_path: Path) -> None:
    gone = searcher.search("red", k=3)
    for hit in gone:
        Path(hit.path).unlink()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
    hits = searcher.search("red", k=100)
    assert len(hits) == 38
    assert not set(paths(hits)) & set(paths(gone))
    assert len(searcher.search("red", k=5)) == 5


def test_an_empty_index_answers_every_search(tmp_path: Path, encoder: FakeEncoder) -> None:
    (tmp_path / "photos").mkdir()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=encoder)
    with open_index(tmp_path / "index") as index:
        searcher = Searcher(index, encoder)
        assert searcher.search("x") == []
        assert searcher.search("x", filters=Filters(camera="x")) == []
        assert searcher.search_image(painted(1)) == []


def test_a_search_never_sees_half_of_a_commit(
    searcher: Searcher, tmp_path: Path, paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that comes between ranking and looking up rows replaces a photo; a search sees it before or after."""
    for number in range(30):
        (tmp_path / "photos" / f"{number % 3}" / f"{number:02}.png").unlink()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
    photo = tmp_path / "photos" / "same" / "x0.png"
    assert len(searcher.search("x", k=100)) == 11
    images_of = Index.images_of
    commits = iter(range(1))

    def interrupted(self: Index, *arguments: Any, **options: Any) -> Any:
        for number in commits:
            painted(1000 + number, width=64).save(photo)
            build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
        return images_of(self, *arguments, **options)

    monkeypatch.setattr(Index, "images_of", interrupted)
    hits = searcher.search("x", k=100)
    assert len(hits) == len(set(paths(hits))) == 11


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=5))
def test_normalised_rows_pass_the_check(rows: list[list[float]]) -> None:
    matrix = np.array(rows)
    if (np.linalg.norm(matrix, axis=1) == 0).any():
        with pytest.raises(UsageError):
            normalise(matrix)
    else:
        assert check_unit_rows(normalise(matrix), dim=3).dtype == np.float32
