"""Measure answers, not just neighbours, and write docs/quality.md.

    scripts/quality.py DATA [--out docs/quality.md] [--only captions,prompts,...]

DATA is a folder with flickr8k_dev/ and coco_cc/, each with images/ and captions.json. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import quality_duplicates
import quality_library
import quality_probe
import quality_search
from hardware import cpu_name
from quality_data import read_photos
from threadpoolctl import threadpool_limits

from searchengine.models.registry import load_encoder
from searchengine.vectors import Encoder

MACHINE = f"{os.cpu_count()} cores of {cpu_name()}"

HEAD = f"""# How good the answers are

`scripts/quality.py` made these tables from real runs with the encoder `mini`, on {MACHINE}.
Photos are Flickr8k's dev split, with which no head was trained, and photos of COCO under free licences. What a photo
shows, several of its captions must say; `searchengine/concepts.py` has the rules. In brackets are 95 % intervals: of
the bootstrap over photos, each with all its captions, or over queries; of shares of a count, Wilson's.
"""

CAPTIONS = "Each caption asks for its own photo among all, and each photo for one of its own captions."

RELEVANCE = """Constants and baselines were fitted on one half of Flickr8k's dev split; the figures are from the other
half and from COCO. The best cutoff is that of each query in its own order of scores. The last column: of the queries
for what no photo in the library shows, because all that do were taken out, the share that shows matches all the same.
One of the fixed scores is that of the best F1, the other one has as few of these as the line."""

LANGUAGE = "Pairs of concepts that some photos show together and some alone, on Flickr8k's dev split."

PROMPTS = """Mean average precision of a concept's photos, asked for by its name alone and by the mean of the prompts in
`searchengine/prompts.py`. A search uses them for a single word, where the gain is beyond its interval; not for two."""

CLASSIFICATION = """`classify --index`, from stored vectors. Timed is what is computed for the vectors: neither
the prompts of the labels, once for all, nor what prints or stores the answers."""

TAGS = f"""`classify --write-tags` with the labels {", ".join(quality_library.THINGS)} and `something else`, one tag a
photo at most, although some photos show several of these."""

CHANGE = "While all photos of COCO are embedded anew by another model, one thread searches without a pause."


class Section(NamedTuple):
    title: str
    text: str
    make: Callable[[], str]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--only", default="", help="names of sections, with commas between")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work:
        sections = _sections(given.data, Path(work))
        parts = [HEAD]
        for name in given.only.split(",") if given.only else sections:
            started = time.perf_counter()
            title, text, make = sections[name]
            parts.append("\n\n".join(part for part in (f"## {title}", text, make().rstrip("\n")) if part) + "\n")
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
            if given.out:
                given.out.write_text("\n".join(parts), "utf-8")
    if not given.out:
        print("\n".join(parts))


def _sections(data: Path, work: Path) -> dict[str, Section]:
    encoder = load_encoder("mini")
    dev, coco = (read_photos(data / name, work=work, encoder=encoder) for name in ("flickr8k_dev", "coco_cc"))
    fitted, other = dev.part(slice(0, None, 2), "fitted on"), dev.part(slice(1, None, 2), "flickr8k_dev, other half")
    return {
        "captions": Section(
            "Captions and their photos", CAPTIONS, lambda: quality_search.captions([dev, coco], encoder)
        ),
        "relevance": Section(
            "The line where matches end", RELEVANCE, lambda: quality_search.cutoff(fitted, [other, coco], encoder)
        ),
        "language": Section("AND, OR, NOT", LANGUAGE, lambda: quality_search.language(dev, encoder)),
        "prompts": Section("Prompts around a word", PROMPTS, lambda: quality_search.prompts([dev, coco], encoder)),
        "classification": Section(
            "Classes for a whole library", CLASSIFICATION, lambda: quality_library.classification(encoder)
        ),
        "tags": Section("Tags", TAGS, lambda: quality_library.tags(dev, encoder, work=work)),
        "probe": Section("Linear probes", "", lambda: _probe(data, encoder)),
        "duplicates": Section("Duplicates", "", lambda: quality_duplicates.table(data, encoder)),
        "change": Section("A change of model", CHANGE, lambda: quality_library.model_change(coco, encoder, work=work)),
    }


def _probe(data: Path, encoder: Encoder) -> str:
    with threadpool_limits(1):  # hundreds of small problems: a second thread would only wait for the first
        return quality_probe.table(data, encoder)


if __name__ == "__main__":
    main()
