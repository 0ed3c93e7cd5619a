"""Searching in Milvus: the tests of searches in a folder, and what is Milvus's own. Milvus Lite answers, from files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_boolean
import test_search
from ann_data import clustered
from ann_data import library as rows_of_photos
from commandline import Cli
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving_index
from test_boolean import LARGE_QUERIES, ByHand, photos  # noqa: F401
from test_filters import LATITUDES, LONGITUDES, MOMENTS, NAMES, RADII_KM, absent_or
from test_search import library  # noqa: F401

import searchengine.cli.options
import searchengine.milvus.nearest
import searchengine.milvus.reader
import searchengine.web.opened
from indexer.copy import copy
from indexer.pipeline import build
from indexer.tags import TaggingRequest, write_tags
from indexer.writer import IndexWriter, NewPhoto
from searchengine import Searcher, open_index
from searchengine.duplicates import exact_duplicates, near_duplicates
from searchengine.errors import (
    IndexFormatError,
    IndexNotFound,
    IndexTooNew,
    IndexUnusable,
    ModelMismatch,
    QueryError,
    UsageError,
)
from searchengine.filters import ORIENTATIONS, Filters
from searchengine.index.circles import box_around
from searchengine.index.schema import images
from searchengine.metadata import PhotoMetadata
from searchengine.milvus.connection import Connection, MilvusPlace
from searchengine.milvus.expressions import expression_of
from searchengine.milvus.reader import MilvusIndex
from searchengine.milvus.schema import NOTHING, STATE, escaped, state_collection, unescaped
from searchengine.milvus.vectors import MilvusVectors
from searchengine.query_filters import Joined
from searchengine.query_tree import And, Condition, Not, Or, Query
from searchengine.stores import StoredPhoto

# -- the tests of searches in a folder ---------------------------------------------------------------------------------

# Of `test_search` and `test_boolean` those that change the files of an index or replace a method of its reader, and
# the laws that take hundreds of searches; Milvus has its own of both kinds below.
OF_A_FOLDER = frozenset(
    """
    test_a_photo_that_is_dropped_in_the_middle_of_a_query_by_it_is_no_crash
    test_many_queries_are_one_pass_over_the_vectors
    test_pages_follow_the_ranks_of_an_approximate_index
    test_deleted_photos_are_not_found
    test_an_empty_index_answers_every_search
    test_a_truncated_segment_is_a_clear_error
    test_searches_while_an_index_is_compacted_find_all_or_say_why
    test_a_search_never_sees_half_of_a_commit
    test_pages_put_together_are_one_big_page
    test_pages_of_any_sizes_neither_overlap_nor_lose_a_photo
    test_normalised_rows_pass_the_check
    test_a_query_means_what_it_says
    test_the_laws_of_logic_hold
    test_a_commit_during_a_search_makes_it_start_over
    test_a_large_library_answers_as_if_every_photo_were_compared
    test_only_where_the_nearest_do_not_tell_is_every_photo_compared
    test_real_photos_are_found_as_computed_by_hand
    test_of_real_photos_the_first_are_what_was_asked_for
    test_a_query_that_makes_no_sense_is_one_line_on_standard_error
    test_no_expression_is_taken_for_plain_text
    test_plain_text_never_loads_the_grammar
    """.split()
)


def in_milvus(folder: Path, *, place: Path) -> str:
    """The address of a copy of an index, flushed to the files of Milvus."""
    address = f"milvus://{place}/photos.db"
    copy(folder, address)
    return address


def shared(module: ModuleType) -> dict[str, Any]:
    """The tests of a module as members of a class, which has a fixture `searcher` of its own for them."""
    names = [name for name in vars(module) if name.startswith("test_") and name not in OF_A_FOLDER]
    return {name: staticmethod(vars(module)[name]) for name in names}


class TestSearches:
    locals().update(shared(test_search))

    @pytest.fixture(scope="class")
    def searcher(self, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:  # noqa: F811
        with open_index(in_milvus(library / "index", place=tmp_path_factory.mktemp("milvus"))) as index:
            yield Searcher(index, FakeEncoder())


class TestConditions:
    locals().update(shared(test_boolean))

    @pytest.fixture(scope="class")
    def searcher(self, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:  # noqa: F811
        folder = tmp_path_factory.mktemp("milvus")
        build(folder / "index", [photos], encoder=FakeEncoder(), batch_size=7, isolated=False)
        with open_index(in_milvus(folder / "index", place=folder)) as index:
            yield Searcher(index, FakeEncoder())

    @pytest.fixture(scope="class")
    def by_hand(self, searcher: Searcher) -> ByHand:
        return ByHand(searcher, list(searcher.index.images(np.arange(100)).values()))


def test_the_tests_that_are_left_out_are_there() -> None:
    known = {name for module in (test_search, test_boolean) for name in vars(module)}
    assert known >= OF_A_FOLDER


# -- a folder and Milvus side by side ----------------------------------------------------------------------------------


class Both(NamedTuple):
    """The same index in a folder and in Milvus, and what searches each."""

    local: Searcher
    milvus: Searcher
    folder: Path
    address: str


def both_of(folder: Path, *, place: Path, dim: int = 16) -> Iterator[Both]:
    address, encoder = in_milvus(folder, place=place), FakeEncoder(dim=dim)
    with open_index(folder) as local, open_index(address) as milvus:
        yield Both(Searcher(local, encoder), Searcher(milvus, encoder), folder, address)


ODD_CAMERAS = ["aBö%_\\'\"; ", "100%", "a_b", "A\\b", "ab", "Ö", None, None]
ODD_FOLDERS = ["a", "ab", "b/ö", "a'b", "%", "\udcff", 'q"q', "new\nline"]
LABELS = ['say "cheese"', "100%", "a_b", "cat, dog", "tab\there", "naïve"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Ninety photos of 60 contents, with odd names, cameras and tags, and places at the edges of the Earth."""
    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    encoder = FakeEncoder()
    rows = encoder.encode_texts([f"row {number}" for number in range(60)])
    contents = [hashlib.sha256(b"%d" % number).digest() for number in range(60)]
    with IndexWriter(folder / "index", encoder=encoder) as writer:
        writer.add_vectors(contents, rows)
        for number in range(90):
            place = None if rng.random() < 0.3 else (float(rng.uniform(-90, 90)), float(rng.uniform(-180, 180)))
            place = (89.9995, 0.0) if number == 1 else (0.0, 179.9999) if number == 2 else place
            metadata = PhotoMetadata(
                width=int(rng.integers(1, 5)),
                height=int(rng.integers(1, 5)),
                taken_at=f"20{rng.integers(0, 30):02}-06-01T12:00:00" if rng.random() < 0.7 else None,
                camera=ODD_CAMERAS[rng.integers(len(ODD_CAMERAS))],
                latitude=place and place[0],
                longitude=place and place[1],
            )
            key = f"/photos/{ODD_FOLDERS[rng.integers(len(ODD_FOLDERS))]}/{number}.jpg"
            content = contents[number if number < 60 else rng.integers(60)]
            listed = StoredPhoto(key, int(rng.integers(0, 4)), 1, '"etag\x7f%"' if number % 3 else None)
            writer.add_photo(NewPhoto(store="local", listed=listed, content_hash=content, metadata=metadata))
        writer.commit(report={}, finished=True)
    tagging = TaggingRequest(labels=LABELS, templates=["{}"], top=2, min_probability=0.0)
    write_tags(folder / "index", tagging, encoder=encoder)
    yield from both_of(folder / "index", place=folder)


