"""Tensors of a file as numpy arrays, where the file is mapped into memory: only what is used is read.

The package `safetensors` copies each tensor that it hands out, 70 ms for mini's text tower, and knows no bfloat16
without torch.
"""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

# Headers of CLIPs have about 100 bytes a tensor.
MAX_HEADER_BYTES = 4 * 2**20
# Convolutions have four.
MAX_DIMENSIONS = 8


class NumberFormat(Enum):
    """What the numbers of a file are, and how numpy sees them."""

    FLOAT64 = "<f8"
    FLOAT32 = "<f4"
    FLOAT16 = "<f2"
    BFLOAT16 = "<u2"  # the upper half of a float32
    INT64 = "<i8"
    INT32 = "<i4"
    UINT8 = "|u1"
    BOOL = "|b1"

    @property
    def size_bytes(self) -> int:
        return np.dtype(self.value).itemsize

    def widened(self, values: Array) -> Array:
        """The same array, or for bfloat16, which numpy lacks, the same numbers as float32."""
        if self is not NumberFormat.BFLOAT16:
            return values
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


# Those that weights may have, and what is stored beside weights; others have no reader here.
SAFETENSORS_FORMATS = {
    "F64": NumberFormat.FLOAT64,
    "F32": NumberFormat.FLOAT32,
    "F16": NumberFormat.FLOAT16,
    "BF16": NumberFormat.BFLOAT16,
    "I64": NumberFormat.INT64,
    "I32": NumberFormat.INT32,
    "U8": NumberFormat.UINT8,
    "BOOL": NumberFormat.BOOL,
}


class SafetensorsFile:
    """https://github.com/huggingface/safetensors#format

    Raises OSError for a file that cannot be read, ValueError for one that is not of this format or not all there.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
        header_bytes = int(mapped[:8].view("<u8")[0])
        if header_bytes > min(MAX_HEADER_BYTES, len(mapped) - 8):
            raise ValueError(f"its header would have {header_bytes:,} bytes")
        self._data: Bytes = mapped[8 + header_bytes :]
        try:
            header = dict(json.loads(mapped[8 : 8 + header_bytes].tobytes()))
            noted = dict(header.pop("__metadata__", None) or {})
            self.metadata = {key: value for key, value in noted.items() if isinstance(value, str)}
            self._entries = {str(name): _Entry(entry) for name, entry in header.items()}
        except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"its header makes no sense: {type(error).__name__}: {error}") from None
        end = max((entry.end for entry in self._entries.values()), default=0)
        if end != len(self._data):
            raise ValueError(f"it has {len(self._data):,} bytes of data, not {end:,}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> Array:
        """The tensor as it is stored, mapped and not to be written to; bfloat16 as float32. Raises ValueError."""
        entry = self._entries[name]
        if entry.format is None:
            raise ValueError(f"{name} holds {entry.dtype}, of which nothing is known here")
        return entry.format.widened(self._data[entry.begin : entry.end].view(entry.format.value).reshape(entry.shape))


class _Entry:
    """Where a tensor lies: bytes `begin` to `end` of the data."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.dtype = str(entry["dtype"])[:16]
        self.format = SAFETENSORS_FORMATS.get(self.dtype)
        self.shape: tuple[int, ...] = tuple(entry["shape"])
        self.begin, self.end = entry["data_offsets"]
        if len(self.shape) > MAX_DIMENSIONS:  # their product takes its time
            raise ValueError(f"its header tells of {len(self.shape):,} dimensions, more than {MAX_DIMENSIONS}")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*self.shape, self.begin, self.end)):
            raise ValueError("its header has, for a size or a place, what is no integer from 0 to 2**63 - 1")
        if self.begin > self.end:
            raise ValueError(f"its header tells of a tensor at {self.begin} to {self.end}")
        if self.format and self.end - self.begin != math.prod(self.shape) * self.format.size_bytes:
            raise ValueError(
                f"its header gives {self.end - self.begin} bytes to {self.dtype} of shape {list(self.shape)}"
            )
