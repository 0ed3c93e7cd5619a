"""scripts/bench_search.py runs from end to end, and what it counts is what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import painted
from fakes import FakeEncoder
from PIL import Image

from searchengine.vectors import FloatMatrix, normalise

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

import bench_search_data  # noqa: E402
from bench_search_goals import Record, goals  # noqa: E402
from bench_search_measure import Truth, limited_threads, take_turns  # noqa: E402

DIM, N = 32, 2000
DEV_PHOTOS, TRAIN_PHOTOS = 8, 20


def random_rows(count: int, *, seed: int = 0) -> FloatMatrix:
    return normalise(np.random.default_rng(seed).standard_normal((count, DIM)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Laid out as the shared data is: vectors of CLIP's, photos, captions."""
    (tmp_path / "golden").mkdir()
    parts = {name: random_rows(40, seed=seed) for seed, name in enumerate(bench_search_data.CLIP_CENTRES)}
    np.savez(tmp_path / "golden" / "golden_vectors.npz", **parts)  # type: ignore[arg-type]
    for part, count in (("train", TRAIN_PHOTOS), ("dev", DEV_PHOTOS)):
        images = tmp_path / f"flickr8k_{part}" / "images"
        images.mkdir(parents=True)
        for number in range(count):
            painted(number + count).save(images / f"{number:02}.png")
    captions = [{"file": f"{number:02}.png", "captions": [f"number {number}"]} for number in range(DEV_PHOTOS)]
    (tmp_path / "flickr8k_dev" / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def make_clip(n: int, folder: Path, cache: Path) -> bench_search_data.DataSet:
    return bench_search_data.clip(n, count=4, data=folder, cache=cache)


def make_mini(n: int, folder: Path, cache: Path) -> bench_search_data.DataSet:
    return bench_search_data.mini(
        n, count=4, data=folder, cache=cache, load_encoder=lambda: FakeEncoder(dim=DIM, image_size=32)
    )


def test_a_whole_run_tells_every_contender_and_which_peers_are_not_installed(folder: Path, tmp_path: Path) -> None:
    cache, found, plot = tmp_path / "cache", tmp_path / "found.json", tmp_path / "plot.png"
    make_mini(N, folder, cache)
    options = f"--data mini --sizes {N} --threads 1 --queries 4 --rounds 1".split()
    folders: list[str | Path] = ["--data-folder", folder, "--data-cache", cache, "--json", found, "--plot", plot]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench_search.py", *options, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())
    measured = {record["contender"] for record in results["records"]}
    assert {"faiss flat", "numpy", "faiss HNSW32", "ours flat", "ours scan", "ours ivf"} <= measured
    for peer in ("hnswlib", "usearch"):
        is_installed = importlib.util.find_spec(peer) is not None
        assert (peer in measured) is is_installed
        assert (f"{peer} is not installed" in done.stdout) is not is_installed
    for record in results["records"]:
        if record["contender"] in ("faiss flat", "numpy", "ours flat") and "recall_10" in record:
            assert record["recall_10"] == 1
    assert results["goals"]
    with Image.open(plot) as image:
        assert len(image.getcolors(2**20) or []) > 5
    assert not [path for path in cache.iterdir() if path.is_dir()], "indexes were left behind"


def test_fewer_vectors_are_the_first_of_more(folder: Path, tmp_path: Path) -> None:
    for make in (make_clip, make_mini):
        few, many = make(30, folder, tmp_path / "few"), make(N, folder, tmp_path / "many")
        again = make(30, folder, tmp_path / "many")
        assert np.array_equal(few.vectors, many.vectors[:30])
        assert np.array_equal(few.vectors, again.vectors)
        assert np.allclose(np.linalg.norm(many.vectors, axis=1), 1, atol=1e-5)
        for kind, queries in few.queries.items():
            assert np.array_equal(queries, many.queries[kind])


def test_a_held_out_photo_is_not_among_the_vectors(folder: Path, tmp_path: Path) -> None:
    data = make_mini(N, folder, tmp_path / "cache")
    kept = (TRAIN_PHOTOS + DEV_PHOTOS - 4) * (1 + bench_search_data.CROPS)
    assert f"of {kept:,} real photos and crops, {N - kept:,} made from them" in data.about
    assert not np.isclose(data.queries["held-out photos"] @ data.vectors[:kept].T, 1, atol=1e-6).any()


def test_recall_is_the_share_of_the_best_and_ties_count() -> None:
    vectors = np.concatenate([random_rows(50), random_rows(50)])  # each row twice
    queries = random_rows(1, seed=1)
    best = np.argsort(-(vectors[:50] @ queries[0]))
    truth = Truth(vectors, queries, k=10)
    assert truth.recall({0: best[:5]}, 10) == 0.5
    assert truth.recall({0: np.repeat(best[:5], 2)}, 10) == 0.5, "a row counts once"
    assert truth.recall({0: np.concatenate([best[:5], best[:5] + 50])}, 10) == 1
    assert truth.recall({0: best[:1] + 50}, 1) == 1
    assert truth.recall({0: np.array([-1, *best[:5], *best[40:44]])}, 10) == 0.5


def test_recall_under_a_filter_counts_what_passes_alone() -> None:
    vectors, queries = random_rows(100), random_rows(2, seed=1)
    allowed = np.zeros((2, 100), dtype=bool)
    allowed[0, ::2] = allowed[1, :3] = True
    truth = Truth(vectors, queries, k=10, mask=lambda rows: allowed[:, rows])
    best = np.argsort(-(vectors @ queries[0]))
    passing = best[best % 2 == 0]
    assert truth.recall({0: passing[:10]}, 10) == 1
    assert truth.recall({0: best[best % 2 == 1][:10]}, 10) == 0
    assert truth.recall({1: np.array([2, 0, 1, -1])}, 10) == 1, "three are all there are"


def test_everyone_answers_in_every_round_and_those_that_take_long_less_often() -> None:
    rows = np.zeros((1, 10), np.int64)
    turns = take_turns(
        {"a": lambda _: rows, "b": lambda _: rows}, queries=20, rounds=2, sparse={"b"}, part=5
    )  # fmt: skip
    assert [len(seconds) for seconds in turns.seconds["a"]] == [10, 10]
    assert sorted(turns.answers["b"]) == [0, 1, 10, 11]
    assert turns.speedup("a", "a") == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind threads to cores")
def test_the_bound_on_threads_ends_with_the_measurement() -> None:
    before = os.sched_getaffinity(0)
    with limited_threads(1, []):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_a_goal_is_judged_by_the_worst_kind_of_query_and_by_recall() -> None:
    def latency(contender: str, queries: str, recall: float, *, times_flat: float, times_ivf: float) -> Record:
        return {
            "data": "clip", "n": 1, "measure": "latency", "contender": contender, "setting": "", "queries": queries,
            "threads": 1, "recall_10": recall, "times_flat": times_flat, "times_ivf": times_ivf,
        }  # fmt: skip

    def judged(*records: Record) -> list[bool]:
        build: Record = {"data": "clip", "n": 1, "measure": "build", "contender": "faiss flat", "held_bytes": 1}
        return [goal.met for goal in goals([build, *records]) if goal.goal.startswith("ivf")]

    good = latency("ours ivf", "held out", 0.995, times_flat=80, times_ivf=1)
    slow = latency("ours ivf", "off the clusters", 0.995, times_flat=40, times_ivf=1)
    blind = latency("ours ivf", "off the clusters", 0.9, times_flat=400, times_ivf=1)
    peer = latency("hnswlib", "held out", 0.992, times_flat=90, times_ivf=1.1)
    careless = latency("hnswlib", "held out", 0.9, times_flat=900, times_ivf=11)
    assert judged(good) == [True]
    assert judged(good, slow) == [False]
    assert judged(good, blind) == [False]
    assert judged(good, careless) == [True], "a peer that finds less is no rival"
    assert judged(good, careless, peer) == [True, False]


def test_a_kind_that_was_left_out_met_no_goal() -> None:
    build: Record = {"data": "clip", "n": 1, "measure": "build", "contender": "faiss flat", "held_bytes": 1}
    assert {(goal.goal, goal.met) for goal in goals([build])} == {
        (f"ours {kind}: takes part", False) for kind in ("flat", "scan", "ivf")
    }
