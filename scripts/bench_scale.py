"""One index at growing sizes, up to more than the memory holds: how long it takes to build, its size, its answers.

    scripts/bench_scale.py --data DATA --work DIR [--sizes 100000,1000000,10000000] [--queries 50]

The vectors are points of clusters around real CLIP vectors, made piece by piece from fixed seeds and written straight
into full segments, as indexing and merging leave them; only then is the clock started. Each step is a process of its
own, so that its memory is its own. Every answer is held against a comparison with all vectors. DATA is the folder with
`golden/golden_vectors.npz`; 10,000,000 vectors need 25 GB in DIR, which keeps them for another run.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_search_contenders import write_index_folder
from bench_search_data import PIECE, Clusters
from hardware import cpu_name

from searchengine.filters import Filters
from searchengine.index import exact
from searchengine.index.reader import Index
from searchengine.vectors import FloatMatrix

K = 10
WARM_UP = 5
LOOK_EVERY_S = 0.1
MADE = "made.json"


@dataclass(frozen=True)
class Stream:
    """The first `n` rows of what the pieces are; none is kept."""

    made: Clusters
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.made.dim

    def __getitem__(self, run: slice) -> FloatMatrix:
        start, stop, _ = run.indices(self.n)
        numbers = range(start // PIECE, -(-stop // PIECE))
        rows = np.concatenate([self.made.piece(number, np.random.default_rng([0, number])) for number in numbers])
        return rows[start - numbers.start * PIECE : stop - numbers.start * PIECE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", default="100000,1000000,10000000")
    parser.add_argument("--queries", type=int, default=50, help="of each of three kinds")
    parser.add_argument("--keep", action="store_true", help="search what was built before")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    made = Clusters.from_data(options.data)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"{cpu_name()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB; load before: {os.getloadavg()[0]:.1f}")
    print(f"{made.about}; {made.dim} dimensions, k {K}, {options.queries} queries of each kind")
    records = [
        measured(made, int(size), work=options.work, count=options.queries, keep=options.keep)
        for size in options.sizes.split(",")
    ]
    print()
    print("\n".join(table(records)))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


def measured(made: Clusters, n: int, *, work: Path, count: int, keep: bool) -> dict[str, Any]:
    folder = work / f"clusters-{n}"
    if not (folder / MADE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        write_index_folder(Stream(made, n), folder)
        (folder / MADE).write_text(json.dumps({"seconds": time.perf_counter() - started}))
        print(f"{n:,} vectors written in {time.perf_counter() - started:.0f} s", flush=True)
    record: dict[str, Any] = {"n": n, "build_s": 0.0, "build_peak_mib": 0.0}
    if not keep:
        record |= built(folder)
        print(f"{n:,} vectors: built in {record['build_s']:.0f} s", flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        record |= pool.submit(searched, folder, made.queries(count)).result()
        record["recall"] = pool.submit(recall, folder, made.queries(count), record.pop("found")).result()
    record["bytes"] = {
        name: sum(file.stat().st_size for file in folder.glob(pattern))
        for name, pattern in (("segments", "segments/*"), ("ann", "ann/*"), ("tables", "metadata.sqlite*"))
    }
    print(json.dumps(record), flush=True)
    return record


def built(folder: Path) -> dict[str, float]:
    """By the command, from its start to its exit."""
    command = [sys.executable, "-m", "searchengine", "compact", "--kind", "ivf", "--rebuild", "--index", str(folder)]
    started, peak_mib = time.perf_counter(), 0.0
    with subprocess.Popen([*command, "--json"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak_mib = max(peak_mib, own_mib(process.pid))
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"build_s": time.perf_counter() - started, "build_peak_mib": peak_mib}


def searched(folder: Path, queries: dict[str, FloatMatrix]) -> dict[str, Any]:
    """In a process of its own: opening, and each query by itself, in the order of kinds taking turns."""
    started = time.perf_counter()
    with Index(folder) as index:
        ann = index.snapshot().ann
        assert ann is not None
        opened = time.perf_counter()
        index.search(next(iter(queries.values()))[:1], k=K)
        first = time.perf_counter()
        for kind in queries:
            for query in queries[kind][:WARM_UP]:
                index.search(query[None], k=K)
        seconds: dict[str, list[float]] = {kind: [] for kind in queries}
        found: dict[str, list[list[int]]] = {kind: [] for kind in queries}
        for number in range(len(next(iter(queries.values())))):
            for kind in queries:
                began = time.perf_counter()
                ids = index.search(queries[kind][number][None], k=K)[1][0]
                seconds[kind].append(time.perf_counter() - began)
                found[kind].append(ids.tolist())
        folder_filter = Filters(under="/photos/00042")
        began = time.perf_counter()
        among = index.vector_ids(folder_filter)
        index.search(queries["held out"][:1], k=K, among=among)
        filtered_s = time.perf_counter() - began
        return {
            "says_recall": ann.parameters.recall_at_10,
            "code_bytes": ann.parameters.code_bytes,
            "open_s": opened - started,
            "first_s": first - opened,
            "own_mib": own_mib(os.getpid()),
            "p50_ms": {kind: 1000 * float(np.median(times)) for kind, times in seconds.items()},
            "p99_ms": {kind: 1000 * float(np.quantile(times, 0.99)) for kind, times in seconds.items()},
            "filtered_ms": 1000 * filtered_s,
            "filter_leaves": len(among),
            "found": found,
        }


def recall(folder: Path, queries: dict[str, FloatMatrix], found: dict[str, list[list[int]]]) -> dict[str, float]:
    """Of the ten nearest of all vectors, the share that was found."""
    with Index(folder) as index:
        table, together = index.snapshot().table, np.concatenate(list(queries.values()))
        true = [ids for _, ids in exact.search(table, together, k=K)]
    answers = [ids for kind in queries for ids in found[kind]]
    shares = [float(np.isin(best, ids).mean()) for best, ids in zip(true, answers, strict=True)]
    parts = np.split(np.array(shares), len(queries))
    return {kind: float(part.mean()) for kind, part in zip(queries, parts, strict=True)}


def own_mib(pid: int) -> float:
    """The memory of a process that is no file's; of one that has just ended, none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def table(records: list[dict[str, Any]]) -> list[str]:
    kinds = list(records[0]["p50_ms"])
    names = [f"{kind}: p50 / p99 ms, recall@10" for kind in kinds]
    head = [
        "vectors",
        "built, s",
        "memory to build, MiB",
        "ann, B a vector",
        "all, B a vector",
        "open, s",
        "memory to search, MiB",
        *names,
    ]
    rows = [
        [
            f"{record['n']:,}",
            f"{record['build_s']:.0f}",
            f"{record['build_peak_mib']:,.0f}",
            f"{record['bytes']['ann'] / record['n']:.0f}",
            f"{sum(record['bytes'].values()) / record['n']:,.0f}",
            f"{record['open_s']:.2f}",
            f"{record['own_mib']:,.0f}",
            *(
                f"{record['p50_ms'][kind]:.1f} / {record['p99_ms'][kind]:.1f}, {record['recall'][kind]:.3f}"
                for kind in kinds
            ),
        ]
        for record in records
    ]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
