"""Segment files: how they are written, and which files of an index folder belong to nobody."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import sqlalchemy as sa

from searchengine.index.layout import IndexPaths, publish
from searchengine.index.schema import ANN_VERSION, ann, schema_version, segments
from searchengine.index.segments import Ids, check_segment_size
from searchengine.models.published import sha256_of
from searchengine.vectors import FloatMatrix


def segment_file(number: int) -> str:
    return f"{number:08d}.faiss"


def write_segment(path: Path, pieces: Iterable[tuple[Ids, FloatMatrix]], *, dim: int) -> tuple[int, str]:
    """Write vectors, ids int64 (n,) and rows float32 (n, dim) a piece, under a temporary name, then publish them.

    Returns how many they are, and the sha256 of the file. Raises OSError.
    """
    index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    for ids, matrix in pieces:
        index.add_with_ids(matrix, ids)
    sha256 = write_index(index, path)
    return int(index.ntotal), sha256


def write_index(index: Any, path: Path) -> str:
    """Write a FAISS index under a temporary name, then publish it. Returns the sha256 of the file. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        faiss.write_index(index, str(temporary))
        sha256 = sha256_of(temporary)
        publish(temporary, path)
    except RuntimeError as error:  # in the words of FAISS's source code, with the system's own in brackets at the end
        temporary.unlink(missing_ok=True)  # on a full disk it matters
        reason = re.search(r"\(([^()]+)\)\s*$", str(error))
        raise OSError(reason[1] if reason else f"{path.name} could not be written") from None
    except OSError:
        temporary.unlink(missing_ok=True)
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
