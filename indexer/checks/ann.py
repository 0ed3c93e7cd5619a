"""Whether `ann/` is what was written, and holds all vectors that it says it holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np

from indexer.checks.problems import DropRows, Problem
from searchengine.errors import IndexFormatError
from searchengine.index.ann_file import load_ann
from searchengine.index.layout import IndexPaths
from searchengine.index.schema import ANN_VERSION
from searchengine.models.published import sha256_of
from searchengine.text import printable

COMPACT_AGAIN = (
    "run `searchengine compact --rebuild`; until then searches fail, or `verify --repair` and they are slower"
)


def check_ann(connection: sqlite3.Connection, paths: IndexPaths, *, dim: int) -> Iterator[Problem]:
    """Takes memory for the codes of `ann/`."""
    if connection.execute("PRAGMA user_version").fetchone()[0] < ANN_VERSION:
        return
    query = "SELECT id, file, sha256, parameters, covariance, spread FROM ann ORDER BY id"
    rows = connection.execute(query).fetchall()
    for number, file, sha256, parameters, covariance, spread in rows:
        message = _wrong(connection, paths, str(file), sha256, parameters, covariance, spread, dim)
        if message is None and len(rows) > 1:
            message = f"is one of {len(rows)}, and there can be but one"
        if message is not None:
            yield Problem(
                kind="ann",
                object=f"ann/{printable(str(file))}",
                message=message,
                remedy=COMPACT_AGAIN,
                fix=DropRows("ann", [number]),
            )


def _wrong(
    connection: sqlite3.Connection,
    paths: IndexPaths,
    file: str,
    sha256: str,
    parameters: str,
    covariance: bytes,
    spread: bytes,
    dim: int,
) -> str | None:
    if (
        "/" in file
        or not isinstance(parameters, str)
        or not isinstance(covariance, bytes)
        or not isinstance(spread, bytes)
    ):
        return "has a row that cannot be"
    path = paths.ann(file)
    try:
        if sha256_of(path) != sha256:
            return "is damaged: its content is not what was written (another sha256)"
        ann = load_ann(path, sha256=sha256, parameters=parameters, covariance=covariance, spread=spread, dim=dim)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (IndexFormatError, ValueError, TypeError, RecursionError):
        return "is not what the tables say"
    through_id = ann.parameters.through_id
    held = np.concatenate([ann.ids_in(number) for number in range(ann.parameters.lists)])
    query = "SELECT id FROM vectors WHERE id <= ? ORDER BY id"
    expected = np.fromiter((row[0] for row in connection.execute(query, (through_id,))), np.int64)
    missing = np.setdiff1d(expected, held)
    if missing.size:
        return f"lacks {missing.size:,} of the vectors that it should hold"
    return None