def values_of(name: str, *values: Any) -> st.SearchStrategy[Condition]:
    return st.sampled_from(values).map(lambda value: Condition(name, value))


CONDITIONS = st.one_of(
    values_of("after", "2010", "2020-06-01"),
    values_of("before", "2010", "2020-06-02"),
    values_of("camera", "a", "%", "_", "\\", "ÖB", "ö"),
    values_of("under", "/photos/a", "/photos/%", "/photos/\udcff", "/"),
    values_of("near", "0,180,500", "90,0,3000", "10,20,8000"),
    values_of("min-side", "2", "4"),
    values_of("orientation", *ORIENTATIONS),
    values_of("tag", *LABELS, "none such"),
)
TREES: st.SearchStrategy[Query] = st.recursive(
    CONDITIONS,
    lambda parts: st.one_of(
        parts.map(Not),
        st.lists(parts, min_size=2, max_size=3).map(lambda some: And(tuple(some))),
        st.lists(parts, min_size=2, max_size=3).map(lambda some: Or(tuple(some))),
    ),
    max_leaves=5,
)
FILTERS = st.builds(
    Filters,
    after=absent_or(MOMENTS | st.sampled_from(["2000", "2019-12"])),
    before=absent_or(MOMENTS | st.sampled_from(["2010", "2015-02-28"])),
    under=absent_or(st.sampled_from(["/photos", *(f"/photos/{name}" for name in ODD_FOLDERS)])),
    camera=absent_or(NAMES | st.just("")),
    near=absent_or(st.tuples(LATITUDES, LONGITUDES, RADII_KM)),
    min_side=absent_or(st.integers(1, 4)),
    orientation=absent_or(st.sampled_from(ORIENTATIONS)),
    min_size_bytes=absent_or(st.integers(0, 3)),
    max_size_bytes=absent_or(st.integers(0, 3)),
    tag=absent_or(st.sampled_from(LABELS) | st.lists(st.sampled_from(LABELS), max_size=2)),
    where=absent_or(st.just(images.c.width > 2 * images.c.height) | TREES.map(lambda tree: Joined(tree).as_sql)),
)


