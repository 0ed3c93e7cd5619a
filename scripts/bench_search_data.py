"""The vectors and queries that scripts/bench_search.py measures on: seeded, made once, kept in a folder.

clip   Real CLIP vectors (texts, photos, Detic's class names) as the centres of clusters, plus noise. Queries: held-out
       points of the clusters; points off them, between two centres; and random directions, the worst case.
mini   What the encoder `mini` makes of real photos and of crops of them. Beyond as many as there are, a vector is made
       from a real one: a step towards one of its ten nearest, plus noise of the covariance of such differences.
       Queries: photos whose vectors were held out, and captions, which lie off all photos. Both of the dev split.

A file for n vectors begins with those of the file for fewer.
"""

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from searchengine.vectors import FloatMatrix, normalise

PIECE = 10_000  # vectors made from one seed
CLIP_CENTRES = ("text_emb", "image_emb", "unsplash_image_emb", "extra_detic_o365", "extra_detic_oid")
CLIP_NOISE = 0.6  # length of the noise, where a centre has length 1
CROPS, CROP_SIDES = 2, (0.45, 0.9)  # random crops of each photo beside the whole, and their sides as parts of its own
PHOTOS_PER_BATCH = 16
NEIGHBOURS, MINI_NOISE = 10, 0.4  # noise in standard deviations of the differences to the neighbours
FOLDERS = 16


@dataclass(frozen=True)
class DataSet:
    """`vectors` float32 (n, dim), mapped from a file; `queries` by what they are, float32 (q, dim); all unit rows.

    `anchors` float32 (FOLDERS, dim) part vectors and queries into "folders" of what is alike (`folder_of`).
    """

    name: str
    about: str
    vectors: FloatMatrix
    queries: dict[str, FloatMatrix]
    anchors: FloatMatrix

    def folder_of(self, rows: FloatMatrix) -> NDArray[np.int64]:
        pieces = [(rows[start : start + PIECE] @ self.anchors.T).argmax(1) for start in range(0, len(rows), PIECE)]
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Clusters:
    """Points of clusters around real CLIP vectors; `piece` makes PIECE of them, float32 (PIECE, dim)."""

    centres: FloatMatrix

    @classmethod
    def from_data(cls, data: Path) -> "Clusters":
        with np.load(data / "golden" / "golden_vectors.npz", allow_pickle=False) as golden:
            return cls(normalise(np.concatenate([golden[name].astype(np.float32) for name in CLIP_CENTRES])))

    @property
    def dim(self) -> int:
        return self.centres.shape[1]

    @property
    def about(self) -> str:
        return f"{len(self.centres):,} real CLIP vectors as centres, plus noise of length {CLIP_NOISE}"

    def piece(self, _: int, rng: np.random.Generator) -> FloatMatrix:
        return self._near(self.centres[rng.integers(0, len(self.centres), PIECE)], rng)

    def queries(self, count: int) -> dict[str, FloatMatrix]:
        """`count` of each kind."""
        rng = np.random.default_rng([1])
        pairs = self.centres[rng.integers(0, len(self.centres), (count, 2))]
        return {
            "held out": self._near(self.centres[rng.integers(0, len(self.centres), count)], rng),
            "off the clusters": self._near(normalise(pairs.mean(1)), rng),
            "random directions": normalise(noise(rng, (count, self.dim), 1.0)),
        }

    def _near(self, places: FloatMatrix, rng: np.random.Generator) -> FloatMatrix:
        return normalise(places + noise(rng, places.shape, CLIP_NOISE / self.dim**0.5))


def clip(n: int, *, count: int, data: Path, cache: Path) -> DataSet:
    """`count` queries of each kind."""
    made = Clusters.from_data(data)
    vectors = _cached(cache, f"clip-{len(made.centres)}", n, made.dim, made.piece)
    return _data_set("clip", made.about, vectors, made.queries(count))


