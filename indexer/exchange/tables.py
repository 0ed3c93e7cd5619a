"""Facts of photos as columns of Parquet (https://parquet.apache.org), by pyarrow.

Text is UTF-8 there. So a name that is not has escapes in the column `path`, and its own bytes in `path_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from indexer.exchange.records import (
    FACTS,
    NAMES,
    PHOTOS_AT_ONCE,
    Record,
    identity_as_json,
    identity_from_json,
    record_of,
)
from indexer.replicas.rows import PhotoRow
from searchengine.errors import UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.text import printable

BYTES = "path_bytes"
IDENTITY = b"searchengine"  # its key in the metadata of a file's schema
ROWS_A_GROUP = 16_384


def arrow() -> Any:
    """The module pyarrow, with what is used of it. Raises UsageError where it is not installed."""
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            "Parquet needs the extra parquet; install it with: pip install 'searchengine[parquet]'"
        ) from None
    return pyarrow


def columns_of(path: str) -> list[tuple[str, Any]]:
    """Each column of a photo's facts with its type; `path` is what its place is called."""
    pa = arrow()
    types = {"latitude": pa.float64(), "longitude": pa.float64()}
    types |= dict.fromkeys(("size_bytes", "mtime_ns", "width", "height"), pa.int64())
    return [
        ("id", pa.int64()),
        ("store", pa.string()),
        (path, pa.string()),
        (BYTES, pa.binary()),
        ("content_hash", pa.string()),
        *((name, types.get(name, pa.string())) for name in FACTS),
        ("tags", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))),
    ]


class TableWriter:
    """Writes one file of Parquet, group of rows by group of rows."""

    def __init__(self, file: Path, columns: Sequence[tuple[str, Any]], *, identity: IndexIdentity) -> None:
        pa = arrow()
        self._schema = pa.schema(columns, metadata={IDENTITY: identity_as_json(identity)})
        texts = [field.name for field in self._schema if field.type in (pa.string(), pa.binary())]
        # No vector repeats another, so a dictionary of theirs would only be in the way.
        self._writer = pa.parquet.ParquetWriter(file, self._schema, compression="zstd", use_dictionary=texts)
        self._waiting: list[Any] = []

    def write(self, values: dict[str, Any]) -> None:
        """By name one array, or list, a column."""
        pa = arrow()
        self._waiting.append(pa.Table.from_pydict(values, schema=self._schema))
        if sum(len(table) for table in self._waiting) >= ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            table = arrow().concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table, row_group_size=len(table))
            self._waiting = []


def values_of(photos: Sequence[PhotoRow], *, path: str) -> dict[str, list[Any]]:
    """The facts of some photos, column by column."""
    records = [record_of(photo) for photo in photos]
    values = {name: [record[name] for record in records] for name in ("id", "store", "content_hash", *FACTS)}
    names = [record["path"].encode("utf-8", "surrogateescape") for record in records]
    values[path] = [name.decode("utf-8", "backslashreplace") for name in names]
    values[BYTES] = [None if shown.encode() == name else name for shown, name in zip(values[path], names, strict=True)]
    values["tags"] = [
        [{"label": label, "probability": share} for label, share in record["tags"].items()] for record in records
    ]
    return values


class TableReader:
    """Reads some files of Parquet one after the other, as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.rows = 0
        self.identity: IndexIdentity | None = None
        for file in files:
            opened = _open(file)
            self.rows += opened.metadata.num_rows
            card = (opened.schema_arrow.metadata or {}).get(IDENTITY)
            identity = identity_from_json(card, place=str(file)) if card else None
            if file != files[0] and identity != self.identity:
                raise UsageError(f"{printable(str(file))} is of another encoder than {printable(str(files[0]))}")
            self.identity = identity

    def batches(self, *, more: Sequence[str] = ()) -> Iterator[tuple[Path, list[Record], dict[str, Any]]]:
        """At most PHOTOS_AT_ONCE photos at a time: their file, their records, and the columns `more` by name."""
        for file in self._files:
            opened = _open(file)
            there = set(opened.schema_arrow.names)
            if lacking := set(more) - there:
                raise UsageError(f"{printable(str(file))} has no column {min(lacking)}; it must hold the vectors")
            names = [name for name in (*NAMES, BYTES) if name in there]
            try:
                for batch in opened.iter_batches(batch_size=PHOTOS_AT_ONCE, columns=[*names, *more]):
                    records = batch.select(names).to_pylist()
                    yield file, [_as_record(record) for record in records], {name: batch[name] for name in more}
            # Of text that is no UTF-8, times that no calendar has, or two columns of one name, Python's own tell.
            except (arrow().ArrowException, OSError, ValueError, ArithmeticError, LookupError, TypeError) as error:
                raise _damaged(file, error) from None


def matrix_of(column: Any, *, file: Path) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """A column of lists of equal length, fixed or not, as a matrix (n, dim). Raises UsageError for another one."""
    pa = arrow()
    kind = column.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise UsageError(f"{printable(str(file))}: the column of vectors is {kind}; it must be a list of floats")
    values = column.flatten()
    if column.null_count or values.null_count or len(pa.compute.list_value_length(column).unique()) > 1:
        raise UsageError(f"{printable(str(file))}: a vector is missing, or is shorter than another")
    matrix: np.ndarray[Any, np.dtype[np.floating[Any]]] = values.to_numpy(zero_copy_only=False)
    return matrix.reshape(len(column), -1)


def _open(file: Path) -> Any:
    pa = arrow()
    try:
        return pa.parquet.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UsageError:
    reason = printable(str(error).partition("\n")[0])[:200]
    return UsageError(f"{printable(str(file))} cannot be read as Parquet ({reason}); export it again")


def _as_record(record: Record) -> Record:
    name = record.pop(BYTES, None)
    if isinstance(name, bytes):
        place = next((column for column in ("path", "image_path") if column in record), "path")
        record[place] = name.decode("utf-8", "surrogateescape")
    tags = record.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, dict) and {"label", "probability"} <= tag.keys() for tag in tags):
        record["tags"] = {tag["label"]: tag["probability"] for tag in tags}
    return record
