"""How many edited copies of real photos `duplicates` finds, and what it takes for copies by mistake; as Markdown.

    scripts/quality_duplicates.py DATA [--model mini]

The library is the dev split of Flickr8k and the photos of COCO in the folder DATA. Every fifth photo gets one edited
copy, of each kind in turn, so that each kind is asked for anew in the same library. A false pair is one that is no
photo with its copy; the dev split has a few series of one scene, which count as false here.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from searchengine.decode import crop_pixels, decode_file
from searchengine.duplicates import AT_MOST, NEIGHBOURS, STANDS_OUT, SURELY
from searchengine.models.registry import load_encoder
from searchengine.vectors import Encoder, FloatMatrix

Edit = Callable[[Image.Image], Image.Image]
EVERY = 5
FIXED = (0.9, 0.92, 0.94, 0.96)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without `share` of each side, half of it at either end."""
    x, y = round(image.width * share / 2), round(image.height * share / 2)
    return image.crop((x, y, image.width - x, image.height - y))


EDITS: dict[str, Edit] = {
    "JPEG, quality 80": lambda image: recompressed(image, 80),
    "JPEG, quality 50": lambda image: recompressed(image, 50),
    "half as wide and high": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice as wide and high": lambda image: image.resize((image.width * 2, image.height * 2)),
    "cropped by 5 %": lambda image: cropped(image, 0.05),
    "cropped by 10 %": lambda image: cropped(image, 0.10),
    "cropped by 20 %": lambda image: cropped(image, 0.20),
    "15 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "15 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "20 % more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def encoded(crops: Iterator[np.ndarray], encoder: Encoder, *, batch_size: int = 32) -> FloatMatrix:
    pieces, batch = [], []
    for crop in crops:
        batch.append(crop)
        if len(batch) == batch_size:
            pieces.append(encoder.encode_pixels(np.stack(batch)))
            batch = []
    return np.concatenate([*pieces, *([encoder.encode_pixels(np.stack(batch))] if batch else [])])


def near(vectors: FloatMatrix, threshold: float | None) -> np.ndarray:
    """Which pairs (n, n) are near copies by the rule of searchengine/duplicates.py, written down once more, plainly."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    if threshold is not None:
        return cosines >= threshold
    usual = np.median(cosines[np.triu_indices(len(cosines), 1)])
    ninth = np.maximum(-np.partition(-cosines, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1], usual)
    stands_out = 1 - cosines <= STANDS_OUT * (1 - np.maximum(ninth[:, None], ninth[None, :]))
    return (cosines >= 1 - SURELY * (1 - usual)) | ((cosines >= 1 - AT_MOST * (1 - usual)) & stands_out)


def table(data: Path, encoder: Encoder) -> str:
    photos = sorted((data / "flickr8k_dev").rglob("*.jpg")) + sorted((data / "coco_cc").rglob("*.jpg"))
    library = encoded((decode_file(str(photo), image_size=encoder.image_size) for photo in photos), encoder)
    chosen = np.arange(0, len(photos), EVERY)
    rules: list[float | None] = [None, *FIXED]
    rows, false = [], np.zeros((len(EDITS), len(rules)))
    for number, (name, edit) in enumerate(EDITS.items()):
        opened = (Image.open(photos[i]).convert("RGB") for i in chosen)
        copies = encoded((crop_pixels(edit(image), image_size=encoder.image_size) for image in opened), encoder)
        both = np.concatenate([library, copies])
        found = []
        for place, rule in enumerate(rules):
            pairs = near(both, rule)
            hits = pairs[chosen, len(library) + np.arange(len(chosen))]
            found.append(hits.mean())
            false[number, place] = np.triu(pairs).sum() - hits.sum()
        rows.append(f"| {name} | " + " | ".join(f"{share:.2f}" for share in found) + " |")
    heads = ["what stands out (the default)", *(f"cosine ≥ {rule:g}" for rule in FIXED)]
    mean = " | ".join(f"{share:.1f}" for share in false.mean(axis=0))
    return "\n".join(
        [
            f"{len(chosen)} edited copies of each kind among {len(photos):,} photos, encoder {encoder.name}: found are",
            "",
            f"| copy | {' | '.join(heads)} |",
            f"| --- |{' --- |' * len(heads)}",
            *rows,
            f"| false pairs, of {len(photos) + len(chosen):,} photos | {mean} |",
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", default="mini")
    given = arguments.parse_args()
    print(table(given.data, load_encoder(given.model)))


if __name__ == "__main__":
    main()
