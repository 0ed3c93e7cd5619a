"""`ann/` as `compact` builds it: what it finds, filters and pages, new photos, damage, and the command line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ann_data import brute_force, brute_scores, clustered, library, queries_like, random_rows, recall
from commandline import Cli
from conftest import QUICK
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import calls_of, kill_at
from test_reader import add
from torture_faults import Child

import indexer.ann
import indexer.tuning
import searchengine.index.ann
import searchengine.index.snapshot
from indexer.ann import choose, compared_one_by_one
from indexer.compact import compact
from indexer.report import Report
from indexer.verify import verify
from indexer.writer import IndexWriter, NewPhoto
from searchengine.errors import IndexFormatError, UsageError
from searchengine.index.reader import Index
from searchengine.index.segments import Ids
from searchengine.metadata import PhotoMetadata
from searchengine.stores import StoredPhoto
from searchengine.vectors import FloatMatrix, normalise

COUNT, DIM = 8000, 32
IDS = np.arange(1, COUNT + 1)
SMALL, TINY, SMALL_DIM = 1500, 300, 16
KINDS = ("scan", "ivf")


@pytest.fixture(autouse=True, scope="module")
def small_thresholds() -> Iterator[None]:
    """A few thousand vectors cross every boundary that a million do, and are built within a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searchengine.index.snapshot, "COMPARED_AT_MOST", 50)
        patch.setattr(indexer.ann, "NORMAL_SAMPLES", 3000)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # the others would only wait for each other
        yield
        faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def rows() -> FloatMatrix:
    return clustered(COUNT, DIM, seed=0)[0]


@pytest.fixture(scope="module")
def built(rows: FloatMatrix) -> Iterator[dict[str, Path]]:
    """An index of each kind over the same photos. Tests only read it."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        plain = library(Path(name) / "flat", np.array_split(rows, 3))
        folders = {}
        for kind in KINDS:
            folders[kind] = Path(shutil.copytree(plain, Path(name) / kind))
            done = compact(folders[kind], kind=kind).built
            assert done is not None
            assert (done.kind, done.count, done.through_id) == (kind, COUNT, COUNT)
        yield folders


@pytest.fixture(scope="module")
def small_rows() -> FloatMatrix:
    return clustered(SMALL, SMALL_DIM, seed=1, clusters=20)[0]


@pytest.fixture(scope="module")
def small_templates(small_rows: FloatMatrix) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folders = {"flat": library(Path(name) / "flat", np.array_split(small_rows, 3))}
        for kind in KINDS:
            folders[kind] = Path(shutil.copytree(folders["flat"], Path(name) / kind))
            compact(folders[kind], kind=kind)
        yield folders


@pytest.fixture(scope="module")
def tiny_template(small_rows: FloatMatrix) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = library(Path(name) / "ivf", [small_rows[:TINY]])
        compact(folder, kind="ivf")
        yield folder


@pytest.fixture
def tiny(tiny_template: Path) -> Iterator[Path]:
    """An index of the kind ivf of the test's own, over the first of `small_rows`."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        yield Path(shutil.copytree(tiny_template, Path(name) / "ivf"))


@pytest.fixture
def small(small_templates: dict[str, Path]) -> Iterator[Callable[[str], Path]]:
    """small("ivf"): an index of that kind of the test's own, over `small_rows`."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        numbers = itertools.count()
        yield lambda kind: Path(shutil.copytree(small_templates[kind], Path(name) / f"{kind}-{next(numbers)}"))


def ann_files(folder: Path) -> list[Path]:
    return sorted((folder / "ann").glob("*"))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What is not a table: name -> inode and time, which a file that is written anew does not keep."""
    found = [*folder.glob("segments/*"), *folder.glob("ann/*"), folder / "index.json"]
    return {str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in found}


def kind_of(folder: Path) -> str:
    with Index(folder) as index:
        ann = index.snapshot().ann
        return ann.parameters.kind if ann else "flat"


def write(folder: Path, new: FloatMatrix | None = None, *, first: int = 0, removed: list[int] | None = None) -> None:
    with IndexWriter(folder, encoder=FakeEncoder(dim=SMALL_DIM)) as writer:
        if new is not None:
            add(writer, new, first=first)
        writer.remove_photos(removed or [])
        writer.commit(report=Report().as_dict(), finished=True)


def sql(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "metadata.sqlite", isolation_level=None)) as connection:
        connection.execute(statement, values)


