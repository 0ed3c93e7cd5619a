"""Labelled queries from captions, and how well a cutoff separates their matches from the rest.

Captions tell which photos show what, by these rules:

- A *concept* is a word that names a thing, an action or a kind of place, or two words that stand side by side
  ("tennis ball"). Forms of a word count as one ("dogs", "run", "running"); its name is the form that is said most.
- What is said implies what it is a kind of: who writes "puppy" or "poodle" says "dog", too (`KINDS`).
- A photo *shows* a concept if at least two of its captions say it, does not show it if none does, and is left out of
  the count if a single one does. Of two words, a photo is also left out if its captions say both, but not together.
- A concept is used if `min_photos` photos show it and as many do not, and if a third of the photos of which it is said
  at all show it: else it is a matter of opinion.

Two photos *match each other* if they share at least two concepts. They do not if no concept that is said of one is said
of the other. Concepts that more than a quarter of all photos show do not count here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from searchengine.vectors import FloatMatrix

Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]

# A judge sees a query (dim,) and a library (n, dim), all of length 1, and says which photos it keeps (n,).
Judge = Callable[[FloatMatrix, FloatMatrix], Mask]

SAID_BY = 2  # so many captions of a photo must agree
AGREEMENT = 1 / 3
SHARED_CONCEPTS, SHARED_BY_AT_MOST = 2, 0.25
RESAMPLES = 2000

NO_CONCEPTS = frozenset(
    """
    a an the is are was were be been being am in on of off and or to too with without at it its his her hers their
    theirs he she him them they this that these those there here who which what while where when as for by from into
    onto out up down over under through across along around near next behind front top bottom back side sides toward
    towards past before after during against between beside among about above below beneath inside outside within away
    one two three four five six seven eight several some many few lot lots other others another each both all any more
    most no not very just so than then also only like has have had having do does doing done can could will would may
    get gets getting got go goes going gone come comes coming make makes making made take takes taking taken put puts
    look looks looking stand stands standing sit sits sitting wear wears wearing hold holds holding watch watches
    watching seem appear appears try tries trying use uses using show shows showing shown see sees seen give gives
    lay lays laying lie lies lying lean leans leaning be move moves moving set sets face faces facing
    white black red blue green yellow brown orange pink purple gray grey tan gold golden silver blond blonde dark light
    bright colorful colored colourful color colors small large little big tall long short old older young younger wooden
    something someone thing things piece part parts group couple pair bunch area close middle left right end edge
    background foreground view picture photo photograph photographer image camera scene way line day time together
    different various empty full open nearby distance others himself herself themselves alone
    """.split()
)

KINDS = {
    "animal": "dog cat horse cow sheep bird elephant giraffe zebra bear",
    "ball": "football basketball baseball volleyball",
    "beach": "seashore shore",
    "bike": "bicycle motorcycle motorbike cyclist bicyclist biker",
    "bird": "duck goose seagull pigeon parrot",
    "boat": "canoe kayak sailboat raft ship",
    "child": "kid boy girl toddler baby",
    "dog": "puppy poodle terrier retriever labrador collie greyhound dalmatian bulldog dachshund beagle husky",
    "food": "pizza sandwich cake fruit vegetable meat salad",
    "man": "guy gentleman men",
    "person": "man woman child people guy lady player rider surfer skier skateboarder snowboarder climber crowd",
    "street": "road",
    "vehicle": "car truck bus van",
    "water": "ocean sea lake river pool pond wave",
    "woman": "lady women",
}
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "leaves": "leaf", "knives": "knife", "swam": "swim", "ran": "run", "rode": "ride",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something to ask for, and what is known of each of n photos: `shown` and `counted`, bool (n,).

    A photo that is not counted may or may not show it.
    """

    name: str
    shown: Mask
    counted: Mask


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """What a judge kept, a number for each of c queries; all arrays are (c,).

    `oracle_f1` is that of the best cutoff there is in the order of scores. `precision` is not a number where nothing
    was kept; `recall` and `f1` are 0 there. `false_alarm` tells where something was kept of a library that lacks what
    was asked for.
    """

    precision: Numbers
    recall: Numbers
    f1: Numbers
    oracle_f1: Numbers
    false_alarm: Mask

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """(mean, low, high), the 95 % interval, of each figure; `f1_of_oracle` is the ratio of the means of both F1."""
        figures: dict[str, Callable[[NDArray[np.integer]], float]] = {
            "precision": lambda chosen: _mean(self.precision[chosen]),
            "recall": lambda chosen: _mean(self.recall[chosen]),
            "f1": lambda chosen: _mean(self.f1[chosen]),
            "oracle_f1": lambda chosen: _mean(self.oracle_f1[chosen]),
            "f1_of_oracle": lambda chosen: _mean(self.f1[chosen]) / max(_mean(self.oracle_f1[chosen]), 1e-9),
            "false_alarms": lambda chosen: _mean(self.false_alarm[chosen].astype(np.float64)),
        }
        return {name: bootstrap(figure, count=len(self.f1)) for name, figure in figures.items()}


