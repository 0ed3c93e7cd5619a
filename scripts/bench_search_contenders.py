"""Who takes part in scripts/bench_search.py: each is built from a matrix, saved, and opened again from its file.

What they answer are rows of the matrix, best first; -1 where one found too few.
"""

import importlib.util
import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from indexer.compact import SEGMENT_BYTES, compact
from indexer.segments import segment_file, write_segment
from searchengine.index.layout import IndexIdentity, IndexPaths, write_identity
from searchengine.index.reader import Index
from searchengine.index.schema import connect_for_writing, migrate
from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix

M, EF_CONSTRUCTION = 32, 100  # of every HNSW: 32 links a node, 64 in the lowest layer
EFS = (16, 32, 64, 128, 256, 512, 1024)
NPROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RERANKED = 10  # times k
ROWS_AT_ONCE = 16_384


class Contender(ABC):
    """Kept at `path`. `settings` trade speed for recall; one that `is_exact` has none. A search uses `threads`."""

    name = ""
    package = "faiss"
    settings: tuple[int, ...] = (0,)
    setting_name = ""
    is_exact = False
    threads = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Any = None

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec(cls.package) is not None

    @abstractmethod
    def build(self, vectors: FloatMatrix) -> None:
        """From unit rows float32 (n, dim)."""

    @abstractmethod
    def save(self) -> None: ...

    @abstractmethod
    def open(self) -> None: ...

    def close(self) -> None:
        self.index = None

    @abstractmethod
    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        """Rows int64 (q, k)."""


class Faiss(Contender):
    def save(self) -> None:
        faiss.write_index(self.index, str(self.path))

    def open(self) -> None:
        self.index = faiss.read_index(str(self.path))

    def _add(self, vectors: FloatMatrix) -> None:
        for rows in pieces(vectors):
            self.index.add(rows)


class FaissFlat(Faiss):
    name, is_exact = "faiss flat", True

    def build(self, vectors: FloatMatrix) -> None:
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self._add(vectors)

    def matrix(self) -> FloatMatrix:
        """Without a copy."""
        n, dim = self.index.ntotal, self.index.d
        return faiss.rev_swig_ptr(self.index.get_xb(), n * dim).reshape(n, dim)

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        return self.index.search(queries, k)[1]

    def search_bitmap(self, queries: FloatMatrix, k: int, bitmap: np.ndarray) -> Ids:
        """Only among rows whose bit is set in uint8 (n / 8,), lowest bits first."""
        return self.index.search(queries, k, params=faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bitmap)))[1]


class Numpy(FaissFlat):
    name, package = "numpy", "numpy"

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        scores = queries @ self.matrix().T
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)


