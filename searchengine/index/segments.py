"""One segment of an index: an immutable FAISS file, mapped into memory and searched exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from searchengine.errors import IndexFormatError
from searchengine.index.layout import REPAIR
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

Ids = NDArray[np.int64]

MAX_HEADER_BYTES = 1024


@dataclass(frozen=True)
class Segment:
    """One immutable FAISS file. Row i of its matrix is the vector with id `ids[i]`."""

    file: str
    faiss_index: Any
    ids: Ids

    def vectors(self) -> FloatMatrix:
        """The stored matrix (n, dim), without a copy. Valid while the segment is."""
        flat: Any = faiss.downcast_index(self.faiss_index.index)
        floats: FloatMatrix = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        return floats

    def nearest(self, queries: FloatMatrix, *, k: int, parameters: Any = None) -> tuple[FloatMatrix, Ids]:
        """Scores and ids of at least the k best, each (q, k'). Of equal scores FAISS keeps whichever it likes, so it is
        asked for more until what it leaves out is worse than the k-th: then no choice is left to it."""
        count = len(self.ids)
        asked = k + 1
        while True:
            asked = min(asked, count)
            scores, ids = self.faiss_index.search(queries, asked, params=parameters)
            if asked == count or np.all((scores[:, k - 1] > scores[:, -1]) | (ids[:, -1] < 0)):
                return scores, ids
            asked *= 2


def load_segment(path: Path, *, count: int | None, dim: int | None) -> Segment:
    """Map a segment into memory. Raises IndexFormatError where it is missing, damaged, or not what its row says.

    `count` and `dim` are what it should hold; None where any will do.
    """
    try:
        path.open("rb").close()  # FAISS tells what is wrong in the words of its source code
        loaded: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except FileNotFoundError:
        raise IndexFormatError(f"{printable(str(path))} is missing; {REPAIR}") from None
    except OSError as error:
        raise IndexFormatError(f"{printable(str(path))} cannot be read: {error.strerror}; {REPAIR}") from None
    except (RuntimeError, MemoryError):
        raise IndexFormatError(f"{printable(str(path))} cannot be read: it is cut short or damaged; {REPAIR}") from None
    if not isinstance(loaded, faiss.IndexIDMap2) or not isinstance(
        faiss.downcast_index(loaded.index), faiss.IndexFlatIP
    ):
        raise IndexFormatError(f"{printable(str(path))} is no segment of an index; {REPAIR}")
    count, dim = loaded.ntotal if count is None else count, loaded.d if dim is None else dim
    if (loaded.ntotal, loaded.d, loaded.metric_type) != (count, dim, faiss.METRIC_INNER_PRODUCT):
        raise IndexFormatError(
            f"{printable(str(path))} holds {loaded.ntotal} vectors of dimension {loaded.d}, expected "
            f"{count} of {dim}; {REPAIR}"
        )
    return Segment(file=path.name, faiss_index=loaded, ids=faiss.vector_to_array(loaded.id_map))


def check_segment_size(path: Path, *, count: int, dim: int) -> None:
    """Raises IndexFormatError where a segment is missing or cannot be what its row says; it is not read for that."""
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise IndexFormatError(f"{printable(str(path))} is missing; {REPAIR}") from None
    content_bytes = count * (4 * dim + 8)  # a row and its id
    if not content_bytes < size_bytes < content_bytes + MAX_HEADER_BYTES:
        raise IndexFormatError(
            f"{printable(str(path))} has {size_bytes:,} bytes, which is not what {count} vectors of dimension {dim} "
            f"take; {REPAIR}"
        )
