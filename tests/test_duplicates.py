"""Duplicates: union-find and groups against brute force, real photos edited in real ways, and output for scripts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ann_data import library, random_rows
from commandline import Cli
from conftest import QUICK
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import indexer
import searchengine
from indexer.compact import compact
from searchengine import components, duplicates
from searchengine.components import Components
from searchengine.duplicates import (
    AT_MOST,
    STANDS_OUT,
    SURELY,
    USUAL_COSINE,
    DuplicateGroup,
    exact_duplicates,
    near_duplicates,
)
from searchengine.errors import UsageError
from searchengine.filters import Filters
from searchengine.index.reader import Index
from searchengine.index.snapshot import Snapshot
from searchengine.vectors import FloatMatrix, normalise

Paint = Callable[..., Path]

EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized": lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4)),
    "cropped": lambda image: image.crop((10, 10, image.width - 10, image.height - 10)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "recompressed": lambda image: image,
}


@pytest.fixture(autouse=True)
def offline(own_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")


@pytest.fixture
def quick() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        yield Path(folder)


def numbers(group: DuplicateGroup) -> list[int]:
    """Which rows of `library` the photos are."""
    return [photo.id - 1 for photo in group.photos]


# -- union-find ------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 60),
    batches=st.lists(st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=40), max_size=4),
)
def test_components_are_those_that_walking_along_the_pairs_finds(
    size: int, batches: list[list[tuple[int, int]]]
) -> None:
    parts = Components(size)
    links: dict[int, set[int]] = {member: set() for member in range(size)}
    for batch in batches:
        pairs = [(first % size, second % size) for first, second in batch]
        parts.unite(*np.array(pairs, np.int64).reshape(-1, 2).T)
        for first, second in pairs:
            links[first].add(second)
            links[second].add(first)
    root_of: dict[int, int] = {}
    for start in range(size):  # rising, so that each component is found by its least member
        waiting = [] if start in root_of else [start]
        while waiting:
            member = waiting.pop()
            if root_of.setdefault(member, start) == start:
                waiting += [other for other in links[member] if other not in root_of]
    assert parts.roots(np.arange(size)).tolist() == [root_of[member] for member in range(size)]


# -- groups by a threshold -------------------------------------------------------------------------------------------


def brute_force_groups(rows: FloatMatrix, threshold: float | None) -> list[list[int]]:
    """Components of all pairs, each taken apart from its first row on: of equal size, the first is best."""
    scores = rows.astype(np.float64) @ rows.T.astype(np.float64)
    if threshold is None:  # at least ten rows, too few to tell what is usual
        ninth = np.maximum(np.sort(scores, axis=1)[:, -10], USUAL_COSINE)
        stands_out = 1 - scores <= STANDS_OUT * (1 - np.maximum(ninth[:, None], ninth))
        floor, certain = (1 - share * (1 - USUAL_COSINE) for share in (AT_MOST, SURELY))
        near = (scores >= certain) | ((scores >= floor) & stands_out)
    else:
        near = scores >= threshold
    reach = near | np.eye(len(rows), dtype=np.bool_)
    while not np.array_equal(further := (reach.astype(np.float32) @ reach) > 0, reach):
        reach = further
    groups = []
    left = list(range(len(rows)))
    while left:
        first = left[0]
        group = [row for row in left if row == first or (reach[first, row] and near[first, row])]
        left = [row for row in left if row not in group]
        groups += [group] if len(group) > 1 else []
    return groups


@given(
    count=st.integers(1, 80),
    dim=st.sampled_from([2, 3, 8]),
    distinct=st.sampled_from([1, 3, 80]),
    threshold=st.sampled_from([0.3, 0.6, 0.9, 0.99, 1.0]),
    segments=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_groups_by_a_threshold_are_those_of_brute_force_also_where_many_are_alike(
    count: int, dim: int, distinct: int, threshold: float, segments: int, seed: int
) -> None:
    rows = random_rows(distinct, dim, seed=seed)[np.random.default_rng(seed).integers(0, distinct, count)]
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        library(Path(folder, "i"), [part for part in np.array_split(rows, segments) if len(part)])
        with Index(Path(folder, "i")) as index:
            found = near_duplicates(index, threshold=threshold)
    least = threshold - 1e-6
    assert sorted(numbers(group) for group in found) == brute_force_groups(rows, least)
    assert all(group.similarity >= least for group in found)


@given(
    families=st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([0.0, 0.02, 0.06, 0.12, 0.3])), min_size=1, max_size=4
    ),
    walk=st.booleans(),
    dim=st.sampled_from([2, 3, 8]),
    threshold=st.sampled_from([None, None, 0.5, 0.9, 0.985, 0.999]),
    filtered=st.booleans(),
    crowd=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_families_are_those_of_brute_force_whatever_their_size_and_shape(
    families: list[tuple[int, float]],
    walk: bool,
    dim: int,
    threshold: float | None,
    filtered: bool,
    crowd: int,
    seed: int,
) -> None:
    """Balls and chains, some next to each other; few are asked for at once, so that all stages have their turn."""
    random = np.random.default_rng(seed)
    parts = [random_rows(10, dim, seed=seed)]
    for size, spread in families:
        steps = spread * random.standard_normal((size, dim)) / np.sqrt(dim)
        parts.append(normalise(parts[-1][-1] + 0.1 * parts[0][0] + (np.cumsum(steps, axis=0) if walk else steps)))
    rows = np.concatenate(parts)[random.permutation(sum(map(len, parts)))][:99]
    with tempfile.TemporaryDirectory(dir=QUICK) as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"CROWD": crowd, "DEEPER": 2, "ROWS_PER_BLOCK": 7}.items():
            patch.setattr(components, name, value)
        library(Path(folder, "i"), [rows])
        with Index(Path(folder, "i")) as index:
            found = near_duplicates(index, threshold=threshold, filters=Filters(under="/photos") if filtered else None)
    expected = brute_force_groups(rows, None if threshold is None else threshold - 1e-6)
    assert sorted(numbers(group) for group in found) == expected


# Longitudes and latitudes of photos in two families, and two photos, 20 degrees from each other, where these touch: far
# from where one begins to look for others. There, more than are asked for first lie nearer, but belong to neither.
TOUCHING = {
    "long families": ([(x, 0) for x in (*range(45), *range(124, 63, -1))], ((44, 0), (64, 0))),
    "others are nearer": (
        [
            *((x, 0) for x in (-20.5, 0, *range(20, 0, -1), *range(55, 39, -1))),
            *((x, y) for x in (0, 55) for y in (25, 26, 27, 28)),
        ],
        ((20, 0), (40, 0)),
    ),
}


@pytest.mark.parametrize(("places", "pair"), TOUCHING.values(), ids=TOUCHING)
def test_families_that_touch_at_their_far_ends_are_one(
    quick: Path, monkeypatch: pytest.MonkeyPatch, places: list[tuple[float, float]], pair: Any
) -> None:
    monkeypatch.setattr(components, "CROWD", 3)
    x, y = np.radians(places).T
    rows = np.stack([np.cos(x) * np.cos(y), np.sin(x) * np.cos(y), np.sin(y)], axis=1).astype(np.float32)
    library(quick / "i", [rows])
    threshold = float(np.cos(np.radians(21.2)))
    with Index(quick / "i") as index:
        groups = [numbers(group) for group in near_duplicates(index, threshold=threshold)]
    assert sorted(groups) == brute_force_groups(rows, threshold)
    assert any({places.index(photo) for photo in pair} <= set(group) for group in groups)


@pytest.mark.parametrize("threshold", [None, 0.95])
def test_a_family_of_thousands_takes_no_more_work_a_photo_than_a_small_one(
    quick: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None
) -> None:
    search, brought = Snapshot.search, []

    def counted(self: Snapshot, *arguments: Any, **options: Any) -> Any:
        found = search(self, *arguments, **options)
        brought.append(found[0].size)
        return found

    monkeypatch.setattr(Snapshot, "search", counted)
    others, family = random_rows(3000, 16, seed=0), random_rows(1, 16, seed=1)
    family = normalise(family + 0.01 * random_rows(2000, 16, seed=2))
    library(quick / "i", [np.concatenate([others, family])])
    with Index(quick / "i") as index:
        groups = near_duplicates(index, threshold=threshold)
    assert max(len(group.photos) for group in groups) == 2000
    assert sum(brought) < 15 * 5000


def test_an_index_for_large_libraries_finds_the_same_groups(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchengine.index.snapshot.COMPARED_AT_MOST", 100)
    rows = random_rows(500, 24, seed=1)
    rows[300:340] = normalise(rows[:40] + 0.03 * random_rows(40, 24, seed=2))
    rows[400:430] = normalise(rows[400] + 0.03 * random_rows(30, 24, seed=3))  # more than a first search brings
    monkeypatch.setattr("searchengine.components.CROWD", 20)
    library(quick / "i", [rows[:250], rows[250:]])
    with Index(quick / "i") as index:
        exact = {threshold: near_duplicates(index, threshold=threshold) for threshold in (None, 0.95)}
    compact(quick / "i", kind="ivf")
    with Index(quick / "i") as index:
        assert not index.snapshot().is_exact()
        assert {threshold: near_duplicates(index, threshold=threshold) for threshold in (None, 0.95)} == exact
    expected = [[row, row + 300] for row in range(40)] + [list(range(400, 430))]
    assert sorted(map(numbers, exact[0.95])) == expected
    assert sorted(map(numbers, exact[None])) == expected


def test_a_chain_of_near_copies_is_taken_apart_so_that_each_is_near_the_best(quick: Path) -> None:
    angles = np.radians([0, 15, 30, 45, 60])  # each is near the next one, and far from the last
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    library(quick / "i", [rows])
    with Index(quick / "i") as index:
        groups = near_duplicates(index, threshold=0.9)  # an angle of 26 degrees
    assert [numbers(group) for group in groups] == [[0, 1], [2, 3]]
    assert all(group.similarity == pytest.approx(np.cos(np.radians(15)), abs=1e-6) for group in groups)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.1, float("nan")])
def test_a_threshold_that_no_cosine_can_have_is_refused(quick: Path, threshold: float) -> None:
    library(quick / "i", [random_rows(3, 4, seed=0)])
    with Index(quick / "i") as index, pytest.raises(UsageError, match="0.95"):
        near_duplicates(index, threshold=threshold)


# -- groups that stand out -------------------------------------------------------------------------------------------


def test_what_is_near_only_because_everything_there_is_near_does_not_stand_out(quick: Path) -> None:
    close = normalise(random_rows(1, 32, seed=0) + 0.3 * random_rows(40, 32, seed=1))  # cosines of about 0.92
    apart = random_rows(60, 32, seed=2)
    copies = normalise(apart[:5] + 0.3 * random_rows(5, 32, seed=3))  # of about 0.96
    library(quick / "i", [np.concatenate([close, apart, copies])])
    with Index(quick / "i") as index:
        assert sorted(map(numbers, near_duplicates(index))) == [[40 + row, 100 + row] for row in range(5)]
        assert len(near_duplicates(index, threshold=0.8)[0].photos) == 40


def test_a_large_family_of_copies_is_one_group(quick: Path) -> None:
    rows = random_rows(60, 32, seed=0)
    far = 2 * SURELY * (1 - USUAL_COSINE)  # the squared distance that is surely a copy's
    rows[10:50] = normalise(rows[10] + 0.4 * np.sqrt(far) * random_rows(40, 32, seed=1))
    library(quick / "i", [rows])
    with Index(quick / "i") as index:
        assert [numbers(group) for group in near_duplicates(index)] == [list(range(10, 50))]


def test_a_damaged_vector_hides_no_copies(quick: Path) -> None:
    rows = random_rows(150, 32, seed=0)
    rows[50] = rows[100]
    rows[7] = np.nan
    library(quick / "i", [rows])
    with Index(quick / "i") as index:
        for threshold in (None, 0.9):
            assert [numbers(group) for group in near_duplicates(index, threshold=threshold)] == [[50, 100]]


def test_two_photos_alone_are_copies_only_if_they_are_near(quick: Path) -> None:
    row = random_rows(1, 32, seed=0)
    for name, distance, groups in (("near", 0.1, 1), ("far", 0.9, 0)):
        library(quick / name, [np.concatenate([row, normalise(row + distance * random_rows(1, 32, seed=1))])])
        with Index(quick / name) as index:
            assert len(near_duplicates(index)) == groups


# -- photos ----------------------------------------------------------------------------------------------------------


def paths(groups: list[DuplicateGroup]) -> list[list[str]]:
    return [[os.path.basename(photo.key) for photo in group.photos] for group in groups]


def test_copies_of_copies_join_and_gone_photos_do_not(paint: Paint, tmp_path: Path, encoder: FakeEncoder) -> None:
    for name in ("photos/a.png", "photos/sub/a2.png", "photos/gone.png"):
        paint(name, 1)
    paint("photos/other.png", 2)
    with Image.open(tmp_path / "photos/a.png") as image:
        image.resize((120, 80), Image.Resampling.NEAREST).save(tmp_path / "photos/large.png")
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    (tmp_path / "photos/gone.png").unlink()
    paint("photos/lost.png", 3)
    shutil.copy(tmp_path / "photos/lost.png", tmp_path / "photos/lost2.png")
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    for name in ("lost", "lost2"):
        (tmp_path / f"photos/{name}.png").unlink()
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    with searchengine.open_index(tmp_path / "i") as index:
        assert paths(exact_duplicates(index)) == [["a.png", "a2.png"]]
        assert paths(near_duplicates(index, threshold=0.999)) == [["large.png", "a.png", "a2.png"]]
        under = Filters(under=str(tmp_path / "photos/sub"))
        assert exact_duplicates(index, filters=under) == []
        assert near_duplicates(index, filters=under, threshold=0.999) == []
        small = Filters(max_size_bytes=os.path.getsize(tmp_path / "photos/a.png"))
        assert paths(near_duplicates(index, filters=small, threshold=0.999)) == [["a.png", "a2.png"]]


def test_a_copy_that_goes_meanwhile_leaves_no_group_of_one(
    paint: Paint, tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        paint(f"photos/{name}", 1)
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    are_copied = duplicates._are_copied

    def delayed(*arguments: Any) -> Any:
        found = are_copied(*arguments)
        (tmp_path / "photos/b.png").unlink()
        indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
        return found

    monkeypatch.setattr(duplicates, "_are_copied", delayed)
    with Index(tmp_path / "i") as index:
        assert exact_duplicates(index) == []


def test_the_best_has_most_pixels_then_most_bytes(paint: Paint, tmp_path: Path, encoder: FakeEncoder) -> None:
    with Image.open(paint("original.png", 1)) as image:
        (tmp_path / "photos").mkdir()
        for name, side, quality in (("small", 60, 95), ("poor", 240, 40), ("best", 240, 95)):
            copy = image.resize((side, side * 2 // 3), Image.Resampling.NEAREST)
            copy.save(tmp_path / "photos" / f"{name}.jpg", quality=quality)
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    with searchengine.open_index(tmp_path / "i") as index:
        assert paths(near_duplicates(index, threshold=0.95)) == [["best.jpg", "poor.jpg", "small.jpg"]]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edited(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photos of COCO, edits of some of them, copies of others, and their index by mini. Tests only read them."""
    folder = tmp_path_factory.mktemp("edited")
    photos = sorted((data / "coco_cc").rglob("*.jpg"))[:18]
    for place in ("photos", "edits", "copies"):
        (folder / place).mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "photos")
    for photo, (edit, change) in zip(photos, list(EDITS.items()) * 2, strict=False):
        with Image.open(photo) as image:
            change(image.convert("RGB")).save(folder / "edits" / f"{photo.stem}-{edit}.jpg", quality=60)
    for photo in photos[10:13]:
        shutil.copy(photo, folder / "copies" / f"{photo.stem}-copy.jpg")
    encoder = searchengine.load_encoder("mini", device="cpu")
    indexer.build(folder / "i", [folder / "photos", folder / "edits", folder / "copies"], encoder=encoder)
    return folder, folder / "i"


