"""Building `ann/`: which kind suits an index, and the codes of all its vectors in lists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, NamedTuple

import faiss
import numpy as np
import sqlalchemy as sa

from indexer.lock import LockedIndex
from indexer.segments import delete_orphans, next_id, write_index
from indexer.tuning import tuned
from searchengine.errors import IndexFormatError, UsageError
from searchengine.index.ann import Ann, AnnParameters, resident_bytes
from searchengine.index.ann_file import chained
from searchengine.index.layout import REPAIR, IndexIdentity, IndexPaths, index_folder, make_folder
from searchengine.index.schema import ANN_ROW, ann, images, open_read_only, segments
from searchengine.index.segments import load_segment
from searchengine.index.table import Rows, VectorTable
from searchengine.vectors import FloatMatrix

KINDS = ("auto", "flat", "scan", "ivf")
DEFAULT_RECALL = 0.99

# Below the first, comparing every vector takes a few milliseconds; below the second, reading every code does.
SCAN_FROM, IVF_FROM = 20_000, 200_000

SCAN_CELLS = 16
POINTS_PER_CENTROID = 64
KMEANS_ROUNDS = 8
SAMPLE_SIZE = 100_000
ROWS_PER_BLOCK = 65_536
SEED = 0

POINTS_PER_CODE = 16  # 4 bits
NORMAL_SAMPLES = 50_000
# The same memory holds finer codes of fewer dimensions or coarser codes of more.
DIMENSIONS_PER_CODE = (2, 4)
# The vectors of a cell are split into lists by how far they lie from its centroid, each with a scale for its codes: one
# scale for all would put the far ones too near, and those are often the best. These shares are nearer than each bound;
# the furthest differ most from each other. Each list is filled up to 32 codes, so of many cells there are fewer lists.
LENGTHS = {"scan": (0.3, 0.6, 0.85, 0.95, 0.985, 0.996), "ivf": (0.3, 0.6, 0.85, 0.97)}
MAX_SCALE = 10.0  # float32 has room for no more beside a centroid


def choose(kind: str, *, count: int, dim: int, memory_bytes: int | None) -> tuple[str, int]:
    """The kind that `kind` means for `count` vectors, and the bytes of a code; 0 for flat, which has none.

    Raises UsageError where `kind` was asked for by name and does not fit into `memory_bytes`.
    """
    if kind not in KINDS:
        raise UsageError(f"the kind of index is {kind!r}; it must be one of {', '.join(KINDS)}")
    chosen = kind
    if kind == "auto":
        chosen = "flat" if count < SCAN_FROM else "scan" if count < IVF_FROM else "ivf"
    if chosen == "flat" or not count or (kind == "auto" and dim % 2):
        return "flat", 0
    sizes = [_code_bytes(dim, dimensions) for dimensions in DIMENSIONS_PER_CODE]
    for code_bytes in sizes:
        if memory_bytes is None or count * resident_bytes(code_bytes) <= memory_bytes:
            return chosen, code_bytes
    if kind == "auto":
        return "flat", 0
    needed = count * resident_bytes(min(sizes))
    raise UsageError(
        f"an index of kind {kind} over {count:,} vectors takes {needed / 2**20:,.0f} MiB of memory, more than "
        f"{(memory_bytes or 0) / 2**20:,.0f} MiB; allow more, or take the kind flat"
    )


def compared_one_by_one(index: str | os.PathLike[str]) -> int:
    """How many vectors a search compares one by one: all of them, or those newer than `ann/`."""
    with closing(open_read_only(IndexPaths(index_folder(index)).database)) as connection:
        (vectors,) = connection.execute("SELECT coalesce(sum(count), 0) FROM segments").fetchone()
        held = connection.execute("SELECT parameters FROM ann").fetchone()
    count = _parameters(held[0]).get("count") if held else 0
    return max(0, int(vectors) - (count if isinstance(count, int) else 0))


def check_choice(locked: LockedIndex, identity: IndexIdentity, *, kind: str, memory_bytes: int | None) -> None:
    """Raises UsageError for a kind that does not fit, before anything is changed."""
    with locked.engine.begin() as connection:
        count = connection.execute(sa.select(sa.func.count(sa.distinct(images.c.vector_id)))).scalar_one()
    choose(kind, count=count, dim=identity.dim, memory_bytes=memory_bytes)


def update_ann(
    locked: LockedIndex,
    identity: IndexIdentity,
    *,
    kind: str,
    memory_bytes: int | None,
    recall: float,
    rebuild: bool,
    on_progress: Callable[[int, int], None],
) -> AnnParameters | None:
    """Give the index the `ann/` that `choose` chooses, or none; returns it if it was built now.

    There must be no vectors of no photo: `compact` drops them first. Raises OSError, UsageError.
    """
    with locked.engine.begin() as connection:
        rows = connection.execute(sa.select(segments.c.file, segments.c.count).order_by(segments.c.id)).all()
        before = connection.execute(sa.select(*ANN_ROW)).all()
    loaded = [load_segment(locked.paths.segment(file), count=count, dim=identity.dim) for file, count in rows]
    table = VectorTable(loaded, dim=identity.dim)
    chosen, code_bytes = choose(kind, count=len(table), dim=identity.dim, memory_bytes=memory_bytes)
    wanted = {
        "kind": chosen,
        "code_bytes": code_bytes,
        "through_id": int(table.ids.max(initial=0)),
        "count": len(table),
        "recall_target": recall,
    }
    if chosen == "flat":
        if before:
            with locked.engine.begin() as connection:
                connection.execute(sa.delete(ann))
        built = None
    elif not rebuild and len(before) == 1 and wanted.items() <= _parameters(before[0].parameters).items():
        return None
    else:
        built = build_ann(locked, table, kind=chosen, code_bytes=code_bytes, recall=recall, on_progress=on_progress)
    delete_orphans(locked.engine, locked.paths)
    return built


def _parameters(recorded: str) -> dict[str, Any]:
    """Of a row of the table `ann`; none where they are damaged, and it is built anew."""
    try:
        fields = json.loads(recorded)
    except (TypeError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def build_ann(
    locked: LockedIndex,
    table: VectorTable,
    *,
    kind: str,
    code_bytes: int,
    recall: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnnParameters:
    """Build `ann/` over the living vectors of `table` and put it in the place of the one before, in one transaction.

    Takes memory for the codes, and for some 100,000 vectors. Raises OSError where it cannot be written.
    """
    codes, rotation, covariance, spread, scales = _encode(
        table, kind=kind, code_bytes=code_bytes, on_progress=on_progress
    )
    parameters = AnnParameters(
        kind=kind,
        through_id=int(table.ids.max(initial=0)),
        count=table.living,
        code_bytes=code_bytes,
        lists=codes.nlist,
        scales=scales,
        miss=0.0,
        margin=0.0,
        recall_target=recall,
        recall_at_10=0.0,
    )
    untuned = Ann(codes, rotation=rotation, covariance=covariance, spread=spread, parameters=parameters)
    parameters = tuned(untuned, table)
    with locked.engine.begin() as connection:
        number = next_id(connection, "ann")
    path = locked.paths.ann(f"{number:08d}.faiss")
    make_folder(path.parent)
    sha256 = write_index(chained(codes, rotation=rotation), path)
    row = {
        "id": number,
        "file": path.name,
        "sha256": sha256,
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": parameters.as_dict(),
        "covariance": covariance.tobytes(),
        "spread": spread.tobytes(),
    }
    with locked.engine.begin() as connection:
        connection.execute(sa.delete(ann))
        connection.execute(sa.insert(ann).values(row))
    return parameters


class _Encoded(NamedTuple):
    """The codes in lists; rotation (dim, dim), covariance (dim, dim) of the residuals, spread (lists,), scales."""

    codes: Any
    rotation: FloatMatrix
    covariance: FloatMatrix
    spread: FloatMatrix
    scales: tuple[float, ...]


def _encode(table: VectorTable, *, kind: str, code_bytes: int, on_progress: Callable[[int, int], None]) -> _Encoded:
    rng = np.random.default_rng(SEED)
    dim = table.dim
    rotation = np.ascontiguousarray(np.linalg.qr(rng.standard_normal((dim, dim)))[0], dtype=np.float32)
    living = table.living_rows
    cells = _cell_count(kind, len(living))
    size = min(len(living), max(SAMPLE_SIZE, POINTS_PER_CENTROID * cells))
    sample = table.gather(np.sort(rng.choice(living, size, replace=False))) @ rotation.T
    if not np.isfinite(sample).all():
        raise IndexFormatError(f"the index holds vectors that are not finite; {REPAIR}")
    centroids = _centroids(sample, kind=kind, cells=cells, rng=rng)
    quantizer = faiss.IndexFlatL2(dim)
    quantizer.add(centroids)

    residuals, _ = _residuals(sample[:SAMPLE_SIZE], quantizer)
    covariance = np.ascontiguousarray(residuals.T @ residuals / len(residuals), dtype=np.float32)
    lengths = np.linalg.norm(residuals, axis=1)
    bounds = np.unique(np.quantile(lengths, LENGTHS[kind]))
    of_length = np.searchsorted(bounds, lengths)
    counts = np.maximum(np.bincount(of_length, minlength=len(bounds) + 1), 1)
    squares = np.bincount(of_length, weights=lengths**2, minlength=len(counts)) / counts  # (lengths,)
    squares = np.maximum(squares, max(squares.max() / MAX_SCALE**2, 1e-12))
    scales = np.sqrt(squares / squares[0])

    lists = len(scales) * cells
    codes: Any = faiss.IndexIVFPQFastScan(quantizer, dim, lists, 2 * code_bytes, 4, faiss.METRIC_INNER_PRODUCT)
    codes.by_residual = True
    points, distortion = _points_of_a_normal(dim // (2 * code_bytes))
    points = points * np.sqrt(squares[0] / dim)
    _set_points(codes, points)
    codes.is_trained = True
    numbered = [_numbered(centroids, first=number * cells) for number in range(len(scales))]
    sums, vectors = squares.repeat(cells), np.ones(lists)  # a list of few vectors is taken for a usual one
    for done, rows in _blocks(living):
        rotated = table.gather(rows) @ rotation.T
        residuals, cell = _residuals(rotated, quantizer)
        lengths = np.linalg.norm(residuals, axis=1)
        of_length = np.searchsorted(bounds, lengths)
        numbers = of_length * cells + cell
        vectors += np.bincount(numbers, minlength=lists)
        sums += np.bincount(numbers, weights=lengths**2, minlength=lists)
        # Moved towards its centroid, a vector stays in its cell.
        rotated -= residuals * (1 - 1 / scales[of_length, None]).astype(np.float32)
        for number, quantizer_of_length in enumerate(numbered):
            codes.quantizer = quantizer_of_length
            some = of_length == number
            codes.add_with_ids(rotated[some], table.ids[rows[some]])
        on_progress(done, len(living))
    codes.quantizer = quantizer
    spread = np.sqrt(sums / vectors / np.mean(squares)).astype(np.float32)
    # A point stands for the mean of its cell, which is nearer to the centroid than what it stands for. Moved outward, a
    # score by code is right on average for every vector, also for those few that lie just where the query does.
    _set_points(codes, points / (1 - distortion))
    return _Encoded(codes, rotation, covariance, spread, tuple(scales.tolist()))


def _residuals(vectors: FloatMatrix, quantizer: Any) -> tuple[FloatMatrix, Rows]:
    """How `vectors` (n, dim) differ from their nearest centroids (n, dim), and the numbers of those (n,)."""
    cell = quantizer.search(vectors, 1)[1][:, 0]
    return vectors - quantizer.reconstruct_n(0, quantizer.ntotal)[cell], cell


def _numbered(centroids: FloatMatrix, *, first: int) -> Any:
    """An index of `centroids` that numbers them from `first`."""
    numbered = faiss.IndexIDMap2(faiss.IndexFlatL2(centroids.shape[1]))
    numbered.add_with_ids(centroids, np.arange(first, first + len(centroids)))
    return numbered


def _set_points(codes: Any, points: FloatMatrix) -> None:
    """Let each part of a code mean one of the same `points` (16, dimensions)."""
    faiss.copy_array_to_vector(np.tile(points.ravel(), codes.pq.M).astype(np.float32), codes.pq.centroids)


def _cell_count(kind: str, count: int) -> int:
    wanted = SCAN_CELLS if kind == "scan" else 2 ** round(np.log2(max(count, 1)) / 2)
    return int(max(1, min(wanted, count // POINTS_PER_CENTROID)))


def _centroids(sample: FloatMatrix, *, kind: str, cells: int, rng: np.random.Generator) -> FloatMatrix:
    """(cells, dim): some of the vectors for `scan`, which reads all lists anyway; k-means for `ivf`."""
    if kind == "scan" or cells == 1:
        chosen: FloatMatrix = sample[np.sort(rng.choice(len(sample), cells, replace=False))]
        return chosen
    clustering = faiss.Kmeans(
        sample.shape[1], cells, niter=KMEANS_ROUNDS, seed=SEED + 1, max_points_per_centroid=POINTS_PER_CENTROID
    )
    clustering.train(sample)
    return np.asarray(clustering.centroids)


def _points_of_a_normal(dimensions: int) -> tuple[FloatMatrix, float]:
    """The (16, dimensions) points that stand best for a standard normal distribution, by k-means; and the share of its
    variance that is lost by that."""
    samples = np.random.default_rng(SEED).standard_normal((NORMAL_SAMPLES, dimensions), dtype=np.float32)
    clustering = faiss.Kmeans(
        dimensions, POINTS_PER_CODE, niter=40, seed=SEED + 1, max_points_per_centroid=NORMAL_SAMPLES
    )
    clustering.train(samples)
    points = np.asarray(clustering.centroids)
    return points, float(clustering.index.search(samples, 1)[0].mean()) / dimensions


def _code_bytes(dim: int, dimensions: int) -> int:
    """What 4 bits for each `dimensions` dimensions take, or for fewer, where `dim` cannot be divided so."""
    while dim % (2 * dimensions):
        dimensions -= 1
        if not dimensions:
            raise UsageError(f"vectors of dimension {dim} have no codes; take the kind flat")
    return dim // dimensions // 2


def _blocks(rows: Rows) -> Iterator[tuple[int, Rows]]:
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        some = rows[start : start + ROWS_PER_BLOCK]
        yield start + len(some), some
