"""Which decoder is worth its place: Pillow (full, and draft as ours), simplejpeg and OpenCV, at equal crops.

    scripts/bench_decode.py [FOLDER_OF_PHOTOS] [--rounds 5] [--photos 40] [--json FILE]

Crops of 224 pixels, RGB. All take turns, photo by photo; times are CPU time
of one thread, medians of rounds. The difference to Pillow's full decode and the same resize is in grey levels, mean
over photos and largest mean of one. Below: what it takes to decode in a process of its own, as indexing does (elapsed
time, its start left out); what PNG, WebP and HEIC cost, of which how much is the decoder's.
simplejpeg and opencv-python-headless are left out where they are not installed.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import bench_ingest_photos
import numpy as np
from hardware import cpu_name
from PIL import Image

from searchengine.decode import DEFAULT_LIMITS, crop_pixels, decode_bytes, open_image
from searchengine.isolation import IsolatedDecoder

ROOT = Path(__file__).parent.parent
SIDE = 224
Decode = Callable[[bytes], np.ndarray]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos = ROOT.parent / "shared/data/coco_cc/images"
    arguments.add_argument("folder", type=Path, nargs="?", default=photos)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--photos", type=int, default=40)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    print(cpu_name())
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for size in bench_ingest_photos.SIDES:
            files = bench_ingest_photos.make(options.folder, Path(work, size), size=size, count=options.photos)
            encoded = [file.read_bytes() for file in files]
            print(f"{len(files)} JPEGs of {size}: CPU ms a photo, difference to the full decode, mean and worst photo")
            figures[size] = take_turns(jpeg_decoders(), encoded, options.rounds)
            figures[size]["isolation"] = isolation(encoded, options.rounds)
            if size == "500 x 375":
                for kind, parameters in {"PNG": {}, "WEBP": {"quality": 90}, "HEIF": {"quality": 90}}.items():
                    print(f"as {kind}")
                    again = [saved(data, kind, **parameters) for data in encoded]
                    figures[kind] = take_turns({"Pillow, full": pillow_full, "ours": ours}, again, options.rounds)
                    bare = statistics.median(cpu_ms(lambda data=data: open_image(data).load()) for data in again)
                    print(f"    of that, {bare:.2f} ms is decoding, the rest resize and metadata")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def pillow_full(data: bytes) -> np.ndarray:
    return crop_pixels(open_image(data), image_size=SIDE)


def ours(data: bytes) -> np.ndarray:
    return decode_bytes(data, image_size=SIDE).pixels


def drafted(data: bytes) -> np.ndarray:
    """No less than the crop, instead of no less than twice that."""
    image = open_image(data)
    image.draft("RGB", (SIDE, SIDE))
    return crop_pixels(image, image_size=SIDE)


def boxed(data: bytes) -> np.ndarray:
    """As ours, but only what the crop shows is resized."""
    image = open_image(data)
    image.draft("RGB", (2 * SIDE, 2 * SIDE))
    width, height = image.size
    short = min(width, height)
    scaled = [max(SIDE, int(SIDE * side / short)) for side in (width, height)]
    corner = [round((side - SIDE) / 2) for side in scaled]
    x, y = width / scaled[0], height / scaled[1]
    box = (corner[0] * x, corner[1] * y, (corner[0] + SIDE) * x, (corner[1] + SIDE) * y)
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def jpeg_decoders() -> dict[str, Decode]:
    found: dict[str, Decode] = {
        "Pillow, full": pillow_full,
        "Pillow, draft >= 2 x (ours)": ours,
        "Pillow, draft >= 1 x": drafted,
        "Pillow, draft >= 2 x, box": boxed,
    }
    try:
        import simplejpeg

        def simple(data: bytes) -> np.ndarray:
            pixels = simplejpeg.decode_jpeg(data, min_height=2 * SIDE, min_width=2 * SIDE, min_factor=1)
            return crop_pixels(Image.fromarray(pixels), image_size=SIDE)

        found["simplejpeg >= 2 x"] = simple
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(1)

        def opencv(data: bytes) -> np.ndarray:
            width, height = Image.open(io.BytesIO(data)).size
            reduction = next((r for r in (8, 4, 2) if min(width, height) // r >= 2 * SIDE), 1)
            flag = cv2.IMREAD_COLOR if reduction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
            pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flag), cv2.COLOR_BGR2RGB)
            short = min(pixels.shape[:2])
            height, width = (max(SIDE, int(SIDE * side / short)) for side in pixels.shape[:2])
            top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
            small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
            return small[top : top + SIDE, left : left + SIDE]

        found["OpenCV >= 2 x, area"] = opencv
    except ImportError:
        pass
    return found


def take_turns(decoders: dict[str, Decode], encoded: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """CPU ms a photo, and the difference to the first of the decoders."""
    milliseconds: dict[str, list[float]] = {name: [] for name in decoders}
    differences: dict[str, list[float]] = {name: [] for name in decoders}
    for round_ in range(rounds + 1):
        spent = dict.fromkeys(decoders, 0.0)
        for data in encoded:
            crops: dict[str, np.ndarray] = {}
            for name, decode in decoders.items():
                started = time.thread_time()
                crops[name] = decode(data)
                spent[name] += time.thread_time() - started
            exact = next(iter(crops.values())).astype(np.int16)
            for name, crop in crops.items() if not round_ else ():
                differences[name].append(float(np.abs(exact - crop).mean()))
        for name, seconds in spent.items() if round_ else ():
            milliseconds[name].append(1000 * seconds / len(encoded))
    found = {}
    for name in decoders:
        median, mean = statistics.median(milliseconds[name]), statistics.fmean(differences[name])
        found[name] = {"cpu_ms": median, "mean_difference": mean, "worst_photo": max(differences[name])}
        print(f"    {name:30s} {median:7.2f}   {mean:6.4f}   {max(differences[name]):.3f}")
    return found


def isolation(encoded: list[bytes], rounds: int) -> dict[str, float]:
    """Elapsed ms a photo in this process and in one of its own, in turns; medians of rounds."""
    milliseconds: dict[str, list[float]] = {"here": [], "isolated": []}
    with closing(IsolatedDecoder(limits=DEFAULT_LIMITS)) as decoder:
        decoder.decode_bytes(encoded[0], image_size=SIDE)
        kinds: dict[str, Decode] = {
            "here": ours,
            "isolated": lambda data: decoder.decode_bytes(data, image_size=SIDE).pixels,
        }
        for _ in range(rounds):
            for name, decode in kinds.items():
                started = time.perf_counter()
                for data in encoded:
                    decode(data)
                milliseconds[name].append(1000 * (time.perf_counter() - started) / len(encoded))
    found = {name: statistics.median(values) for name, values in milliseconds.items()}
    print(f"    in a process of its own: {found['isolated']:.2f} ms elapsed, {found['here']:.2f} in this one")
    return found


def saved(data: bytes, kind: str, **parameters: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, kind, **parameters)
    return buffer.getvalue()


def cpu_ms(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return 1000 * (time.thread_time() - started)


if __name__ == "__main__":
    main()
