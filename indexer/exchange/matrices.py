"""Matrices in .npy files (numpy's format 1.0, https://numpy.org/neps/nep-0001-npy-format.html) that grow row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import UsageError
from searchengine.text import printable
from searchengine.vectors import FloatMatrix


class MatrixWriter:
    """Writes the rows of one matrix of `dim` columns, float32 or float16, as they come."""

    def __init__(self, path: Path, *, dim: int, dtype: str) -> None:
        self.rows = 0
        self._dim = dim
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = path.open("wb")
        self._write_header()

    def write(self, vectors: FloatMatrix) -> None:
        """Rows (n, dim)."""
        self._file.write(vectors.astype(self._dtype).tobytes())
        self.rows += len(vectors)

    def close(self) -> None:
        """The number of rows is known now; numpy leaves room for any in the header."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        described: dict[str, Any] = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, self._dim),
        }
        np.lib.format.write_array_header_1_0(self._file, described)


def open_matrix(path: Path) -> NDArray[np.floating[Any]]:
    """A matrix of floats (n, dim), mapped from its file. Raises UsageError where it is none, or needs pickle."""
    shown = printable(str(path))
    try:
        matrix: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UsageError(f"{shown} is missing; the files of an export belong together") from None
    except Exception as error:  # of no file, or one cut short or pickled; a header can make numpy raise almost any
        reason = printable(str(error).partition("\n")[0])[:200]
        raise UsageError(f"{shown} is no matrix of numbers ({reason}); export it again") from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        what = f"an array of {matrix.dtype} {matrix.shape}"
        raise UsageError(f"{shown} holds {what}; it must be a matrix of floats with one row a photo")
    return matrix
