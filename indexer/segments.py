"""Segment files: how they are written, and which files of an index folder belong to nobody."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from searchengine.index.layout import IndexPaths, publish
from searchengine.index.schema import ANN_VERSION, ann, schema_version, segments
from searchengine.index.segments import LENGTH, Ids, check_segment_size, segment_head
from searchengine.models.published import sha256_of
from searchengine.vectors import FloatMatrix


def segment_file(number: int) -> str:
    return f"{number:08d}.faiss"


def write_segment(path: Path, pieces: Iterable[tuple[Ids, FloatMatrix]], *, dim: int) -> tuple[int, str]:
    """Write vectors, ids int64 (n,) and rows float32 (n, dim) a piece, under a temporary name, then publish them.

    Returns how many they are, and the sha256 of the file. Raises OSError.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        count = write_rows(temporary, pieces, dim=dim)

    sha256 = _publish(path, write)
    return count, sha256


def write_rows(path: Path, pieces: Iterable[tuple[Ids, FloatMatrix]], *, dim: int) -> int:
    """Write the file that FAISS would, piece by piece: FAISS holds all of it in memory, up to twice.

    Returns how many vectors they are. Raises OSError.
    """
    all_ids: list[Ids] = []
    with path.open("wb") as file:
        file.write(segment_head(count=0, dim=dim))
        for ids, matrix in pieces:
            if matrix.shape != (len(ids), dim):
                raise ValueError(f"{len(ids)} ids for vectors of shape {matrix.shape}, expected dimension {dim}")
            all_ids.append(ids)
            file.write(np.ascontiguousarray(matrix, dtype="<f4").data)
        count = sum(len(ids) for ids in all_ids)
        file.write(LENGTH.pack(count))
        for ids in all_ids:
            file.write(np.ascontiguousarray(ids, dtype="<i8").data)
        file.seek(0)
        file.write(segment_head(count=count, dim=dim))
    return count


def write_index(index: Any, path: Path) -> str:
    """Write a FAISS index under a temporary name, then publish it. Returns the sha256 of the file. Raises OSError."""
    import faiss

    def write(temporary: Path) -> None:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # in the words of FAISS's source code, the system's own in brackets at the end
            reason = re.search(r"\(([^()]+)\)\s*$", str(error))
            raise OSError(reason[1] if reason else f"{path.name} could not be written") from None

    return _publish(path, write)


def _publish(path: Path, write: Callable[[Path], None]) -> str:
    """Have a file written under a temporary name, then give it its own. Returns the sha256 of the file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sha256 = sha256_of(temporary)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it matters
        raise
    return sha256


def check_named_segments(connection: sa.Connection, paths: IndexPaths, *, dim: int) -> None:
    """Nothing is built on a broken index. Raises IndexFormatError for a segment that is missing or has another size."""
    for file, count in connection.execute(sa.select(segments.c.file, segments.c.count)).all():
        check_segment_size(paths.segment(file), count=count, dim=dim)


def next_id(connection: sa.Connection, table: str) -> int:
    """One past the highest id that `table` ever had: ids of dropped rows are not given out again."""
    query = sa.text("SELECT seq FROM sqlite_sequence WHERE name = :table")
    return int(connection.execute(query, {"table": table}).scalar() or 0) + 1


def orphans(paths: IndexPaths, named: Container[str]) -> list[Path]:
    """Files that this program makes, left by a process that was killed: segments not in `named`, and unfinished files.

    `named` are paths within the index. What else may lie in its folders is the user's. While another process writes,
    its newest files look like orphans.
    """
    unfinished = [paths.identity.with_name(paths.identity.name + ".tmp"), *paths.folder.glob("metadata.sqlite.tmp*")]
    unnamed = [
        file
        for folder in (paths.segments, paths.anns)
        for file in folder.glob("*")
        if file.suffix in {".faiss", ".tmp"}
        and f"{folder.name}/{file.name}" not in named
        and not file.name.startswith(".")
    ]
    return sorted(file for file in (*unfinished, *unnamed) if file.is_file())


def delete_orphans(engine: sa.Engine, paths: IndexPaths) -> None:
    """Only under the writer's lock. What cannot be deleted does no harm."""
    with engine.begin() as connection:
        named = {f"segments/{file}" for file in connection.execute(sa.select(segments.c.file)).scalars()}
        if schema_version(connection, paths.database) >= ANN_VERSION:
            named |= {f"ann/{file}" for file in connection.execute(sa.select(ann.c.file)).scalars()}
        left = orphans(paths, named)
        # Damaged tables may have lost rows without a word; what they named is not to be deleted.
        if left and connection.exec_driver_sql("PRAGMA integrity_check(segments)").scalars().all() != ["ok"]:
            return
    for file in left:
        with suppress(OSError):
            file.unlink()
