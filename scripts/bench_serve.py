"""How fast `searchengine serve` answers on loopback, and what saturates first.

    scripts/bench_serve.py [--seconds 300] [--n 100000] [--clients 1 8 64] [--markdown FILE]

An index of n vectors of `mini` (real photos, extended as scripts/bench_search_data.py tells), compacted as a library
of that size is; one service; wrk as the load, on the same machine, so the load takes part of the processors. Three
kinds of requests, 50 hits each: photos like an indexed one, chosen at random; texts that were asked before; texts that
never were. --seconds is for all of them together. Meanwhile the memory of the service and of its children is read once
a second. Prints the hardware and a table in Markdown, and ends with 1 where any request failed.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import bench_search_data
import numpy as np
from bench_search_contenders import write_index_folder
from bench_serve_process import TICKS, Service
from hardware import cpu_name
from numpy.typing import NDArray

import searchengine
from searchengine.index.layout import IndexIdentity, write_identity

ROOT = Path(__file__).parent.parent
K = 50
KNOWN_TEXTS = 100
KINDS = {
    "like an indexed photo": "photo",
    "a text asked before": "known",
    "a text never asked before": "new",
}
MEMORY = ("with the vectors that it has mapped", "without what belongs to files")
# One request after the other, as wrk asks for them; what it counted, as JSON in its last line. Every thread of every
# run has numbers of its own for its new texts.
LUA = """
local kind, first, n, k = "%(kind)s", %(first)d, %(n)d, %(k)d
local texts = {%(texts)s}
local threads, count = 0, 0
function setup(thread) thread:set("number", threads); threads = threads + 1 end
function init(args) math.randomseed(first + number) end
function request()
  count = count + 1
  local path
  if kind == "photo" then
    path = "/api/images/" .. math.random(1, n) .. "/similar?k=" .. k
  else
    path = "/api/search?k=" .. k .. "&q=" .. texts[math.random(1, #texts)]
    if kind == "new" then path = path .. "+" .. string.format("%%d", first + number * 1000000 + count) end
  end
  return wrk.format("GET", path)
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %%d, "seconds": %%f, "p50": %%f, "p99": %%f, "max": %%f, "broken": %%d, "refused": %%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, e.connect + e.read + e.write + e.timeout, e.status))
end
"""


@dataclass(frozen=True)
class Measured:
    """`p50`, `p99`, `longest` in milliseconds; `cores` that the service, wrk and others used on average."""

    kind: str
    clients: int
    requests: int
    per_second: float
    p50: float
    p99: float
    longest: float
    errors: int
    service_cores: float
    load_cores: float
    other_cores: float
    rss_bytes: int
    stages: dict[str, float]

    def row(self) -> str:
        busy = " ".join(f"{name} {share:.0%}" for name, share in self.stages.items() if share >= 0.01)
        return (
            f"| {self.kind} | {self.clients} | {self.per_second:,.0f} | {self.p50:.1f} | {self.p99:.1f} "
            f"| {self.errors} | {self.service_cores:.2f} + {self.load_cores:.2f} "
            f"| {self.rss_bytes / 2**20:,.0f} | {busy} |"
        )


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--n", type=int, default=100_000, help="vectors (default 100000)")
    arguments.add_argument("--seconds", type=float, default=300.0, help="of load, all together (default 300)")
    arguments.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    arguments.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    arguments.add_argument("--data-folder", type=Path, default=ROOT.parent / "shared/data", metavar="FOLDER")
    cache = Path(tempfile.gettempdir(), "bench_search")
    arguments.add_argument("--data-cache", type=Path, default=cache, metavar="FOLDER", help=f"(default {cache})")
    options = arguments.parse_args()
    if shutil.which("wrk") is None:
        arguments.error("wrk is not installed; on Debian, apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "index")
        texts = make_index(index, options)
        with running(index) as service:
            found = measure(service, texts, Path(folder), options)
        report = "\n".join(lines_of(found, service.memory, options))
    print(report)
    if options.markdown:
        options.markdown.write_text(f"{report}\n", "utf-8")
    return 1 if any(one.errors for one in found) else 0


def make_index(folder: Path, options: argparse.Namespace) -> list[str]:
    """Makes it, and returns captions to ask for."""
    encoder = searchengine.load_encoder("mini")
    data = bench_search_data.mini(
        options.n, count=60, data=options.data_folder, cache=options.data_cache, load_encoder=lambda: encoder
    )
    write_index_folder(data.vectors, folder)
    write_identity(folder, IndexIdentity(encoder=encoder.name, fingerprint=encoder.fingerprint, dim=encoder.dim))
    done = subprocess.run(
        [sys.executable, "-m", "searchengine", "compact", "--index", str(folder), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    status = json.loads(done.stdout)
    print(f"an index of {status['vectors']:,} vectors, kind {status['index_kind']}", flush=True)
    captions = json.loads((options.data_folder / "flickr8k_dev/captions.json").read_text("utf-8"))
    texts = [re.sub(r"[^a-z ]", "", photo["captions"][0].lower()).strip() for photo in captions]
    return random.Random(0).sample(texts, KNOWN_TEXTS)


@contextmanager
def running(index: Path) -> Iterator[Service]:
    service = Service(index)
    try:
        yield service
    finally:
        code = service.close()
    if code != 0:
        raise SystemExit(f"the service ended with {code}")


def measure(service: Service, texts: list[str], folder: Path, options: argparse.Namespace) -> list[Measured]:
    seconds = options.seconds / (len(KINDS) * len(options.clients))
    runs, found = 0, []
    for name, kind in KINDS.items():
        for clients in options.clients:
            script = folder / f"{kind}-{clients}.lua"
            quoted = ", ".join(f'"{quote_plus(text)}"' for text in texts)
            runs += 1
            values = {"kind": kind, "first": runs * 10_000_000, "n": options.n, "k": K, "texts": quoted}
            script.write_text(LUA % values)
            service.settle()
            if kind == "known":
                for text in texts:
                    service.ask(f"/api/search?k={K}&q={quote_plus(text)}")
            load(service.url, script, clients=clients, seconds=min(1.0, seconds))  # caches, threads
            values["first"] += 5_000_000
            script.write_text(LUA % values)
            found.append(measured(name, service, script, clients=clients, seconds=seconds))
            print(found[-1].row(), flush=True)
    return found


def measured(kind: str, service: Service, script: Path, *, clients: int, seconds: float) -> Measured:
    service.settle()
    stages, before = service.stage_seconds(), _cpu_seconds(service)
    answer = load(service.url, script, clients=clients, seconds=seconds)
    service_cores, load_cores, all_cores = (_cpu_seconds(service) - before) / answer["seconds"]
    after = {stage: total - stages.get(stage, 0.0) for stage, total in service.stage_seconds().items()}
    whole = sum(after.values()) or 1.0
    return Measured(
        kind=kind,
        clients=clients,
        requests=answer["requests"],
        per_second=answer["requests"] / answer["seconds"],
        p50=answer["p50"],
        p99=answer["p99"],
        longest=answer["max"],
        errors=answer["broken"] + answer["refused"],
        service_cores=service_cores,
        load_cores=load_cores,
        other_cores=max(0.0, all_cores - service_cores - load_cores),
        rss_bytes=service.memory_bytes()[0],
        stages={stage: spent / whole for stage, spent in after.items()},
    )


def load(url: str, script: Path, *, clients: int, seconds: float) -> dict[str, Any]:
    command = ["wrk", "-t", str(min(clients, 2)), "-c", str(clients), "-d", f"{max(1, round(seconds))}s"]
    done = subprocess.run(
        [*command, "--timeout", "30s", "-s", str(script), url], capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def lines_of(found: list[Measured], memory: list[tuple[int, int]], options: argparse.Namespace) -> Iterator[str]:
    cores = len(os.sched_getaffinity(0))
    yield f"{cpu_name()}, {cores} cores; {options.n:,} vectors, {K} hits a request, {options.seconds:.0f} s in all"
    yield ""
    columns = (
        "request, clients, a second, p50 (ms), p99 (ms), errors, cores of service + load, RSS (MiB), time by stage"
    )
    yield f"| {columns.replace(',', ' |')} |"
    yield f"|{' --- |' * len(columns.split(','))}"
    yield from (one.row() for one in found)
    yield ""
    yield f"{sum(one.requests for one in found):,} requests, {sum(one.errors for one in found)} errors."
    if len(memory) >= 8:
        quarter = len(memory) // 4
        for name, sizes in zip(MEMORY, zip(*memory, strict=True), strict=True):
            parts = [statistics.median(sizes[i * quarter : (i + 1) * quarter]) / 2**20 for i in range(4)]
            yield (
                f"Memory of the service, {name}, median of each quarter of the time: "
                f"{', '.join(f'{part:,.0f}' for part in parts)} MiB; at most {max(sizes) / 2**20:,.0f} MiB."
            )
    for kind in KINDS:
        fullest = max((one for one in found if one.kind == kind), key=lambda one: one.clients)
        used = fullest.service_cores + fullest.load_cores + fullest.other_cores
        work = {name: share for name, share in fullest.stages.items() if name != "queue" and share >= 0.01}
        stage = max(work, key=lambda name: work[name], default="")
        what = "the processors" if used >= 0.85 * cores else f"not the processors: {used:.2f} of {cores} cores are busy"
        yield (
            f"What saturates first, {kind}, {fullest.clients} clients: {what} ({fullest.service_cores:.2f} cores the "
            f"service, {fullest.load_cores:.2f} wrk, {fullest.other_cores:.2f} what else ran); "
            + (f"of the stages, most time goes to `{stage}`." if stage else "all time goes to HTTP itself.")
        )


def _cpu_seconds(service: Service) -> NDArray[np.float64]:
    """(3,): of the service, of those that this process has started and that have ended, as wrk has, of the machine."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    machine = (user + nice + system + irq + softirq) / TICKS
    return np.array([service.cpu_seconds(), ended.ru_utime + ended.ru_stime, machine])


if __name__ == "__main__":
    sys.exit(main())