def label_concepts(captions: Sequence[Sequence[str]], *, min_photos: int = 5) -> list[Concept]:
    """The concepts that n photos show, each photo given by its captions, in the order of their names."""
    lemma = _lemmas(caption for photo in captions for caption in photo)
    forms: dict[str, Counter[str]] = {}
    said: list[Counter[str]] = []  # by how many captions of each photo
    for photo in captions:
        count: Counter[str] = Counter()
        for caption in photo:
            words = _words(caption)
            terms = [lemma[word] for word in words]
            for word, term in zip(words, terms, strict=True):
                forms.setdefault(term, Counter())[word] += 1
            for pair in zip(pairwise(words), pairwise(terms), strict=True):
                if not (set(pair[0]) | set(pair[1])) & NO_CONCEPTS:
                    forms.setdefault(" ".join(pair[1]), Counter())[" ".join(pair[0])] += 1
            count.update(_implied(terms))
        said.append(count)
    shown_by = Counter(term for count in said for term, times in count.items() if times >= SAID_BY)
    said_of = Counter(term for count in said for term in count)
    concepts = []
    for term, photos in shown_by.items():
        if photos < min_photos or photos < AGREEMENT * said_of[term]:
            continue
        times = np.array([count[term] for count in said])
        parts = term.split()
        apart = np.array([len(parts) > 1 and all(count[part] for part in parts) for count in said])
        shown = times >= SAID_BY
        counted = shown | ((times == 0) & ~apart)
        if (counted & ~shown).sum() >= min_photos:
            name = forms[term].most_common(1)[0][0] if term in forms else term
            concepts.append(Concept(name=name, shown=shown, counted=counted))
    return sorted(concepts, key=lambda concept: concept.name)


def label_photos(concepts: Sequence[Concept], *, min_photos: int = 5) -> list[tuple[int, Concept]]:
    """For each photo that `min_photos` others match: its place among the photos, and which those are.

    The photo itself is not counted.
    """
    telling = [concept for concept in concepts if concept.shown.mean() <= SHARED_BY_AT_MOST]
    shown = np.stack([concept.shown for concept in telling]).astype(np.int64)
    said = np.stack([concept.shown | ~concept.counted for concept in telling]).astype(np.int64)
    matches, related = shown.T @ shown >= SHARED_CONCEPTS, said.T @ said > 0
    np.fill_diagonal(matches, False)
    np.fill_diagonal(related, True)
    return [
        (place, Concept(name=f"photo {place}", shown=matches[place], counted=matches[place] | ~related[place]))
        for place in np.flatnonzero((matches.sum(axis=1) >= min_photos) & (~related).any(axis=1)).tolist()
    ]


