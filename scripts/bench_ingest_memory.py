"""What indexing takes of memory, and how that grows with the library: `bench_ingest.py --memory`.

    bench_ingest_memory.py PHOTOS INDEX         index a folder with an encoder that costs nothing

The files are tiny JPEGs, no two alike, so that a library of 100,000 takes minutes; the vectors have 512 dimensions.
Counted are resident pages, of files too; told beside them is what no file has. Nothing is kept of a photo that is
committed, and a run of 1,000 photos takes one whole commit, as all do. What larger ones take beyond it are SQLite's
caches, which a small index does not fill (2.5 MiB), the photos read while a commit is made, and holes in the heap.
"""

import hashlib
import io
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from indexer.pipeline import build
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores, normalise

COUNTS = (1_000, 10_000, 100_000)
DIM, SIDE = 512, 32
SAMPLE_SECONDS = 0.02  # a commit takes a tenth of a second, and a run of 1,000 photos one


class CheapEncoder:
    """Implements `searchengine.vectors.Encoder` for photos: the pixels themselves, cut to 512 numbers."""

    name, dim, image_size, precision, logit_scale = "cheap", DIM, SIDE, "fp32", 1.0
    usual_scores = UsualScores(centre=0.0, spread=1.0)
    fingerprint = hashlib.sha256(b"cheap").hexdigest()

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        return normalise(pixels.reshape(len(pixels), -1)[:, :DIM].astype(np.float32) + 1)


class PeakMemory:
    """The most that a process, with what its children have of their own, takes while this context lasts. Linux only.

    `bytes`: its resident pages, and the private ones of its descendants: pages that workers share with it count once.
    `held_bytes`: those of them that no file has, the heap above all; the others are pages of programs, libraries and
    mapped files, most of which the kernel may drop. It is looked at `every_seconds`, which takes a millisecond.
    """

    def __init__(self, pid: int, *, every_seconds: float = 0.1) -> None:
        self.pid, self.bytes, self.held_bytes = pid, 0, 0
        self._every_seconds = every_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            own = pages(self.pid)
            others = [pages(pid) for pid in descendants(self.pid)]
            private = sum(other["Private_Clean"] + other["Private_Dirty"] for other in others)
            self.bytes = max(self.bytes, own["Rss"] + private)
            held = own["Anonymous"] + sum(min(other["Anonymous"], other["Private_Dirty"]) for other in others)
            self.held_bytes = max(self.held_bytes, held)
            if self._done.wait(self._every_seconds):
                return


def pages(pid: int) -> Counter[str]:
    """Bytes by their kind; none for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return Counter()
    return Counter({line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines})


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += children + [grandchild for child in children for grandchild in descendants(child)]
    return found


def measure(work: Path) -> dict[int, int]:
    """Peak bytes by the number of photos, each number in a process of its own."""
    photos, found = work / "tiny", {}
    made = 0
    for count in COUNTS:
        for number in range(made, count):
            file = photos / f"{number // 1000:03}" / f"{number:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg() + number.to_bytes(4, "big"))  # decoders stop before what follows the picture
        made = count
        indexing = subprocess.Popen([sys.executable, __file__, photos, work / f"index of {count}"])
        with PeakMemory(indexing.pid, every_seconds=SAMPLE_SECONDS) as peak:
            if indexing.wait():
                raise SystemExit(f"indexing {count:,} photos failed")
        found[count] = peak.bytes
        shown = f"{peak.bytes / 2**20:.1f} MiB, {peak.held_bytes / 2**20:.1f} of them no file's"
        print(f"{count:,} photos: {shown}", flush=True)
    return found


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2 * SIDE, SIDE), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    report = build(sys.argv[2], [sys.argv[1]], encoder=CheapEncoder())  # type: ignore[arg-type]
    assert report.failed == 0, report
    print(f"{report.added:,} photos in {report.seconds:.0f} s: {report.seconds_by_stage}", flush=True)