def assert_sound(scores: FloatMatrix, ids: Ids, rows: FloatMatrix, query: FloatMatrix) -> None:
    """Scores are those of the ids to the bit, and fall; equal ones are in the order of ids; none is there twice."""
    assert scores.tobytes() == brute_scores(rows[ids - 1], query).tobytes()
    assert np.lexsort((ids, -scores)).tolist() == list(range(len(ids)))
    assert len(set(ids.tolist())) == len(ids)


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "wanted"), [("scan", 0.998), ("ivf", 0.99)])
def test_near_far_and_random_queries_find_what_exact_search_finds(
    built: dict[str, Path], rows: FloatMatrix, kind: str, wanted: float
) -> None:
    shares = []
    with Index(built[kind]) as index:
        for number, distance in enumerate((0.0, 0.5, 1.5, 3.0, np.inf)):
            held_out = clustered(60, DIM, seed=50 + number)[0]
            queries = queries_like(held_out, distance=distance, seed=number)
            scores, ids = index.search(queries, k=10)
            assert scores.shape == ids.shape == (60, 10)
            for query, some_scores, some in zip(queries, scores, ids, strict=True):
                assert_sound(some_scores, some, rows, query)
            shares.append(recall(ids, [brute_force(rows, IDS, query, 10)[1] for query in queries]))
    assert np.mean(shares) >= wanted, shares
    assert min(shares) >= wanted - 0.01, shares


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 11, 100, 101, 999, 1000, 1001, 2000, COUNT, COUNT + 5])
def test_any_number_of_hits_can_be_asked_for(built: dict[str, Path], rows: FloatMatrix, kind: str, k: int) -> None:
    queries = queries_like(clustered(3, DIM, seed=9)[0], distance=1.5, seed=9)
    with Index(built[kind]) as index:
        scores, ids = index.search(queries, k=k)
    assert ids.shape == (3, min(k, COUNT))
    for query, some_scores, some in zip(queries, scores, ids, strict=True):
        assert_sound(some_scores, some, rows, query)
        assert recall([some], [brute_force(rows, IDS, query, k)[1]]) >= 0.97 or k == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes_per_thread", [10**9, 1], ids=["one thread", "two threads"])
def test_photos_of_a_burst_in_one_list_are_all_looked_at_however_many_threads_share_the_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codes_per_thread: int
) -> None:
    """The best codes of all lists count, not the best of each thread's half."""
    bursts = normalise(np.repeat(random_rows(8, DIM, seed=5), 150, axis=0) + 2e-3 * random_rows(1200, DIM, seed=6))
    rows = np.concatenate([clustered(4000, DIM, seed=2)[0], bursts])
    folder = library(tmp_path / "index", [rows])
    compact(folder, kind=kind)
    monkeypatch.setitem(searchengine.index.ann.CANDIDATES, kind, 60)
    monkeypatch.setattr(searchengine.index.ann, "CODES_PER_THREAD", codes_per_thread)
    queries = queries_like(bursts[::40], distance=0.3, seed=1)
    with Index(folder) as index:
        ids = index.search(queries, k=10)[1]
    true = [brute_force(rows, np.arange(1, len(rows) + 1), query, 10)[1] for query in queries]
    assert recall(ids, true) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_few_dimensions_that_faiss_leaves_out_are_no_loss(tmp_path: Path, kind: str) -> None:
    """Its fast scan passes over the codes whose score is the least that there can be."""
    rows = random_rows(60, 4, seed=0)
    folder = library(tmp_path / "index", [rows])
    compact(folder, kind=kind)
    with Index(folder) as index:
        for k in (10, 59, 60, 1000):
            scores, ids = index.search(rows, k=k)
            assert ids.shape == (60, min(k, 60))
            for query, some_scores, some in zip(rows, scores, ids, strict=True):
                assert_sound(some_scores, some, rows, query)


@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_nearly_equal_photos_hide_nothing(tmp_path: Path, kind: str) -> None:
    """As of a burst or a video: their codes are all alike, only exact scores tell them apart."""
    rng = np.random.default_rng(0)
    burst = normalise(random_rows(1, DIM, seed=5) + 1e-3 * rng.standard_normal((3000, DIM)))
    rows = np.concatenate([clustered(1500, DIM, seed=2)[0], burst, clustered(1500, DIM, seed=3)[0]])
    folder = library(tmp_path / "index", [rows])
    compact(folder, kind=kind)
    queries = np.concatenate([burst[:20], queries_like(burst[:20], distance=0.3, seed=1)])
    with Index(folder) as index:
        scores, ids = index.search(queries, k=10)
    for query, some_scores, some in zip(queries, scores, ids, strict=True):
        assert_sound(some_scores, some, rows, query)
    true = [brute_force(rows, np.arange(1, 6001), query, 10)[1] for query in queries]
    assert recall(ids, true) >= (1.0 if kind == "scan" else 0.99)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_told_in_the_order_of_their_ids(tmp_path: Path, kind: str) -> None:
    rows = np.repeat(clustered(40, SMALL_DIM, seed=4, clusters=20)[0], 50, axis=0)
    folder = library(tmp_path / "index", [rows])
    compact(folder, kind=kind)
    with Index(folder) as index:
        scores, ids = index.search(rows[::50], k=50)
    for number, (query, some_scores, some) in enumerate(zip(rows[::50], scores, ids, strict=True)):
        assert_sound(some_scores, some, rows, query)
        assert some.tolist() == list(range(50 * number + 1, 50 * number + 51))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 10, 96, 768])
def test_vectors_of_many_dimensions_have_codes(tmp_path: Path, kind: str, dim: int) -> None:
    rows = random_rows(200, dim, seed=0)
    folder = library(tmp_path / "index", [rows])
    compact(folder, kind=kind)
    queries = random_rows(20, dim, seed=1)
    with Index(folder) as index:
        assert index.snapshot().ann is not None
        scores, ids = index.search(queries, k=10)
    for query, some_scores, some in zip(queries, scores, ids, strict=True):
        assert_sound(some_scores, some, rows, query)
    assert recall(ids, [brute_force(rows, IDS[:200], query, 10)[1] for query in queries]) >= 0.97


def test_vectors_of_an_odd_dimension_have_none_which_is_said(tmp_path: Path) -> None:
    folder = library(tmp_path / "index", [random_rows(100, 7, seed=0)])
    for kind in KINDS:
        with pytest.raises(UsageError, match="vectors of dimension 7 have no codes; take the kind flat"):
            compact(folder, kind=kind)
    assert compact(folder, kind="flat").built is None
    assert verify(folder).ok


