"""How well an encoder finds captioned photos, and how well the line between matches and the rest is drawn.

Captions ask for their own photo: Recall@K and median rank, both ways. What several captions of a photo say, by the
rules in concepts.py, makes labelled sets to ask for by name, as people do: "dog". The mean average precision (mAP) is
that over all these concepts; the cutoff is what a search for each would show as matches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from searchengine.captions import CaptionedPhoto
from searchengine.concepts import Mask, bootstrap, label_concepts, measure_cutoff
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits
from searchengine.errors import ImageError, UsageError
from searchengine.hits import MATCH
from searchengine.index.protocol import PhotoIndex
from searchengine.metrics import (
    Interval,
    Owners,
    Ranks,
    average_precision,
    ranks_of_images,
    ranks_of_texts,
    retrieval,
)
from searchengine.metrics import Retrieval as Retrieval
from searchengine.metrics import image_to_text as image_to_text
from searchengine.metrics import text_to_image as text_to_image
from searchengine.photo_vectors import vectors_of
from searchengine.prompts import query_vectors
from searchengine.relevance import SAMPLE_SIZE, likeness_of, relevance
from searchengine.vectors import Encoder, FloatMatrix

WORST_SHOWN = 24
FIRST_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class ConceptFigures:
    """How well the photos of one concept are found: `photos` is how many show it."""

    name: str
    photos: int
    average_precision: float
    f1: float
    oracle_f1: float


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """`map` is the mean average precision, `cutoff` the figures of the line where matches end, as `Cutoff.summary` has
    them; `intervals` those of all of these. `of_each` begins with the concept that is found worst."""

    map: float
    cutoff: dict[str, float]
    intervals: dict[str, Interval]
    of_each: list[ConceptFigures]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A caption whose photo came at `rank`, and the photos that came first instead, each with its score."""

    caption: str
    path: Path
    rank: float
    score: float
    first: list[tuple[Path, float]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`concepts` is None where the captions make no labelled set. `duplicates`: entries of a photo that had one before.

    `worst` holds, of the photos that are found worst, the caption that finds them worst.
    """

    text_to_image: Retrieval
    image_to_text: Retrieval
    concepts: Concepts | None
    images: int
    captions: int
    duplicates: int
    failed: list[tuple[Path, str]]
    model: str
    worst: list[Failure]

    def as_dict(self) -> dict[str, Any]:
        return {
            "text_to_image": self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text.as_dict(),
            "images": self.images,
            "captions": self.captions,
            "failed": len(self.failed),
            "model": self.model,
            "duplicates": self.duplicates,
            "concepts": len(self.concepts.of_each) if self.concepts else 0,
            "map": self.concepts.map if self.concepts else None,
            "cutoff": _without_nan(self.concepts.cutoff) if self.concepts else None,
            "intervals": {
                "text_to_image": self.text_to_image.intervals,
                "image_to_text": self.image_to_text.intervals,
                "concepts": _without_nan(self.concepts.intervals) if self.concepts else None,
            },
        }


def evaluate(
    photos: Sequence[CaptionedPhoto],
    *,
    encoder: Encoder,
    index: PhotoIndex | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    batch_size: int = 32,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Hold `encoder` against captions: the right answer of a caption is its own photo, and the other way round.

    Vectors come from `index` where it has the content, and are computed, but not stored, where it lacks it. Photos
    that cannot be decoded are left out and listed. A photo that is listed twice, or whose bytes are those of another,
    counts once, with the captions of both. Raises UsageError if none is left, ModelMismatch if `index` is of another
    encoder.
    """
    listed = _merged(photos, [os.path.abspath(photo.path) for photo in photos])
    kept: list[CaptionedPhoto] = []
    hashes: list[bytes] = []
    vectors: list[FloatMatrix] = []
    failed: list[tuple[Path, str]] = []
    found = vectors_of(
        (str(photo.path) for photo in listed),
        encoder=encoder,
        index=index,
        limits=limits,
        batch_size=batch_size,
        workers=workers,
    )
    for done, (photo, (_, outcome)) in enumerate(zip(listed, found, strict=True), start=1):
        if isinstance(outcome, ImageError):
            failed.append((photo.path, str(outcome)))
        else:
            kept.append(photo)
            hashes.append(outcome.content_hash)
            vectors.append(outcome.vector)
        if done % batch_size == 0 or done == len(listed):
            on_progress(done, len(listed))
    if not kept:
        raise UsageError(f"none of the {len(listed):,} photos can be read; the first: {failed[0][0]}: {failed[0][1]}")
    images = np.stack(list(dict(zip(hashes, vectors, strict=True)).values()))  # equal bytes, equal vectors
    kept = _merged(kept, hashes)
    captions = [caption for photo in kept for caption in photo.captions]
    owner = np.repeat(np.arange(len(kept)), [len(photo.captions) for photo in kept])
    texts = encoder.encode_texts(captions, truncate=True)  # as every published figure does
    ranks = ranks_of_images(texts, images, owner)
    return Evaluation(
        text_to_image=retrieval(ranks, owner=owner),
        image_to_text=retrieval(ranks_of_texts(texts, images, owner), owner=np.arange(len(kept))),
        concepts=measure_concepts([photo.captions for photo in kept], images, encoder=encoder),
        images=len(kept),
        captions=len(captions),
        duplicates=len(photos) - len(failed) - len(kept),
        failed=failed,
        model=encoder.name,
        worst=_worst(kept, captions, texts, images, owner, ranks),
    )


def measure_concepts(captions: Sequence[Sequence[str]], images: FloatMatrix, *, encoder: Encoder) -> Concepts | None:
    """Ask for each concept that photos `images` (n, dim) show, by their captions (n,), as a search would."""
    concepts = label_concepts(captions)
    if not concepts:
        return None
    queries = query_vectors([concept.name for concept in concepts], encoder=encoder)

    def judge(query: FloatMatrix, library: FloatMatrix) -> Mask:
        scores = library @ query
        some = scores[:SAMPLE_SIZE]
        likeness = likeness_of(library[:SAMPLE_SIZE])
        kept: Mask = (
            relevance(
                scores, background=some, usual=encoder.usual_scores, likeness=likeness, size=len(scores), kind="text"
            )
            >= MATCH
        )
        return kept

    cutoff = measure_cutoff(concepts, queries=queries, library=images, judge=judge)
    precisions = np.array(
        [
            average_precision((images @ query)[concept.counted], concept.shown[concept.counted])
            for concept, query in zip(concepts, queries, strict=True)
        ]
    )
    figures = {"map": bootstrap(lambda drawn: float(precisions[drawn].mean()), count=len(concepts)), **cutoff.summary()}
    of_each = [
        ConceptFigures(
            name=concept.name,
            photos=int(concept.shown.sum()),
            average_precision=float(precisions[place]),
            f1=float(cutoff.f1[place]),
            oracle_f1=float(cutoff.oracle_f1[place]),
        )
        for place, concept in enumerate(concepts)
    ]
    return Concepts(
        map=figures["map"][0],
        cutoff={name: figure[0] for name, figure in figures.items() if name != "map"},
        intervals={name: figure[1:] for name, figure in figures.items()},
        of_each=sorted(of_each, key=lambda one: one.average_precision),
    )


def _merged(photos: Sequence[CaptionedPhoto], keys: Sequence[object]) -> list[CaptionedPhoto]:
    """Those of equal keys as one, the first, with the captions of all: a caption that came already is not new."""
    found: dict[object, CaptionedPhoto] = {}
    for photo, key in zip(photos, keys, strict=True):
        known = found.get(key)
        if known is None:
            found[key] = photo
        else:
            more = tuple(caption for caption in photo.captions if caption not in known.captions)
            found[key] = replace(known, captions=known.captions + more)
    return list(found.values())


def _worst(
    photos: Sequence[CaptionedPhoto],
    captions: Sequence[str],
    texts: FloatMatrix,
    images: FloatMatrix,
    owner: Owners,
    ranks: Ranks,
) -> list[Failure]:
    shown: dict[int, Failure] = {}
    for place in np.argsort(-ranks, kind="stable").tolist():
        photo = int(owner[place])
        if ranks[place] <= 1 or len(shown) == WORST_SHOWN:
            break
        if photo not in shown:
            scores = images @ texts[place]
            first = [i for i in np.argsort(-scores, kind="stable")[: FIRST_SHOWN + 1].tolist() if i != photo]
            shown[photo] = Failure(
                caption=captions[place],
                path=photos[photo].path,
                rank=float(ranks[place]),
                score=float(scores[photo]),
                first=[(photos[i].path, float(scores[i])) for i in first[:FIRST_SHOWN]],
            )
    return list(shown.values())


def _without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN, which the precision of nothing is."""
    return {name: None if np.isnan(figure).any() else figure for name, figure in figures.items()}
