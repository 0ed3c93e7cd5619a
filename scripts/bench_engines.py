"""How fast one and two workers index, as processes of this machine and as nodes of a Ray cluster.

    scripts/bench_engines.py PHOTOS [--photos 400] [--rounds 2] [--kill]
    scripts/bench_engines.py --free 50000

Everybody indexes the same photos with mini on the CPU, and takes turns in every round. A worker has one core for its
encoder and one process that decodes; *this process* has all cores. Photos a second are told over the whole run, which
includes the start of workers (and joining the cluster), and over what comes after the first photos are done. The Ray
cluster, of nodes of one core each on this machine, is started beforehand. All indexes are compared in the end: vectors
to the bit.

`--kill` adds a run whose second node is killed by force when half of the photos are done. `--free` tells how many
photos a second the run itself can take, which crawls, answers, records and commits, from workers that cost nothing:
they make vectors up. Needs the extra `ray`.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from hardware import cpu_name

from indexer.engines import Engine, Place
from indexer.engines.messages import (
    Embedded,
    EncoderSource,
    Finding,
    Findings,
    Lease,
    LeasedPhoto,
    Question,
    Ready,
    Setup,
    ToRun,
    ToWorker,
)
from indexer.engines.processes import ProcessEngine
from indexer.engines.ray import RayEngine
from indexer.pipeline import build
from indexer.report import OnProgress, Progress
from searchengine.filters import Filters
from searchengine.index.reader import Index
from searchengine.metadata import PhotoMetadata
from searchengine.models.registry import load_encoder
from searchengine.vectors import normalise

SOURCE = EncoderSource(name="mini")
QUESTION_PHOTOS = 32


class OneCore(ProcessEngine):
    """Processes with a core each, however many the machine has."""

    def places(self) -> list[Place]:
        return [Place(name="cpu", device="cpu", cores=1, share=1 / (os.cpu_count() or 1)) for _ in super().places()]


@contextmanager
def ray_cluster(nodes: int) -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.others = [cluster.add_node(**node) for _ in range(nodes - 1)]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()


def contents(index: Path) -> dict[str, bytes]:
    """The vector of each photo, by its name."""
    with Index(index) as opened:
        photos = opened.images_of(opened.vector_ids(Filters()).tolist())
        return {row.key: opened.vector(vector).tobytes() for vector, rows in photos.items() for row in rows}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Photos a second over all of a run, and from when the first were done; what it made."""

    whole: float
    working: float
    made: dict[str, bytes]


def measure(photos: Path, engine: Engine | None, *, on_progress: OnProgress = lambda progress: None) -> Run:
    marks: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        if progress.done:
            marks.append((time.monotonic(), progress.done))
        on_progress(progress)

    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        encoder = load_encoder("mini", device="cpu")
        report = build(Path(folder) / "index", [photos], encoder=encoder, engine=engine, on_progress=note)
        seconds = time.monotonic() - started
        (first_at, first), (last_at, last) = marks[0], marks[-1]
        made = contents(Path(folder) / "index")
    return Run(whole=report.added / seconds, working=(last - first) / (last_at - first_at), made=made)


class FreeEngine:
    """Four workers that find something in a photo without looking at it."""

    source = SOURCE

    def __init__(self) -> None:
        self.said: SimpleQueue[tuple[FreeLink, ToRun]] = SimpleQueue()

    def places(self) -> list[Place]:
        return [Place(name="nowhere", device="cpu", cores=1)] * 4

    def start(self, place: Place, setup: Setup) -> "FreeLink":
        link = FreeLink(self.said)
        self.said.put((link, Ready()))
        return link

    def hear(self, timeout_seconds: float) -> list[tuple["FreeLink", ToRun]]:
        try:
            return [self.said.get(timeout=timeout_seconds)]
        except Empty:
            return []

    def close(self) -> None:
        pass


