"""Does mini still know the 1,000 ImageNet classes? Class name -> photo, against naive label matching.

    scripts/bench_breadth.py FOLDER... [--model mini]

Naive label matching ranks photos by the dot product of the query's sentence vector with the mean of the ten likeliest
class names' sentence vectors, weighted by their probabilities. Both rank the same photos, which are proxies, since no
labelled ImageNet photo is at hand:

- simulated: one set of features a class, made from the classifier's weights and the covariance of the real photos in
  FOLDER... (the way of indexer/prototypes.py, but from photos not trained on), alone and among the real ones;
- real: photos in FOLDER... of which the classifier is sure (p > 0.5) stand for their class. The classifier's own word
  counts as the truth here, which favours naive matching by construction.

Prints Recall@1/5/10. Needs photos that the heads were not trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from indexer.prototypes import SHRINKAGE, class_texts
from searchengine.decode import decode_file
from searchengine.formats import EXTENSIONS
from searchengine.models.mini import parts
from searchengine.models.mini.efficientnet import EfficientNetLite2
from searchengine.models.mini.heads import POOLED, MiniHeads, likeliest, unit
from searchengine.models.mini.minilm import MiniLM
from searchengine.models.registry import find_weights
from searchengine.resources import resource
from searchengine.settings import load_settings

DISTANCE, NOISE, SEED = 11.0, 0.85, 0
SURE = 0.5
QUERIES = {"bare name": "{}", "unseen template": "I am looking for a {}"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    arguments.add_argument("--model", default="mini")
    options = arguments.parse_args()
    tower = EfficientNetLite2.from_file(parts.locate(parts.IMAGE_TOWER))
    sentences = MiniLM.from_folder(parts.locate(parts.TEXT_TOWER).parent)
    heads = MiniHeads.load(find_weights(options.model, models_folder=load_settings().models_folder))

    files = [f for folder in options.folders for f in sorted(folder.iterdir()) if f.suffix.lower() in EXTENSIONS]
    real = np.concatenate([describe(tower, files[start : start + 32]) for start in range(0, len(files), 32)])
    simulated = simulate(real, tower)
    names = class_texts(sentences.encode).names.numpy()
    lines = resource("labels/imagenet.txt").read_text("utf-8").splitlines()

    probabilities = torch.from_numpy(real[:, POOLED:]).softmax(1).numpy()
    sure = np.where(probabilities.max(1) > SURE, probabilities.argmax(1), -1)
    classes = np.unique(sure[sure >= 0])
    print(f"{len(simulated)} simulated and {len(files)} real photos, of {len(classes)} classes for sure")
    print("| query | photos | mini R@1/5/10 | naive label matching |\n| --- | --- | --- | --- |")
    for kind, template in QUERIES.items():
        texts = sentences.encode([template.format(line.split(",")[0].strip()) for line in lines])
        for pool, photos, owner, wanted in (
            ("1,000 simulated", simulated, np.arange(1000), np.arange(1000)),
            ("the same among the real ones", np.concatenate([simulated, real]), np.r_[:1000, np.full(len(real), -1)],
             np.arange(1000)),
            ("real", real, sure, classes),
        ):  # fmt: skip
            ours = recalls(heads.text(texts[wanted]) @ heads.image(photos).T, owner, wanted)
            naive = recalls(texts[wanted] @ unit(likeliest(photos[:, POOLED:]) @ names).T, owner, wanted)
            print(f"| {kind} | {pool} | {ours} | {naive} |")


def describe(tower: EfficientNetLite2, files: list[Path]) -> np.ndarray:
    crops = np.stack([decode_file(file, image_size=parts.IMAGE_SIZE) for file in files])
    return tower.describe(torch.from_numpy(crops)).numpy()


def simulate(real: np.ndarray, tower: EfficientNetLite2) -> np.ndarray:
    """One row of features a class: the mean, a step towards the class, and the difference of two real photos."""
    weight, bias = tower.classifier_weight.numpy(), tower.classifier_bias.numpy()
    pooled = real[:, :POOLED]
    centred = pooled - pooled.mean(0)
    covariance = centred.T @ centred[:, : weight.shape[1]] / len(centred)
    diagonal = np.arange(weight.shape[1])
    kept = covariance[diagonal, diagonal].copy()
    covariance[: weight.shape[1]] *= 1 - SHRINKAGE
    covariance[diagonal, diagonal] = kept
    towards = (weight - weight.mean(0)) @ covariance.T
    one, other = np.random.default_rng(SEED).integers(len(pooled), size=(2, len(weight)))
    rows = pooled.mean(0) + DISTANCE * towards + NOISE * (pooled[one] - pooled[other]) / 2**0.5
    rows = np.clip(rows, pooled.min(0), pooled.max(0))
    return np.concatenate([rows, rows[:, : weight.shape[1]] @ weight.T + bias], axis=1).astype(np.float32)


def recalls(scores: np.ndarray, owner: np.ndarray, wanted: np.ndarray) -> str:
    """Recall@1/5/10 of the best photo of each wanted class; photos of other classes stand in its way."""
    own = owner[None, :] == wanted[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    rank = ((scores > best) & ~own).sum(axis=1)
    return "/".join(f"{(rank < k).mean():.3f}" for k in (1, 5, 10))


if __name__ == "__main__":
    main()
