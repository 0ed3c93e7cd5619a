"""Whether the segment files of an index are what was written, and hold just the vectors that the tables name."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from indexer.checks.problems import INDEX_AGAIN, REPAIR_ALONE, DropRows, Fix, Problem, RewriteSegments, SetCount
from searchengine.errors import IndexFormatError
from searchengine.index.layout import IndexPaths
from searchengine.index.segments import Ids, Segment, load_segment
from searchengine.models.published import sha256_of
from searchengine.text import printable
from searchengine.vectors import UNIT_TOLERANCE

ROWS_PER_CHECK = 16_384

NO_IDS: Ids = np.empty(0, dtype=np.int64)


def check_segments(connection: sqlite3.Connection, paths: IndexPaths, *, dim: int) -> Iterator[Problem]:
    """Memory does not grow with the index.

    A vector's id is unique in its table, so it is unique among all segments if each holds just what its rows name.
    """
    named = _ids_by_segment(connection)
    segment_id, ids = next(named, (None, NO_IDS))
    # A name that leads out of the folder is nothing to follow; there is a rule for it.
    query = "SELECT id, file, count, sha256 FROM segments WHERE instr(file, '/') = 0 ORDER BY id"
    for number, file, count, sha256 in connection.execute(query):
        while segment_id is not None and segment_id < number:  # vectors of no segment, for which there is a rule
            segment_id, ids = next(named, (None, NO_IDS))
        expected = ids if segment_id == number else NO_IDS
        yield from _check(paths.segment(str(file)), number, count, sha256, expected, dim)


def _ids_by_segment(connection: sqlite3.Connection) -> Iterator[tuple[int, Ids]]:
    query = "SELECT segment_id, id FROM vectors WHERE typeof(segment_id) = 'integer' ORDER BY segment_id, id"
    for segment_id, rows in groupby(connection.execute(query), key=itemgetter(0)):
        yield segment_id, np.fromiter((row[1] for row in rows), np.int64)


def _check(path: Path, number: int, count: int, sha256: str, expected: Ids, dim: int) -> Iterator[Problem]:
    def problem(message: str, remedy: str = INDEX_AGAIN, fix: Fix | None = None) -> Problem:
        return Problem(
            kind="segment", object=f"segments/{printable(path.name)}", message=message, remedy=remedy, fix=fix
        )

    drop = DropRows("segments", [number])
    try:
        actual = sha256_of(path)
    except FileNotFoundError:
        yield problem("is missing", fix=drop)
        return
    except OSError as error:
        yield problem(f"cannot be read: {error.strerror}", "check the disk, and the permissions of the file")
        return
    if actual != sha256:
        yield problem("is damaged: its content is not what was written (another sha256)", fix=drop)
        return
    try:
        segment = load_segment(path, count=None, dim=dim)
    except IndexFormatError as error:
        yield problem(str(error).removeprefix(printable(str(path))).partition(";")[0].strip(), fix=drop)
        return
    held = np.sort(segment.ids)
    if len(held) != count:
        yield problem(
            f"holds {len(held):,} vectors, but {count:,} are recorded", REPAIR_ALONE, SetCount(number, len(held))
        )
    if np.any(held[1:] == held[:-1]):
        yield problem("holds several vectors of one id", fix=drop)
        return
    missing, unnamed = np.setdiff1d(expected, held, True), np.setdiff1d(held, expected, True)
    if missing.size:
        yield problem(f"lacks {missing.size:,} of its vectors", fix=DropRows("vectors", missing.tolist()))
    if unnamed.size:
        yield problem(f"holds {unnamed.size:,} vectors that are not in the tables", REPAIR_ALONE, RewriteSegments())
    wrong = np.intersect1d(_not_unit(segment), expected)
    if wrong.size:
        yield problem(f"holds {wrong.size:,} vectors whose length is not 1", fix=DropRows("vectors", wrong.tolist()))


def _not_unit(segment: Segment) -> Ids:
    """The ids of vectors that are not finite or not of length 1."""
    matrix, wrong = segment.matrix, [NO_IDS]
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(matrix[start : start + ROWS_PER_CHECK], axis=1)
        # A comparison with what is not a number is false.
        good = np.abs(lengths - 1) <= UNIT_TOLERANCE
        wrong.append(segment.ids[start : start + ROWS_PER_CHECK][~good])
    return np.concatenate(wrong)
