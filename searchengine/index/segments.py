"""One segment of an index: an immutable FAISS file, mapped into memory.

It is read here without FAISS, which would build a hash table of all ids, a second a million, before the first query.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import IndexFormatError
from searchengine.index.layout import REPAIR
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

Ids = NDArray[np.int64]

# As FAISS's index_write.cpp lays it out: IndexIDMap2 ("IxM2") over IndexFlatIP ("IxFI"), little endian.
# name, dimension, count, two unused, is_trained, metric
HEADER = struct.Struct("<4siqqq?i")
LENGTH = struct.Struct("<Q")
MAP_NAME, FLAT_NAME = b"IxM2", b"IxFI"
INNER_PRODUCT = 0
UNUSED = 2**20
ROWS_START = 2 * HEADER.size + LENGTH.size


@dataclass(frozen=True)
class Segment:
    """Row i of `matrix`, float32 (n, dim), mapped from the file, is the vector with id `ids[i]`."""

    file: str
    matrix: FloatMatrix
    ids: Ids


def load_segment(path: Path, *, count: int | None, dim: int | None) -> Segment:
    """Map a segment into memory. Raises IndexFormatError where it is missing, damaged, or not what its row says.

    `count` and `dim` are what it should hold; None where any will do.
    """
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            head = file.read(ROWS_START)
            size_bytes = file.seek(0, 2)
    except FileNotFoundError:
        raise IndexFormatError(f"{shown} is missing; {REPAIR}") from None
    except OSError as error:
        raise IndexFormatError(f"{shown} cannot be read: {error.strerror}; {REPAIR}") from None
    if head[:4] != MAP_NAME[: len(head)]:
        raise IndexFormatError(f"{shown} is no segment of an index; {REPAIR}")
    if len(head) < ROWS_START:
        raise IndexFormatError(f"{shown} cannot be read: it is cut short or damaged; {REPAIR}")
    _, map_dim, held, _, _, _, map_metric = HEADER.unpack_from(head)
    flat_name, flat_dim, rows, _, _, _, metric = HEADER.unpack_from(head, HEADER.size)
    if flat_name != FLAT_NAME:
        raise IndexFormatError(f"{shown} is no segment of an index; {REPAIR}")
    count, dim = held if count is None else count, map_dim if dim is None else dim
    if (held, map_dim, map_metric) != (count, dim, INNER_PRODUCT):
        raise IndexFormatError(
            f"{shown} holds {held} vectors of dimension {map_dim}, expected {count} of {dim}; {REPAIR}"
        )
    (values,) = LENGTH.unpack_from(head, 2 * HEADER.size)
    ids_start = ROWS_START + 4 * count * dim
    possible = count >= 0 and dim >= 1
    consistent = possible and (rows, flat_dim, metric, values) == (count, dim, INNER_PRODUCT, count * dim)
    if not consistent or size_bytes != segment_bytes(count=count, dim=dim):
        raise IndexFormatError(f"{shown} cannot be read: it is cut short or damaged; {REPAIR}")
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):
        raise IndexFormatError(f"{shown} cannot be read: it is cut short or damaged; {REPAIR}") from None
    if len(mapped) != size_bytes or LENGTH.unpack(mapped[ids_start : ids_start + LENGTH.size].tobytes()) != (count,):
        raise IndexFormatError(f"{shown} cannot be read: it is cut short or damaged; {REPAIR}")
    matrix: FloatMatrix = np.ndarray((count, dim), np.float32, buffer=mapped, offset=ROWS_START)
    ids: Ids = np.ndarray(count, np.int64, buffer=mapped, offset=ids_start + LENGTH.size)
    return Segment(file=path.name, matrix=matrix, ids=ids)


def check_segment_size(path: Path, *, count: int, dim: int) -> None:
    """Raises IndexFormatError where a segment is missing or cannot be what its row says; it is not read for that."""
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise IndexFormatError(f"{printable(str(path))} is missing; {REPAIR}") from None
    if size_bytes != segment_bytes(count=count, dim=dim):
        raise IndexFormatError(
            f"{printable(str(path))} has {size_bytes:,} bytes, which is not what {count} vectors of dimension {dim} "
            f"take; {REPAIR}"
        )


def segment_head(*, count: int, dim: int) -> bytes:
    """What stands before the rows. After them come the number of ids, as LENGTH, and the ids, int64."""
    map_head = HEADER.pack(MAP_NAME, dim, count, UNUSED, UNUSED, True, INNER_PRODUCT)
    flat_head = HEADER.pack(FLAT_NAME, dim, count, UNUSED, UNUSED, True, INNER_PRODUCT)
    return map_head + flat_head + LENGTH.pack(count * dim)


def segment_bytes(*, count: int, dim: int) -> int:
    """What the file of a segment takes."""
    return ROWS_START + 4 * count * dim + LENGTH.size + 8 * count
