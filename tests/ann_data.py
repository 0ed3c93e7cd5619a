"""What the tests of exact and of approximate search share: vectors in clusters, tables, and brute force."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from fakes import FakeEncoder
from test_reader import add

from indexer.report import Report
from indexer.segments import segment_file, write_segment
from indexer.writer import IndexWriter
from searchengine.index.schema import images, segments, vectors
from searchengine.index.segments import Ids, Segment, load_segment
from searchengine.vectors import FloatMatrix, normalise


def random_rows(count: int, dim: int, *, seed: int) -> FloatMatrix:
    return normalise(np.random.default_rng(seed).standard_normal((count, dim)))


def clustered(count: int, dim: int, *, seed: int, clusters: int = 100) -> tuple[FloatMatrix, np.ndarray]:
    """Unit rows (count, dim) around centres that do not depend on `seed`, and the number of each one's cluster."""
    rng = np.random.default_rng(seed)
    centres = random_rows(clusters, dim, seed=77)
    of = rng.integers(0, clusters, count)
    return normalise(centres[of] + rng.standard_normal((count, dim)) / np.sqrt(dim)), of


def queries_like(rows: FloatMatrix, *, distance: float, seed: int) -> FloatMatrix:
    """`rows` moved at random by so many lengths of a vector; all at random for an infinite distance."""
    away = random_rows(*rows.shape, seed=seed)
    return away if np.isinf(distance) else normalise(rows + distance * away)


def brute_scores(rows: FloatMatrix, query: FloatMatrix) -> FloatMatrix:
    """Inner products (n,), summed in float64 and rounded once."""
    scores: FloatMatrix = (rows.astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    return scores


def brute_force(rows: FloatMatrix, ids: Ids, query: FloatMatrix, k: int) -> tuple[FloatMatrix, Ids]:
    """Scores and ids of the k best, equal ones in the order of their ids."""
    scores = brute_scores(rows, query)
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]


def recall(found: Iterable[Ids], true: Iterable[Ids]) -> float:
    return float(np.mean([np.isin(expected, ids).mean() for ids, expected in zip(found, true, strict=True)]))


def library(folder: Path, parts: list[FloatMatrix]) -> Path:
    """An index of one photo a row: row i of all has the photo and the vector of id i + 1. One segment a part.

    Only the first photo goes through the writer, since many would take long; the others are rows like it.
    """
    with IndexWriter(folder, encoder=FakeEncoder(dim=parts[0].shape[1])) as writer:
        add(writer, parts[0][:1])
        writer.commit(report=Report().as_dict(), finished=True)
        paths, engine, first = writer.paths, writer.engine, 1
        with engine.begin() as connection:
            photo = dict(connection.execute(sa.select(images)).mappings().one())
            for number, part in enumerate([parts[0][1:], *parts[1:]], start=2):
                if not len(part):
                    continue
                file, ids = segment_file(number), np.arange(first + 1, first + 1 + len(part))
                count, sha256 = write_segment(paths.segment(file), [(ids, part)], dim=part.shape[1])
                row = {"id": number, "file": file, "count": count, "sha256": sha256}
                connection.execute(sa.insert(segments).values(row))
                numbers = ids.tolist()
                contents = [hashlib.sha256(b"%d" % (i - 1)).digest() for i in numbers]
                connection.execute(
                    sa.insert(vectors),
                    [
                        {"id": i, "content_hash": content, "segment_id": number}
                        for i, content in zip(numbers, contents, strict=True)
                    ],
                )
                connection.execute(
                    sa.insert(images),
                    [{**photo, "id": i, "vector_id": i, "key": f"/photos/{i - 1}.jpg"} for i in numbers],
                )
                first += len(part)
    return folder


def segments_of(folder: Path, rows: FloatMatrix, ids: Ids, sizes: list[int]) -> list[Segment]:
    """`rows` written to files of these sizes, and mapped."""
    segments, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"{number}.faiss"
        some = slice(first, first + size)
        write_segment(path, [(ids[some], rows[some])], dim=rows.shape[1])
        segments.append(load_segment(path, count=size, dim=rows.shape[1]))
        first += size
    return segments
