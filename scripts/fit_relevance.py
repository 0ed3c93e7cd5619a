"""Fit the constants of searchengine/relevance.py on captioned photos, and tell how good the line of matches is.

    scripts/fit_relevance.py DATA/flickr8k_dev DATA/coco_cc [--model mini] [--fit]

Each folder holds captions.json and images/. What counts as a match, searchengine/concepts.py says. Every second photo
of the first folder is for fitting: the constants, with --fit, and the baselines always. The figures come from the
other half and from the further folders, with 95 % intervals:

    word, phrase    concepts asked for by name, as a search asks; with "a photo of" before it
    photo           photos that share at least two concepts with the one that is given
    foreign         names of concepts of another folder, of which no caption here says anything

Maximised is the mean F1, as a share of that of the best cutoff of each query, less 0.6 times the false alarms: the
share of concepts that find something where every photo of which they are said at all was taken away. The slope is the
likeliest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from searchengine.captions import read_captions
from searchengine.concepts import (
    Concept,
    Judge,
    Mask,
    keep_above,
    keep_best,
    keep_to_largest_gap,
    label_concepts,
    label_photos,
    measure_cutoff,
)
from searchengine.decode import decode_file
from searchengine.models.registry import load_encoder
from searchengine.prompts import query_vectors
from searchengine.relevance import CONSTANTS, MATCH, USUAL_LIKENESS, Kind, likeness_of, relevance
from searchengine.vectors import Encoder, FloatMatrix, UsualScores

FALSE_ALARM_COSTS = 0.6
PHOTO_QUERIES = 200


class Queries:
    """Labelled queries of one sort, `vectors` (c, dim), and the photos `library` (n, dim) that they are asked of."""

    def __init__(self, kind: Kind, labels: list[Concept], vectors: FloatMatrix, library: FloatMatrix) -> None:
        self.kind, self.labels, self.vectors, self.library = kind, labels, vectors, library
        self.likeness = likeness_of(library)

    def measure(self, judge: Judge) -> dict[str, tuple[float, float, float]]:
        return measure_cutoff(self.labels, queries=self.vectors, library=self.library, judge=judge).summary()

    def alarms(self, judge: Judge) -> float:
        cutoff = measure_cutoff(self.labels, queries=self.vectors, library=self.library, judge=judge)
        return float(cutoff.false_alarm.mean())

    def gain(self, judge: Judge, *, alarm_costs: float = FALSE_ALARM_COSTS) -> float:
        cutoff = measure_cutoff(self.labels, queries=self.vectors, library=self.library, judge=judge)
        return float(cutoff.f1.mean() / cutoff.oracle_f1.mean() - alarm_costs * cutoff.false_alarm.mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folders", type=Path, nargs="+")
    arguments.add_argument("--model", default="mini")
    arguments.add_argument("--fit", action="store_true", help="fit the constants anew, and report with those")
    options = arguments.parse_args()
    encoder = load_encoder(options.model)
    usual = encoder.usual_scores
    sets = {folder.name: _read(folder, encoder) for folder in options.folders}
    first = next(iter(sets))
    captions, vectors = sets.pop(first)
    fitted = _queries(captions[::2], vectors[::2], encoder)
    print(f"usual_scores = UsualScores{_usual(fitted['word'])}")
    if options.fit:
        _fit([fitted["word"], fitted["phrase"]], usual)
        _fit([fitted["photo"]], usual)
    print(*(f"{kind}: {constants}" for kind, constants in CONSTANTS.items()), sep="\n")
    reported = {f"{first}, other half": (captions[1::2], vectors[1::2]), **sets}
    print(f"{'':<40}{'of oracle F1':>20}{'F1':>20}{'precision':>20}{'recall':>20}{'false alarms':>20}")
    for name, (some, of_some) in reported.items():
        asked = _queries(some, of_some, encoder)
        for sort, queries in asked.items():
            oracle = queries.measure(keep_best(1))["oracle_f1"][0]
            print(f"{name}: {len(queries.labels)} queries, {sort}; oracle F1 {oracle:.3f}")
            for method, judge in _judges(fitted[sort], queries, usual).items():
                figures = queries.measure(judge)
                cells = (figures[key] for key in ("f1_of_oracle", "f1", "precision", "recall", "false_alarms"))
                print(
                    f"  {method:<38}" + "".join(f"{f'{m:.2f} [{low:.2f}, {high:.2f}]':>20}" for m, low, high in cells)
                )
            _print_calibration(queries, usual)
        foreign = _foreign(some, [text for other, (texts, _) in reported.items() if other != name for text in texts])
        if foreign:
            judge = matches(usual, "text")
            empty = [not judge(query, of_some).any() for query in query_vectors(foreign, encoder=encoder)]
            print(f"{name}: {len(foreign)} foreign concepts, of which {np.mean(empty):.2f} find nothing")


def matches(usual: UsualScores, kind: Kind, likeness: UsualScores = USUAL_LIKENESS) -> Judge:
    """What searchengine/relevance.py takes for matches; `likeness` matters to photos alone."""

    def judge(query: FloatMatrix, library: FloatMatrix) -> Mask:
        scores = library @ query
        kept: Mask = relevance(scores, background=scores, usual=usual, likeness=likeness, kind=kind) >= MATCH
        return kept

    return judge


def _relevances(queries: Queries, usual: UsualScores) -> Iterator[FloatMatrix]:
    """Of each query the probabilities (n,) that the photos of the library match."""
    for query in queries.vectors:
        scores = queries.library @ query
        yield relevance(scores, background=scores, usual=usual, likeness=queries.likeness, kind=queries.kind)


def _read(folder: Path, encoder: Encoder) -> tuple[list[tuple[str, ...]], FloatMatrix]:
    """Captions (n,) and vectors (n, dim) of the photos, by name."""
    photos = sorted(
        read_captions(folder / "captions.json", images=folder / "images"), key=lambda photo: photo.path.name
    )
    crops = [decode_file(photo.path, image_size=encoder.image_size) for photo in photos]
    batches = [np.stack(crops[start : start + 32]) for start in range(0, len(crops), 32)]
    return [photo.captions for photo in photos], np.concatenate([encoder.encode_pixels(batch) for batch in batches])


def _queries(captions: list[tuple[str, ...]], vectors: FloatMatrix, encoder: Encoder) -> dict[str, Queries]:
    least = 5 if len(captions) >= 400 else 3
    concepts = label_concepts(captions, min_photos=least)
    names = [concept.name for concept in concepts]
    photos = label_photos(concepts, min_photos=least)
    chosen = np.sort(np.random.default_rng(0).permutation(len(photos))[:PHOTO_QUERIES])
    places, labels = zip(*(photos[number] for number in chosen), strict=True)
    return {
        "word": Queries("text", concepts, query_vectors(names, encoder=encoder), vectors),
        "phrase": Queries("text", concepts, encoder.encode_texts([f"a photo of {name}" for name in names]), vectors),
        "photo": Queries("image", list(labels), vectors[list(places)], vectors),
    }


def _usual(queries: Queries) -> tuple[float, float]:
    scores = queries.vectors @ queries.library.T
    low, median = np.quantile(scores, (0.1587, 0.5), axis=1)
    return round(float(np.median(median)), 3), round(float(np.median(median - low)), 3)


def _fit(sorts: list[Queries], usual: UsualScores) -> None:
    kind = sorts[0].kind

    def best(grid: list[dict[str, float]], goal: Callable[[], float]) -> None:
        before, gains = CONSTANTS[kind], []
        for values in grid:
            CONSTANTS[kind] = before._replace(**values)
            gains.append(goal())
        CONSTANTS[kind] = before._replace(**grid[int(np.argmax(gains))])

    shares, excesses = np.arange(0.4, 0.81, 0.05), np.arange(1.0, 2.6, 0.25)
    grid = [{"share": float(share), "excess": float(excess)} for share, excess in product(shares, excesses)]
    best(grid, lambda: float(np.mean([queries.gain(matches(usual, kind, queries.likeness)) for queries in sorts])))
    slopes = [{"slope": float(slope)} for slope in np.arange(0.4, 1.6, 0.1)]
    best(slopes, lambda: sum(np.log(_of_labels(queries, usual)).sum() for queries in sorts))


def _of_labels(queries: Queries, usual: UsualScores) -> FloatMatrix:
    """The probability that was given to what is true, for every photo of every query that is counted."""
    found = []
    for label, probabilities in zip(queries.labels, _relevances(queries, usual), strict=True):
        probability = np.clip(probabilities, 1e-6, 1 - 1e-6)
        found.append(np.where(label.shown, probability, 1 - probability)[label.counted])
    return np.concatenate(found)


def _judges(fitted: Queries, reported: Queries, usual: UsualScores) -> dict[str, Judge]:
    """The line of matches, and baselines tuned on `fitted`: for F1, or to as few false alarms as the line has."""
    alarms = fitted.alarms(matches(usual, fitted.kind, fitted.likeness))
    scores = np.arange(0.0, 0.9, 0.01)
    score = max(scores, key=lambda x: fitted.gain(keep_above(x), alarm_costs=0))
    rare = min(scores, key=lambda x: abs(fitted.alarms(keep_above(x)) - alarms))
    k = max((1, 2, 3, 5, 8, 10, 12, 16, 20, 30, 40, 60), key=lambda k: fitted.gain(keep_best(k), alarm_costs=0))
    return {
        "line of matches": matches(usual, reported.kind, reported.likeness),
        f"fixed score {score:.2f}, best F1": keep_above(score),
        f"fixed score {rare:.2f}, as few false alarms": keep_above(rare),
        f"top {k}": keep_best(k),
        "largest gap": keep_to_largest_gap(),
    }


def _print_calibration(queries: Queries, usual: UsualScores) -> None:
    """How often a photo is right, where its probability is said to be so high."""
    said, right = [], []
    for label, probabilities in zip(queries.labels, _relevances(queries, usual), strict=True):
        said.append(probabilities[label.counted])
        right.append(label.shown[label.counted])
    probability, shown = np.concatenate(said), np.concatenate(right)
    cells = []
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.5), (0.5, 0.7), (0.7, 1.01)):
        here = (probability >= low) & (probability < high)
        if here.any():
            cells.append(f"{probability[here].mean():.2f}: {shown[here].mean():.2f} ({here.sum()})")
    print(f"  {'said to be, and is right (photos)':<38}" + ", ".join(cells))


def _foreign(captions: list[tuple[str, ...]], others: list[tuple[str, ...]]) -> list[str]:
    said = " ".join(caption for photo in captions for caption in photo).lower()
    return [
        concept.name
        for concept in label_concepts(others, min_photos=3)
        if not any(word.rstrip("s") in said for word in concept.name.split())
    ]


if __name__ == "__main__":
    main()
