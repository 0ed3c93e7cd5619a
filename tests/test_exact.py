"""Exact search: to the bit what float64 gives, whichever way a vector is found; and the files that vectors are in."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ann_data import brute_force, brute_scores, random_rows, segments_of
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

import searchengine.index.exact
import searchengine.index.table
from indexer.segments import write_segment
from searchengine.errors import IndexFormatError
from searchengine.index import exact
from searchengine.index.allowed import Allowed
from searchengine.index.segments import HEADER, ROWS_START, Ids, load_segment
from searchengine.index.table import VectorTable
from searchengine.vectors import FloatMatrix


@pytest.fixture
def quick() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        yield Path(folder)


def some_ids(rng: np.random.Generator, count: int, *, order: str) -> Ids:
    """Rising without a gap, rising with gaps, or as several compactions leave them."""
    if order == "gapless":
        return np.arange(count, dtype=np.int64) + int(rng.integers(0, 1000))
    ids = np.sort(rng.choice(5 * count, count, replace=False)).astype(np.int64)
    return ids if order == "gaps" else rng.permutation(ids)


# -- exact search ----------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    dim=st.sampled_from([1, 2, 3, 7, 16, 33, 64]),
    order=st.sampled_from(["gapless", "gaps", "shuffled"]),
    distinct=st.sampled_from([1, 2, 5, 1000]),
    dead_share=st.sampled_from([0, 0.1, 0.9, 1]),
    subset_share=st.sampled_from([None, 0, 0.05, 0.3, 0.5, 1]),
    k=st.integers(1, 400),
    queries=st.integers(0, 5),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150)
def test_a_search_gives_the_ids_and_the_bits_that_brute_force_in_float64_gives(
    sizes: list[int],
    dim: int,
    order: str,
    distinct: int,
    dead_share: float,
    subset_share: float | None,
    k: int,
    queries: int,
    seed: int,
) -> None:
    rng, count = np.random.default_rng(seed), sum(sizes)
    rows = random_rows(distinct, dim, seed=seed)[rng.integers(0, distinct, count)]
    ids = some_ids(rng, count, order=order)
    dead = ids[rng.random(count) < dead_share]
    with tempfile.TemporaryDirectory(dir=QUICK) as folder, pytest.MonkeyPatch.context() as patch:
        # A few rows cross each boundary that many do.
        patch.setattr(searchengine.index.exact, "ROWS_PER_BLOCK", 16)
        patch.setattr(searchengine.index.exact, "QUERIES_PER_BLOCK", 2)
        patch.setattr(searchengine.index.exact, "SCORES_PER_CHUNK", 4)
        patch.setattr(searchengine.index.table, "ROWS_PER_EXACT_SCORE", 8)
        table = VectorTable(segments_of(Path(folder), rows, ids, sizes), dim=dim)
        table.bury(np.setdiff1d(ids, dead))
        kept = ~np.isin(ids, dead)
        allowed = None
        if subset_share is not None:
            chosen = np.sort(np.append(ids[rng.random(count) < subset_share], [-5, 10**9]))  # two that are not there
            allowed = Allowed(table, chosen)
            kept &= np.isin(ids, chosen)
            assert len(allowed) == kept.sum()
        asked = random_rows(queries, dim, seed=seed + 1) if queries else np.empty((0, dim), np.float32)
        found = exact.search(table, asked, k=k, allowed=allowed)
        assert len(found) == queries
        for query, (scores, found_ids) in zip(asked, found, strict=True):
            expected_scores, expected_ids = brute_force(rows[kept], ids[kept], query, k)
            np.testing.assert_array_equal(found_ids, expected_ids)
            assert scores.dtype == np.float32
            assert scores.tobytes() == expected_scores.tobytes()


@pytest.mark.parametrize("k", [1, 10, 1000, 10_000, 100_000])
@pytest.mark.parametrize("share", [None, 0.01, 0.3, 0.7])
def test_many_vectors_and_a_great_k_are_ranked_as_brute_force_ranks_them(
    big: tuple[VectorTable, FloatMatrix, Ids], k: int, share: float | None
) -> None:
    table, rows, ids = big
    kept = ~table.is_dead(np.arange(len(ids)))
    allowed = None
    if share is not None:
        chosen = np.random.default_rng(1).random(len(ids)) < share
        kept &= chosen
        allowed = Allowed(table, np.sort(ids[chosen]))
    queries = random_rows(3, rows.shape[1], seed=5)
    for some in (queries[:1], queries):
        for query, (scores, found) in zip(some, exact.search(table, some, k=k, allowed=allowed), strict=True):
            expected_scores, expected = brute_force(rows[kept], ids[kept], query, k)
            np.testing.assert_array_equal(found, expected)
            assert scores.tobytes() == expected_scores.tobytes()


@pytest.fixture(scope="module")
def big() -> Iterator[tuple[VectorTable, FloatMatrix, Ids]]:
    """20,000 vectors in three segments, not in the order of their ids; a third are copies, some hundred are dead."""
    rng = np.random.default_rng(0)
    rows = random_rows(20_000, 24, seed=0)
    rows[rng.integers(0, 20_000, 6000)] = rows[rng.integers(0, 50, 6000)]
    ids = np.concatenate([np.arange(15_001, 24_001), np.arange(1, 6001), np.arange(7001, 12_001)])
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        segments = segments_of(Path(folder), rows, ids, [9000, 6000, 5000])
        table = VectorTable(segments, dim=24)
        table.bury(rng.choice(ids, 19_700, replace=False))
        yield table, rows, ids


def test_a_vector_has_the_same_score_to_the_bit_whichever_way_it_was_found(
    big: tuple[VectorTable, FloatMatrix, Ids],
) -> None:
    table, rows, ids = big
    queries = random_rows(4, 24, seed=8)
    expected = [dict(zip(ids.tolist(), brute_scores(rows, query), strict=True)) for query in queries]
    sparse = Allowed(table, np.sort(ids[::40]))
    dense = Allowed(table, np.sort(ids[1::2]))
    ways = [exact.search(table, queries, k=k) for k in (3, 500)]
    ways.append([exact.search(table, query[None], k=50)[0] for query in queries])
    ways += [exact.search(table, queries, k=30, allowed=some) for some in (sparse, dense)]
    for _ in range(3):  # the second time a subset has its matrix
        ways.append([exact.search(table, query[None], k=30, allowed=sparse)[0] for query in queries])
    alone = Allowed(table, np.array([5]))
    ways.append([exact.search(table, query[None], k=1, allowed=alone)[0] for query in queries])
    for way in ways:
        for of_query, (scores, found) in zip(expected, way, strict=True):
            assert len(found) > 0
            assert all(
                of_query[i].tobytes() == score.tobytes() for i, score in zip(found.tolist(), scores, strict=True)
            )


def test_a_subset_too_large_to_be_kept_is_searched_alike(
    big: tuple[VectorTable, FloatMatrix, Ids], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _, ids = big
    queries = random_rows(2, 24, seed=9)
    kept = Allowed(table, np.sort(ids[::5]))
    before = exact.search(table, queries, k=20, allowed=kept)
    monkeypatch.setattr("searchengine.index.allowed.MATRIX_BYTES", 100)
    large = Allowed(table, np.sort(ids[::5]))
    assert not large.keeps_matrix
    for _ in range(2):
        alone = [exact.search(table, query[None], k=20, allowed=large)[0] for query in queries]
        for found in (exact.search(table, queries, k=20, allowed=large), alone):
            for (scores, some), (expected_scores, expected) in zip(found, before, strict=True):
                np.testing.assert_array_equal(some, expected)
                assert scores.tobytes() == expected_scores.tobytes()


def test_where_all_vectors_are_equal_the_lowest_ids_come_first(quick: Path) -> None:
    ids = np.random.default_rng(0).permutation(np.arange(1, 3001))
    rows = np.repeat(random_rows(1, 16, seed=0), 3000, axis=0)
    table = VectorTable(segments_of(quick, rows, ids, [1000, 2000]), dim=16)
    table.bury(np.setdiff1d(ids, [1, 4]))
    for queries in (random_rows(1, 16, seed=1), random_rows(3, 16, seed=1)):
        for scores, found in exact.search(table, queries, k=5):
            assert found.tolist() == [2, 3, 5, 6, 7]
            assert len(set(scores.tolist())) == 1


def test_vectors_that_float32_cannot_tell_apart_are_told_apart(quick: Path) -> None:
    """The last bits of the components differ, which a sum in float32 loses now and then."""
    base = random_rows(1, 256, seed=0)
    noise = np.random.default_rng(1).integers(-2, 3, (5000, 256)) * np.float32(2**-26)
    rows = (base + noise).astype(np.float32)
    ids = np.arange(1, 5001)
    table = VectorTable(segments_of(quick, rows, ids, [2500, 2500]), dim=256)
    query = random_rows(1, 256, seed=2)
    for queries in (query, np.repeat(query, 2, axis=0)):
        expected_scores, expected = brute_force(rows, ids, query[0], 10)
        for scores, found in exact.search(table, queries, k=10):
            np.testing.assert_array_equal(found, expected)
            assert scores.tobytes() == expected_scores.tobytes()


@given(
    sizes=st.lists(st.integers(1, 20), max_size=4),
    order=st.sampled_from(["gapless", "gaps", "shuffled"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_rows_and_ids_belong_together(sizes: list[int], order: str, seed: int) -> None:
    rng, count = np.random.default_rng(seed), sum(sizes)
    ids = some_ids(rng, count, order=order)
    rows = random_rows(count, 5, seed=seed) if count else np.empty((0, 5), np.float32)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        table = VectorTable(segments_of(Path(folder), rows, ids, sizes), dim=5)
        asked = np.append(rng.permutation(ids), [-1, 10**12]).astype(np.int64)
        found = table.rows_of(asked)
        np.testing.assert_array_equal(table.ids[found], asked[:-2])
        np.testing.assert_array_equal(table.gather(found), rows[found])
        some = rng.integers(0, count, 30) if count else np.empty(0, np.int64)  # in any order, some twice
        np.testing.assert_array_equal(table.gather(some), rows[some])
        query = random_rows(1, 5, seed=seed + 1)[0]
        assert table.exact_scores(query, some).tobytes() == brute_scores(rows[some], query).tobytes()
        np.testing.assert_allclose(table.scores(query, some), rows[some] @ query, atol=1e-6)


# -- the files -------------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 50), dim=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_a_segment_is_what_faiss_itself_reads(count: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    ids = rng.choice(2**62, count, replace=False) if count else np.empty(0, np.int64)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        path = Path(folder) / "00000001.faiss"
        half = count // 2
        pieces = [(ids[:half], rows[:half]), (ids[half:], rows[half:])]
        assert write_segment(path, pieces, dim=dim)[0] == count
        same: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
        same.add_with_ids(rows, ids)
        assert path.read_bytes() == faiss.serialize_index(same).tobytes()
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        theirs: Any = faiss.read_index(str(path))
        flat: Any = faiss.downcast_index(theirs.index)
        for segment in (load_segment(path, count=count, dim=dim), load_segment(path, count=None, dim=None)):
            assert (segment.file, segment.matrix.shape) == ("00000001.faiss", (count, dim))
            assert segment.matrix.tobytes() == flat.reconstruct_n(0, count).tobytes() == rows.tobytes()
            np.testing.assert_array_equal(segment.ids, faiss.vector_to_array(theirs.id_map))
            np.testing.assert_array_equal(segment.ids, ids)
            with pytest.raises(ValueError, match="read-only"):
                segment.matrix[:] = 0


@pytest.mark.parametrize("error", [OSError, IndexFormatError, KeyboardInterrupt])
def test_of_a_segment_that_could_not_be_finished_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    def pieces() -> Iterator[tuple[Ids, FloatMatrix]]:
        yield np.arange(5), random_rows(5, 4, seed=0)
        raise error

    with pytest.raises(error):
        write_segment(tmp_path / "00000001.faiss", pieces(), dim=4)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    """A segment of five vectors of dimension 4."""
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        path = Path(folder) / "sound.faiss"
        write_segment(path, [(np.arange(1, 6), random_rows(5, 4, seed=0))], dim=4)
        yield path


EXPECTED: tuple[tuple[int | None, int | None], ...] = ((5, 4), (None, None), (None, 4))


@pytest.mark.parametrize(("count", "dim"), EXPECTED)
def test_a_segment_that_is_cut_short_anywhere_or_too_long_is_refused(
    sound: Path, quick: Path, count: int | None, dim: int | None
) -> None:
    content, path = sound.read_bytes(), quick / "00000001.faiss"
    for damaged in [*(content[:length] for length in range(len(content))), content + b"\0", 2 * content]:
        path.write_bytes(damaged)
        with pytest.raises(IndexFormatError, match=r"00000001\.faiss .*(verify --repair)"):
            load_segment(path, count=count, dim=dim)


# Two numbers that FAISS does not use, and whether an index is trained, which a flat one always is.
UNUSED = {start + place for start in (0, HEADER.size) for place in range(16, 33)}
ROWS_AND_HEADERS_END = ROWS_START + 4 * 5 * 4 + 8


@given(
    place=st.sampled_from([*range(ROWS_START), *range(ROWS_AND_HEADERS_END - 8, ROWS_AND_HEADERS_END)]),
    flipped=st.integers(1, 255),
    expected=st.sampled_from(EXPECTED),
)
@settings(max_examples=400)
def test_a_flipped_byte_in_what_describes_the_vectors_is_refused(
    sound: Path, place: int, flipped: int, expected: tuple[int | None, int | None]
) -> None:
    content = bytearray(sound.read_bytes())
    content[place] ^= flipped
    path = sound.with_name("damaged.faiss")
    path.write_bytes(content)
    count, dim = expected
    if place in UNUSED:
        same = load_segment(path, count=count, dim=dim)
        np.testing.assert_array_equal(same.matrix, random_rows(5, 4, seed=0))
        assert same.ids.tolist() == [1, 2, 3, 4, 5]
    else:
        with pytest.raises(IndexFormatError, match=r"damaged\.faiss .*(verify --repair)"):
            load_segment(path, count=count, dim=dim)


@given(place=st.integers(0, 209), content=st.binary(min_size=1, max_size=60))
@settings(max_examples=200)
def test_bytes_that_are_overwritten_anywhere_never_crash(sound: Path, place: int, content: bytes) -> None:
    damaged = bytearray(sound.read_bytes())
    damaged[place : place + len(content)] = content
    path = sound.with_name("overwritten.faiss")
    path.write_bytes(damaged)
    for count, dim in EXPECTED:
        try:
            segment = load_segment(path, count=count, dim=dim)
        except IndexFormatError:
            continue
        assert (segment.matrix.shape, segment.ids.shape) == ((5, 4), (5,))


@pytest.mark.parametrize(
    ("held", "dim"), [(-3, -4), (-1, 4), (2**62, 4), (2**40, 2**30), (0, -1), (5, 0)], ids=lambda number: str(number)
)
def test_a_header_that_agrees_with_itself_on_nonsense_is_refused(quick: Path, held: int, dim: int) -> None:
    path = quick / "forged.faiss"
    values = held * dim
    content = HEADER.pack(b"IxM2", dim, held, 1 << 20, 1 << 20, True, 0)
    content += HEADER.pack(b"IxFI", dim, held, 1 << 20, 1 << 20, True, 0)
    content += struct.pack("<Q", values % 2**64) + bytes(max(0, min(4 * values, 1000)))
    content += struct.pack("<Q", held % 2**64)
    size = ROWS_START + 4 * values + 8 + 8 * held
    path.write_bytes(content[:size] if 0 < size < 10_000 else content)
    with pytest.raises(IndexFormatError, match="verify --repair"):
        load_segment(path, count=None, dim=None)


def test_another_kind_of_file_is_no_segment(quick: Path) -> None:
    path = quick / "other.faiss"
    faiss.write_index(faiss.IndexFlatIP(4), str(path))
    with pytest.raises(IndexFormatError, match="is no segment of an index|cut short"):
        load_segment(path, count=0, dim=4)
    by_distance = faiss.IndexIDMap2(faiss.IndexFlatL2(4))
    by_distance.add_with_ids(random_rows(5, 4, seed=0), np.arange(1, 6))
    faiss.write_index(by_distance, str(path))
    with pytest.raises(IndexFormatError, match="verify --repair"):
        load_segment(path, count=5, dim=4)
    with pytest.raises(IndexFormatError, match="is missing"):
        load_segment(quick / "none.faiss", count=5, dim=4)
    with pytest.raises(IndexFormatError, match="cannot be read"):
        load_segment(quick, count=5, dim=4)
