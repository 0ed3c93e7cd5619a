"""Tables of docs/quality.md about searches: captions, prompts, the line where matches end, AND, OR, NOT."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from quality_data import Photos, cell, mean_of, table

from searchengine.captions import CaptionedPhoto
from searchengine.concepts import (
    Concept,
    Cutoff,
    Judge,
    Mask,
    keep_above,
    keep_best,
    keep_to_largest_gap,
    label_photos,
    measure_cutoff,
)
from searchengine.evaluate import evaluate
from searchengine.hits import MATCH, Hit
from searchengine.index.reader import Index
from searchengine.metrics import average_precision
from searchengine.prompts import query_vectors
from searchengine.relevance import Kind, likeness_of, relevance
from searchengine.search import Searcher
from searchengine.vectors import Encoder, FloatMatrix

PHOTO_QUERIES = 200
PAIRS = 40
LEAST_OF_BOTH = 5


def captions(sets: list[Photos], encoder: Encoder) -> str:
    rows = []
    for photos in sets:
        listed = [CaptionedPhoto(path=p, captions=c) for p, c in zip(photos.paths, photos.captions, strict=True)]
        with Index(photos.index) as index:
            found = evaluate(listed, encoder=encoder, index=index)
        for way, figures in (("text to image", found.text_to_image), ("image to text", found.image_to_text)):
            cells = [cell((share, *figures.intervals[f"recall@{k}"])) for k, share in figures.recall.items()]
            median = cell((figures.median_rank, *figures.intervals["median_rank"]), "g")
            rows.append([f"{photos.name}, {len(photos.paths):,} photos", way, *cells, median])
    return table(["photos", "", "R@1", "R@5", "R@10", "median rank"], rows)


def prompts(sets: list[Photos], encoder: Encoder) -> str:
    rows = []
    for photos in sets:
        concepts = photos.concepts
        for words, name in ((1, "one word"), (2, "two words")):
            asked = [concept for concept in concepts if len(concept.name.split()) == words]
            if len(asked) < 2:
                continue
            names = [concept.name for concept in asked]
            # With two words a search does not use them: this is why.
            prompted = _ensembles(names, encoder) if words == 2 else query_vectors(names, encoder=encoder)
            bare = _precisions(asked, encoder.encode_texts(names), photos.vectors)
            better = _precisions(asked, prompted, photos.vectors)
            gain = mean_of((better - bare).tolist())
            rows.append(
                [photos.name, f"{len(asked)}, {name}", f"{bare.mean():.3f}", f"{better.mean():.3f}", cell(gain, "+.3f")]
            )
    return table(["photos", "concepts", "mAP of the words alone", "of the prompts", "gain"], rows)


def _ensembles(names: list[str], encoder: Encoder) -> FloatMatrix:
    from searchengine.prompts import prompts_of
    from searchengine.zeroshot import class_vectors

    return class_vectors(encoder, names, templates=prompts_of(encoder.name))


def _precisions(concepts: list[Concept], queries: FloatMatrix, library: FloatMatrix) -> FloatMatrix:
    return np.array(
        [
            average_precision((library @ query)[concept.counted], concept.shown[concept.counted])
            for concept, query in zip(concepts, queries, strict=True)
        ]
    )


class Asked(NamedTuple):
    """Labelled queries (c, dim) of one kind."""

    kind: Kind
    labels: list[Concept]
    queries: FloatMatrix
    library: FloatMatrix

    def cut_by(self, judge: Judge) -> Cutoff:
        return measure_cutoff(self.labels, queries=self.queries, library=self.library, judge=judge)

    def measure(self, judge: Judge) -> dict[str, tuple[float, float, float]]:
        return self.cut_by(judge).summary()


def cutoff(fitting: Photos, sets: list[Photos], encoder: Encoder) -> str:
    """The line of matches beside what is usual, each tuned on `fitting`."""
    rows = []
    for kind in ("text", "image"):
        tuned = _asked(fitting, kind, encoder)
        line = _line(kind, encoder)
        alarms = float(tuned.cut_by(line).false_alarm.mean())
        judges = {"line of matches": line, **_baselines(tuned, alarms=alarms)}
        for photos in sets:
            asked = _asked(photos, kind, encoder)
            for name, judge in judges.items():
                figures = asked.measure(judge)
                keys = ("f1_of_oracle", "f1", "precision", "recall", "false_alarms")
                what = f"{photos.name}: {len(asked.labels)} {'words' if kind == 'text' else 'photos'}"
                rows.append([what, name, *(cell(figures[key], ".2f") for key in keys)])
    heads = [
        "asked",
        "what is kept",
        "F1, share of the best cutoff's",
        "F1",
        "precision",
        "recall",
        "absent: finds some",
    ]
    return table(heads, rows)


def _asked(photos: Photos, kind: Kind, encoder: Encoder) -> Asked:
    concepts = photos.concepts
    if kind == "text":
        names = [concept.name for concept in concepts]
        return Asked(kind, concepts, query_vectors(names, encoder=encoder), photos.vectors)
    labelled = label_photos(concepts, min_photos=5 if len(photos.paths) >= 400 else 3)
    chosen = np.sort(np.random.default_rng(0).permutation(len(labelled))[:PHOTO_QUERIES])
    places, labels = zip(*(labelled[number] for number in chosen), strict=True)
    return Asked(kind, list(labels), photos.vectors[list(places)], photos.vectors)


def _line(kind: Kind, encoder: Encoder) -> Judge:
    def judge(query: FloatMatrix, library: FloatMatrix) -> Mask:
        scores = library @ query
        usual, likeness = encoder.usual_scores, likeness_of(library)
        kept: Mask = relevance(scores, background=scores, usual=usual, likeness=likeness, kind=kind) >= MATCH
        return kept

    return judge


def _baselines(tuned: Asked, *, alarms: float) -> dict[str, Judge]:
    """Those of the best F1 on `tuned`; and the fixed score that has as few false alarms as the line has there."""
    fixed: dict[str, Judge] = {f"score of {x:.2f} or more": keep_above(x) for x in np.arange(0.05, 0.9, 0.025)}
    first: dict[str, Judge] = {f"the {k} best": keep_best(k) for k in (3, 5, 10, 15, 20, 30, 50)}
    cuts = {name: tuned.cut_by(judge) for name, judge in {**fixed, **first}.items()}
    chosen = [
        max(fixed, key=lambda name: cuts[name].f1.mean()),
        min(fixed, key=lambda name: abs(cuts[name].false_alarm.mean() - alarms)),
        max(first, key=lambda name: cuts[name].f1.mean()),
    ]
    judges = {**fixed, **first}
    return {name: judges[name] for name in chosen} | {"up to the largest gap": keep_to_largest_gap()}


def language(photos: Photos, encoder: Encoder) -> str:
    """Two conditions at a time, against the same in words and as a sum of vectors."""
    concepts = [one for one in photos.concepts if " " not in one.name]
    ways: dict[str, tuple[Callable[[Concept, Concept], Concept], dict[str, str]]] = {
        "both": (_both, {"AND": "{} AND {}", "as a text": "{} and {}", "sum": "{} + {}"}),
        "the first, not the second": (
            _without,
            {"AND NOT": "{} AND NOT {}", "as a text": "{} without {}", "sum": "{} - {}"},
        ),
        "either": (_either, {"OR": "{} OR {}", "as a text": "{} or {}", "sum": "{} + {}"}),
    }
    rows = []
    with Index(photos.index) as index:
        searcher = Searcher(index, encoder)
        place_of = {str(path.resolve()): place for place, path in enumerate(photos.paths)}
        for what, (labels_of, queries) in ways.items():
            asked = _pairs(concepts, labels_of)
            for name, pattern in queries.items():
                precisions, f1 = [], []
                for first, second, label in asked:
                    text = pattern.format(first.name, second.name)
                    hits = searcher.search_query(text, k=len(photos.paths))
                    precision, cut = _judged(hits, label, place_of)
                    precisions.append(precision)
                    f1.append(cut)
                rows.append([f"{what}, {len(asked)} pairs", name, cell(mean_of(precisions)), cell(mean_of(f1))])
    return table(["asked for", "how", "mAP", "F1 of what is shown as matches"], rows)


def _pairs(
    concepts: list[Concept], labels_of: Callable[[Concept, Concept], Concept]
) -> list[tuple[Concept, Concept, Concept]]:
    found = [(a, b, labels_of(a, b)) for a, b in combinations(concepts, 2)]
    found = [
        (a, b, label)
        for a, b, label in found
        if label.shown.sum() >= LEAST_OF_BOTH
        and (a.shown & b.shown).sum() >= LEAST_OF_BOTH
        # one a kind of the other makes no question
        and (a.shown & ~b.shown).sum() >= LEAST_OF_BOTH
        and (b.shown & ~a.shown).sum() >= LEAST_OF_BOTH
    ]
    chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:PAIRS])
    return [found[number] for number in chosen]


def _both(a: Concept, b: Concept) -> Concept:
    shown = a.shown & b.shown
    return Concept(name="", shown=shown, counted=shown | (a.counted & ~a.shown) | (b.counted & ~b.shown))


def _without(a: Concept, b: Concept) -> Concept:
    shown = a.shown & b.counted & ~b.shown
    return Concept(name="", shown=shown, counted=shown | (a.counted & ~a.shown) | b.shown)


def _either(a: Concept, b: Concept) -> Concept:
    shown = a.shown | b.shown
    return Concept(name="", shown=shown, counted=shown | (a.counted & b.counted))


def _judged(hits: list[Hit], label: Concept, place_of: dict[str, int]) -> tuple[float, float]:
    """Average precision of the order of hits, and F1 of those that are shown as matches."""
    places = np.array([place_of[hit.path] for hit in hits])
    matches = np.array([hit.relevance >= MATCH for hit in hits])[label.counted[places]]
    places = places[label.counted[places]]
    order = -np.arange(len(places), dtype=np.float32)
    shown = label.shown[places]
    missing = int(label.shown.sum() - shown.sum())  # not among the hits, so found last
    precision = average_precision(np.append(order, np.full(missing, -1e9)), np.append(shown, np.ones(missing, bool)))
    right = int((matches & shown).sum())
    return precision, 2 * right / (int(matches.sum()) + int(label.shown.sum()))
