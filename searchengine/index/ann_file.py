"""The file of an `ann/`: FAISS's IndexPreTransform (the rotation) over IndexIVFPQFastScan (codes in lists)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from searchengine.errors import IndexFormatError
from searchengine.index.ann import Ann, AnnParameters
from searchengine.index.layout import IndexPaths
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

REBUILD = "run `searchengine compact --rebuild`, which makes it anew"


def chained(codes: Any, *, rotation: FloatMatrix) -> Any:
    """The index that goes into the file."""
    transform = faiss.LinearTransform(rotation.shape[1], rotation.shape[0], False)
    faiss.copy_array_to_vector(np.ascontiguousarray(rotation, np.float32).ravel(), transform.A)
    transform.is_trained = True
    return faiss.IndexPreTransform(transform, codes)


def newest_ann(row: Any, *, paths: IndexPaths, dim: int, known: Ann | None) -> Ann | None:
    """What the newest `row` of the table `ann` names; `known`, where that is it. Raises IndexFormatError."""
    if row is None:
        return None
    if not isinstance(row.file, str):
        shown = printable(str(paths.folder))
        raise IndexFormatError(f"the table ann of the index at {shown} is damaged; {REBUILD}")
    if known is not None and (known.sha256, known.recorded) == (row.sha256, row.parameters):
        return known
    return load_ann(
        paths.ann(row.file),
        sha256=row.sha256,
        parameters=row.parameters,
        covariance=row.covariance,
        spread=row.spread,
        dim=dim,
    )


def load_ann(path: Path, *, sha256: str, parameters: str, covariance: bytes, spread: bytes, dim: int) -> Ann:
    """The file that a row of the table `ann` names. Its `sha256` is taken down, not computed.

    Raises IndexFormatError where it is missing, damaged, or not what its row says.
    """
    shown = printable(str(path))
    wrong = IndexFormatError(f"{shown} does not hold what the tables say; {REBUILD}")
    try:
        known = AnnParameters(**json.loads(parameters))
        of_residuals = np.frombuffer(covariance, np.float32).reshape(dim, dim)
        of_lists = np.frombuffer(spread, np.float32).reshape(known.lists)
    except (TypeError, ValueError, RecursionError):
        raise wrong from None
    try:
        path.open("rb").close()  # FAISS tells what is wrong in the words of its source code
        chain: Any = faiss.read_index(str(path))
        codes: Any = faiss.downcast_index(chain.index)
        transform: Any = faiss.downcast_VectorTransform(chain.chain.at(0))
        rotation = faiss.vector_to_array(transform.A).reshape(dim, dim)
    except FileNotFoundError:
        raise IndexFormatError(f"{shown} is missing; {REBUILD}") from None
    except OSError as error:
        raise IndexFormatError(f"{shown} cannot be read: {error.strerror}; {REBUILD}") from None
    except (RuntimeError, MemoryError, AttributeError, ValueError):
        raise IndexFormatError(f"{shown} cannot be read: it is cut short or damaged; {REBUILD}") from None
    if not isinstance(codes, faiss.IndexIVFPQFastScan) or (
        (codes.d, codes.ntotal, codes.nlist) != (dim, known.count, known.lists)
        or codes.quantizer.ntotal * len(known.scales) != known.lists
    ):
        raise wrong
    loaded = Ann(
        codes,
        owner=chain,
        sha256=sha256,
        recorded=parameters,
        rotation=rotation,
        covariance=of_residuals,
        spread=of_lists,
        parameters=known,
    )
    ids = [loaded.ids_in(number) for number in range(known.lists)]
    lowest = min((int(some.min()) for some in ids if some.size), default=0)
    highest = max((int(some.max()) for some in ids if some.size), default=0)
    if lowest < 0 or highest != known.through_id:
        raise wrong
    return loaded