@given(filters=FILTERS | TREES.map(lambda tree: Joined(tree).filters))
@settings(max_examples=50)
def test_a_filter_lets_the_same_photos_through_as_in_a_folder(odd: Both, filters: Filters) -> None:
    local, milvus = odd.local.index, odd.milvus.index
    ids = local.vector_ids(filters)
    assert milvus.vector_ids(filters).tolist() == ids.tolist()
    assert milvus.count_images(filters) == local.count_images(filters)
    some = np.arange(60, 0, -7)
    for found, expected in zip(
        milvus.photos_of(some, filters=filters), local.photos_of(some, filters=filters), strict=True
    ):
        assert found.tolist() == expected.tolist()


@given(
    query=st.sampled_from(["red", "NOT blue", "red AND NOT blue", "red OR id:7 OR camera:a", "2:red - id:3"]),
    filters=st.none() | FILTERS,
    k=st.integers(1, 100),
    offset=st.sampled_from([0, 0, 3, 50]),
)
@settings(max_examples=15)
def test_hits_are_those_of_a_folder_to_the_last_bit(
    odd: Both, query: str, filters: Filters | None, k: int, offset: int
) -> None:
    local, milvus = (
        searcher.search_query(query, k=k, offset=offset, filters=filters) for searcher in (odd.local, odd.milvus)
    )
    assert milvus == local


def test_what_is_known_of_photos_is_what_a_folder_knows(odd: Both) -> None:
    local, milvus = odd.local.index, odd.milvus.index
    numbers = np.arange(-1, 95)
    rows = local.images(numbers)
    assert len(rows) == 90
    assert milvus.images(numbers) == rows
    assert milvus.keys_of(np.arange(1, 61)) == local.keys_of(np.arange(1, 61))
    assert milvus.images_of([3, 1, 3]) == local.images_of([3, 1, 3])
    assert milvus.tags() == local.tags() != []
    for row in rows.values():
        assert milvus.image_by_key(row.store, row.key) == row
        assert milvus.vector(row.vector_id).tobytes() == local.vector(row.vector_id).tobytes()
        assert milvus.tags(vector_id=row.vector_id) == local.tags(vector_id=row.vector_id)
    assert milvus.image(91) is milvus.image_by_key("local", "/photos/none.jpg") is None
    assert milvus.vector_id_by_content(hashlib.sha256(b"7").digest()) == 8
    assert milvus.vector_id_by_content(hashlib.sha256(b"none").digest()) is None
    with pytest.raises(KeyError):
        milvus.vector(999)
    with pytest.raises(QueryError, match="no photo with id"):
        odd.milvus.similar(91)
    assert milvus.last_run() is not None
    assert (milvus.count_failures(), list(milvus.failed_photos())) == (0, [])
    assert milvus.size_bytes() > 60 * 16 * 4
    assert milvus.sample_vectors(10).tobytes() == local.sample_vectors(10).tobytes()


