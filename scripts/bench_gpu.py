"""How fast CLIP's image tower is on a GPU, ours against transformers with the same random weights; and an index run.

    scripts/bench_gpu.py [--batches 1 8 64 512] [--precisions fp32 bf16 fp16] [--rounds 10] [--photos 8192]

Each batch starts in memory, is copied to the device and its embeddings back: ours takes uint8 crops, transformers
normalised floats that were made and pinned beforehand. Both take turns in every round. MFU is the share of the peak of
bf16 products that the operations of the whole network reach: of the peak measured here, and of the data sheet's.

The index run is all of `searchengine index` over files of 500 x 375, no two alike. Beside it stand what the cores
decode (D) and the device encodes (E) while nothing else is done; both at once can do no more than the slower of them.
Without a CUDA device it says so and exits with 2. `--device cpu` only tests this script: give it few `--photos`.
Needs the extra `bench`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_encode import ROOT, Job, normalised, random_clip, tasks
from bench_ingest_contenders import limits, rate
from bench_ingest_photos import make
from transformers import CLIPModel

from indexer.pipeline import build
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.devices import suitable_batch

# Dense bf16, in FLOP/s, of NVIDIA's data sheets; the first name that a device's name contains.
DATA_SHEET = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "4090": 165.2e12}
# Photos that are made by Pillow; the files after them are these again, with a number behind their end.
PICTURES, PHOTO_SIZE = 256, "500 x 375"
GOAL = 0.85
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512])
    arguments.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments.add_argument("--rounds", type=int, default=10)
    photos = ROOT.parent / "shared/data/coco_cc/images"
    arguments.add_argument(
        "--folder", type=Path, default=photos, help="photos that those of the index run are made from"
    )
    arguments.add_argument("--photos", type=int, default=8192, help="of the index run; 0 for none")
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = arguments.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here, so nothing was measured")
        sys.exit(2)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    peak = bf16_peak(options.device)
    sheet = next((flops for model, flops in DATA_SHEET.items() if model in name), None)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}; bf16: {peak / 1e12:.2f} TFLOPS here, "
          f"{f'{sheet / 1e12:.0f} by its data sheet' if sheet else 'data sheet not known'}")  # fmt: skip
    crops = np.random.default_rng(0).integers(0, 256, (max(options.batches), 224, 224, 3), dtype=np.uint8)
    model = random_clip("plain").eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        photos = make_photos(options.folder, Path(folder, "photos"), options.photos)
        for precision in options.precisions:
            reference = CLIPModel.from_pretrained(folder, dtype=DTYPES[precision]).eval().to(options.device)
            encoder = ClipEncoder(name="random", weights_file=file, device=options.device, precision=precision)
            for job, side, inputs in tasks(model, crops, options.batches):
                if side == "images":
                    bench(job, precision, reference, encoder, inputs(0), options.rounds, options.device, (peak, sheet))
            if photos:
                index(encoder, photos, precision, options.device)


def index(encoder: ClipEncoder, photos: list[Path], precision: str, device: str) -> None:
    """Three runs, the limits sampled before each of them."""
    batch = suitable_batch(device)
    crops = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    rates, decode, encode = [], [], []
    for _ in range(3):
        decode.append(limits(encoder, photos)["decode"])
        encode.append(rate(lambda: encoder.encode_pixels(crops), batch))
        with tempfile.TemporaryDirectory() as out:
            started = time.perf_counter()
            report = build(Path(out, "index"), [photos[0].parent], encoder=encoder, batch_size=batch)
            rates.append(len(photos) / (time.perf_counter() - started))
            assert report.added == len(photos), report
    share = statistics.median(r / min(d, e) for r, d, e in zip(rates, decode, encode, strict=True))
    d, e, r = (statistics.median(values) for values in (decode, encode, rates))
    print(f"index, {precision}, {len(photos)} photos of {PHOTO_SIZE}, batch {batch}: {r:.1f} img/s; "
          f"D {d:.1f}, E {e:.1f} img/s; {share:.2f} of the slower")  # fmt: skip
    if device == "cuda":
        print(f"  {'met' if share >= GOAL else 'NOT MET':8s} {share:<8.3g} at least {GOAL} of the slower of D and E")


def make_photos(source: Path, folder: Path, count: int) -> list[Path]:
    files = make(source, folder, size=PHOTO_SIZE, count=min(count, PICTURES))
    for number in range(len(files), count):
        file = folder / f"{number:06}.jpg"
        file.write_bytes(files[number % PICTURES].read_bytes() + b"%06d" % number)
        files.append(file)
    return files


def bench(
    job: Job,
    precision: str,
    reference: torch.nn.Module,
    encoder: ClipEncoder,
    crops: np.ndarray,
    rounds: int,
    device: str,
    peaks: tuple[float, float | None],
) -> None:
    ready = normalised(crops).to(DTYPES[precision])
    ready = ready.pin_memory() if device == "cuda" else ready

    @torch.inference_mode()
    def transformers() -> torch.Tensor:
        return reference.get_image_features(ready.to(device, non_blocking=True)).pooler_output.cpu()

    runs = {"transformers": transformers, "ours": lambda: torch.from_numpy(encoder.encode_pixels(crops))}
    rows = [torch.nn.functional.normalize(run().float(), dim=1) for run in runs.values()]
    seconds: dict[str, list[float]] = {contender: [] for contender in runs}
    memory_bytes: dict[str, int] = {}
    for round_ in range(rounds + 2):
        for contender, run in runs.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held_bytes = torch.cuda.memory_allocated()
            elapsed = seconds_of(run, device)
            if round_ >= 2:
                seconds[contender].append(elapsed)
            if device == "cuda":
                memory_bytes[contender] = torch.cuda.max_memory_allocated() - held_bytes
    ratio = statistics.median(a / b for a, b in zip(seconds["transformers"], seconds["ours"], strict=True))
    print(f"{job.title}, {precision}, rounds {rounds}: ours x {ratio:.2f}; rows differ by "
          f"{float((rows[0] - rows[1]).abs().max()):.1e}")  # fmt: skip
    for contender, times in seconds.items():
        median = statistics.median(times)
        reached = job.items * job.flops / median
        shares = "  ".join(
            f"{100 * reached / peak:5.1f} % {of}"
            for of, peak in zip(("measured", "data sheet"), peaks, strict=True)
            if peak
        )
        print(f"    {contender:12s} {1000 * median:9.2f} ms {job.items / median:9.1f} img/s   MFU {shares}   "
              f"peak memory {memory_bytes.get(contender, 0) / 2**20:.0f} MiB beyond the weights")  # fmt: skip


def bf16_peak(device: str) -> float:
    """FLOP/s of the best of several products of square matrices."""
    peak = 0.0
    for side in (2048, 4096, 8192) if device == "cuda" else (512,):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = min(seconds_of(lambda a=a, b=b: [a @ b for _ in range(10)], device) for _ in range(5)) / 10
        peak = max(peak, 2 * side**3 / seconds)
    return peak


def seconds_of(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    # After all streams: ours may copy and compute on ones of its own.
    torch.cuda.synchronize()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
