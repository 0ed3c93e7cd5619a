"""What the tables of scripts/quality.py are made from: captioned photos and their vectors; how a cell is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexer.pipeline import build
from searchengine.captions import read_captions
from searchengine.concepts import Concept, bootstrap, label_concepts
from searchengine.index.reader import Index
from searchengine.vectors import Encoder, FloatMatrix


@dataclass(frozen=True)
class Photos:
    """Captioned photos by name: `paths` and `captions` (n,), `vectors` (n, dim), and the index that has them."""

    name: str
    folder: Path
    index: Path
    paths: list[Path]
    captions: list[tuple[str, ...]]
    vectors: FloatMatrix

    @property
    def concepts(self) -> list[Concept]:
        return label_concepts(self.captions, min_photos=5 if len(self.paths) >= 400 else 3)

    def part(self, which: slice, name: str) -> Photos:
        return Photos(name, self.folder, self.index, self.paths[which], self.captions[which], self.vectors[which])


def read_photos(folder: Path, *, work: Path, encoder: Encoder) -> Photos:
    """The photos of `folder`, which holds captions.json and images/, indexed in the folder `work`."""
    index = work / f"{folder.name}.index"
    build(index, [folder / "images"], encoder=encoder)
    photos = sorted(read_captions(folder / "captions.json", images=folder / "images"), key=lambda one: one.path.name)
    with Index(index) as opened:
        table = opened.snapshot().table
        vector_of = {path: vector for vector, rows in opened.keys_of(table.ids).items() for _, path in rows}
        ids = np.array([vector_of[str(photo.path.resolve())] for photo in photos])
        vectors = table.gather(np.concatenate([table.rows_of(ids[[place]]) for place in range(len(ids))]))
    return Photos(folder.name, folder, index, [p.path for p in photos], [p.captions for p in photos], vectors)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(figure: tuple[float, float, float], form: str = ".3f") -> str:
    """A figure and its 95 % interval."""
    return f"{figure[0]:{form}} [{figure[1]:{form}}, {figure[2]:{form}}]"


def mean_of(values: Sequence[float]) -> tuple[float, float, float]:
    known = np.array(values, np.float64)
    return bootstrap(lambda drawn: float(known[drawn].mean()), count=len(known))