def test_a_filter_that_milvus_can_express_needs_no_second_look(odd: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked of SQLite")

    monkeypatch.setattr(searchengine.milvus.passing.Passing, "among", judged)
    filters = Filters(camera="AB", under="/photos/%", after="2001", min_side=1, max_size_bytes=9, tag=LABELS[:2])
    assert expression_of(filters).is_exact
    odd.milvus.search("red", filters=filters)
    odd.milvus.search_query("red AND NOT (camera:ab OR orientation:square) AND tag:100%")
    with pytest.raises(AssertionError, match="asked of SQLite"):
        odd.milvus.search("red", filters=Filters(near=(0.0, 0.0, 9000.0)))


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("%\n\x7f\udc80\udcff"), max_size=9),
    end=st.integers(0, 9),
)
def test_a_text_comes_out_as_it_went_in_and_a_beginning_stays_one(text: str, end: int) -> None:
    assert unescaped(escaped(text)) == text
    assert escaped(text).startswith(escaped(text[:end]))
    assert escaped(text).encode().decode() == escaped(text)
    assert all(character >= " " and character != "\x7f" for character in escaped(text))


@given(centre=st.tuples(LATITUDES, LONGITUDES), radius_km=RADII_KM)
def test_the_centre_of_a_circle_lies_in_its_box(centre: tuple[float, float], radius_km: float) -> None:
    box = box_around(*centre, radius_km)
    assert box.south < centre[0] < box.north
    assert box.meridians is None or any(west <= centre[1] <= east for west, east in box.meridians)


# -- many photos -------------------------------------------------------------------------------------------------------

