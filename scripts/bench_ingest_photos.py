"""The photos that `bench_ingest.py` indexes: real ones, cut to 500 x 375 or enlarged to 12 megapixels, no two alike."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from searchengine.formats import EXTENSIONS

SIDES = {"500 x 375": (500, 375), "12 MP": (4000, 3000)}
QUALITY = 90
# What a sensor adds, in grey levels: without it, an enlarged photo is a smaller file than any camera makes.
NOISE = 4


def make(source: Path, folder: Path, *, size: str, count: int) -> list[Path]:
    """`count` JPEGs of `size`, a key of SIDES, from the photos in `source`; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, (file, image) in enumerate(zip(files, variants(source), strict=False)):
        if not file.exists():
            photo = ImageOps.fit(image, sides_of(image, size), Image.Resampling.BICUBIC)
            if size == "12 MP":
                photo = with_noise(photo, seed=number)
            photo.save(file, quality=QUALITY)
    return files


def sides_of(image: Image.Image, size: str) -> tuple[int, int]:
    wide, narrow = SIDES[size]
    return (wide, narrow) if image.width >= image.height else (narrow, wide)


def variants(source: Path) -> Iterator[Image.Image]:
    """Each photo; then each mirrored; then both of parts of them, ever smaller; without end."""
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in EXTENSIONS)
    for number in count():
        turn, file = divmod(number, len(files))
        image = Image.open(files[file]).convert("RGB")
        image = ImageOps.crop(image, turn // 2 * 8)
        yield ImageOps.mirror(image) if turn % 2 else image


def with_noise(image: Image.Image, *, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, NOISE, (image.height, image.width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