def mini(n: int, *, count: int, data: Path, cache: Path, load_encoder: Callable[[], Any]) -> DataSet:
    """`load_encoder` is called where the photos have yet to be embedded."""
    trained, dev = (sorted((data / f"flickr8k_{part}" / "images").iterdir()) for part in ("train", "dev"))
    real, captions = _embedded(trained + dev, data / "flickr8k_dev" / "captions.json", cache, load_encoder)
    rng = np.random.default_rng([2])
    held_out = len(trained) + rng.permutation(len(dev))[: min(count, len(dev) // 2)]
    photos = real.reshape(len(trained) + len(dev), 1 + CROPS, -1)
    kept = np.delete(photos, held_out, axis=0).reshape(-1, real.shape[1])
    kept = np.ascontiguousarray(kept[rng.permutation(len(kept))])
    more = functools.cache(lambda: _between_neighbours(kept))
    made = f", {n - len(kept):,} made from them (a step to a near one, plus noise)" if n > len(kept) else ""
    return _data_set(
        "mini",
        f"vectors of {min(n, len(kept)):,} real photos and crops{made}",
        _cached(cache, f"mini-{len(kept)}", n, real.shape[1], lambda number, rng: more()(rng) if number else kept),
        {
            "held-out photos": photos[held_out, 0],
            "captions": captions[rng.permutation(len(captions))[:count]],
        },
    )


def _data_set(name: str, about: str, vectors: FloatMatrix, queries: dict[str, FloatMatrix]) -> DataSet:
    rows = np.random.default_rng([3]).choice(min(len(vectors), PIECE), min(FOLDERS, len(vectors)), replace=False)
    return DataSet(name, about, vectors, queries, vectors[np.sort(rows)])


def noise(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> FloatMatrix:
    return np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)


def _cached(cache: Path, name: str, n: int, dim: int, piece: Callable[[int, np.random.Generator], FloatMatrix]) -> Any:
    """The first n of what the pieces are, mapped from a file; a file of more will do."""
    cache.mkdir(parents=True, exist_ok=True)
    sizes = sorted(int(file.stem.rpartition("-")[2]) for file in cache.glob(f"{name}-*.npy"))
    enough = next((size for size in sizes if size >= n), n)
    path = cache / f"{name}-{enough}.npy"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(n, dim))
        start = number = 0
        while start < n:
            made = piece(number, np.random.default_rng([0, number]))[: n - start]
            rows[start : start + len(made)] = made
            start, number = start + len(made), number + 1
        rows.flush()
        del rows
        temporary.rename(path)
    return np.load(path, mmap_mode="r")[:n]


def _embedded(
    photos: list[Path], captions_file: Path, cache: Path, load_encoder: Callable[[], Any]
) -> tuple[FloatMatrix, FloatMatrix]:
    """1 + CROPS rows a photo, in its order, and the first caption of each photo of the file."""
    texts = [photo["captions"][0] for photo in json.loads(captions_file.read_text("utf-8"))]
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"mini-real-{len(photos)}.npz"
    if not kept.exists():
        print(f"embedding {len(photos):,} photos and {CROPS} crops of each, once", flush=True)
        encoder, rng, rows = load_encoder(), random.Random(0), []
        for start in range(0, len(photos), PHOTOS_PER_BATCH):
            rows.append(encoder.encode_images(list(_with_crops(photos[start : start + PHOTOS_PER_BATCH], rng))))
        temporary = kept.with_name("unfinished.npz")
        np.savez(temporary, photos=np.concatenate(rows), captions=encoder.encode_texts(texts))
        temporary.rename(kept)
    with np.load(kept, allow_pickle=False) as arrays:
        return arrays["photos"], arrays["captions"]


def _with_crops(photos: list[Path], rng: random.Random) -> Iterator[Image.Image]:
    for file in photos:
        with Image.open(file) as photo:
            whole = photo.convert("RGB")
        yield whole
        for _ in range(CROPS):
            side = rng.uniform(*CROP_SIDES)
            width, height = int(whole.width * side), int(whole.height * side)
            left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
            yield whole.crop((left, top, left + width, top + height))


def _between_neighbours(real: FloatMatrix) -> Callable[[np.random.Generator], FloatMatrix]:
    """What makes PIECE vectors that lie as real ones do."""
    nearest = np.empty((len(real), NEIGHBOURS), np.int64)
    for start in range(0, len(real), 1000):
        scores = real[start : start + 1000] @ real.T
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -1  # not itself
        nearest[start : start + 1000] = np.argpartition(-scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    covariance = np.zeros((real.shape[1],) * 2)
    for column in nearest.T:
        differences = real[column] - real
        covariance += differences.T @ differences / nearest.size
    values, directions = np.linalg.eigh(covariance)
    spread = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)

    def make(rng: np.random.Generator) -> FloatMatrix:
        one = rng.integers(0, len(real), PIECE)
        other = nearest[one, rng.integers(0, NEIGHBOURS, PIECE)]
        step = rng.random((PIECE, 1), dtype=np.float32)
        return normalise(
            real[one] + step * (real[other] - real[one]) + noise(rng, (PIECE, real.shape[1]), MINI_NOISE) @ spread
        )

    return make