def stem(path: str) -> str:
    return os.path.basename(path).split(".")[0].split("-")[0]


def test_edited_copies_of_real_photos_are_found_and_nothing_else(cli: Cli, edited: tuple[Path, Path]) -> None:
    folder, index = edited
    outcome = cli("duplicates", "--index", index, "--json")
    assert outcome.code == 0, outcome.err
    groups = outcome.lines
    assert list(groups[0])[:2] == ["similarity", "paths"]
    for group in groups:
        assert len({stem(path) for path in group["paths"]}) == 1, "photos of different things"
        assert group["similarity"] == min(group["similarities"])
        areas = [width * height for width, height in zip(group["widths"], group["heights"], strict=True)]
        assert areas[0] == max(areas)
    found = {stem(path) for group in groups for path in group["paths"]}
    made = {stem(file.name) for place in ("edits", "copies") for file in (folder / place).iterdir()}
    assert len(made) == 11
    assert found <= made
    assert len(found) >= 10


def test_exact_lists_copies_to_the_byte_and_scripts_get_all_but_the_best(cli: Cli, edited: tuple[Path, Path]) -> None:
    folder, index = edited
    copies = sorted(str(file) for file in (folder / "copies").iterdir())
    groups = cli("duplicates", "--exact", "--index", index, "--json").lines
    assert [group["similarity"] for group in groups] == [1.0] * 3
    assert [group["paths"][1] for group in groups] == copies
    assert cli("duplicates", "--exact", "--index", index, "-0").out.split("\0") == [*copies, ""]
    assert cli("duplicates", "--exact", "--index", index, "--format", "paths").out.split("\n") == [*copies, ""]
    table = cli("duplicates", "--exact", "--index", index)
    assert table.out.count(" * ") == 3
    assert "3 groups; 3 photos" in table.err
    assert len(list(folder.rglob("*.jpg"))) == 29, "nothing is deleted"


