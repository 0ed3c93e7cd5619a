"""mini in int8 against mini in fp32: how fast, how good, and how far they agree.

    scripts/bench_mini_int8.py DATA [--rounds 9] [--batch 32]

DATA is a folder with flickr8k_dev/ and coco_cc/, each with images/ and captions.json. The two towers take turns on the
same crops, so the ratio holds on a noisy machine. Recall is as `searchengine evaluate` has it. Agreement is over all
captions of a set, each of which orders the photos twice: the mean share of the first ten that both orders have, how
often the first photo is the same, and Spearman's correlation of the two orders. Cosines are between the two vectors of
a photo: as they are, and after subtracting the mean of fp32's from both. Needs the extra `dev`, as bench_mini.py does.
"""

import argparse
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from bench_mini import interleave
from hardware import cpu_name

from searchengine.captions import read_captions
from searchengine.decode import decode_file
from searchengine.metrics import image_to_text, text_to_image
from searchengine.models.devices import has_fast_integers
from searchengine.models.mini import parts
from searchengine.models.mini.encoder import MiniEncoder, load_image_tower
from searchengine.models.registry import load_encoder
from searchengine.vectors import FloatMatrix

SETS = ("flickr8k_dev", "coco_cc")
PHOTOS_AT_ONCE = 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--batch", type=int, default=32)
    options = arguments.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"products of integers {'in hardware' if has_fast_integers() else 'emulated'}")  # fmt: skip
    compare_speed(options.data / SETS[0] / "images", batch=options.batch, rounds=options.rounds)
    encoders = {precision: load_encoder("mini", device="cpu", precision=precision) for precision in parts.PRECISIONS}
    for name in SETS:
        compare_answers(options.data / name, encoders)


def compare_speed(folder: Path, *, batch: int, rounds: int) -> None:
    pixels = torch.from_numpy(decode(sorted(folder.iterdir())[:batch]))
    fp32, int8 = (load_image_tower("cpu", precision=precision) for precision in parts.PRECISIONS)
    times = interleave({"fp32": lambda: fp32.describe(pixels), "int8": lambda: int8.describe(pixels)}, rounds)
    rates = {name: batch / statistics.median(seconds) for name, seconds in times.items()}
    ratios = sorted(a / b for a, b in zip(times["fp32"], times["int8"], strict=True))
    print(f"image tower, batch {batch}, {rounds} rounds: fp32 {rates['fp32']:.1f} photos/s, "
          f"int8 {rates['int8']:.1f} photos/s, ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


def compare_answers(folder: Path, encoders: dict[str, MiniEncoder]) -> None:
    photos = list(read_captions(folder / "captions.json", images=folder / "images"))
    owner = np.repeat(np.arange(len(photos)), [len(photo.captions) for photo in photos])
    texts = encoders["fp32"].encode_texts([caption for photo in photos for caption in photo.captions], truncate=True)
    images: dict[str, list[FloatMatrix]] = {precision: [] for precision in encoders}
    for start in range(0, len(photos), PHOTOS_AT_ONCE):
        crops = decode([photo.path for photo in photos[start : start + PHOTOS_AT_ONCE]])
        for precision, encoder in encoders.items():
            images[precision].append(encoder.encode_pixels(crops))
    rows = {precision: np.concatenate(some) for precision, some in images.items()}
    print(f"{folder.name}, {len(photos)} photos, {len(texts)} captions:")
    for precision, vectors in rows.items():
        found = [retrieve(texts, vectors, owner).recall.values() for retrieve in (text_to_image, image_to_text)]
        there, back = ("/".join(f"{share:.3f}" for share in shares) for shares in found)
        print(f"  {precision} R@1/5/10: text to image {there}, image to text {back}")
    first, second = (texts @ vectors.T for vectors in rows.values())
    print("  captions' orders: first ten shared {:.3f}, same first {:.3f}, Spearman {:.4f}".format(
        *agreement(first, second)))  # fmt: skip
    centre = rows["fp32"].mean(0)
    for kind, taken in (("plain", 0), ("centred", centre)):
        each = cosines(rows["fp32"] - taken, rows["int8"] - taken)
        print(f"  {kind} cosine of photos: mean {each.mean():.4f}, 1st percentile {np.quantile(each, 0.01):.4f}")


def agreement(first: FloatMatrix, second: FloatMatrix) -> tuple[float, float, float]:
    """Scores (captions, photos) twice: the share of the ten best in both, of equal firsts, and Spearman's rho."""
    ranks = [scores.argsort(axis=1)[:, ::-1].argsort(axis=1) for scores in (first, second)]
    shared = ((ranks[0] < 10) & (ranks[1] < 10)).sum(axis=1) / 10
    same = ranks[0].argmin(axis=1) == ranks[1].argmin(axis=1)
    photos = first.shape[1]
    squares = np.square(ranks[0] - ranks[1]).sum(axis=1)
    rho = 1 - 6 * squares / (photos * (photos**2 - 1))
    return float(shared.mean()), float(same.mean()), float(rho.mean())


def cosines(a: FloatMatrix, b: FloatMatrix) -> FloatMatrix:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def decode(files: list[Path]) -> np.ndarray:
    return np.stack([decode_file(file, image_size=parts.IMAGE_SIZE) for file in files])


if __name__ == "__main__":
    main()
