"""Those who index photos in `bench_ingest.py`, each a process of its own that is told when it is its turn.

    bench_ingest_contenders.py NAME FOLDER      the folder: model.safetensors, "images fp32.onnx", "images int8.onnx"

Reads a JSON object a line, {"photos": folder, "limits": false}, and answers with one: seconds and CPU seconds of
reading all photos of that folder until their embeddings are on disk, or with "limits" how many images a second are
encoded, and decoded, on all cores when nothing else is done. All embed with the same weights; models are loaded and
warm before the first turn, and what starts anew with every run (workers) counts.

The emulations do what these programs do, with nothing slowed down: the usual script is the one of transformers'
documentation; rclip (0.x, 1.x) reads photos one by one, runs ONNX Runtime over 8 and keeps vectors in SQLite;
clip-retrieval decodes in workers of a torch DataLoader, runs eager torch over batches and saves .npy. Each loads only
the libraries that it needs, for its memory is compared too.
"""

import json
import os
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION
from searchengine.vectors import Encoder

Run = Callable[[list[Path], Path], None]  # photos, an empty folder to write in

LIMIT_SECONDS, LIMIT_PHOTOS, BATCH = 1.5, 64, 32


def usual_script(folder: Path, *, batch: int) -> Run:
    import torch
    from transformers import CLIPModel
    from transformers.models.clip import CLIPImageProcessorPil

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessorPil()

    def run(photos: list[Path], out: Path) -> None:
        rows = []
        for some in batched(photos, batch):
            inputs = processor(images=[Image.open(photo).convert("RGB") for photo in some], return_tensors="pt")
            with torch.inference_mode():
                rows.append(unit(model.get_image_features(**inputs).pooler_output.numpy()))
        np.save(out / "embeddings.npy", np.concatenate(rows))

    return run


def rclip(folder: Path, *, precision: str) -> Run:
    from onnxruntime import InferenceSession

    session = InferenceSession(str(folder / f"images {precision}.onnx"), providers=["CPUExecutionProvider"])

    def run(photos: list[Path], out: Path) -> None:
        database = sqlite3.connect(out / "db.sqlite3")
        database.execute("CREATE TABLE images (filepath TEXT UNIQUE, modified_at FLOAT, size INTEGER, vector BLOB)")
        for some in batched(photos, 8):
            rows = unit(session.run(None, {"x": np.stack([preprocessed(photo) for photo in some])})[0])
            facts = [(str(photo), photo.stat().st_mtime, photo.stat().st_size) for photo in some]
            values = [(*fact, row.tobytes()) for fact, row in zip(facts, rows, strict=True)]
            database.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", values)
            database.commit()
        database.close()

    return run


class Photos:
    """A map-style dataset for torch's DataLoader."""

    def __init__(self, photos: list[Path]) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> np.ndarray:
        return preprocessed(self.photos[number])


def clip_retrieval(folder: Path) -> Run:
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()

    def run(photos: list[Path], out: Path) -> None:
        loader = torch.utils.data.DataLoader(Photos(photos), batch_size=64, num_workers=os.cpu_count() or 1)
        with torch.inference_mode():
            rows = [unit(model.get_image_features(pixels).pooler_output.numpy()) for pixels in loader]
        np.save(out / "embeddings.npy", np.concatenate(rows))

    return run


def ours(encoder: Encoder) -> Run:
    """All of `searchengine index`: crawl, hash, decode in processes, encode, segments and rows committed."""
    from indexer.pipeline import build

    def run(photos: list[Path], out: Path) -> None:
        report = build(out / "index", [photos[0].parent], encoder=encoder, batch_size=BATCH)
        assert report.added == len(photos), report

    return run


def encoder_of(name: str, folder: Path) -> Encoder:
    from searchengine.models.clip.encoder import ClipEncoder
    from searchengine.models.registry import load_encoder

    if name.startswith("mini"):
        return load_encoder("mini", device="cpu", precision=name.partition(" ")[2] or "fp32")
    file = folder / "model.safetensors"
    return ClipEncoder(name="random", weights_file=file, device="cpu", precision=name)


def limits(encoder: Encoder, photos: list[Path]) -> dict[str, float]:
    """Images a second: crops that lie in memory encoded; files that lie in memory decoded and cropped."""
    from searchengine.decode import decode_bytes

    files = [photo.read_bytes() for photo in photos[:LIMIT_PHOTOS]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def decode() -> list[np.ndarray]:
            return list(pool.map(lambda data: decode_bytes(data, image_size=encoder.image_size).pixels, files))

        crops = np.stack(decode())
        batches = [crops[start : start + BATCH] for start in range(0, len(crops), BATCH)]
        return {
            "encode": rate(lambda: [encoder.encode_pixels(batch) for batch in batches], len(crops)),
            "decode": rate(decode, len(files)),
        }


def rate(work: Callable[[], object], items: int) -> float:
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < LIMIT_SECONDS:
        work()
        done += items
    return done / elapsed


def preprocessed(photo: Path) -> np.ndarray:
    """float32 (3, 224, 224), as CLIP has it: all of the photo decoded, then resized and cropped."""
    image = Image.open(photo).convert("RGB")
    scale = 224 / min(image.size)
    width, height = (max(224, int(side * scale)) for side in image.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STANDARD_DEVIATION)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def batched(items: Iterable[Path], size: int) -> Iterator[list[Path]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    kind, _, choice = name.partition(" ")
    encoder = encoder_of(choice, folder) if kind == "ours" else None
    makers: dict[str, Callable[[], Run]] = {
        "script": lambda: usual_script(folder, batch=int(choice)),
        "rclip": lambda: rclip(folder, precision=choice),
        "clip-retrieval": lambda: clip_retrieval(folder),
    }
    run = ours(encoder) if encoder else makers[kind]()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        photos = sorted(Path(request["photos"]).iterdir())
        if request["limits"]:
            assert encoder
            answer = limits(encoder, photos)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                started, cpu = time.perf_counter(), cpu_seconds()
                run(photos, Path(out))
                answer = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
