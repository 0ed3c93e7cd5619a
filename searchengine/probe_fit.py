"""Fitting a linear probe: logistic regression on embeddings, and how good it is on photos that it has not seen.

The photos are dealt into `FOLDS` parts, each class evenly. For each part in turn all others are fitted, C and the
temperature chosen by a cross-validation within them; the part only judges. The probe itself is fitted on all photos by
the same procedure. Copies of a photo count as one, so none is ever on both sides.

C and the temperature are chosen together: of each C the logits of photos left out are scaled by the temperature that
suits them best, and the C of the least cross-entropy wins. The targets are smoothed as in Platt 1999, section 2.2:
else a handful of photos that are told apart without an error would ask for probabilities of 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import UsageError
from searchengine.labels import LabelledPhoto
from searchengine.photo_vectors import PhotoVector
from searchengine.probe import Probabilities, Probe, softmax
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix

Numbers = NDArray[np.int64]
Lines = tuple[FloatMatrix, FloatMatrix]  # (classes, dim) and (classes,)

FOLDS = 5
FEWEST_OF_A_CLASS = 3  # one to judge, one to choose C by, one to fit
INVERSE_PENALTIES = tuple(10.0**power for power in np.arange(-1, 3.6, 0.5))  # C
TEMPERATURES, TEMPERATURE_STEP = (1 / 30, 30.0), 1e-3  # the step as a logarithm
MAX_ITERATIONS = 1000

Z = 1.959964  # of a normal distribution 95 % lie so many standard deviations around the mean
ECE_BINS = 15
RESAMPLES = 2000
DRAWS = 4  # smaller sets of photos are drawn up to so many times


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled photos of different content: `vectors` float32 (n, dim), `labels` (n,) as places in `classes`."""

    vectors: FloatMatrix
    labels: Numbers
    classes: tuple[str, ...]
    copies: int  # left out