def test_a_large_library_of_an_odd_dimension_is_flat_unless_another_kind_is_named() -> None:
    assert choose("auto", count=1_000_000, dim=7, memory_bytes=None) == ("flat", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 17, 60, 130])
def test_the_smallest_libraries_can_have_one(tmp_path: Path, kind: str, count: int) -> None:
    rows = random_rows(count, SMALL_DIM, seed=0)
    folder = library(tmp_path / "index", [rows])
    done = compact(folder, kind=kind).built
    assert done is not None
    assert done.count == count
    assert verify(folder).ok
    with Index(folder) as index:
        scores, ids = index.search(rows, k=10)
        for number, (query, some_scores, some) in enumerate(zip(rows, scores, ids, strict=True), start=1):
            assert_sound(some_scores, some, rows, query)
            assert some[0] == number


# -- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    depths=st.lists(st.integers(1, 130) | st.integers(950, 1100) | st.integers(1, SMALL + 10), min_size=1, max_size=4),
    distance=st.sampled_from([0.0, 1.5, np.inf]),
    share=st.sampled_from([None, 0.5, 0.9]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_the_first_hits_do_not_depend_on_how_many_are_asked_for(
    small_templates: dict[str, Path],
    small_rows: FloatMatrix,
    kind: str,
    depths: list[int],
    distance: float,
    share: float | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    query = queries_like(small_rows[rng.integers(0, SMALL, 1)], distance=distance, seed=seed)[0]
    among = None if share is None else np.flatnonzero(rng.random(SMALL) < share) + 1
    living = SMALL if among is None else len(among)
    with Index(small_templates[kind]) as index:
        everything = index.rank(query, k=SMALL + 100, among=among)
        assert len(everything[1]) == living
        for depth in depths:
            scores, ids = index.rank(query, k=depth, among=among)
            np.testing.assert_array_equal(ids, everything[1][:depth])
            assert scores.tobytes() == everything[0][:depth].tobytes()
            assert scores.tobytes() == brute_scores(small_rows[ids - 1], query).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [None, 0.3])
def test_pages_lose_and_repeat_nothing(
    built: dict[str, Path], rows: FloatMatrix, kind: str, share: float | None
) -> None:
    rng = np.random.default_rng(2)
    among = None if share is None else np.flatnonzero(rng.random(COUNT) < share) + 1
    expected = IDS if among is None else among
    query = queries_like(rows[:1], distance=1.5, seed=2)[0]
    seen: list[int] = []
    with Index(built[kind]) as index:
        while True:
            size = int(rng.choice([1, 7, 30, 400, 1500]))
            page = index.rank(query, k=len(seen) + size, among=among)[1][len(seen) :]
            if not len(page):
                break
            seen += page.tolist()
    assert sorted(seen) == expected.tolist()


# -- filters ---------------------------------------------------------------------------------------------------------


def filters_over(rows: FloatMatrix, query: FloatMatrix) -> dict[str, Ids]:
    rng = np.random.default_rng(4)
    by_score = np.argsort(-(rows @ query))
    found = {f"{share:.1%} at random": np.flatnonzero(rng.random(COUNT) < share) for share in (0.001, 0.01, 0.1, 0.5)}
    found["only the nearest"] = np.sort(by_score[:300])
    found["only the furthest"] = np.sort(by_score[-300:])
    found["all but the nearest"] = np.sort(by_score[500:])
    found["a new album"] = np.arange(COUNT - 200, COUNT)
    found["one"] = by_score[COUNT // 2 :][:1]
    found["none"] = np.empty(0, np.int64)
    return {name: positions + 1 for name, positions in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [10, 150])
def test_a_filter_leaves_only_what_passes_it_and_never_too_few(
    built: dict[str, Path], rows: FloatMatrix, kind: str, k: int
) -> None:
    shares: dict[str, list[float]] = {}
    with Index(built[kind]) as index:
        for distance in (0.0, 1.5, 3.0, np.inf):
            queries = queries_like(clustered(6, DIM, seed=21)[0], distance=distance, seed=22)
            for name, among in filters_over(rows, queries[0]).items():
                scores, ids = index.search(queries, k=k, among=among)
                assert ids.shape == (6, min(k, len(among))), name
                assert np.isin(ids, among).all()
                for query, some_scores, some in zip(queries, scores, ids, strict=True):
                    assert_sound(some_scores, some, rows, query)
                    if len(among):
                        true = brute_force(rows[among - 1], among, query, k)[1]
                        shares.setdefault(name, []).append(recall([some], [true]))
    means = {name: round(float(np.mean(values)), 4) for name, values in shares.items()}
    assert min(means.values()) >= 0.95, means  # of 24 queries, which are few
    assert np.mean(list(means.values())) >= 0.99, means


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_that_is_used_again_finds_the_same(built: dict[str, Path], rows: FloatMatrix, kind: str) -> None:
    among = np.flatnonzero(np.random.default_rng(0).random(COUNT) < 0.2) + 1
    among.flags.writeable = False  # as the reader gives them, so that it is remembered
    with Index(built[kind]) as index:
        first = index.search(rows[:5], k=20, among=among)
        for _ in range(2):
            again = index.search(rows[:5], k=20, among=among)
            assert [part.tobytes() for part in again] == [part.tobytes() for part in first]
        assert [part.tobytes() for part in index.search(rows[:5], k=20, among=among.copy())] == [
            part.tobytes() for part in first
        ]


# -- photos that come and go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_photo_is_never_shown_and_is_when_it_is_back(
    small: Callable[[str], Path], small_rows: FloatMatrix, kind: str
) -> None:
    folder = small(kind)
    query = queries_like(small_rows[:1], distance=1.0, seed=0)
    ids = IDS[:SMALL]
    nearest = brute_force(small_rows, ids, query[0], 100)[1]
    with Index(folder) as index:
        write(folder, removed=nearest.tolist())
        left = np.setdiff1d(ids, nearest)
        for k in (10, 300, SMALL):
            scores, found = index.search(query, k=k)
            assert found.shape == (1, min(k, SMALL - 100))
            assert not np.isin(found, nearest).any()
            assert_sound(scores[0], found[0], small_rows, query[0])
            assert recall(found, [brute_force(small_rows[left - 1], left, query[0], k)[1]]) >= 0.9
        among = np.sort(np.concatenate([nearest, left[:200]]))
        assert sorted(index.search(query, k=1000, among=among)[1][0].tolist()) == left[:200].tolist()
        # The vector is still there, so that its photo is known as soon as it is back.
        with IndexWriter(folder, encoder=FakeEncoder(dim=SMALL_DIM)) as writer:
            back = int(nearest[0])
            add_photo_again(writer, back)
        assert index.search(query, k=10)[1][0, 0] == back
        assert len(index.snapshot()) == SMALL - 99
    compact(folder, kind=kind)
    with Index(folder) as index:
        assert len(index.snapshot()) == SMALL - 99
        assert index.search(query, k=10)[1][0, 0] == back
    assert verify(folder).ok


def add_photo_again(writer: IndexWriter, number: int) -> None:
    """The photo of this id, in `library`, under its name: its vector is in the index."""
    writer.add_photo(
        NewPhoto(
            store="local",
            listed=StoredPhoto(f"/photos/{number - 1}.jpg", 1, 1),
            content_hash=hashlib.sha256(b"%d" % (number - 1)).digest(),
            metadata=PhotoMetadata(width=4, height=3),
        )
    )
    writer.commit(report={}, finished=True)


@pytest.mark.parametrize("kind", KINDS)
def test_new_photos_are_found_at_once_and_become_part_of_it_the_next_time(
    small: Callable[[str], Path], small_rows: FloatMatrix, kind: str
) -> None:
    folder, query = small(kind), random_rows(1, SMALL_DIM, seed=99)
    with Index(folder) as index:
        assert len(index.snapshot().fresh) == 0
        new = np.concatenate([queries_like(query, distance=0.1, seed=0), random_rows(80, SMALL_DIM, seed=1)])
        rows = np.concatenate([small_rows, new])
        write(folder, new, first=SMALL)
        newest = np.arange(SMALL + 1, SMALL + 82)
        scores, ids = index.search(query, k=10)
        assert ids[0, 0] == SMALL + 1
        assert_sound(scores[0], ids[0], rows, query[0])
        assert len(index.snapshot().fresh) == 81
        assert sorted(index.search(query, k=500, among=newest)[1][0].tolist()) == newest.tolist()
        mixed = np.concatenate([np.arange(1, 200), newest])
        np.testing.assert_array_equal(
            index.search(query, k=20, among=mixed)[1][0], brute_force(rows[mixed - 1], mixed, query[0], 20)[1]
        )
        assert len(index.rank(query[0], k=10_000)[1]) == SMALL + 81

        write(folder, removed=[SMALL + 1])
        assert index.search(query, k=10)[1][0, 0] != SMALL + 1
        assert len(index.snapshot().fresh) == 80
        done = compact(folder, kind=kind).built
        assert done is not None
        assert (done.count, done.through_id) == (SMALL + 80, SMALL + 81)
        assert len(index.snapshot().fresh) == 0
        scores, ids = index.search(query, k=10)
        assert_sound(scores[0], ids[0], rows, query[0])
    assert verify(folder).ok
    assert len(ann_files(folder)) == 1


def test_killed_between_merging_and_building_the_old_codes_still_serve(
    small: Callable[[str], Path], small_rows: FloatMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name vectors that are in no segment any more."""
    for kind in KINDS:
        folder = small(kind)
        query = queries_like(small_rows[:1], distance=1.0, seed=0)
        ids = IDS[:SMALL]
        nearest = brute_force(small_rows, ids, query[0], 400)[1]
        write(folder, removed=nearest.tolist())
        with monkeypatch.context() as patch:
            patch.setattr("indexer.compact.update_ann", lambda *_, **__: None)
            assert compact(folder).dropped == 400
        left = np.setdiff1d(ids, nearest)
        with Index(folder) as index:
            for k in (10, 100, SMALL):
                scores, found = index.search(query, k=k)
                assert found.shape == (1, min(k, SMALL - 400))
                assert_sound(scores[0], found[0], small_rows, query[0])
                assert recall(found, [brute_force(small_rows[left - 1], left, query[0], k)[1]]) >= 0.9


# -- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_time_there_is_nothing_to_do(small: Callable[[str], Path], kind: str) -> None:
    folder = small(kind)
    before = files(folder)
    assert len(ann_files(folder)) == 1
    done = compact(folder, kind=kind)
    assert (done.merged, done.written, done.built) == (0, 0, None)
    assert files(folder) == before
    assert compact(folder, kind=kind, rebuild=True).built is not None
    assert len(ann_files(folder)) == 1
    assert files(folder) != before


def test_the_kind_can_be_changed_and_flat_has_no_file(small: Callable[[str], Path]) -> None:
    folder = small("scan")
    with Index(folder) as index:
        for kind in ("ivf", "flat", "scan", "auto"):
            compact(folder, kind=kind)
            ann = index.snapshot().ann
            assert (ann.parameters.kind if ann else "flat") == {"auto": "flat"}.get(kind, kind)
            assert len(ann_files(folder)) == (0 if kind in {"flat", "auto"} else 1)
            assert index.search(random_rows(2, SMALL_DIM, seed=0), k=3)[1].shape == (2, 3)
            assert verify(folder).ok


@pytest.mark.parametrize(
    ("kind", "count", "chosen"),
    [
        ("auto", 0, "flat"), ("auto", 19_999, "flat"), ("auto", 20_000, "scan"), ("auto", 199_999, "scan"),
        ("auto", 200_000, "ivf"), ("flat", 10**6, "flat"), ("scan", 10**6, "scan"), ("ivf", 5, "ivf"),
        ("ivf", 0, "flat"),
    ],
)  # fmt: skip
def test_the_kind_follows_from_the_number_of_photos(kind: str, count: int, chosen: str) -> None:
    assert choose(kind, count=count, dim=512, memory_bytes=None)[0] == chosen


def test_where_memory_is_short_codes_are_coarser_and_then_there_are_none(
    small: Callable[[str], Path], small_rows: FloatMatrix
) -> None:
    folder, fine, coarse = small("flat"), SMALL_DIM // 4, SMALL_DIM // 8
    for memory_bytes, code_bytes in ((SMALL * (fine + 16), fine), (SMALL * (fine + 16) - 1, coarse)):
        done = compact(folder, kind="ivf", memory_bytes=memory_bytes).built
        assert done is not None
        assert done.code_bytes == code_bytes
        with Index(folder) as index:
            assert index.snapshot().resident_bytes_per_vector * SMALL <= memory_bytes
            queries = queries_like(small_rows[:30], distance=1.5, seed=1)
            true = [brute_force(small_rows, IDS[:SMALL], query, 10)[1] for query in queries]
            assert recall(index.search(queries, k=10)[1], true) >= 0.97
    for kind in KINDS:
        with pytest.raises(UsageError, match=rf"an index of kind {kind} over 1,500 vectors takes .* allow more, or"):
            compact(folder, kind=kind, memory_bytes=SMALL * (coarse + 16) - 1)
    assert kind_of(folder) == "ivf", "what could not be had replaces nothing"
    assert choose("auto", count=10**6, dim=512, memory_bytes=2**20) == ("flat", 0)


def test_the_recall_that_was_asked_for_is_reached(small: Callable[[str], Path]) -> None:
    folder = small("flat")
    misses, lists = [], []
    for target in (0.5, 0.9, 0.999):
        done = compact(folder, kind="ivf", recall=target).built
        assert done is not None
        assert done.recall_target == target
        assert done.recall_at_10 >= target - 0.02
        misses.append(done.miss)
        lists.append(done.lists)
    assert misses == sorted(misses, reverse=True)
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(UsageError, match="recall"):
            compact(folder, kind="ivf", recall=wrong)
    with pytest.raises(UsageError, match="it must be one of auto, flat, scan, ivf"):
        compact(folder, kind="hnsw")


def test_a_reader_that_is_open_takes_the_new_parameters_of_the_same_codes(small: Callable[[str], Path]) -> None:
    """Built anew for another recall, the file may be the same to the bit; what is known of it is not."""
    folder = small("flat")
    with Index(folder) as index:
        for target in (0.5, 0.999):
            done = compact(folder, kind="ivf", recall=target).built
            ann = index.snapshot().ann
            assert ann is not None
            assert ann.parameters == done


@pytest.mark.parametrize("kind", KINDS)
def test_readers_of_several_threads_live_through_compactions(
    small: Callable[[str], Path], small_rows: FloatMatrix, kind: str
) -> None:
    folder = small("flat")
    queries = queries_like(small_rows[:40], distance=0.3, seed=3)
    true = [brute_force(small_rows, IDS[:SMALL], query, 10)[1] for query in queries]
    stop, wrong, kinds, turns = threading.Event(), [], set(), []

    def search(index: Index) -> None:
        while not stop.is_set():
            try:
                scores, ids = index.search(queries, k=10)
                for query, some_scores, some in zip(queries, scores, ids, strict=True):
                    assert_sound(some_scores, some, small_rows, query)
                assert recall(ids, true) >= 0.97
                ann = index.snapshot().ann
                kinds.add(ann.parameters.kind if ann else "flat")
                turns.append(1)
            except BaseException as error:
                wrong.append(error)
                return

    with Index(folder) as index:
        readers = [threading.Thread(target=search, args=(index,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(2):
                compact(folder, kind=kind, rebuild=True, recall=0.99)
                before = len(turns)
                while len(turns) < before + 4 and not wrong:
                    stop.wait(0.002)
                if number < 1:
                    compact(folder, kind="flat")
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    if wrong:
        raise wrong[0]
    assert kinds == {"flat", kind}


def test_codes_of_vectors_far_from_their_centroid_are_no_less_right_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    centres, of = random_rows(8, 64, seed=1), rng.integers(0, 8, 3000)
    rows = normalise(centres[of] + rng.uniform(0.3, 1.2, (3000, 1)) * random_rows(3000, 64, seed=2))
    errors = []
    for lengths in ((), indexer.ann.LENGTHS["ivf"]):
        monkeypatch.setitem(indexer.ann.LENGTHS, "ivf", lengths)
        folder = library(tmp_path / str(len(lengths)), [rows])
        compact(folder, kind="ivf")
        with Index(folder) as index:
            ann = index.snapshot().ann
            assert ann is not None and len(ann.parameters.scales) == len(lengths) + 1
            own = [ann.scores_by_code(row, count=len(rows)) for row in rows[:300]]
        # Each vector's score with itself, which is 1.
        errors.append([float(1 - scores[ids == number][0]) for number, (scores, ids) in enumerate(own, start=1)])
    assert np.std(errors[1]) < 0.75 * np.std(errors[0])
    assert np.max(np.abs(errors[1])) < 0.75 * np.max(np.abs(errors[0]))


def test_one_that_an_older_program_built_has_one_scale_and_finds_the_same(
    tiny: Path, small_rows: FloatMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(indexer.ann.LENGTHS, "ivf", ())
    monkeypatch.setitem(indexer.ann.LENGTHS, "scan", ())
    compact(tiny, kind="ivf", rebuild=True)
    sql(tiny, "UPDATE ann SET parameters = json_remove(parameters, '$.scales')")
    assert verify(tiny).ok
    with Index(tiny) as index:
        ann = index.snapshot().ann
        assert ann is not None and ann.parameters.scales == (1.0,)
        for query in small_rows[:20]:
            scores, ids = index.rank(query, k=10)
            assert_sound(scores, ids, small_rows, query)
            assert recall([ids], [brute_force(small_rows[:TINY], IDS[:TINY], query, 10)[1]]) >= 0.9


def build_anew(folder: Path) -> None:
    compact(folder, kind="ivf", rebuild=True)


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked from this process")
def test_killed_at_any_call_while_it_builds_the_index_is_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        quick = Path(name)
        monkeypatch.setattr(indexer.ann, "NORMAL_SAMPLES", 700)
        monkeypatch.setattr(indexer.tuning, "TUNING_QUERIES", 4)
        monkeypatch.setattr(indexer.tuning, "MEASURING_QUERIES", 2)
        rows = random_rows(60, SMALL_DIM, seed=0)
        original = library(quick / "original", [rows])
        compact(original, kind="scan")
        assert kind_of(original) == "scan"
        with Index(original) as index:
            before = [part.tobytes() for part in index.search(rows, k=60)]
        shutil.copytree(original, quick / "index")
        total = calls_of(build_anew, quick / "index")
        killed = 0
        for number in range(1, total + 1, max(1, total // 24)):
            shutil.rmtree(quick / "index")
            shutil.copytree(original, quick / "index")
            assert kill_at(number, build_anew, quick / "index") == -signal.SIGKILL, (quick / "log").read_text()
            killed += 1
            assert [p for p in verify(quick / "index").problems if p.kind != "orphan"] == []
            with Index(quick / "index") as index:
                assert [part.tobytes() for part in index.search(rows, k=60)] == before
            assert kind_of(quick / "index") in {"scan", "ivf"}
            write_nothing(quick / "index")  # the next process that writes tidies
            assert verify(quick / "index").problems == []
            assert len(ann_files(quick / "index")) == 1
        assert killed > 20


def write_nothing(folder: Path) -> None:
    with IndexWriter(folder, encoder=FakeEncoder(dim=SMALL_DIM)):
        pass


# -- damage ----------------------------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path, Path], None]:
    return lambda _, file: os.truncate(file, int(share * file.stat().st_size))


def put_in_its_place(make: Callable[[], tuple[Any, ...]]) -> Callable[[Path, Path], None]:
    def damage(_: Path, file: Path) -> None:
        index, *_kept = make()
        faiss.write_index(index, str(file))

    return damage


def set_parameter(name: str, value: object) -> Callable[[Path, Path], None]:
    def damage(folder: Path, _: Path) -> None:
        sql(folder, "UPDATE ann SET parameters = json_set(parameters, ?, json(?))", f"$.{name}", json.dumps(value))

    return damage


def set_scales(text: str) -> Callable[[Path, Path], None]:
    """As text, for SQLite has no NaN."""

    def damage(folder: Path, _: Path) -> None:
        with closing(sqlite3.connect(folder / "metadata.sqlite")) as connection:
            fields = json.loads(connection.execute("SELECT parameters FROM ann").fetchone()[0])
        recorded = json.dumps(fields | {"scales": "HERE"}).replace('"HERE"', text)
        sql(folder, "UPDATE ann SET parameters = ?", recorded)

    return damage


def set_column(name: str, value: object) -> Callable[[Path, Path], None]:
    return lambda folder, _: sql(folder, f"UPDATE ann SET {name} = ?", value)


def another_chain() -> tuple[Any, ...]:
    """A rotation before an index that is no list of codes."""
    transform = faiss.LinearTransform(SMALL_DIM, SMALL_DIM, False)
    faiss.copy_array_to_vector(np.eye(SMALL_DIM, dtype=np.float32).ravel(), transform.A)
    transform.is_trained = True
    flat = faiss.IndexFlatIP(SMALL_DIM)
    flat.add(random_rows(SMALL, SMALL_DIM, seed=0))
    chain = faiss.IndexPreTransform(transform, flat)
    return chain, transform, flat  # it keeps neither alive


def of_other_vectors(_: Path, file: Path, *, count: int = TINY - 50) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        other = library(Path(name) / "other", [random_rows(count, SMALL_DIM, seed=8)])
        compact(other, kind="ivf")
        shutil.copyfile(ann_files(other)[0], file)


def twice(folder: Path, _: Path) -> None:
    sql(
        folder,
        "INSERT INTO ann (file, sha256, built_at, parameters, covariance, spread) "
        "SELECT '00000077.faiss', sha256, built_at, parameters, covariance, spread FROM ann",
    )


def put_a_folder_in_its_place(_: Path, file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_a_text_in_its_place(_: Path, file: Path) -> None:
    file.write_text("no index")


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "missing": lambda _, file: file.unlink(),
    "empty": cut(0),
    "cut within the header": cut(0.002),
    "cut at a half": cut(0.5),
    "cut at the end": lambda _, file: os.truncate(file, file.stat().st_size - 1),
    "a folder": put_a_folder_in_its_place,
    "a text": put_a_text_in_its_place,
    "a flat index": put_in_its_place(lambda: (faiss.IndexFlatIP(SMALL_DIM),)),
    "another chain": put_in_its_place(another_chain),
    "that of other vectors": of_other_vectors,
    "parameters that are no JSON": set_column("parameters", "{nonsense"),
    "parameters that are a list": set_column("parameters", "[1, 2]"),
    "parameters that are null": set_column("parameters", "null"),
    "parameters that lack one": set_column("parameters", '{"kind": "ivf"}'),
    "an unknown kind": set_parameter("kind", "hnsw"),
    "a kind that is a number": set_parameter("kind", 7),
    "a margin that is a text": set_parameter("margin", "wide"),
    "a margin that is null": set_parameter("margin", None),
    "a miss that is a list": set_parameter("miss", [1]),
    "a through_id that is a text": set_parameter("through_id", "all"),
    "a through_id below zero": set_parameter("through_id", -5),
    "a through_id that is a fraction": set_parameter("through_id", 12.5),
    "a margin beyond any number": set_parameter("margin", 10**400),
    "no scales": set_scales("[]"),
    "scales that are null": set_scales("null"),
    "scales that are a text": set_scales('"1234"'),
    "a scale below zero": set_scales("[1, 2, -3, 4]"),
    "a scale of zero": set_scales("[1, 2, 0, 4]"),
    "a scale that is no number": set_scales("[1, 2, NaN, 4]"),
    "a scale beyond any number": set_scales("[1, 2, 3, 1" + "0" * 400 + "]"),
    "a scale beyond float32": set_scales("[1, 2, 3, 1e300]"),
    "a scale too few": set_scales("[1, 2, 3]"),
    "another count": set_parameter("count", 3),
    "other lists": set_parameter("lists", 3),
    "lists below zero": set_parameter("lists", -1),
    "a covariance of another size": set_column("covariance", b"1234"),
    "a covariance that is a text": set_column("covariance", "round"),
    "a spread of another size": set_column("spread", b""),
    "the name of another file": set_column("file", "00000099.faiss"),
    "a name out of the folder": set_column("file", "../segments/00000001.faiss"),
    "a name that is a number": set_column("file", b"\xff\xfe"),
    "two rows": twice,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_by_a_search_and_by_verify_and_repaired(tiny: Path, small_rows: FloatMatrix, name: str) -> None:
    DAMAGES[name](tiny, ann_files(tiny)[0])
    remedy = "run `searchengine (compact --rebuild|verify --repair)"
    with pytest.raises(IndexFormatError, match=remedy), Index(tiny) as index:
        index.search(small_rows[:2], k=10)
    assert_repairable(tiny, small_rows)


@pytest.mark.parametrize("through_id", [TINY // 2, TINY + 7])
def test_verify_sees_where_new_vectors_are_said_to_begin_elsewhere_than_they_do(
    tiny: Path, small_rows: FloatMatrix, through_id: int
) -> None:
    """Else vectors would be found twice, or later ones never."""
    set_parameter("through_id", through_id)(tiny, tiny)
    assert_repairable(tiny, small_rows)


@pytest.mark.parametrize("parameters", ['{"count": "x"}', '{"count": null}', '{"count": 1e999}', "[1]", "{"])
def test_where_it_is_damaged_a_run_takes_all_vectors_for_compared_one_by_one(tiny: Path, parameters: str) -> None:
    assert compared_one_by_one(tiny) == 0
    sql(tiny, "UPDATE ann SET parameters = ?", parameters)
    assert compared_one_by_one(tiny) == TINY


def test_verify_sees_a_file_of_as_many_other_vectors_which_no_score_is_taken_from(
    tiny: Path, small_rows: FloatMatrix
) -> None:
    of_other_vectors(tiny, ann_files(tiny)[0], count=TINY)
    with Index(tiny) as index:
        scores, ids = index.search(small_rows[:5], k=TINY)
    for query, some_scores, some in zip(small_rows, scores, ids, strict=False):
        assert_sound(some_scores, some, small_rows, query)
    assert_repairable(tiny, small_rows)


def assert_repairable(folder: Path, rows: FloatMatrix) -> None:
    found = verify(folder)
    assert [problem.kind for problem in found.problems if problem.kind != "orphan"][:1] == ["ann"]
    assert all("--re" in problem.remedy for problem in found.problems)
    repaired = verify(folder, repair=True)
    assert repaired.ok
    assert repaired.repaired
    with Index(folder) as index:
        assert index.snapshot().ann is None
        _, ids = index.search(rows[:2], k=10)
        for query, some in zip(rows, ids, strict=False):
            np.testing.assert_array_equal(some, brute_force(rows[:TINY], IDS[:TINY], query, 10)[1])
    assert [file for file in ann_files(folder) if file.is_file()] == []
    assert verify(folder).ok


@pytest.mark.parametrize(
    "name", ["missing", "cut at a half", "an unknown kind", "parameters that are no JSON", "two rows"]
)
def test_the_remedy_that_a_search_tells_mends_it(tiny: Path, name: str) -> None:
    DAMAGES[name](tiny, ann_files(tiny)[0])
    compact(tiny, kind="ivf", rebuild=True)
    assert verify(tiny).ok
    assert kind_of(tiny) == "ivf"


@given(share=st.floats(0, 1, exclude_max=True), flipped=st.integers(1, 255))
@settings(max_examples=15)
def test_verify_sees_any_flipped_byte(small_templates: dict[str, Path], share: float, flipped: int) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(shutil.copytree(small_templates["scan"], Path(name) / "index"))
        (file,) = ann_files(folder)
        content = bytearray(file.read_bytes())
        content[int(share * len(content))] ^= flipped
        file.write_bytes(content)
        assert [problem.kind for problem in verify(folder).problems] == ["ann"]


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked from this process")
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_in_a_header_never_crashes_a_search(
    small: Callable[[str], Path], small_rows: FloatMatrix, tmp_path: Path, kind: str
) -> None:
    """Each of what FAISS reads before and after the codes: it is told, or all that is found is sound."""
    folder = small(kind)
    (file,) = ann_files(folder)
    content = file.read_bytes()
    header = content.index(b"IwPf")
    places = [*range(0, 120), *range(header, header + 160), *range(len(content) - 60, len(content))]

    def search_all() -> None:
        taken = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**30,) * 2)
        for number, place in enumerate(places):
            for flip in (0x01, 0x80)[number % 2 :][:1]:
                damaged = bytearray(content)
                damaged[place] ^= flip
                file.write_bytes(damaged)
                (tmp_path / "place").write_text(f"{place} ({place - header} after the name) by {flip:#x}")
                try:
                    with Index(folder) as index:
                        scores, ids = index.search(small_rows[:3], k=10)
                except IndexFormatError:
                    continue
                for query, some_scores, found in zip(small_rows, scores, ids, strict=False):
                    assert_sound(some_scores, found, small_rows, query)

    code, _ = Child(search_all, log=tmp_path / "log").wait(seconds=30)
    said = (tmp_path / "log").read_text()[-1500:]
    assert code == 0, f"ended with {code} at byte {(tmp_path / 'place').read_text()}: {said}"


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_tells_what_it_built_and_status_shows_it(
    small: Callable[[str], Path], own_home: None, cli: Cli, kind: str
) -> None:
    folder = small("flat")
    status = cli("status", "--index", folder, "--json").lines[0]
    assert (status["index_kind"], status["recall_at_10"], status["vectors_not_in_ann"]) == ("flat", 1.0, 0)
    done = cli("compact", "--kind", kind, "--index", folder, "--json").lines[0]
    status = cli("status", "--index", folder, "--json").lines[0]
    assert done == status
    assert (status["index_kind"], status["vectors"], status["vectors_not_in_ann"]) == (kind, SMALL, 0)
    assert 0.97 <= status["recall_at_10"] <= 1
    assert f"{kind}: recall@10 {status['recall_at_10']:.3f}" in cli("status", "--index", folder).out
    write(folder, random_rows(3, SMALL_DIM, seed=5), first=SMALL)
    assert cli("status", "--index", folder, "--json").lines[0]["vectors_not_in_ann"] == 3
    assert "3 newer vectors" in cli("status", "--index", folder).out
    told = cli("compact", "--kind", kind, "--index", folder).out
    assert f"built {kind} over 1,503 vectors, with recall@10 " in told
    assert cli("compact", "--kind", kind, "--index", folder).out == "nothing to do\n"
    assert cli("verify", "--index", folder).code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kind", "hnsw"], "hnsw"),
        (["--memory", "much"], "much"),
        (["--memory", "9" * 400], "9"),
        (["--recall", "0"], "0"),
        (["--recall", "1.5"], "1.5"),
        (["--kind", "ivf", "--memory", "10K"], "takes"),
    ],
)
def test_what_cannot_be_is_refused_in_plain_words(
    small: Callable[[str], Path], own_home: None, cli: Cli, arguments: list[str], told: str
) -> None:
    folder = small("flat")
    outcome = cli("compact", *arguments, "--index", folder)
    assert outcome.code == 2
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert kind_of(folder) == "flat"


def test_photos_are_found_by_text_and_by_likeness_in_an_index_of_any_kind(
    photos: Path, tmp_path: Path, own_home: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searchengine.index.snapshot, "COMPARED_AT_MOST", 0)
    index = tmp_path / "index"
    assert cli("index", photos, "--index", index, "--model", "mini").code == 0
    asked = [
        ("search", "a red square", "-k", "20", "--index", index, "--json"),
        ("similar", photos / "red.png", "-k", "20", "--index", index, "--json"),
        ("search", "a cat", "--under", photos / "2023", "-k", "3", "--index", index, "--json"),
    ]
    expected = [cli(*arguments).out for arguments in asked]
    assert all(expected)
    for kind in KINDS:
        assert cli("compact", "--kind", kind, "--index", index, "--json").lines[0]["index_kind"] == kind
        assert [cli(*arguments).out for arguments in asked] == expected
