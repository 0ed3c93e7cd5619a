"""Fit the constants of searchengine/relevance.py on captioned photos, and tell how good the cutoff is.

    scripts/fit_relevance.py CAPTIONS.json --images FOLDER [--model mini]

Concepts are the words that name things in at least MIN_PHOTOS of the photos. A photo shows a concept if at least two of
its captions say the word, does not show it if none does, and is left out of the count otherwise. Photos are split by
name: the constants are fitted on one half and the figures come from the other. The best fixed threshold on the score,
tuned on the same half, stands beside. What is maximised is F0.5, which counts precision twice as much as recall: what
people complain about is junk.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np

from searchengine.captions import CaptionedPhoto, read_captions
from searchengine.decode import decode_file
from searchengine.models.registry import load_encoder
from searchengine.relevance import MATCH, relevance, standard_distance

MIN_PHOTOS = 8
NOT_THINGS = set(
    """
    a an the is are in on of and to with at it its his her their by for from up down out into over as two one three
    four there another while that this who has be or other some several many very through across off under near next
    behind front top back side around along past towards toward onto after before during them they he she him each
    all no not large small little big young old white black red blue green yellow brown orange pink purple gray grey
    tan dark light bright colorful looking standing sitting walking running jumping playing wearing holding riding
    being doing going looks stands sits walks runs jumps plays wears holds rides watches watching carrying carries
    smiling smiles something outside inside area together against background close middle group someone people
    person
    """.split()
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("captions", type=Path)
    arguments.add_argument("--images", type=Path, required=True)
    arguments.add_argument("--model", default="mini")
    options = arguments.parse_args()
    encoder = load_encoder(options.model)
    photos = sorted(read_captions(options.captions, images=options.images), key=lambda photo: photo.path.name)
    crops = [decode_file(photo.path, image_size=encoder.image_size) for photo in photos]
    batches = [np.stack(crops[start : start + 32]) for start in range(0, len(crops), 32)]
    vectors = np.concatenate([encoder.encode_pixels(batch) for batch in batches])
    fit, test = (
        Half([photos[i] for i in range(start, len(photos), 2)], vectors[start::2], encoder) for start in (0, 1)
    )
    thresholds = np.arange(1.0, 6.0, 0.05)
    usual = encoder.usual_scores

    def distance(scores: np.ndarray) -> np.ndarray:
        return standard_distance(scores, background=scores, usual=usual)

    best_z = max(thresholds, key=lambda z: fit.mean_f(lambda scores: distance(scores) >= z))
    slope = fit.slope(best_z)
    fixed = max(np.arange(0.0, 0.8, 0.005), key=lambda x: fit.mean_f(lambda scores: scores >= x))
    print(f"{len(photos)} photos, {len(fit.concepts)} and {len(test.concepts)} concepts")
    centre = float(np.median(fit.scores))
    spread = float(np.median(np.median(fit.scores, axis=1) - np.quantile(fit.scores, 0.1587, axis=1)))
    print(f"fitted: usual_scores = UsualScores(centre={centre:.3f}, spread={spread:.3f})")
    print(f"fitted: THRESHOLD = {best_z:.2f}, SLOPE = {slope:.2f}; best fixed score {fixed:.3f}")
    for name, keep in (
        ("fitted constants", lambda scores: distance(scores) >= best_z),
        ("as shipped", lambda scores: relevance(scores, background=scores, usual=usual) >= MATCH),
        ("fixed score", lambda scores: scores >= fixed),
        ("oracle cutoff", None),
    ):
        print(f"{name:<17} on the other half: F0.5 {test.mean_f(keep):.3f}, F1 {test.mean_f(keep, 1.0):.3f}")


class Half:
    """Half of the photos with the scores of every concept that is frequent among them."""

    def __init__(self, photos: list[CaptionedPhoto], vectors: np.ndarray, encoder) -> None:
        said = [[set(re.findall(r"[a-z]+", caption.lower())) for caption in photo.captions] for photo in photos]
        counts = [Counter(word for words in captions for word in words) for captions in said]
        frequent = Counter(word for count in counts for word, n in count.items() if n >= 2)
        self.concepts = sorted(w for w, n in frequent.items() if n >= MIN_PHOTOS and w not in NOT_THINGS and len(w) > 2)
        mentions = np.array([[count[word] for count in counts] for word in self.concepts])  # (concepts, photos)
        self.shown, self.counted = mentions >= 2, mentions != 1
        self.scores = encoder.encode_texts([f"a photo of {word}" for word in self.concepts]) @ vectors.T

    def mean_f(self, keep, beta: float = 0.5) -> float:
        """Mean over concepts of F-beta of what `keep` keeps; None keeps the best prefix of each ranking."""
        b = beta * beta
        values = []
        for scores, shown, counted in zip(self.scores, self.shown, self.counted, strict=True):
            if keep is None:
                order = np.argsort(-scores[counted])
                hits = np.cumsum(shown[counted][order])
                values.append(np.max((1 + b) * hits / (np.arange(1, len(hits) + 1) + b * shown.sum())))
            else:
                kept = keep(scores) & counted
                values.append((1 + b) * (kept & shown).sum() / max(kept.sum() + b * shown.sum(), 1))
        return float(np.mean(values))

    def slope(self, threshold: float) -> float:
        """The steepness of a logistic curve through `threshold` with the highest likelihood."""
        z = np.concatenate(
            [standard_distance(s, background=s)[c] for s, c in zip(self.scores, self.counted, strict=True)]
        )
        y = np.concatenate([s[c] for s, c in zip(self.shown, self.counted, strict=True)])
        slopes = np.arange(0.5, 6, 0.1)
        return float(max(slopes, key=lambda a: -np.logaddexp(0, -a * (z - threshold) * np.where(y, 1, -1)).sum()))


if __name__ == "__main__":
    main()
