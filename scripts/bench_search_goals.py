"""What scripts/bench_search.py wants of search, and whether its records show it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Record = dict[str, Any]

RECALL = 0.99  # recall@10 of answers that count as equal
APART = "random directions"  # the worst case, which no photo or caption is: judged apart
OURS = ("ours flat", "ours scan", "ours ivf")


@dataclass(frozen=True)
class Goal:
    """`about` says of which vectors, `found` in words."""

    about: str
    goal: str
    found: str
    met: bool


def goals(records: Sequence[Record]) -> list[Goal]:
    """Within each set of vectors: no contender is compared with one that searched others."""
    found: list[Goal] = []
    for (data, n), own in groupby(records, key=lambda record: (record["data"], record["n"])):
        same = list(own)
        flat, scan, ivf = ([r for r in same if r["contender"] == name] for name in OURS)
        for name, taken in zip(OURS, (flat, scan, ivf), strict=True):
            if not taken:
                found.append(Goal(f"{data}, n = {n:,}", f"{name}: takes part", "left out", False))
        for goal in (*_speeds(same, scan, ivf), *_filters(ivf), *_sizes(same), *_batches(same, flat)):
            found.append(Goal(f"{data}, n = {n:,}", *goal))
    return found


def _speeds(same: list[Record], scan: list[Record], ivf: list[Record]) -> Iterator[tuple[str, str, bool]]:
    peers = [r for r in same if r["contender"] not in OURS]
    for threads in _threads(same):
        for apart in (False, True):
            rows = [r for r in ivf if _is_latency(r, threads) and (r["queries"] == APART) is apart]
            if not rows:
                continue
            of = f"threads {threads}{f', {APART}' if apart else ''}"
            worst, recall = _least(rows, "times_flat"), _least(rows, "recall_10")["recall_10"]
            yield (
                f"ivf, {of}: at least 50 x faiss flat at recall@10 >= {RECALL}",
                f"{worst['times_flat']:.1f} x at {recall:.4f} ({worst['queries']})",
                worst["times_flat"] >= 50 and recall >= RECALL,
            )
            kinds = {r["queries"] for r in rows}
            equal = [r for r in peers if _is_latency(r, threads) and r["queries"] in kinds and r["recall_10"] >= RECALL]
            equal = [r for r in equal if r["times_ivf"]]
            if equal:
                best = max(equal, key=lambda r: r["times_ivf"])
                yield (
                    f"ivf, {of}: no slower than the best peer of recall@10 >= {RECALL}",
                    f"{1 / best['times_ivf']:.2f} x {best['contender']} {best['setting']} ({best['queries']})",
                    best["times_ivf"] <= 1 and recall >= RECALL,
                )
        rows = [r for r in scan if _is_latency(r, threads)]
        if rows:
            wanted = 7 if threads == 1 else 10
            worst, recall = _least(rows, "times_flat"), _least(rows, "recall_10")["recall_10"]
            yield (
                f"scan, threads {threads}: at least {wanted} x faiss flat at recall@10 >= 0.999 on any queries",
                f"{worst['times_flat']:.1f} x at {recall:.4f} ({worst['queries']})",
                worst["times_flat"] >= wanted and recall >= 0.999,
            )


def _filters(ivf: list[Record]) -> Iterator[tuple[str, str, bool]]:
    filtered = [r for r in ivf if r["measure"] == "filter"]
    for name, speed, recall in (("1%", 4, 1.0), ("10%", 8, 0.99)):
        for record in filtered:
            if record["filter"] == name:
                yield (
                    f"ivf, filter {name}, {record['queries']}: at least {speed} x a bitmap on faiss flat, "
                    f"recall {recall}",
                    f"{record['times_bitmap']:.1f} x at {record['recall_10']:.4f}",
                    record["times_bitmap"] >= speed and record["recall_10"] >= recall,
                )
    if filtered:
        worst = _least(filtered, "recall_10")
        yield (
            f"ivf, any filter: recall@10 >= {RECALL}, never fewer than k",
            f"{worst['recall_10']:.4f} ({worst['filter']}, {worst['queries']})",
            worst["recall_10"] >= RECALL and all(r["is_full"] for r in filtered),
        )


def _sizes(same: list[Record]) -> Iterator[tuple[str, str, bool]]:
    built = {r["contender"]: r for r in same if r["measure"] == "build"}
    flat = built["faiss flat"]
    for name in OURS:
        if name in built:
            record = built[name]
            yield f"{name}: opened in under a second", f"{record['open_s']:.3f} s", record["open_s"] < 1
    if "ours ivf" in built:
        record = built["ours ivf"]
        part = record["held_bytes"] / flat["held_bytes"]
        yield "ivf: at most 0.3 of faiss flat's memory", f"{part:.3f}", part <= 0.3
        minutes = record["build_s"] / record["n"] * 1e6 / 60
        yield "ivf: built in less than a minute a million", f"{60 * minutes:.0f} s a million", minutes < 1
    for record in same:
        if record["measure"] == "scores":
            error = record["largest_error"]
            yield f"{record['contender']}: scores are exact to float32's rounding", f"{error:.1e}", error <= 1e-6


def _batches(same: list[Record], flat: list[Record]) -> Iterator[tuple[str, str, bool]]:
    for record in flat:
        if record["measure"] == "batch":
            wanted = {"contender": "numpy", "measure": "batch", "threads": record["threads"]}
            numpy = next(r for r in same if wanted.items() <= r.items())
            times = record["per_s"] / numpy["per_s"]
            yield (
                f"flat, threads {record['threads']}: a batch of exact queries at least 5 x numpy",
                f"{times:.2f} x, {record['per_s']:.0f}/s",
                times >= 5,
            )


def _threads(records: list[Record]) -> list[int]:
    return sorted({r["threads"] for r in records if r["measure"] == "latency"})


def _is_latency(record: Record, threads: int) -> bool:
    return bool(record["measure"] == "latency" and record["threads"] == threads)


def _least(records: list[Record], key: str) -> Record:
    return min(records, key=lambda record: record[key])
