"""How good linear probes are on real photos, beside zero-shot classification; as Markdown.

    scripts/quality_probe.py DATA [--model mini]

Photos are those of Flickr8k's dev split in the folder DATA, labels come from their captions by the rules of
searchengine/concepts.py: a photo shows a concept or does not, and is left out where the captions disagree. Zero-shot
chooses between the concept's name and "something else". Balanced accuracy is the mean of both classes' recalls.
"""

import argparse
from pathlib import Path

import numpy as np

from searchengine import zeroshot
from searchengine.captions import read_captions
from searchengine.concepts import label_concepts
from searchengine.decode import decode_file
from searchengine.models.registry import load_encoder
from searchengine.probe_fit import Examples, calibration_error, fit
from searchengine.vectors import Encoder, FloatMatrix

CONCEPTS = ("dog", "child", "ball", "bike", "water", "running")
SHOTS, DRAWS = (3, 5, 10, 20), 3


def balanced(guessed: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([(guessed[labels == number] == number).mean() for number in np.unique(labels)]))


def few(vectors: FloatMatrix, labels: np.ndarray, encoder: Encoder, *, shots: int, seed: int) -> float:
    """Balanced accuracy on all other photos of a probe fitted on `shots` of each class."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.choice(np.flatnonzero(labels == number), shots, replace=False) for number in (0, 1)])
    some = Examples(vectors=vectors[chosen], labels=labels[chosen], classes=("other", "shown"), copies=0)
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    guessed = fit(some, encoder=encoder, seed=seed).probabilities(vectors[others]).argmax(axis=1)
    return balanced(guessed, labels[others])


def table(data: Path, encoder: Encoder) -> str:
    photos = read_captions(data / "flickr8k_dev" / "captions.json", images=data / "flickr8k_dev" / "images")
    crops = [decode_file(str(photo.path), image_size=encoder.image_size) for photo in photos]
    vectors = np.concatenate([encoder.encode_pixels(np.stack(crops[i : i + 32])) for i in range(0, len(crops), 32)])
    rows = []
    for concept in label_concepts([photo.captions for photo in photos]):
        if concept.name not in CONCEPTS:
            continue
        known, labels = vectors[concept.counted], concept.shown[concept.counted].astype(np.int64)
        named = zeroshot.class_vectors(
            encoder, ["something else", concept.name], templates=zeroshot.read_templates("simple")
        )
        shares = zeroshot.probabilities(known, named, logit_scale=encoder.logit_scale)
        guessed = shares.argmax(axis=1)
        shot = [np.mean([few(known, labels, encoder, shots=n, seed=s) for s in range(DRAWS)]) for n in SHOTS]
        report = fit(
            Examples(vectors=known, labels=labels, classes=("other", "shown"), copies=0), encoder=encoder
        ).report
        recalls = [known_class["recall"] for known_class in report["classes"].values()]
        rows.append(
            f"| {concept.name} | {labels.sum()} of {len(labels)} | {balanced(guessed, labels):.3f} | "
            + " | ".join(f"{share:.3f}" for share in shot)
            + f" | {np.mean(recalls):.3f} | {(guessed == labels).mean():.3f} | {report['accuracy']:.3f} "
            f"({report['accuracy_low']:.3f} to {report['accuracy_high']:.3f}) | "
            f"{calibration_error(shares.max(axis=1), guessed == labels):.3f} | {report['calibration_error']:.3f} |"
        )
    heads = ["shown by", "zero-shot", *(f"{shots} of each" for shots in SHOTS), "all labels", "accuracy: zero-shot"]
    heads += ["all labels (95 % interval)", "calibration error: zero-shot", "all labels"]
    return "\n".join(
        [
            f"Balanced accuracy of probes on {encoder.name} (of few photos: the mean of {DRAWS} draws, on all others;",
            "of all labels: on photos held out), then accuracy and calibration error:",
            "",
            f"| concept | {' | '.join(heads)} |",
            f"| --- |{' --- |' * len(heads)}",
            *rows,
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", default="mini")
    given = arguments.parse_args()
    print(table(given.data, load_encoder(given.model)))


if __name__ == "__main__":
    main()