def examples_of(labelled: Sequence[tuple[LabelledPhoto, PhotoVector]]) -> Examples:
    """Photos of the same content become one. Raises UsageError where two of them have different labels, and where a
    class has fewer than `FEWEST_OF_A_CLASS`, or there is but one."""
    first: dict[bytes, tuple[LabelledPhoto, FloatMatrix]] = {}
    for photo, found in labelled:
        known, _ = first.setdefault(found.content_hash, (photo, found.vector))
        if known.label != photo.label:
            raise UsageError(
                f"{printable(photo.path)} (line {photo.line}, {printable(repr(photo.label))}) is a copy of "
                f"{printable(known.path)} (line {known.line}, {printable(repr(known.label))}); a photo has one label"
            )
    if not first:
        raise UsageError("there is no photo to learn from; label some, and check that they can be read")
    names = [photo.label for photo, _ in first.values()]
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise UsageError(f"the only label is {printable(', '.join(classes))}; a probe tells at least two classes apart")
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[name] for name in names])
    counts = np.bincount(labels, minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < FEWEST_OF_A_CLASS:
        raise UsageError(
            f"{printable(repr(classes[fewest]))} has {counts[fewest]} different photos; label at least "
            f"{FEWEST_OF_A_CLASS} of each class, better five or more"
        )
    vectors = np.stack([vector for _, vector in first.values()])
    return Examples(vectors=vectors, labels=labels, classes=classes, copies=len(labelled) - len(first))


def fit(
    examples: Examples,
    *,
    encoder: Encoder,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """The probe, with what was measured in its `report`. The same seed gives the same probe."""
    import sklearn.linear_model  # noqa: F401  (first, so that its BLAS is limited, too)
    from threadpoolctl import threadpool_limits

    # Of hundreds of small products, threads that wait for each other would make a busy machine's long job.
    with threadpool_limits(1, user_api="blas"):
        return _fit(examples, encoder, np.random.default_rng(seed), on_progress)


def _fit(
    examples: Examples, encoder: Encoder, rng: np.random.Generator, on_progress: Callable[[int, int], None]
) -> Probe:
    vectors, labels, classes = examples.vectors, examples.labels, len(examples.classes)
    part_of = _dealt(labels, FOLDS, rng)
    halvings = math.floor(math.log2(min(np.bincount(labels[part_of != part]).min() for part in range(FOLDS))))
    held_out = np.empty((len(labels), classes))  # what a probe that has not seen the photo makes of it
    right = np.zeros((halvings, len(labels)))  # how often one fitted on a half, a quarter, ... is right about it
    for part in range(FOLDS):
        on_progress(part, FOLDS + 1)
        seen, judged = np.flatnonzero(part_of != part), np.flatnonzero(part_of == part)
        penalty, temperature = _choose(vectors[seen], labels[seen], rng)
        held_out[judged] = softmax(
            _logits(_logistic(vectors[seen], labels[seen], penalty), vectors[judged]) / temperature
        )
        for halving in range(halvings):
            shares = 2 ** (halving + 1)
            share_of = _dealt(labels[seen], shares, rng)
            for share in range(min(shares, DRAWS)):
                some = seen[share_of == share]
                guessed = _logits(_logistic(vectors[some], labels[some], penalty), vectors[judged]).argmax(1)
                right[halving, judged] += (guessed == labels[judged]) / min(shares, DRAWS)
    on_progress(FOLDS, FOLDS + 1)
    penalty, temperature = _choose(vectors, labels, rng)
    weights, bias = _logistic(vectors, labels, penalty)
    on_progress(FOLDS + 1, FOLDS + 1)
    right = np.concatenate([[held_out.argmax(1) == labels], right])
    report = _judged(examples, held_out) | _learning(right, rng) | {"C": penalty, "temperature": temperature}
    return Probe(
        encoder=encoder.name,
        precision=encoder.precision,
        fingerprint=encoder.fingerprint,
        classes=examples.classes,
        weights=weights,
        bias=bias,
        temperature=temperature,
        report=report,
    )


def _dealt(labels: Numbers, parts: int, rng: np.random.Generator) -> Numbers:
    """The part (n,) of each photo, from 0: at random, and each class evenly."""
    shuffled = rng.permutation(len(labels))
    part_of = np.empty(len(labels), np.int64)
    part_of[shuffled[np.argsort(labels[shuffled], kind="stable")]] = np.arange(len(labels)) % parts
    return part_of


def _choose(vectors: FloatMatrix, labels: Numbers, rng: np.random.Generator) -> tuple[float, float]:
    """C and the temperature, by cross-validation."""
    part_of = _dealt(labels, FOLDS, rng)
    models = [_regression() for _ in range(FOLDS)]
    logits = np.empty((len(labels), labels.max() + 1))
    best = (math.inf, 0.0, 0.0)
    for penalty in INVERSE_PENALTIES:  # rising: each solution is where the next one starts
        for part, model in enumerate(models):
            seen, judged = part_of != part, part_of == part
            model.set_params(C=penalty).fit(vectors[seen], labels[seen])
            logits[judged] = _logits(_lines(model), vectors[judged])
        best = min(best, (*_temper(logits, labels), penalty))
    return best[2], best[1]


def _temper(logits: NDArray[np.float64], labels: Numbers) -> tuple[float, float]:
    """The cross-entropy with smoothed targets at its least, and the temperature that makes it so."""
    count, classes = logits.shape
    targets = np.full((count, classes), 1 / (count + classes))  # Laplace's: as if each class had come once more
    targets[np.arange(count), labels] += count / (count + classes)
    low, high = map(math.log, TEMPERATURES)
    while high - low > TEMPERATURE_STEP:
        middle = (low + high) / 2
        # The derivative by 1 / temperature, which only rises with it.
        slope = ((softmax(logits / math.exp(middle)) - targets) * logits).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    temperature = math.exp(high)
    shares = np.maximum(softmax(logits / temperature), np.finfo(np.float64).tiny)
    return float(-(targets * np.log(shares)).sum(axis=1).mean()), temperature


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)


def _logistic(vectors: FloatMatrix, labels: Numbers, penalty: float) -> Lines:
    return _lines(_regression().set_params(C=penalty).fit(vectors, labels))


def _lines(model: Any) -> Lines:
    """Two classes share one line, of which each gets half: softmax(-z / 2, z / 2) is the logistic function of z."""
    weights, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights.astype(np.float32), bias.astype(np.float32)


def _logits(lines: Lines, vectors: FloatMatrix) -> NDArray[np.float64]:
    weights, bias = lines
    return (vectors @ weights.T + bias).astype(np.float64)


def _judged(examples: Examples, held_out: Probabilities) -> dict[str, Any]:
    """What the probabilities (n, classes) of photos that were held out say of a probe."""
    labels, counts = examples.labels, np.bincount(examples.labels)
    guessed, surest = held_out.argmax(1), held_out.max(1)
    right = guessed == labels
    low, high = wilson(int(right.sum()), len(right))
    guesses, hits = (np.bincount(some, minlength=len(counts)) for some in (guessed, labels[right]))
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "most_frequent": float(counts.max() / len(labels)),
        "calibration_error": calibration_error(surest, right),
        "photos": len(labels),
        "copies": examples.copies,
        "classes": {
            name: {
                "photos": int(counts[place]),
                "precision": float(hits[place] / guesses[place]) if guesses[place] else None,
                "recall": float(hits[place] / counts[place]),
            }
            for place, name in enumerate(examples.classes)
        },
    }


def _learning(right: NDArray[np.float64], rng: np.random.Generator) -> dict[str, Any]:
    """Accuracy by the number of photos fitted on, and what the last doubling of it brought.

    `right` (1 + halvings, n): how right about each photo one of all but a fold, of a half of it, a quarter ... is.
    The interval is a bootstrap's over the photos, of both probes together.
    """
    seen = len(right[0]) * (FOLDS - 1) / FOLDS
    curve = [
        {"photos": round(seen / 2**halving), "accuracy": float(share.mean())} for halving, share in enumerate(right)
    ][::-1]
    if len(curve) < 2:
        return {"learning_curve": curve, "last_doubling": None}
    gains = right[0] - right[1]
    drawn = [float(gains[rng.integers(0, len(gains), len(gains))].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"learning_curve": curve, "last_doubling": {"gain": float(gains.mean()), "low": low, "high": high}}


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): right also near 0 and 1, and for few."""
    share = right / count
    centre = share + Z**2 / (2 * count)
    reach = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, (centre - reach) / (1 + Z**2 / count)), min(1.0, (centre + reach) / (1 + Z**2 / count))


def calibration_error(surest: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """How far the highest probabilities (n,) are from how often they are `right` (n,), over bins of equal width.

    The expected calibration error of Guo et al. 2017, section 3. Of few photos it is too high by chance.
    """
    bins = np.minimum((surest * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    off = np.bincount(bins, weights=surest - right, minlength=ECE_BINS)
    return float(np.abs(off).sum() / len(right))