def measure_cutoff(concepts: Sequence[Concept], *, queries: FloatMatrix, library: FloatMatrix, judge: Judge) -> Cutoff:
    """Hold `judge` against the labels of `concepts`, asked for by `queries` (c, dim) in `library` (n, dim), unit rows.

    The false alarm is sought in the library without all photos of which the concept is said even once.
    """
    rows = []
    for concept, query in zip(concepts, queries, strict=True):
        kept = judge(query, library) & concept.counted
        right, wanted = int((kept & concept.shown).sum()), int(concept.shown.sum())
        false_alarm = bool(judge(query, library[concept.counted & ~concept.shown]).any())
        rows.append(
            (
                right / kept.sum() if kept.any() else np.nan,
                right / wanted,
                2 * right / (int(kept.sum()) + wanted),
                oracle_f1(library @ query, concept),
                false_alarm,
            )
        )
    precision, recall, f1, oracle, alarms = np.array(rows, np.float64).reshape(-1, 5).T
    return Cutoff(precision=precision, recall=recall, f1=f1, oracle_f1=oracle, false_alarm=alarms.astype(np.bool_))


def oracle_f1(scores: FloatMatrix, concept: Concept) -> float:
    """The best F1 of any cutoff in the order of `scores` (n,)."""
    order = np.argsort(-scores[concept.counted], kind="stable")
    right = np.cumsum(concept.shown[concept.counted][order])
    return float(np.max(2 * right / (np.arange(1, len(right) + 1) + concept.shown.sum())))


def keep_above(threshold: float) -> Judge:
    """The baseline of one fixed score for all queries."""
    return lambda query, library: library @ query >= threshold


def keep_best(k: int) -> Judge:
    """The baseline of the k best for all queries."""

    def judge(query: FloatMatrix, library: FloatMatrix) -> Mask:
        kept = np.zeros(len(library), np.bool_)
        kept[np.argsort(-(library @ query), kind="stable")[:k]] = True
        return kept

    return judge


def keep_to_largest_gap(*, among: int = 100) -> Judge:
    """The baseline of a cutoff in the widest gap between the `among` best scores."""

    def judge(query: FloatMatrix, library: FloatMatrix) -> Mask:
        order = np.argsort(-(library @ query), kind="stable")
        best = (library @ query)[order[:among]]
        kept = np.zeros(len(library), np.bool_)
        kept[order[: 1 + int(np.argmax(best[:-1] - best[1:]))] if len(best) > 1 else order] = True
        return kept

    return judge


def bootstrap(
    statistic: Callable[[NDArray[np.integer]], float], *, count: int, seed: int = 0
) -> tuple[float, float, float]:
    """`statistic` of all of `count` queries, and its 95 % percentile interval over resampled ones (Efron 1979).

    It is given the places (count,) of the queries that were drawn.
    """
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    found = np.array([statistic(drawn) for drawn in draws])
    known = found[np.isfinite(found)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return statistic(np.arange(count)), float(low), float(high)


def _mean(values: Numbers) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


def _lemmas(captions: Iterable[str]) -> dict[str, str]:
    """Each word to the form that all its forms share: itself, or a shorter word that is said, too."""
    counts = Counter(word for caption in captions for word in _words(caption))
    return {word: _lemma(word, counts) for word in counts}


def _lemma(word: str, known: Counter[str]) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    candidates = []
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        candidates = [
            word[:-1],
            word[:-2] if word.endswith("es") else "",
            f"{word[:-3]}y" if word.endswith("ies") else "",
        ]
    elif len(word) > 5 and word.endswith("ing"):
        stem = word[:-3]
        candidates = [stem, f"{stem}e", stem[:-1] if stem[-1] == stem[-2] else ""]
    candidates = [candidate for candidate in candidates if len(candidate) > 2 and known[candidate]]
    return max(candidates, key=lambda candidate: known[candidate], default=word)


def _implied(terms: Sequence[str]) -> set[str]:
    """What a caption says: its words that are concepts, pairs of them, and what these are kinds of."""
    said = {term for term in terms if term not in NO_CONCEPTS and len(term) > 2}
    said |= {f"{a} {b}" for a, b in pairwise(terms) if a in said and b in said and a != b}
    while more := {kind for kind, members in KINDS.items() if kind not in said and said & set(members.split())}:
        said |= more
    return said
