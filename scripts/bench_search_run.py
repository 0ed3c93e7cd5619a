"""One set of vectors of one size, and all who search it: what scripts/bench_search.py does for each."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_search_contenders import (
    Contender,
    FaissFlat,
    FaissHnsw,
    FaissIvf,
    Hnswlib,
    Numpy,
    Ours,
    Usearch,
    copy_index,
    write_index_folder,
)
from bench_search_data import DataSet
from bench_search_goals import RECALL, Record
from bench_search_measure import Truth, available_bytes, limited_threads, measure_opening, rest, take_turns, timed
from numpy.typing import NDArray

from searchengine.index.segments import Ids
from searchengine.vectors import FloatMatrix

K, DEEP, BATCH = 10, 100, 100
FRACTIONS = (0.001, 0.01, 0.1, 0.5)
FILTERED_QUERIES = 40
OPENING_QUERIES = 20  # of a process that opens an index, before its memory is looked at
EXACT_PART = 5  # exact contenders answer every fifth query
KINDS = ("flat", "scan", "ivf")
PEERS = (FaissIvf, FaissHnsw, Hnswlib, Usearch)

Answer = Callable[[int], Ids]


@dataclass(frozen=True)
class Filter:
    """`allowed` bool (sets, n), and which of the sets each query may search, (q,)."""

    name: str
    allowed: NDArray[np.bool_]
    set_of: NDArray[np.int64]

    def mask(self, rows: slice) -> NDArray[np.bool_]:
        return self.allowed[self.set_of, rows]


class Bench:
    """Contenders are kept in `folder`. `records` are what was measured."""

    def __init__(self, data: DataSet, folder: Path, options: argparse.Namespace) -> None:
        self.data, self.folder, self.options = data, folder, options
        self.n = len(data.vectors)
        self.records: list[Record] = []
        self.truths = {kind: Truth(data.vectors, rows, k=DEEP) for kind, rows in data.queries.items()}
        self.deep_recalls: dict[tuple[str, str], float] = {}

    def run(self) -> list[Record]:
        print(f"\n{self.data.name}, n = {self.n:,}: {self.data.about}")
        flat, numpy = FaissFlat(self.folder / "flat.faiss"), Numpy(self.folder)
        kinds: tuple[str, ...] = KINDS
        standing: list[Contender] = [flat, numpy]
        if available_bytes() < 3 * self.data.vectors.nbytes:
            print("  numpy and ours flat left out: the memory holds the vectors once")
            kinds, standing = KINDS[1:], [flat]
        self._build(flat)
        numpy.index = flat.index
        ours = list(self._ours(kinds))
        standing += ours
        self._latency(standing)
        self._batches(standing)
        for kind in list(self.data.queries)[:2]:
            for filter_ in self._filters(kind):
                self._filtered(kind, filter_, flat, ours)
        for one in ours:
            self._scores(one)
        for make in PEERS:
            peer = make(self._place(make) / make.name)
            if self._can_take_part(peer):
                self._build(peer)
                if isinstance(peer, FaissIvf):
                    peer.matrix = flat.matrix()
                self._latency([flat, *(one for one in ours if one.kind == "ivf"), peer], shown=[peer])
                self._batches([flat, peer], shown=[peer])
                peer.close()
                gc.collect()
        for one in ours:
            one.close()
        return self.records

    def _ours(self, kinds: Sequence[str]) -> Iterator[Ours]:
        source = self.folder / "index"
        write_index_folder(self.data.vectors, source)
        for kind in kinds:
            ours = Ours(self.folder / kind, kind)
            copy_index(source, ours.path)
            self._build(ours)
            yield ours

    def _place(self, peer: type[Contender]) -> Path:
        if peer.setting_name != "ef" or self.options.graphs is None:
            return self.folder
        place: Path = self.options.graphs / f"{self.data.name}-{self.options.queries}-{self.n}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _can_take_part(self, peer: Contender) -> bool:
        needed = 2 * self.n * (4 * self.data.vectors.shape[1] + 600)
        if not peer.is_installed():
            print(f"  {peer.name} is not installed: left out")
        elif peer.setting_name == "ef" and self.n > self.options.hnsw_max:
            print(f"  {peer.name} left out, building it takes long: --hnsw-max {self.n}")
        elif available_bytes() < needed:
            print(f"  {peer.name} left out, it takes {needed / 2**30:.0f} GiB of memory")
        else:
            return True
        return False

    def _build(self, contender: Contender) -> None:
        noted = contender.path.with_name(f"{contender.path.name} seconds")
        if noted.exists():
            seconds = float(noted.read_text())
        else:
            cores, cpu_before = self.options.threads[-1], time.process_time()
            with limited_threads(cores, [contender]):
                seconds = timed(partial(contender.build, self.data.vectors))
            contender.save()
            contender.index = None
            if contender.setting_name == "ef":
                seconds = (time.process_time() - cpu_before) / cores
                noted.write_text(str(seconds))
        gc.collect()
        queries = next(iter(self.data.queries.values()))[:OPENING_QUERIES]
        opened = measure_opening(contender, queries, n=self.n, k=K)
        contender.open()
        if contender.path.is_file() and contender.path.is_relative_to(self.folder):
            contender.path.unlink()
        own_recall = contender.own_recall if isinstance(contender, Ours) else None
        self._record("build", contender, build_s=seconds, own_recall=own_recall, **asdict(opened))
        print(
            f"  {contender.name}: built in {seconds:.2f} s; {opened.held_bytes:.0f} bytes a vector held, "
            f"{opened.mapped_bytes:.0f} of exact vectors mapped; opened in {opened.open_s:.3f} s, "
            f"first answer after {opened.first_answer_s:.3f} s{f'; says recall {own_recall}' if own_recall else ''}"
        )

    def _latency(self, contenders: list[Contender], *, shown: Sequence[Contender] = ()) -> None:
        sparse = {contender.name for contender in contenders if contender.is_exact}
        runs = {title(one, setting): (one, setting) for one in contenders for setting in one.settings}
        for threads in self.options.threads:
            for kind, queries in self.data.queries.items():
                answer = {name: partial(answer_one, queries, K, *who) for name, who in runs.items()}
                with limited_threads(threads, contenders):
                    turns = take_turns(
                        answer, queries=len(queries), rounds=self.options.rounds, sparse=sparse, part=EXACT_PART
                    )
                print(f"  {kind}, threads {threads}")
                print(f"    {'':36s}   p50 ms   p99 ms  x flat   x ivf   recall@1, @10, @100")
                for name, (contender, setting) in runs.items():
                    if contender not in (shown or contenders):
                        continue
                    times_flat, times_ivf = (
                        turns.speedup(name, other) if other in runs else None for other in ("faiss flat", "ours ivf")
                    )
                    found = {
                        "p50_ms": turns.percentile_ms(name, 50),
                        "p99_ms": turns.percentile_ms(name, 99),
                        "recall_1": self.truths[kind].recall(turns.answers[name], 1),
                        "recall_10": self.truths[kind].recall(turns.answers[name], K),
                        "recall_100": self._deep_recall(contender, setting, kind, list(turns.answers[name])),
                    }
                    said = "".join(f"{times:8.2f}" if times else f"{'':8s}" for times in (times_flat, times_ivf))
                    print("    {:36s}{:9.3f}{:9.3f}{}   {:.4f} {:.4f} {:.4f}".format(
                        name, found["p50_ms"], found["p99_ms"], said, *list(found.values())[2:]
                    ))  # fmt: skip
                    self._record(
                        "latency", contender, queries=kind, threads=threads, setting=setting_of(contender, setting),
                        times_flat=times_flat, times_ivf=times_ivf, **found,
                    )  # fmt: skip

    def _deep_recall(self, contender: Contender, setting: int, kind: str, numbers: list[int]) -> float:
        """recall@100, which does not depend on the number of threads."""
        key = (title(contender, setting), kind)
        if key not in self.deep_recalls:
            queries = self.data.queries[kind]
            answers = {i: answer_one(queries, DEEP, contender, setting, i)[0] for i in numbers}
            self.deep_recalls[key] = self.truths[kind].recall(answers, DEEP)
        return self.deep_recalls[key]

    def _batches(self, contenders: list[Contender], *, shown: Sequence[Contender] = ()) -> None:
        """100 queries of the first kind at once, by peers with the fastest setting that finds enough."""
        kind, queries = next(iter(self.data.queries.items()))
        queries = np.resize(queries, (BATCH, queries.shape[1]))
        settings = {contender: self._good_setting(contender, kind) for contender in contenders}
        for threads in self.options.threads:
            seconds: dict[Contender, list[float]] = {}
            with limited_threads(threads, contenders):
                for round_ in range(1 + self.options.rounds):
                    for contender, setting in settings.items():
                        rest()
                        spent = timed(partial(contender.search, queries, K, setting))
                        if round_:  # the first warms up
                            seconds.setdefault(contender, []).append(spent)
            print(f"  a batch of {BATCH} {kind}, threads {threads}")
            for contender in shown or contenders:
                per_s, setting = BATCH / float(np.median(seconds[contender])), settings[contender]
                print(f"    {title(contender, setting):36s}{per_s:9.1f} queries/s")
                self._record(
                    "batch", contender, threads=threads, setting=setting_of(contender, setting), per_s=per_s
                )  # fmt: skip

    def _good_setting(self, contender: Contender, kind: str) -> int:
        wanted = {"measure": "latency", "contender": contender.name, "queries": kind}
        for setting in contender.settings:
            for record in self.records:
                if (
                    wanted.items() <= record.items()
                    and record["setting"] == setting_of(contender, setting)
                    and record["recall_10"] >= RECALL
                ):
                    return setting
        return contender.settings[-1]

    def _filters(self, kind: str) -> Iterator[Filter]:
        everyone = np.zeros(len(self.data.queries[kind][:FILTERED_QUERIES]), np.int64)
        rng = np.random.default_rng(0)
        for fraction in FRACTIONS:
            allowed = np.zeros((1, self.n), dtype=bool)
            allowed[0, rng.choice(self.n, max(1, int(fraction * self.n)), replace=False)] = True
            yield Filter(f"{100 * fraction:g}%", allowed, everyone)
        folder_of = self.data.folder_of(self.data.vectors)
        own = self.data.folder_of(self.data.queries[kind][:FILTERED_QUERIES])
        folders, set_of = np.unique(own, return_inverse=True)
        inside = folder_of == folders[:, None]
        yield Filter("own folder", inside, set_of)
        yield Filter("all but own folder", ~inside, set_of)

    def _filtered(self, kind: str, filter_: Filter, flat: FaissFlat, ours: list[Ours]) -> None:
        queries = self.data.queries[kind][:FILTERED_QUERIES]
        bitmaps = np.packbits(filter_.allowed, axis=1, bitorder="little")
        ids = [np.flatnonzero(row).astype(np.int64) + 1 for row in filter_.allowed]
        answer: dict[str, Answer] = {
            flat.name: lambda i: flat.search_bitmap(queries[i : i + 1], K, bitmaps[filter_.set_of[i]])
        }
        for one in ours:
            answer[one.name] = lambda i, one=one: one.search_among(queries[i : i + 1], K, ids[filter_.set_of[i]])
        truth = Truth(self.data.vectors, queries, k=K, mask=filter_.mask)
        threads = self.options.threads[0]
        with limited_threads(threads, [flat, *ours]):
            turns = take_turns(
                answer, queries=len(queries), rounds=self.options.rounds, sparse={flat.name}, part=2
            )  # fmt: skip
        share = np.mean([len(ids[i]) for i in filter_.set_of]) / self.n
        print(f"  filter {filter_.name} ({100 * share:.1f}% pass), {kind}, threads {threads}")
        for one in (flat, *ours):
            answers = turns.answers[one.name]
            is_full = all((rows >= 0).sum() >= min(K, len(ids[filter_.set_of[i]])) for i, rows in answers.items())
            times, recall = turns.speedup(one.name, flat.name), truth.recall(answers, K)
            p50, p99 = (turns.percentile_ms(one.name, percent) for percent in (50, 99))
            print(f"    {one.name:36s}{p50:9.3f}{p99:9.3f}{times:8.2f} x bitmap   {recall:.4f}")
            self._record(
                "filter", one, queries=kind, filter=filter_.name, threads=threads, p50_ms=p50, p99_ms=p99,
                times_bitmap=times, recall_10=recall, is_full=is_full,
            )  # fmt: skip

    def _scores(self, ours: Ours) -> None:
        """How far any returned score is from the inner product in float64."""
        largest = 0.0
        for queries in self.data.queries.values():
            scores, ids = ours.index.search(queries, k=K)
            exact = self.data.vectors[ids - 1].astype(np.float64) @ queries[:, :, None].astype(np.float64)
            largest = max(largest, float(np.abs(scores - exact[:, :, 0]).max()))
        self._record("scores", ours, largest_error=largest)

    def _record(self, measure: str, contender: Contender, **figures: Any) -> None:
        self.records.append(
            {"data": self.data.name, "n": self.n, "measure": measure, "contender": contender.name, **figures}
        )


def answer_one(queries: FloatMatrix, k: int, contender: Contender, setting: int, number: int) -> Ids:
    return contender.search(queries[number : number + 1], k, setting)


def setting_of(contender: Contender, setting: int) -> str:
    return f"{contender.setting_name}={setting}" if contender.setting_name else ""


def title(contender: Contender, setting: int) -> str:
    return f"{contender.name} {setting_of(contender, setting)}".strip()
