"""How scripts/bench_search.py measures: in turns, against sums in float64, on a bounded number of threads."""

import ctypes
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from bench_search_contenders import Contender
from numpy.typing import NDArray

from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix

REST_S = 0.03  # threads wait for work in a loop, for some time
ROUNDING = 1e-6  # scores that differ by less are equal
BLOCK = 16_384

Mask = Callable[[slice], NDArray[np.bool_]]  # (1 or q, rows): which rows of the slice each query may find


@dataclass
class Turns:
    """Of each contender: seconds by round, and what it answered to which query."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    answers: dict[str, dict[int, Ids]] = field(default_factory=dict)

    def percentile_ms(self, name: str, percent: float) -> float:
        return 1000 * float(np.percentile(np.concatenate(self.seconds[name]), percent))

    def speedup(self, name: str, other: str) -> float:
        """How many times as fast as the other it is: the median of the rounds' ratios of medians."""
        rounds = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(statistics.median(b) / statistics.median(a) for a, b in rounds)


def take_turns(
    answer: dict[str, Callable[[int], Ids]], *, queries: int, rounds: int, sparse: set[str], part: int
) -> Turns:
    """Each in turn answers the queries of a round, one by one; those in `sparse` only the first of `part`."""
    turns = Turns()
    for block in np.array_split(np.arange(queries), rounds):
        for name, run in answer.items():
            asked = block[: max(1, len(block) // part)] if name in sparse else block
            rest()
            run(int(block[-1]))  # warms up
            seconds = turns.seconds.setdefault(name, [])
            seconds.append([])
            for number in asked.tolist():
                started = time.perf_counter()
                rows = run(number)
                seconds[-1].append(time.perf_counter() - started)
                turns.answers.setdefault(name, {})[number] = rows[0]
    return turns


class Truth:
    """The best `k` scores of each query in float64, falling, (q, k); -inf where fewer rows are allowed."""

    def __init__(self, vectors: FloatMatrix, queries: FloatMatrix, *, k: int, mask: Mask | None = None) -> None:
        self.vectors, self.queries, self.mask = vectors, queries.astype(np.float64), mask
        best = np.full((len(queries), k), -np.inf)
        for start in range(0, len(vectors), BLOCK):
            rows = slice(start, min(start + BLOCK, len(vectors)))
            scores = self.queries @ vectors[rows].astype(np.float64).T
            if mask is not None:
                scores[np.broadcast_to(~mask(rows), scores.shape)] = -np.inf
            best = np.partition(np.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
        self.scores: NDArray[np.float64] = -np.sort(-best, axis=1)

    def recall(self, answers: dict[int, Ids], k: int) -> float:
        """The share of the best k that was found. Another row of the same score counts as well."""
        return statistics.mean(self._recall(number, rows, k) for number, rows in answers.items())

    def _recall(self, number: int, rows: Ids, k: int) -> float:
        wanted = self.scores[number][:k]
        wanted = wanted[np.isfinite(wanted)]
        found = np.unique(rows[:k])
        found = found[found >= 0]
        if self.mask is not None:
            masks = [self.mask(slice(row, row + 1))[:, 0] for row in found.tolist()]
            allowed = [bool(mask[number if len(mask) > 1 else 0]) for mask in masks]
            found = found[np.asarray(allowed, dtype=bool)]
        scores = self.vectors[found].astype(np.float64) @ self.queries[number]
        return float((scores >= wanted[-1] - ROUNDING).sum() / len(wanted)) if len(wanted) else 1.0


@contextmanager
def limited_threads(count: int, contenders: list[Contender]) -> Iterator[None]:
    """At most `count` cores: by OpenMP, by BLAS (with threadpoolctl), by the peers' own arguments, and by letting
    every thread of this process run on `count` cores only, where the system can."""
    before = faiss.omp_get_max_threads()
    with ExitStack() as stack:
        if importlib.util.find_spec("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
        stack.callback(faiss.omp_set_num_threads, before)
        faiss.omp_set_num_threads(count)
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            stack.callback(_run_on, cores)
            _run_on(cores[:count])
        for contender in contenders:
            contender.threads = count
        yield


def _run_on(cores: list[int]) -> None:
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["0"]:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


@dataclass(frozen=True)
class Opened:
    """Seconds to open the files, which were not in memory, and to its first answer; bytes a vector, of what it holds
    (its own memory and mapped codes, all of them) and of exact vectors in mapped segments, those touched."""

    open_s: float
    first_answer_s: float
    held_bytes: float
    mapped_bytes: float


def measure_opening(contender: Contender, queries: FloatMatrix, *, n: int, k: int) -> Opened:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_open, contender, queries, n, k).result()


def _open(contender: Contender, queries: FloatMatrix, n: int, k: int) -> Opened:
    __import__(contender.package)
    setting = contender.settings[len(contender.settings) // 2]
    _forget(contender.path)
    before, _, _ = _memory_bytes(contender.path)
    started = time.perf_counter()
    contender.open()
    opened = time.perf_counter()
    contender.search(queries[:1], k, setting)
    answered = time.perf_counter()
    for query in queries[1:]:
        contender.search(query[None], k, setting)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    own, codes, exact = _memory_bytes(contender.path)
    return Opened(opened - started, answered - started, (own - before + codes) / n, exact / n)


def _forget(path: Path) -> None:
    """Drop the files from the system's cache, as far as nobody else has them mapped."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory_bytes(path: Path) -> tuple[int, int, int]:
    """The process's own memory; files below `path` that it has mapped, but for segments; touched pages of segments."""
    own = codes = exact = 0
    smaps = Path("/proc/self/smaps")
    file = ""
    size: dict[str, int] = {}
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            size[key] = 1024 * int(value.split()[0])
        elif "-" in line.split()[0]:
            file, size = " ".join(line.split()[5:]), {}
        if key == "Anonymous":
            own += size[key]
            if file.startswith(str(path)):
                exact += size["Rss"] * ("/segments/" in file)
                codes += size["Size"] * ("/segments/" not in file)
    return own, codes, exact


def rest() -> None:
    """Let the threads of the one before fall asleep; a single one has none."""
    if faiss.omp_get_max_threads() > 1:
        time.sleep(REST_S)


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def available_bytes() -> int:
    """Memory that is free or can be had; without an answer, no limit."""
    about = Path("/proc/meminfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**63)