def test_without_duplicates_the_exit_code_is_1(cli: Cli, edited: tuple[Path, Path]) -> None:
    folder, index = edited
    for flags in ([], ["--exact"], ["--json"], ["--threshold", "0.99"], ["--exact", "-0"]):
        outcome = cli("duplicates", *flags, "--index", index, "--under", folder / "copies")
        assert (outcome.code, outcome.out) == (1, ""), flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-0"], "--exact"),
        (["--format", "paths"], "--threshold auto"),
        (["--exact", "--threshold", "0.9"], "contradict"),
        (["--threshold", "high"], "high"),
        (["--threshold", "nan"], "nan"),
        (["--threshold", "1.5"], "1.5"),
        (["--json", "-0", "--exact"], "-0"),
    ],
)
def test_wrong_use_is_refused(cli: Cli, edited: tuple[Path, Path], flags: list[str], words: str) -> None:
    outcome = cli("duplicates", *flags, "--index", edited[1])
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_scripts_never_get_a_path_by_which_they_could_lose_a_photo(
    cli: Cli, paint: Paint, tmp_path: Path, encoder: FakeEncoder
) -> None:
    names = ("fine", "best-gone", "best-changed", "best-rotten", "copy-changed", "copy-gone", "linked")
    for number, name in enumerate(names):
        paint(f"photos/{name}-1.png", number)
        copy = tmp_path / f"photos/{name}-2.png"
        (os.link if name == "linked" else shutil.copy)(tmp_path / f"photos/{name}-1.png", copy)
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    (tmp_path / "photos/best-gone-1.png").unlink()
    paint("photos/best-changed-1.png", 50)
    rotten = tmp_path / "photos/best-rotten-1.png"
    before = rotten.stat()
    rotten.write_bytes(bytes(before.st_size))
    os.utime(rotten, ns=(before.st_atime_ns, before.st_mtime_ns))
    paint("photos/copy-changed-2.png", 51)
    (tmp_path / "photos/copy-gone-2.png").unlink()
    outcome = cli("duplicates", "--exact", "--format", "paths", "--index", tmp_path / "i")
    assert outcome.out.splitlines() == [str(tmp_path / "photos/fine-2.png")]
    for name in ("best-gone-1", "best-changed-1", "best-rotten-1", "copy-changed-2", "copy-gone-2", "linked-2"):
        assert f"{name}.png" in outcome.err
    assert len(json.loads(cli("duplicates", "--exact", "--index", tmp_path / "i", "--json").out.splitlines()[0])) > 2


def test_a_newline_in_a_name_makes_no_path_of_another_photo(
    cli: Cli, paint: Paint, tmp_path: Path, encoder: FakeEncoder
) -> None:
    only = paint("photos/only.png", 1)
    for name in ("a.png", "b.png", "c.png"):
        paint(f"photos/{name}", 2)
    (tmp_path / f"photos/b\n{only.parent}").mkdir(parents=True)
    hostile = (tmp_path / "photos/b.png").rename(f"{tmp_path}/photos/b\n{only}")
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    outcome = cli("duplicates", "--exact", "--format", "paths", "--index", tmp_path / "i")
    assert outcome.out.splitlines() == [str(tmp_path / "photos/c.png")]
    assert "newline" in outcome.err
    assert str(hostile) in cli("duplicates", "--exact", "-0", "--index", tmp_path / "i").out.split("\0")
