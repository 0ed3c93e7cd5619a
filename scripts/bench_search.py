"""How fast, exact and small search is, beside numpy, faiss, hnswlib and usearch on the same vectors.

    scripts/bench_search.py [--data clip mini] [--sizes 10000 100000 1000000] [--json FILE] [--plot FILE]

The vectors are told in bench_search_data.py, the contenders in bench_search_contenders.py. For each set and size:

- build: seconds on all cores; for ours, what `compact` takes of an index folder that has the vectors. Of a graph: CPU
  seconds divided by the cores, since with --graphs another run may have built it.
- held, mapped: bytes a vector in memory, measured in a process of its own: what the contender holds, and the pages of
  mapped exact vectors that its queries touched. open, first: seconds to open the files, and to the first answer, when
  the system has forgotten the files.
- p50, p99: of queries one by one, in turns. Those that are exact by construction, which take longest, answer every
  fifth. x flat, x ivf: how many times as fast it is as faiss flat and as ours ivf, within a round, then the median of
  all rounds. Standing contenders (numpy, faiss flat, ours) take turns; so does each peer with faiss flat and ours ivf.
- recall@k: the share of the k best by float64 that an answer of k has. Rows whose scores differ by 1e-6 are equal.
- filters: a bitmap, made beforehand, for faiss flat; ids, as `Index.vector_ids` gives them, for ours. A folder
  is a sixteenth or so of the vectors that is alike: queries search their own, and all but their own.

Threads are bounded by OpenMP, by the peers' own arguments, by threadpoolctl for BLAS where it is installed, and by
letting the process run on as many cores only. The goals were set for 1,000,000 vectors, and are judged at any size.
numpy multiplies faiss flat's matrix, so it neither builds nor opens anything. A graph of 1,000,000 vectors takes many
minutes to build: --hnsw-max. hnswlib and usearch take part where they are installed.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_search_data
from bench_search_data import DataSet
from bench_search_goals import Record, goals
from bench_search_measure import available_bytes
from bench_search_plot import Point, draw
from bench_search_run import Bench
from hardware import cpu_name

ROOT = Path(__file__).parent.parent
PANELS_IN_A_ROW = 3
BYTES_PER_VECTOR, MATRICES = 4 * 512, 1.6  # faiss flat's, and the codes of all others


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", nargs="+", choices=("clip", "mini"), default=["clip", "mini"])
    arguments.add_argument("--sizes", nargs="+", type=int, metavar="N", help="(default 10000 100000 1000000)")
    arguments.add_argument("--hnsw-max", type=int, default=100_000, metavar="N", help="no graph of more vectors")
    arguments.add_argument("--graphs", type=Path, metavar="FOLDER", help="keep graphs there, and take those that are")
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="the last ones also build")
    arguments.add_argument("--queries", type=int, default=200, help="of each kind")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--data-folder", type=Path, default=ROOT.parent / "shared/data", metavar="FOLDER")
    cache = Path(tempfile.gettempdir(), "bench_search")
    arguments.add_argument("--data-cache", type=Path, default=cache, metavar="FOLDER", help=f"(default {cache})")
    arguments.add_argument(
        "--quick", action="store_true", help="a test of this script: 10,000 vectors, 40 queries, two rounds"
    )
    arguments.add_argument("--json", type=Path, help="write the figures there")
    arguments.add_argument("--plot", type=Path, help="draw recall@10 against p50 there, a PNG")
    options = arguments.parse_args()
    if options.quick:
        options.queries, options.rounds = 40, 2
    sizes = options.sizes or ([10_000] if options.quick else [10_000, 100_000, 1_000_000])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(hardware())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in [threads for threads in options.threads if threads > cores]:
        print(f"threads {threads} left out: this process may run on {cores}")
    options.threads = [threads for threads in options.threads if threads <= cores] or [cores]
    records: list[Record] = []
    for name in options.data:
        for n in sorted(sizes, reverse=True):  # the file of the largest serves all
            needed = MATRICES * BYTES_PER_VECTOR * n
            if available_bytes() < needed:
                print(f"\n{name}, n = {n:,}: left out, it takes {needed / 2**30:.0f} GiB of memory")
                continue
            data = load(name, n, options)
            with tempfile.TemporaryDirectory(dir=options.data_cache) as folder:
                records += Bench(data, Path(folder), options).run()
    print("\ngoals, set for n = 1,000,000")
    for goal in (found := goals(records)):
        print(f"  {'MET' if goal.met else 'NOT MET':8s} {goal.about}, {goal.goal}: {goal.found}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"hardware": hardware(), "records": records, "goals": [asdict(goal) for goal in found]}, indent=1
            )
        )
    if options.plot and records:
        plot(records, options.plot)


def load(name: str, n: int, options: argparse.Namespace) -> DataSet:
    folders = {"count": options.queries, "data": options.data_folder, "cache": options.data_cache}
    if name == "clip":
        return bench_search_data.clip(n, **folders)

    def load_encoder() -> Any:
        import searchengine

        return searchengine.load_encoder("mini")

    return bench_search_data.mini(n, load_encoder=load_encoder, **folders)


def plot(records: list[Record], path: Path) -> None:
    """With the fewest threads that were measured."""
    latencies = sorted((record for record in records if record["measure"] == "latency"), key=lambda r: r["n"])
    threads = min(record["threads"] for record in latencies)
    points = [
        Point(f"{r['data']}, n = {r['n']:,}, {r['queries']}", r["contender"], r["setting"], r["recall_10"], r["p50_ms"])
        for r in latencies
        if r["threads"] == threads
    ]
    draw(points, path, title=f"Recall against latency, threads {threads}; {hardware()}", columns=PANELS_IN_A_ROW)


def hardware() -> str:
    packages = []
    for name in ("faiss-cpu", "numpy", "hnswlib", "usearch", "threadpoolctl"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    return f"{cpu_name()}, {os.cpu_count()} cores, {', '.join(packages)}"


if __name__ == "__main__":
    main()
