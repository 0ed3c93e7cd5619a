# ruff: noqa: T201 - a program, which prints
"""Torture an index: kill whoever writes it at any instant, change the photos meanwhile, and hold it against a new one.

    scripts/torture [--rounds 200] [--seed 0] [--photos FOLDER] [--encoder fake|mini] [--keep]

Each round is one index with a history of its own, drawn from its seed: several times, photos are added, changed, moved,
deleted, damaged; whoever brings the index up to date is killed, once or several times in a row, at a random call to the
file system or SQL, or at a random time, or is interrupted, or photos change under its hands, while another process
searches. Then it runs to the end, and the index must be what a new index of the same files is, and what os.walk finds;
ids must have stayed, nothing may have been embedded twice, and nothing may be left over.
Stops at the first difference, with exit code 1, and says how to repeat it.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

DATA = Path(os.environ.get("SEARCHENGINE_DATA") or Path(__file__).parents[2] / "shared" / "data")
SMALL_BYTES = 80_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each has one more than that before it")
    parser.add_argument("--photos", type=Path, help="real photos to work on copies of [default: the shared test data]")
    parser.add_argument("--encoder", choices=("fake", "mini"), default="fake")
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds that passed too")
    options = parser.parse_args(arguments)
    # No thread may run where children are forked, so the libraries are told before they are loaded.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in os.environ if name.startswith("SEARCHENGINE_") and name != "SEARCHENGINE_DATA"]:
        del os.environ[name]

    from torture_faults import adopt_orphans, sqlite_library
    from torture_rounds import Divergence, Round, load

    encoder = load(options.encoder)
    places = workplaces()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as samples:
        sources = photos_of(options.photos) if options.photos else default_photos(Path(samples))
        print(f"{options.rounds} rounds from seed {options.seed}, encoder {encoder.name}, {len(sources)} source files, "
              f"in {' and '.join(map(str, places))}; the writes of SQLite itself are "
              f"{'seen' if sqlite_library() else 'not seen: it is no shared library here'}")  # fmt: skip
        started, kills, changes = time.monotonic(), 0, 0
        for seed in range(options.seed, options.seed + options.rounds):
            folder = Path(tempfile.mkdtemp(prefix=f"torture-{seed}-", dir=places[seed % len(places)]))
            round_ = Round(folder, seed=seed, sources=sources, encoder=encoder)
            try:
                round_.play()
            except Divergence as divergence:
                again = [f"--photos {options.photos}"] * bool(options.photos) + [f"--encoder {options.encoder}"]
                print(f"seed {seed}: {round_.told()}\nDIVERGENCE in seed {seed}: {divergence}\n"
                      f"everything is left in {folder}\n"
                      f"again: scripts/torture --rounds 1 --seed {seed} {' '.join(again)}")  # fmt: skip
                return 1
            print(f"seed {seed}: {round_.told()}: ok", flush=True)
            kills, changes = kills + round_.kills, changes + round_.changes
            if not options.keep:
                shutil.rmtree(folder)
        minutes = (time.monotonic() - started) / 60
        print(f"{options.rounds} rounds, {kills} kills, {changes} changes in {minutes:.1f} min: no divergence")
    return 0


def workplaces() -> list[Path]:
    """The disk, and memory where there is some: what is slow on the one is fast on the other."""
    memory = Path("/dev/shm")
    return [Path(tempfile.gettempdir()).resolve(), *([memory] if os.access(memory, os.W_OK) else [])]


def photos_of(folder: Path) -> list[Path]:
    from searchengine.formats import EXTENSIONS

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not found:
        sys.exit(f"there are no photos in {folder}")
    return found


def default_photos(samples: Path) -> list[Path]:
    """Real photos, and a tenth as many of the nasty files."""
    if not DATA.is_dir():
        sys.path.append(str(Path(__file__).parents[1] / "scripts"))
        from sample_photos import copy_photographs

        copy_photographs(samples / "photos")
        return photos_of(samples / "photos")
    photos = photos_of(DATA / "coco_cc")
    nasty = [path for path in photos_of(DATA / "nasty") if path.stat().st_size < SMALL_BYTES]
    return photos + random.Random(0).sample(nasty, len(photos) // 4)


if __name__ == "__main__":
    sys.exit(main())
