"""How fast photos are indexed here, beside the ways of others with the same weights.

    scripts/bench_ingest.py [FOLDER_OF_PHOTOS] [--rounds 3] [--memory] [--json FILE] [--plot FILE.png]

Indexes photos of 500 x 375 and of 12 megapixels, both made from those in the folder (129 of COCO), from the folder to
embeddings on disk. The contenders (bench_ingest_contenders.py) take turns in every round; ratios are taken within a
round, then medians. The limit of ours is 1/(1/E + 1/D): what is left of the cores' time if they do nothing but encode
(E) and decode (D), both sampled before and after each of its runs; the GEMM limit is sampled in each round. Memory is
the peak of a process and of what its workers have of their own. ViT-B/32 with random weights, speed does not depend on
them; `mini` is another, smaller network. `--memory` indexes 1,000 to 100,000 small files. Needs the extra `bench`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bench_encode
import bench_ingest_memory
import bench_ingest_photos
import bench_ingest_plot
import numpy as np
import torch
from hardware import cpu_name

ROOT = Path(__file__).parent.parent
NAMES = {
    "script 1": "the usual script, batch 1",
    "script 32": "the usual script, batch 32",
    "clip-retrieval": "clip-retrieval's way, batch 64",
    "rclip fp32": "rclip's way, batch 8",
    "rclip int8": "rclip's way, in int8",
    "ours fp32": "ours, fp32",
    "ours int8": "ours, int8",
    "ours mini": "ours, mini",
    "ours mini int8": "ours, mini, int8",
}
OURS = [name for name in NAMES if name.startswith("ours")]
IN_SEQUENCE = ("script 1", "script 32", "rclip fp32")  # Pillow's full decode and fp32, one after the other
FP32_PEERS = (*IN_SEQUENCE, "clip-retrieval")
# Of the photos, so that a round does not take longer than the machine stays the same. These do one photo, or a few,
# after the other, and start nothing first: their pace does not depend on how many there are.
SHARE = {"script 1": 0.25, "script 32": 0.5, "rclip fp32": 0.5, "rclip int8": 0.5}


@dataclass
class Result:
    """Of one contender on photos of one size; a value a round."""

    rates: list[float] = field(default_factory=list)  # images a second
    cpu_ms: list[float] = field(default_factory=list)  # a photo
    encode_limits: list[float] = field(default_factory=list)  # images a second
    decode_limits: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def shares(self) -> list[float]:
        """Of 1/(1/E + 1/D)."""
        limits = zip(self.rates, self.encode_limits, self.decode_limits, strict=True)
        return [rate * (1 / encode + 1 / decode) for rate, encode, decode in limits]


Results = dict[str, dict[str, Result]]  # by the size of the photos, then by contender


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos = ROOT.parent / "shared/data/coco_cc/images"
    arguments.add_argument("folder", type=Path, nargs="?", default=photos, help="photos that others are made from")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--small", type=int, default=768, help="photos of 500 x 375")
    arguments.add_argument("--large", type=int, default=192, help="photos of 12 megapixels; 0 for none")
    arguments.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    arguments.add_argument("--memory", action="store_true", help="index up to 100,000 files; takes minutes")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    arguments.add_argument("--plot", type=Path, help="draw them there")
    options = arguments.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        counts = {"500 x 375": options.small, "12 MP": options.large}
        folders = {size: Path(work, size) for size, count in counts.items() if count}
        for size, folder in folders.items():
            bench_ingest_photos.make(options.folder, folder, size=size, count=counts[size])
        make_weights(Path(work), onnx=any(name.startswith("rclip") for name in options.only))
        results, gemm = take_turns(options.only, folders, Path(work), options.rounds)
        memory = bench_ingest_memory.measure(Path(work)) if options.memory else {}
    for size, by_name in results.items():
        show(size, counts[size], by_name)
    print("GEMM limit: " + ", ".join(f"{name} {max(rates) / 1e9:.0f} GFLOPS" for name, rates in gemm.items()))
    for count, peak_bytes in memory.items():
        print(f"memory at {count:>7,} photos: {peak_bytes / 2**20:.0f} MiB")
    met = [{"goal": goal, "found": found, "met": enough} for goal, found, enough in goals(results, memory)]
    for goal in met:
        print(f"  {'met' if goal['met'] else 'NOT MET':8s} {goal['found']:<8.3g} {goal['goal']}")
    if options.json:
        figures = {size: {name: asdict(of) for name, of in by_name.items()} for size, by_name in results.items()}
        facts = {"hardware": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg(), "gemm": gemm}
        options.json.write_text(json.dumps({**facts, "results": figures, "memory": memory, "goals": met}, indent=1))
    if options.plot:
        rates = {size: {NAMES[n]: statistics.median(of.rates) for n, of in r.items()} for size, r in results.items()}
        bench_ingest_plot.draw(rates, options.plot, title=f"images a second, {cpu_name()}, {os.cpu_count()} cores")


def make_weights(folder: Path, *, onnx: bool) -> None:
    """Random weights for all: model.safetensors and, with `onnx`, the image tower for ONNX Runtime."""
    model = bench_encode.random_clip("plain").eval()
    model.save_pretrained(folder)
    if onnx:
        bench_encode.peers(model, folder, np.zeros((2, 224, 224, 3), np.uint8), openvino=False)


def take_turns(
    names: list[str], folders: dict[str, Path], work: Path, rounds: int
) -> tuple[Results, dict[str, list[float]]]:
    """Every contender on photos of each size, in turn; and the operations a second of matrix products."""
    contenders = {name: Contender(name, work) for name in names}
    results: Results = {size: {name: Result() for name in names} for size in folders}
    gemm: dict[str, list[float]] = {}
    warm_up = work / "warm up"
    shutil.copytree(next(iter(folders.values())), warm_up, ignore=lambda _, files: sorted(files)[8:])
    for contender in contenders.values():
        contender.ask(photos=warm_up)
    for round_ in range(rounds):
        best: dict[str, float] = {}
        for precision, flops, multiply in bench_encode.gemms():
            best[precision] = max(best.get(precision, 0), *(flops / bench_encode.timed(multiply) for _ in range(3)))
        for precision, flops_per_s in best.items():
            gemm.setdefault(precision, []).append(flops_per_s)
        for size, folder in folders.items():
            for name in names if round_ % 2 == 0 else reversed(names):
                turn(contenders[name], part_of(folder, SHARE.get(name, 1)), results[size][name])
                found = results[size][name]
                share = f", {found.shares()[-1]:.2f} of the limit" if found.encode_limits else ""
                print(f"round {round_ + 1}, {size}, {NAMES[name]}: {found.rates[-1]:.1f} img/s{share}", flush=True)
    for contender in contenders.values():
        contender.end()
    return results, gemm


def turn(contender: "Contender", photos: Path, result: Result) -> None:
    is_ours = contender.name in OURS
    before = contender.ask(photos=photos, limits=True) if is_ours else {}
    with bench_ingest_memory.PeakMemory(contender.process.pid) as peak:
        found = contender.ask(photos=photos)
    count = len(os.listdir(photos))
    result.rates.append(count / found["seconds"])
    result.cpu_ms.append(1000 * found["cpu_seconds"] / count)
    result.peak_bytes = max(result.peak_bytes, peak.bytes)
    if is_ours:
        after = contender.ask(photos=photos, limits=True)
        result.encode_limits.append((before["encode"] + after["encode"]) / 2)
        result.decode_limits.append((before["decode"] + after["decode"]) / 2)


def part_of(folder: Path, share: float) -> Path:
    """The first of the photos, as links."""
    if share == 1:
        return folder
    part = folder.with_name(f"{share} of {folder.name}")
    if not part.exists():
        part.mkdir()
        files = sorted(folder.iterdir())
        for file in files[: max(1, int(share * len(files)))]:
            os.link(file, part / file.name)
    return part


class Contender:
    """The process of one contender."""

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        script = Path(__file__).with_name("bench_ingest_contenders.py")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, script, name, work], **pipes)

    def ask(self, *, photos: Path, limits: bool = False) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"photos": str(photos), "limits": limits}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended; what it said is above")
        answer: dict[str, float] = json.loads(line)
        time.sleep(bench_encode.REST_S)
        return answer

    def end(self) -> None:
        self.process.communicate()


def show(size: str, count: int, results: dict[str, Result]) -> None:
    rounds = len(next(iter(results.values())).rates)
    print(f"{count} photos of {size}, {rounds} rounds: median img/s, CPU ms a photo, peak MiB, share of the limit")
    for name, of in results.items():
        share = ""
        if of.encode_limits:
            encode, decode = statistics.median(of.encode_limits), statistics.median(of.decode_limits)
            share = f"{statistics.median(of.shares()):.2f} of 1/(1/{encode:.1f} + 1/{decode:.1f})"
        rate, cpu_ms = statistics.median(of.rates), statistics.median(of.cpu_ms)
        print(f"  {NAMES[name]:32s} {rate:7.1f} {cpu_ms:7.1f} {of.peak_bytes / 2**20:7.0f}   {share}")


def ratio(results: dict[str, Result], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(results[name].rates, results[other].rates, strict=True))


def goals(results: Results, memory: dict[int, int]) -> Iterator[tuple[str, float, bool]]:
    """What is wanted, what was found, whether that is enough; of those who took part."""

    def at_least(wanted: float, found: float, what: str) -> tuple[str, float, bool]:
        return f"at least {wanted}: {what}", found, found >= wanted

    def best_of(names: tuple[str, ...], found: dict[str, Result]) -> str | None:
        there = [name for name in names if name in found]
        return max(there, key=lambda name: statistics.median(found[name].rates), default=None)

    small, large = results.get("500 x 375", {}), results.get("12 MP", {})
    best = best_of(FP32_PEERS, small)
    if best and "ours fp32" in small:
        yield at_least(1.15, ratio(small, "ours fp32", best), f"ours, fp32, times as fast as {NAMES[best]}")
    for name, wanted in (("rclip fp32", 2.5), ("script 1", 5)):
        if {"ours int8", name} <= small.keys():
            yield at_least(wanted, ratio(small, "ours int8", name), f"ours, int8, times as fast as {NAMES[name]}")
    for size, by_name in results.items():
        for name in OURS:
            if name in by_name:
                share = statistics.median(by_name[name].shares())
                yield at_least(0.9, share, f"{NAMES[name]}, {size}, of 1/(1/E + 1/D)")
    best = best_of(IN_SEQUENCE, large)
    if best and "ours int8" in large:
        found = ratio(large, "ours int8", best)
        yield at_least(6, found, f"ours, int8, 12 MP, times as fast as {NAMES[best]}: all decoded, fp32, in sequence")
    if memory:
        growth = memory[max(memory)] / memory[min(memory)]
        yield f"at most 1.1: memory at {max(memory):,} photos to that at {min(memory):,}", growth, growth <= 1.1


if __name__ == "__main__":
    main()
