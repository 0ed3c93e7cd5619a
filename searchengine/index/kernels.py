"""The inner loops, which are FAISS's, each on the thread that calls it.

FAISS would share the work of even one query among threads of OpenMP, which wait for each other: on a busy machine that
costs many times what it saves. `omp_set_num_threads` holds for the calling thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from searchengine.vectors import FloatMatrix

Integers = NDArray[np.int64]


def inner_products(matrix: FloatMatrix, vector: FloatMatrix) -> FloatMatrix:
    """Those (n,) of the rows of (n, dim), aligned or not, with (dim,)."""
    products = np.empty(len(matrix), np.float32)
    with _one_thread():
        faiss.fvec_inner_products_ny(  # type: ignore[attr-defined]
            faiss.swig_ptr(products), faiss.swig_ptr(vector), faiss.swig_ptr(matrix), matrix.shape[1], len(matrix)
        )
    return products


def inner_products_of(matrix: FloatMatrix, rows: Integers, vector: FloatMatrix) -> FloatMatrix:
    """Those (m,) of some rows (m,) of (n, dim) with (dim,), without a copy of them."""
    products = np.empty(len(rows), np.float32)
    with _one_thread():
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
            faiss.swig_ptr(products),
            faiss.swig_ptr(vector),
            faiss.swig_ptr(matrix),
            faiss.swig_ptr(rows),
            matrix.shape[1],
            1,
            len(rows),
        )
    return products


def best_by_code(
    codes: Any, vector: FloatMatrix, lists: Integers, centres: FloatMatrix, *, count: int, selector: Any
) -> tuple[FloatMatrix, Integers]:
    """The best in some lists (l,), whose centroids score `centres` (l,): scores by code and ids (<= count,)."""
    scores, ids = np.empty(count, np.float32), np.empty(count, np.int64)
    lists, centres = np.ascontiguousarray(lists), np.ascontiguousarray(centres)
    parameters = faiss.SearchParametersIVF(nprobe=len(lists), sel=selector)  # type: ignore[call-arg]
    with _one_thread():
        codes.search_preassigned_c(
            1,
            faiss.swig_ptr(vector),
            count,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(centres),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(ids),
            False,
            parameters,
        )
    found = ids >= 0
    return scores[found], ids[found]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