MANY, DIM = 400, 32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Photos around a hundred centres. Five of them have twenty near copies each, and one has forty exact ones."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(5)
    rows = clustered(MANY, DIM, seed=0)[0]
    for first in range(0, 100, 20):
        rows[first : first + 20] = rows[first] + 0.001 * rng.standard_normal((20, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows_of_photos(folder / "index", [rows])
    with IndexWriter(folder / "index", encoder=FakeEncoder(dim=DIM)) as writer:
        for number in range(40):
            writer.add_photo(
                NewPhoto(
                    store="local",
                    listed=StoredPhoto(f"/copies/{number}.jpg", 1, 1),
                    content_hash=hashlib.sha256(b"350").digest(),
                    metadata=PhotoMetadata(width=4, height=3),
                )
            )
        writer.commit(report={}, finished=True)
    yield from both_of(folder / "index", place=folder, dim=DIM)


@pytest.mark.parametrize("query", LARGE_QUERIES)
def test_conditions_on_a_large_library_are_answered_as_if_every_photo_were_compared(
    large: Both, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searchengine.milvus.reader, "COMPARED_AT_ONCE", 50)
    monkeypatch.setattr(searchengine.milvus.reader, "CONDITION_DEPTHS", (60, 200))
    for k in (10, 150):
        assert large.milvus.search_query(query, k=k) == large.local.search_query(query, k=k)


def test_of_a_library_too_large_to_be_compared_no_list_of_vectors_is_fetched(
    large: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walked(self: MilvusVectors) -> Any:
        raise AssertionError("all ids are fetched")

    monkeypatch.setattr(searchengine.milvus.reader, "COMPARED_AT_ONCE", 50)
    monkeypatch.setattr(searchengine.milvus.reader, "COMPARED_AT_MOST", 300)
    monkeypatch.setattr(searchengine.milvus.reader, "CONDITION_DEPTHS", (60, 200))
    monkeypatch.setattr(MilvusVectors, "living_ids", property(walked))
    expected = large.local.search_query("id:17 OR id:300", k=20)
    assert large.milvus.search_query("id:17 OR id:300", k=20) == expected
    assert 150 < len(large.milvus.search_query("id:117 AND NOT id:300", k=1000)) <= 400
    large.milvus.search("red", k=20, filters=Filters(under="/photos"))


def test_copies_beyond_what_one_search_gives_hide_nothing(large: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searchengine.milvus.nearest, "MAX_HITS", 16)
    vector = large.local.index.vector(351)
    for k in (1, 30, 60):
        for filters in (
            None,
            Filters(under="/copies"),
            Filters(near=(0.0, 0.0, 1.0)),
            Filters(where=images.c.id > 9, under="/copies"),
        ):
            local, milvus = (
                searcher.search_vector(vector, k=k, filters=filters) for searcher in (large.local, large.milvus)
            )
            assert milvus == local


@pytest.mark.parametrize("through_id", [60, 90])
def test_duplicates_are_those_of_a_folder(large: Both, through_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the vectors to look among are few enough to be named, or not."""
    monkeypatch.setattr(searchengine.milvus.snapshot, "IDS_AT_A_TIME", 80)
    local, milvus = large.local.index, large.milvus.index
    filters = Filters(where=images.c.id <= through_id)
    groups = near_duplicates(milvus, filters=filters)
    assert groups == near_duplicates(local, filters=filters)
    assert len(groups) >= through_id // 20 - 1


def test_copies_to_the_byte_are_those_of_a_folder(large: Both, odd: Both) -> None:
    for both in (large, odd):
        groups = exact_duplicates(both.milvus.index)
        assert groups == exact_duplicates(both.local.index) != []
    assert near_duplicates(odd.milvus.index) == near_duplicates(odd.local.index)


def test_an_approximate_index_gives_exact_scores_and_pages_that_never_overlap(large: Both) -> None:
    index = large.milvus.index
    with closing(Connection(MilvusPlace.parse(large.address))) as connection:
        client, collection = connection.client, index.snapshot().state.collection

        def build_index(kind: str, **parameters: int) -> None:
            client.release_collection(collection)
            client.drop_index(collection, "embedding")
            indexes = client.prepare_index_params()
            indexes.add_index("embedding", index_type=kind, metric_type="IP", params=parameters)
            client.create_index(collection, indexes)
            client.load_collection(collection)

        build_index("HNSW", M=8, efConstruction=40)
        try:
            with open_index(large.address) as opened:
                assert not opened.snapshot().is_exact
                searcher = Searcher(opened, FakeEncoder(dim=DIM))
                found = 0
                for text in ("red", "blue"):
                    together = searcher.search(text, k=120)
                    pages = [hit for start in range(0, 120, 40) for hit in searcher.search(text, k=40, offset=start)]
                    assert pages == together
                    assert searcher.search(text, k=7) == together[:7]
                    exact = {hit.id: hit.score for hit in large.local.search(text, k=MANY + 40)}
                    assert all(hit.score == exact[hit.id] for hit in together)
                    found += len({hit.id for hit in together[:10]} & set(list(exact)[:10]))
                assert found >= 18
        finally:
            build_index("FLAT")


# -- commits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Both]:
    """Six photos."""
    (tmp_path / "photos").mkdir()
    for number in range(6):
        painted(number).save(tmp_path / f"photos/{number}.png")
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    yield from both_of(tmp_path / "index", place=tmp_path)


def commit(both: Both) -> None:
    """One photo less, one more, here and there."""
    photos = both.folder.with_name("photos")  # noqa: F811
    (photos / "0.png").unlink()
    painted(7).save(photos / "7.png")
    build(both.folder, [photos], encoder=FakeEncoder(), isolated=False)
    copy(both.folder, both.address)


def test_a_commit_is_seen_by_an_open_reader_with_all_that_was_remembered(changing: Both) -> None:
    filters = Filters(min_side=1)
    before = changing.milvus.index.snapshot().version
    assert changing.milvus.search("red", filters=filters) == changing.local.search("red", filters=filters)
    assert changing.milvus.index.vector_ids(filters).tolist() == [1, 2, 3, 4, 5, 6]
    assert changing.milvus.index.snapshot().version == before
    commit(changing)
    assert changing.milvus.index.snapshot().version != before
    assert changing.milvus.index.vector_ids(filters).tolist() == [2, 3, 4, 5, 6, 7]
    hits = changing.milvus.search("red", filters=filters)
    assert {Path(hit.path).stem for hit in hits} == set("123457")
    assert hits == changing.local.search("red", filters=filters)


@pytest.mark.parametrize("step", ["nearest_photos", "images"])
@pytest.mark.parametrize("query", ["red", "red AND NOT blue"])
def test_a_commit_during_a_search_makes_it_start_over(
    changing: Both, step: str, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "nearest_vectors" if "NOT" in query and step == "nearest_photos" else step
    monkeypatch.setattr(searchengine.milvus.reader, "COMPARED_AT_ONCE", 0)
    uninterrupted, calls = getattr(MilvusIndex, step), []

    def interrupted(self: MilvusIndex, *arguments: Any, **options: Any) -> Any:
        calls.append(step)
        if len(calls) == 1:
            commit(changing)
        return uninterrupted(self, *arguments, **options)

    monkeypatch.setattr(MilvusIndex, step, interrupted)
    hits = changing.milvus.search_query(query)
    assert len(calls) >= 2
    assert {Path(hit.path).stem for hit in hits} == set("123457")


def test_an_empty_index_answers_every_search(tmp_path: Path, encoder: FakeEncoder) -> None:
    (tmp_path / "photos").mkdir()
    build(tmp_path / "index", [tmp_path / "photos"], encoder=encoder)
    with open_index(in_milvus(tmp_path / "index", place=tmp_path)) as index:
        searcher = Searcher(index, encoder)
        assert searcher.search("x") == searcher.search("x", filters=Filters(camera="x")) == []
        assert searcher.search_query("x AND NOT y", k=10**6) == []
        assert searcher.search_many(["x", "y"]) == [[], []]
        assert near_duplicates(index) == []


def test_vectors_of_another_encoder_are_never_searched(changing: Both) -> None:
    """Whether they have just taken the place of the old ones, or these are gone already."""
    index = changing.milvus.index
    state = index.snapshot().state
    other = replace(state, collection="other", identity=replace(state.identity, fingerprint="f" * 64), commit=9)
    with closing(Connection(MilvusPlace.parse(changing.address))) as connection:
        row = {"name": STATE, "payload": other.payload(), "nothing": NOTHING}
        connection.client.upsert(state_collection(connection.name), [row])
        with pytest.raises(ModelMismatch, match="was replaced by one of encoder fake"):
            changing.milvus.search("red")
        connection.client.drop_collection(state.collection)
    with pytest.raises(ModelMismatch, match="was replaced"):
        index.nearest_photos(FakeEncoder().encode_texts(["red"]), count=3)
    with pytest.raises(ModelMismatch, match="was replaced"):
        index.image(1)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_address_is_read_and_shown_without_what_does_not_belong_there() -> None:
    place = MilvusPlace.parse("milvus://photos.example:1234/Family_1")
    assert (place.uri, place.name, place.is_file) == ("http://photos.example:1234", "Family_1", False)
    assert MilvusPlace.parse("milvus://photos.example/x").shown == "milvus://photos.example:19530/x"
    assert MilvusPlace.parse("milvus+tls://[::1]/x").uri == "https://[::1]:19530"
    file = MilvusPlace.parse("milvus:///folder/photos.db")
    assert (file.uri, file.is_file, file.shown) == ("/folder/photos.db", True, "milvus:///folder/photos.db")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("milvus://user:geheim@host/x", "MILVUS_TOKEN"),
        ("milvus://host", "NAME"),
        ("milvus://photos.db", "milvus:///folder/photos.db"),
        ("milvus://host/a/b", "NAME"),
        ("milvus://host/1st", "NAME"),
        ("milvus://host:port/x", "HOST:PORT"),
        ("milvus:///folder/photos", ".db"),
        ("milvus+tls:///photos.db", ".db"),
        ("milvus://host/x?token=geheim", "HOST:PORT"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused_without_its_secret(address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        open_index(address)
    assert "geheim" not in str(caught.value)


def test_where_nothing_was_published_there_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFound, match="no index at milvus:///"):
        open_index(f"milvus://{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UsageError, match=f"no folder {tmp_path}/none; make it"):
        Connection(MilvusPlace.parse(f"milvus://{tmp_path}/none/photos.db"), create=True)
    with closing(Connection(MilvusPlace.parse(f"milvus://{tmp_path}/empty.db"), create=True)):
        pass
    with pytest.raises(IndexNotFound, match="searchengine copy"):
        open_index(f"milvus://{tmp_path}/empty.db")


def test_a_server_that_does_not_answer_is_told_in_one_line_and_without_the_token(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "geheim")
    monkeypatch.setattr(searchengine.milvus.connection, "CONNECT_SECONDS", 0.2)
    with pytest.raises(IndexUnusable, match="127.0.0.1:9/x cannot be opened") as caught:
        open_index("milvus://127.0.0.1:9/x")
    assert "geheim" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_server_has_several_indexes_and_its_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(data_dir=str(tmp_path / "data"), host="127.0.0.1", port=0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        painted(number).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "photos" / "broken\udcff.jpg").write_bytes(b"\xff\xd8\xff no photo")
    build(tmp_path / "all", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    (tmp_path / "photos" / "0.png").unlink()
    build(tmp_path / "fewer", [tmp_path / "photos"], encoder=FakeEncoder(), isolated=False)
    for name in ("all", "fewer"):
        copy(tmp_path / name, f"milvus://127.0.0.1:{port}/{name}")
    with open_index(f"milvus://127.0.0.1:{port}/all") as index, open_index(tmp_path / "all") as local:
        searcher = Searcher(index, FakeEncoder())
        assert searcher.search("red") == Searcher(local, FakeEncoder()).search("red")
        assert (index.size_bytes(), index.count_failures()) == (None, 1)
        assert list(index.failed_photos()) == list(local.failed_photos())
        with open_index(f"milvus://127.0.0.1:{port}/fewer") as other:
            assert other.count_images() == 2
        with pytest.raises(IndexNotFound, match=f"no index at milvus://127.0.0.1:{port}/none"):
            open_index(f"milvus://127.0.0.1:{port}/none")
        server.stop(0).wait()
        database.close()
        capfd.readouterr()
        for module in (searchengine.milvus.connection, searchengine.milvus.nearest):
            monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)
        with pytest.raises(IndexUnusable, match="does not answer"):
            searcher.search("red")
        assert capfd.readouterr().err == ""


def test_a_state_that_is_damaged_or_of_a_newer_program_is_told(changing: Both) -> None:
    state = changing.milvus.index.snapshot().state
    fields = json.loads(state.payload())
    with closing(Connection(MilvusPlace.parse(changing.address))) as connection:
        for payload, error in (
            ("{", IndexFormatError),
            ("[]", IndexFormatError),
            (json.dumps({**fields, "commit": "x"}), IndexFormatError),
            (json.dumps({**fields, "format_version": 99}), IndexTooNew),
        ):
            row = {"name": STATE, "payload": payload, "nothing": NOTHING}
            connection.client.upsert(state_collection(connection.name), [row])
            with pytest.raises(error, match="photos.db"):
                open_index(changing.address)


def test_an_error_of_milvus_leaves_no_traceback(odd: Both, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Connection(MilvusPlace.parse(odd.address))) as connection:
        with pytest.raises(IndexUnusable, match="does not answer"):
            connection.query("photos_state", "no such field == 1", ("name",))
        with pytest.raises(IndexUnusable, match="does not exist"):
            connection.count("none_such", "")
    assert capfd.readouterr().err == ""


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UsageError, match=r"pip install 'searchengine\[milvus\]'"):
        open_index("milvus://127.0.0.1:9/x")


# -- the command line and the service ----------------------------------------------------------------------------------


@pytest.fixture
def run(cli: Cli, own_home: None, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setattr(searchengine.cli.options, "encoder_of", lambda *_: FakeEncoder())
    monkeypatch.setattr("searchengine.cli.queries.encoder_of", lambda *_: FakeEncoder(), raising=False)
    return cli


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "red", "--json", "-k", "5"),
        ("search", "red AND NOT camera:a", "--json", "--min-side", "2"),
        ("search", "blue", "--format", "paths", "--threshold", "none", "--under", "/photos/a"),
        ("search", "red", "--near", "0,0,1", "--json"),
        ("similar", "7", "--json"),
        ("tags", "--json"),
        ("duplicates", "--exact", "--json"),
    ],
)
def test_a_command_says_of_milvus_what_it_says_of_a_folder(run: Cli, odd: Both, arguments: tuple[str, ...]) -> None:
    local, milvus = (run(*arguments, "--index", str(place)) for place in (odd.folder, odd.address))
    assert (milvus.code, milvus.out) == (local.code, local.out)


def test_a_command_that_needs_a_folder_says_so(run: Cli, odd: Both) -> None:
    refused = run("warm", "--index", odd.address)
    assert refused.code == 2
    assert "in Milvus" in refused.err
    assert "Traceback" not in refused.err


def test_the_service_answers_from_milvus_and_sees_commits(
    changing: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searchengine.web.opened, "load_encoder", lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(searchengine.web.service, "CHECK_SECONDS", 0.02)
    with serving_index(changing.address, home=tmp_path) as server:  # type: ignore[arg-type]

        def found() -> list[str]:
            answer = server.ask("/api/search?q=red&k=3")
            assert answer.status == 200
            return [hit["path"] for hit in answer.json["hits"]]

        assert found() == [hit.path for hit in changing.local.search("red", k=3)]
        commit(changing)
        expected = [hit.path for hit in changing.local.search("red", k=3)]
        for _ in range(200):
            if found() == expected:
                break
        assert found() == expected