class FreeLink:
    def __init__(self, said: "SimpleQueue[tuple[FreeLink, ToRun]]") -> None:
        self.said = said

    def send(self, message: ToWorker) -> None:
        if isinstance(message, Lease):
            photos = list(message.photos.items())
            for start in range(0, len(photos), QUESTION_PHOTOS):
                self._find(message.number, photos[start : start + QUESTION_PHOTOS])

    def end(self) -> None:
        pass

    def _find(self, lease: int, photos: list[tuple[int, LeasedPhoto]]) -> None:
        hashes = [hashlib.sha256(photo.listed.key.encode()).digest() for _, photo in photos]
        rows = np.stack([np.frombuffer(content_hash * 16, np.uint8) for content_hash in hashes])
        metadata = PhotoMetadata(width=640, height=480)
        findings = [
            Finding(lease, position, photo.listed, Embedded(content_hash, metadata))
            for (position, photo), content_hash in zip(photos, hashes, strict=True)
        ]
        self.said.put((self, Question(tuple(hashes))))
        self.said.put((self, Findings(findings=findings, embeddings=normalise(rows.astype(np.float32)))))


def measure_free(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for at in range(number):
            (photos / f"{at:07}.jpg").touch()
        encoder = load_encoder("mini", device="cpu")
        report = build(Path(folder) / "index", [photos], encoder=encoder, engine=FreeEngine())
    listing, writing = (report.seconds_by_stage[stage] for stage in ("list", "write"))
    rate, commit_ms = report.added / (report.seconds - listing), 1e3 * writing / report.added
    print(
        f"{report.added:,} photos that cost workers nothing: {rate:,.0f} a second, of each {commit_ms:.2f} ms to commit"
    )


def on_ray(photos: Path, nodes: int) -> Run:
    with ray_cluster(nodes):
        return measure(photos, RayEngine(SOURCE))


def with_a_killed_node(photos: Path) -> Run:
    """The second node is killed once half of the photos are done."""
    with ray_cluster(2) as cluster:
        killer = threading.Thread(target=lambda: cluster.remove_node(cluster.others[0], allow_graceful=False))

        def kill(progress: Progress) -> None:
            if progress.done > progress.total / 2 and not killer.ident:
                killer.start()

        run = measure(photos, RayEngine(SOURCE), on_progress=kill)
        killer.join()
        return run


WAYS: dict[str, Callable[[Path], Run]] = {
    "this process, all cores": lambda photos: measure(photos, None),
    "1 process of 1 core": lambda photos: measure(photos, OneCore(SOURCE, devices=["cpu"])),
    "2 processes of 1 core": lambda photos: measure(photos, OneCore(SOURCE, devices=["cpu", "cpu"])),
    "Ray, 1 node of 1 core": lambda photos: on_ray(photos, 1),
    "Ray, 2 nodes of 1 core": lambda photos: on_ray(photos, 2),
}
KILLED = {"Ray, 2 nodes, 1 killed": with_a_killed_node}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="PHOTOS")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--free", type=int, metavar="PHOTOS")
    options = parser.parse_args()
    if options.free:
        measure_free(options.free)
    if not options.folder:
        return
    ways = WAYS | (KILLED if options.kill else {})
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(options.folder.rglob("*.jpg"))[: options.photos]:
            shutil.copyfile(file, Path(folder) / file.name)
        for _ in range(options.rounds):
            for way, run in ways.items():
                runs[way].append(run(Path(folder)))
                print(f"{way}: {runs[way][-1].whole:.1f}", file=sys.stderr)
    reference = runs["this process, all cores"][0].made
    print(f"{len(reference)} photos, mini, {options.rounds} rounds, {os.cpu_count()} cores of {cpu_name()}\n")
    print("| way | photos/s | photos/s, once begun | vectors that differ |\n| --- | --- | --- | --- |")
    for way, results in runs.items():
        whole = statistics.median(run.whole for run in results)
        working = statistics.median(run.working for run in results)
        differ = sum(run.made.get(key) != vector for run in results for key, vector in reference.items())
        extra = sum(len(run.made.keys() - reference.keys()) for run in results)
        print(f"| {way} | {whole:.1f} | {working:.1f} | {differ + extra} |")


if __name__ == "__main__":
    main()