class FaissIvf(Faiss):
    """Inverted lists of 8-bit codes, then exact scores of the best of them, from the `matrix` of another contender."""

    name, settings, setting_name = "faiss IVF-SQ8 + rerank", NPROBES, "nprobe"
    matrix: FloatMatrix | None = None

    def build(self, vectors: FloatMatrix) -> None:
        n, dim = vectors.shape
        lists, kind = min(1024, max(1, n // 100)), faiss.ScalarQuantizer.QT_8bit
        centres = faiss.IndexFlatIP(dim)
        self.index = faiss.IndexIVFScalarQuantizer(centres, dim, lists, kind, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(n, min(n, 64 * lists), replace=False)
        self.index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
        self._add(vectors)

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        found = self.index.search(queries, RERANKED * k, params=faiss.SearchParametersIVF(nprobe=setting))[1]
        if self.matrix is None:
            return found[:, :k]
        scores = (self.matrix[found] @ queries[:, :, None])[:, :, 0]
        scores[found < 0] = -np.inf
        return np.take_along_axis(found, np.argsort(-scores, axis=1)[:, :k], axis=1)


class FaissHnsw(Faiss):
    name, settings, setting_name = f"faiss HNSW{M}", EFS, "ef"

    def build(self, vectors: FloatMatrix) -> None:
        self.index = faiss.IndexHNSWFlat(vectors.shape[1], M, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = EF_CONSTRUCTION
        self._add(vectors)

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        return self.index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=max(k, setting)))[1]


class Hnswlib(Contender):
    name, package, settings, setting_name = "hnswlib", "hnswlib", EFS, "ef"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dim_file = path.with_name(f"{path.name} dim")  # its own file does not say

    def build(self, vectors: FloatMatrix) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", vectors.shape[1])
        self.index.init_index(len(vectors), M=M, ef_construction=EF_CONSTRUCTION, random_seed=0)
        for rows in pieces(vectors):
            self.index.add_items(rows, num_threads=self.threads)

    def save(self) -> None:
        self.index.save_index(str(self.path))
        self.dim_file.write_text(str(self.index.dim))

    def open(self) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", int(self.dim_file.read_text()))
        self.index.load_index(str(self.path))

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        self.index.set_ef(max(k, setting))
        return self.index.knn_query(queries, k, num_threads=self.threads)[0].astype(np.int64)


class Usearch(Contender):
    name, package, settings, setting_name = "usearch", "usearch", EFS, "ef"

    def build(self, vectors: FloatMatrix) -> None:
        from usearch.index import Index as UsearchIndex

        size = {"connectivity": M, "expansion_add": EF_CONSTRUCTION}
        self.index = UsearchIndex(ndim=vectors.shape[1], metric="ip", dtype="f32", **size)
        for number, rows in enumerate(pieces(vectors)):
            self.index.add(np.arange(len(rows)) + number * ROWS_AT_ONCE, rows, threads=self.threads)

    def save(self) -> None:
        self.index.save(str(self.path))

    def open(self) -> None:
        from usearch.index import Index as UsearchIndex

        self.index = UsearchIndex.restore(str(self.path))

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        self.index.expansion_search = max(k, setting)
        found = self.index.search(queries, k, threads=self.threads)
        return found.keys.astype(np.int64).reshape(len(queries), -1)


class Ours(Contender):
    """An index folder, compacted to a kind and searched through `Index`. The ids of its vectors are their rows + 1.

    `own_recall` is the recall@10 that it says it has.
    """

    package = "searchengine"

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path)
        self.kind, self.name, self.is_exact = kind, f"ours {kind}", kind == "flat"
        self.own_recall = 1.0

    def build(self, vectors: FloatMatrix) -> None:
        """The folder is one of these vectors already."""
        compact(self.path, kind=self.kind)

    def save(self) -> None:
        """It is."""

    def open(self) -> None:
        """Raises RuntimeError where the index is not what it was to be."""
        self.index = Index(self.path)
        ann = self.index.snapshot().ann
        kind, self.own_recall = (ann.parameters.kind, ann.parameters.recall_at_10) if ann else ("flat", 1.0)
        if kind != self.kind:
            raise RuntimeError(f"{self.path} was to become {self.kind}, but is {kind}")

    def close(self) -> None:
        self.index.close()
        self.index = None

    def search(self, queries: FloatMatrix, k: int, setting: int) -> Ids:
        return self.index.search(queries, k=k)[1] - 1

    def search_among(self, queries: FloatMatrix, k: int, ids: Ids) -> Ids:
        """Only among the vectors of these ids, as SQL finds them: rising, and remembered while the filter stays."""
        ids.flags.writeable = False
        return self.index.search(queries, k=k, among=ids)[1] - 1


class Rows(Protocol):
    """What a matrix float32 (n, dim) is, as far as runs of its rows are taken one after the other."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, run: slice, /) -> FloatMatrix: ...


def write_index_folder(vectors: Rows, folder: Path) -> None:
    """What indexing n photos leaves when small segments have been merged."""
    paths, (n, dim) = IndexPaths(folder), vectors.shape
    paths.segments.mkdir(parents=True)
    engine = connect_for_writing(paths.database)
    migrate(engine, paths.database)
    write_identity(folder, IndexIdentity(encoder="bench", fingerprint="0" * 64, dim=dim))
    capacity = SEGMENT_BYTES // (4 * dim)
    with engine.begin() as connection:
        for number, first in enumerate(range(0, n, capacity), start=1):
            some, file = vectors[first : first + capacity], segment_file(number)
            ids = np.arange(first + 1, first + 1 + len(some), dtype=np.int64)
            count, sha256 = write_segment(paths.segment(file), zip(pieces(ids), pieces(some), strict=True), dim=dim)
            row = (number, file, count, sha256)
            connection.exec_driver_sql('INSERT INTO segments (id, file, "count", sha256) VALUES (?, ?, ?, ?)', row)
            connection.exec_driver_sql(
                "INSERT INTO vectors (id, content_hash, segment_id) VALUES (?, ?, ?)",
                [(i, i.to_bytes(32, "big"), number) for i in ids.tolist()],
            )
            connection.exec_driver_sql(
                "INSERT INTO images (id, store, key, size_bytes, mtime_ns, width, height, vector_id) "
                "VALUES (?, ?, ?, 100000, 0, 640, 480, ?)",
                [(i, b"local", f"/photos/{i // 1000:05}/{i % 1000:03}.jpg".encode(), i) for i in ids.tolist()],
            )
    engine.dispose()


def copy_index(folder: Path, copy: Path) -> None:
    """The same index again. Segments never change, so both share their files."""
    shutil.copytree(folder, copy, copy_function=os.link, ignore=shutil.ignore_patterns("metadata.sqlite*", "lock"))
    source, target = (sqlite3.connect(IndexPaths(path).database) for path in (folder, copy))
    source.backup(target)
    source.close()
    target.close()


def pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield np.ascontiguousarray(rows[start : start + ROWS_AT_ONCE])
