"""How fast mini is: image tower against the eager reference package, prompts, a cold search.

    scripts/bench_mini.py FOLDER_OF_PHOTOS [--rounds 5] [--batch 32]

The two image towers take turns on the same crops, so the ratio holds on a noisy machine. Prints the hardware, n and
medians. Needs the extra `dev` for the reference.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from hardware import cpu_name

from searchengine.decode import decode_file
from searchengine.formats import EXTENSIONS
from searchengine.models.mini import parts
from searchengine.models.mini.efficientnet import EfficientNetLite2
from searchengine.models.mini.encoder import MiniEncoder
from searchengine.models.registry import load_encoder


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=32)
    options = arguments.parse_args()
    files = sorted(f for f in options.folder.iterdir() if f.suffix.lower() in EXTENSIONS)[: options.batch]
    crops = np.stack([decode_file(file, image_size=parts.IMAGE_SIZE) for file in files])
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    bench_image_tower(crops, rounds=options.rounds)
    bench_encoder(crops, rounds=options.rounds)
    bench_cold_search(files)


def bench_image_tower(crops: np.ndarray, *, rounds: int) -> None:
    weights = parts.locate(parts.IMAGE_TOWER)
    reference = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=str(weights)).eval()
    ours = EfficientNetLite2.from_file(weights)
    pixels = torch.from_numpy(crops)
    normalised = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected, got = reference.extract_features(normalised), ours.features(pixels)
        print(f"largest difference of features, relative: {float((expected - got).abs().max() / expected.max()):.1e}")
        times = interleave(
            {"reference": lambda: reference.extract_features(normalised), "ours": lambda: ours.features(pixels)}, rounds
        )
    rates = {name: len(crops) / statistics.median(seconds) for name, seconds in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["reference"], times["ours"], strict=True))
    print(f"image tower, batch {len(crops)}, {rounds} rounds: reference {rates['reference']:.1f} img/s, "
          f"ours {rates['ours']:.1f} img/s, ratio {ratio:.2f}")  # fmt: skip


def bench_encoder(crops: np.ndarray, *, rounds: int) -> None:
    encoder = load_encoder("mini", device="cpu")
    assert isinstance(encoder, MiniEncoder)
    captions = [f"a photo of {a} {b} on a {c}" for a in ("one", "two", "no") for b in ("dogs", "cars", "birds")
                for c in ("street", "beach", "wet green field in spring")]  # fmt: skip
    times = interleave(
        {
            "whole encoder": lambda: encoder.encode_pixels(crops),
            "one prompt": lambda: encoder.encode_texts(["a man riding a wave"]),
            "27 captions": lambda: encoder.encode_texts(captions),
        },
        rounds,
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"whole encoder {len(crops) / medians['whole encoder']:.1f} img/s")
    print(f"one prompt {1000 * medians['one prompt']:.1f} ms; captions {len(captions) / medians['27 captions']:.0f}/s")


def bench_cold_search(files: list[Path]) -> None:
    """A search from the command line, process start to exit, on an index of the crops' photos."""
    with tempfile.TemporaryDirectory() as folder:
        photos, index = Path(folder, "photos"), str(Path(folder, "index"))
        photos.mkdir()
        for file in files:
            (photos / file.name).write_bytes(file.read_bytes())
        command = [sys.executable, "-m", "searchengine"]
        subprocess.run(
            [*command, "index", photos, "--index", index, "--model", "mini"], check=True, capture_output=True
        )
        search = [*command, "search", "a man riding a wave", "--index", index]
        seconds = interleave({"search": lambda: subprocess.run(search, capture_output=True, check=True)}, 5)["search"]
    print(f"cold text search, whole process: {statistics.median(seconds):.2f} s")


def interleave(jobs: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if round_:
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
