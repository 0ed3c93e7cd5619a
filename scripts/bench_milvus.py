"""Searches in a folder and in Milvus side by side: recall@10 and latency, with and without filters.

    python scripts/bench_milvus.py                         100,000 vectors of 512 numbers, Milvus Lite in a file
    python scripts/bench_milvus.py --server milvus://HOST:PORT/NAME    a server, too; NAME is made anew there

Vectors and queries are those of scripts/bench_search.py. The index in Milvus is a copy of that in the folder, made by
`searchengine copy`. Recall is against the folder's exact search, by scores: whatever is as near as the tenth counts.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from bench_search_contenders import copy_index, write_index_folder
from bench_search_data import DataSet, clip
from hardware import cpu_name

from indexer.compact import compact
from indexer.copy import copy
from searchengine.filters import Filters
from searchengine.index.layout import IndexPaths
from searchengine.index.protocol import PhotoIndex, open_index
from searchengine.index.schema import connect_for_writing
from searchengine.milvus.connection import Connection, MilvusPlace
from searchengine.milvus.reader import MilvusIndex
from searchengine.milvus.schema import PARAMETERS
from searchengine.vectors import FloatMatrix

K = 10
FILTERS = {
    "no filter": None,
    "half, by date": Filters(after="2010"),
    "1 in 100, by folder": Filters(under="/photos/00001"),
    "1 in 20, by camera": Filters(camera="CAMERA 7"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("bench-milvus"), help="folder for what is made; kept")
    parser.add_argument("--server", help="address of an index in Milvus that may be overwritten")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    data = clip(given.n, count=given.queries, data=given.data, cache=given.work / "vectors")
    print(f"{given.n:,} vectors of dimension {data.vectors.shape[1]} ({data.about}), {cpu_name()}")
    flat, scan = given.work / "flat.index", given.work / "scan.index"
    make_folders(data, flat, scan)
    file = given.work.absolute() / "photos.db"
    places: dict[str, str | Path] = {"a folder, exact": flat, "a folder, after compact": scan}
    for name, address in (("Milvus Lite", f"milvus://{file}"), ("a server", given.server)):
        if address:
            if name == "Milvus Lite":
                shutil.rmtree(file, ignore_errors=True)
            started = time.perf_counter()
            copy(flat, address)
            print(f"copied to {name} and verified in {time.perf_counter() - started:.0f} s")
            places[name] = address
    print(f"\n| index | queries | filter | recall@{K} | p50, ms | p95, ms |\n| --- | --- | --- | --- | --- | --- |")
    with open_index(flat) as truth:
        for name, place in places.items():
            with open_index(place) as index:
                measure(name, index, data, truth)
        with approximate(f"milvus://{file}") as index:
            measure("Milvus Lite, HNSW", index, data, truth)


def make_folders(data: DataSet, flat: Path, scan: Path) -> None:
    for folder in (flat, scan):
        shutil.rmtree(folder, ignore_errors=True)
    write_index_folder(data.vectors, flat)
    engine = connect_for_writing(IndexPaths(flat).database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE images SET taken_at = printf('20%02d-06-01T12:00:00', id % 20)")
        connection.exec_driver_sql("UPDATE images SET camera = printf('camera %d', id % 20)")
    engine.dispose()
    copy_index(flat, scan)
    compact(scan, kind="scan")


@contextmanager
def approximate(address: str) -> Iterator[PhotoIndex]:
    """With HNSW in place of the flat index, as a server would have it."""
    with open_index(address) as opened:
        assert isinstance(opened, MilvusIndex)
        collection = opened.snapshot().state.collection
    with closing(Connection(MilvusPlace.parse(address))) as connection:
        client = connection.client
        client.release_collection(collection)
        client.drop_index(collection, "embedding")
        indexes = client.prepare_index_params()
        indexes.add_index("embedding", index_type="HNSW", **PARAMETERS["HNSW"])
        started = time.perf_counter()
        client.create_index(collection, indexes)
        client.load_collection(collection)
        built_s = time.perf_counter() - started
    with open_index(address) as index:
        yield index
    print(f"\nHNSW was built in {built_s:.0f} s")


def measure(name: str, index: PhotoIndex, data: DataSet, truth: PhotoIndex) -> None:
    for filter_name, filters in FILTERS.items():
        for kind, queries in data.queries.items() if filters is None else [next(iter(data.queries.items()))]:
            recall, seconds = asked(index, queries, filters, truth)
            p50, p95 = (1000 * float(np.percentile(seconds, percent)) for percent in (50, 95))
            print(f"| {name} | {kind} | {filter_name} | {recall:.3f} | {p50:.1f} | {p95:.1f} |", flush=True)


def asked(
    index: PhotoIndex, queries: FloatMatrix, filters: Filters | None, truth: PhotoIndex
) -> tuple[float, list[float]]:
    """Recall, and the seconds of each query; the first, which warms up, is asked twice."""
    shares, seconds = [], []
    for query in (queries[:1], *np.split(queries, len(queries))):
        started = time.perf_counter()
        ((_, scores),) = index.nearest_photos(query, count=K, filters=filters)
        seconds.append(time.perf_counter() - started)
        ((_, best),) = truth.nearest_photos(query, count=K, filters=filters)
        shares.append(float(np.sum(scores >= best[-1])) / len(best))
    return statistics.mean(shares[1:]), seconds[1:]


if __name__ == "__main__":
    main()
