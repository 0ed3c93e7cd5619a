"""How fast a run finds out what changed, and in how much memory: a million photos that need no disk, then real files.

    scripts/bench_crawl.py [--photos 1000000] [--files 100000] [--folder FOLDER]

Whole runs of `indexer.build` against an index that knows as many photos and vectors. Bookkeeping is what a run takes
beyond the listing alone. Each run has a process of its own; its growth is the peak of its resident memory beyond what
it had before the run, and should hardly be more for ten times the photos. FOLDER, by default a temporary one, holds the
index and the files.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hardware import cpu_name
from PIL import Image

import indexer
from indexer.writer import IndexWriter
from searchengine.index.schema import encode_key
from searchengine.stores import ImageStore, Mount, StoredPhoto, Unlistable, device_of
from searchengine.stores.local import LocalStore
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores, normalise

DIM = 2
FOLDER_SIZE = 1000
STRIDE = 37  # photos of a folder are listed by every 37th number
BATCH = 5000
GOAL_FILES_PER_S = 100_000


class RandomEncoder:
    """Takes no time, so that only the rest of a run is measured."""

    name, dim, precision, image_size, logit_scale = "random", DIM, "fp32", 32, 1.0
    fingerprint = hashlib.sha256(b"random").hexdigest()
    usual_scores = UsualScores(centre=0.0, spread=1.0)

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        return normalise(np.random.default_rng(0).standard_normal((len(texts), DIM)))

    def encode_images(self, images: Sequence[object]) -> FloatMatrix:
        return normalise(np.random.default_rng(0).standard_normal((len(images), DIM)))

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        return normalise(np.random.default_rng(0).standard_normal((len(pixels), DIM)))


@dataclass(frozen=True)
class SyntheticStore:
    """`count` photos in folders of a thousand, listed out of order. Of a hundred, `changed` are not as they were: by
    turns another content, another name, gone."""

    count: int
    changed: int = 0
    name: str = "synthetic"
    prefix: str = "/synthetic/"

    def scan(self, prefix: str) -> Iterator[StoredPhoto | Unlistable | Mount]:
        yield Mount(self.prefix, device_of(self.name, self.prefix) or 0)
        folders = -(-self.count // FOLDER_SIZE)
        for folder in range(folders):
            path = f"{self.prefix}{folder * 7919 % folders:05}/"
            first = folder * FOLDER_SIZE
            for place in range(min(FOLDER_SIZE, self.count - first)):
                number = place * STRIDE % FOLDER_SIZE
                match self._change_of(number):
                    case "content" | None:
                        yield self._photo(f"{path}{number:04}.png")
                    case "name":
                        yield self._photo(f"{path}{number:04} moved.png")

    def _change_of(self, number: int) -> str | None:
        place = number * pow(STRIDE, -1, FOLDER_SIZE) % FOLDER_SIZE
        return ("content", "name", "gone")[number % 3] if place % 100 < self.changed else None

    def _photo(self, key: str) -> StoredPhoto:
        number = _number_of(key)
        return StoredPhoto(key, 100_000 + number, number + FOLDER_SIZE * (self._change_of(number) == "content"))

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        changed = self._change_of(_number_of(key)) == "content"
        return self._photo(key), content(f"new {key}" if changed else key.replace(" moved", ""))

    def head(self, key: str) -> bytes:
        return picture()[:32]


def _number_of(key: str) -> int:
    return int(os.path.basename(key)[:4])


@cache
def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    return stream.getvalue()


def content(name: str) -> bytes:
    """What follows the end of a picture does not change it, but is another content."""
    return picture() + name.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in (options.photos // 10, options.photos):
            bench_synthetic(Path(folder, str(count)), count)
        bench_files(Path(folder, "files"), options.files)


def bench_synthetic(folder: Path, count: int) -> None:
    print(f"\n{count:,} photos that need no disk")
    known = SyntheticStore(count)
    in_own_process(fill, folder, known)
    for title, store in (
        ("unchanged", known),
        ("1% changed, moved, deleted", SyntheticStore(count, changed=1)),
        ("the same again", SyntheticStore(count, changed=1)),
        ("everything gone", SyntheticStore(0)),
    ):
        print(f"  {title:27s}{in_own_process(run, folder, store)}")


def bench_files(folder: Path, count: int) -> None:
    photos = folder / "photos"
    for number in range(count):
        if number % FOLDER_SIZE == 0:
            (photos / f"{number // FOLDER_SIZE:03}").mkdir(parents=True)
        (photos / f"{number // FOLDER_SIZE:03}" / f"{number % FOLDER_SIZE:03}.png").write_bytes(content(str(number)))
    store = LocalStore(str(photos))
    in_own_process(fill, folder / "index", store)
    seconds = walk(str(photos))
    print(f"\n{count:,} files: os.scandir and stat alone {seconds:.2f} s, {count / seconds:,.0f} files/s")
    print(f"  {'unchanged':27s}{in_own_process(run, folder / 'index', store)}")


def in_own_process(job: object, *arguments: object) -> object:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()  # type: ignore[arg-type]


def fill(index: Path, store: ImageStore) -> None:
    """An index that knows all photos of `store`; past the writer for the photos, which it records one by one."""
    with IndexWriter(index, encoder=RandomEncoder()) as writer:
        listed = (item for item in store.scan(store.prefix) if isinstance(item, StoredPhoto))
        first = 1
        while page := list(islice(listed, 100 * BATCH)):
            hashes = [hashlib.sha256(content(item.key)).digest() for item in page]
            writer.add_vectors(hashes, RandomEncoder().encode_images(page))
            writer.commit(report={})
            rows = [
                (encode_key(store.name), encode_key(item.key), item.size_bytes, item.mtime_ns, 8, 8, first + number)
                for number, item in enumerate(page)
            ]
            columns = "(store, key, size_bytes, mtime_ns, width, height, vector_id)"
            with writer.engine.begin() as connection:
                connection.exec_driver_sql(f"INSERT INTO images {columns} VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            first += len(page)
        writer.commit(report={}, finished=True)
    build(index, store)  # what only a run records


def build(index: Path, store: ImageStore) -> indexer.Report:
    with patch("indexer.pipeline.open_stores", return_value=[store]):
        return indexer.build(index, ["-"], encoder=RandomEncoder(), isolated=False)


def run(index: Path, store: ImageStore) -> str:
    seconds = listing_seconds(store)
    before = resident_bytes()
    started = time.perf_counter()
    report = build(index, store)
    whole = time.perf_counter() - started
    done = {name: getattr(report, name) for name in ("added", "updated", "moved", "deleted", "unchanged")}
    said = ", ".join(f"{count:,} {name}" for name, count in done.items() if count)
    files = max(report.scanned, report.deleted)
    rate = files / max(whole - seconds, 1e-9)
    told = f"{whole:6.2f} s, listing alone {seconds:5.2f} s, bookkeeping {rate:9,.0f} files/s"
    if report.scanned == report.unchanged >= GOAL_FILES_PER_S:
        told += f" (goal {GOAL_FILES_PER_S:,}: {'met' if rate >= GOAL_FILES_PER_S else 'NOT MET'})"
    return f"{told}, growth {(peak_bytes() - before) / 2**20:4.0f} MiB: {said}"


def listing_seconds(store: ImageStore) -> float:
    started = time.perf_counter()
    for _ in store.scan(store.prefix):
        pass
    return time.perf_counter() - started


def walk(folder: str) -> float:
    started = time.perf_counter()
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    entry.stat()
    return time.perf_counter() - started


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
