"""Class prototypes: photos of the 1,000 ImageNet classes that nobody has to own, for the training of heads.

Were the features of each class normal with one covariance C, a classifier's optimal weights would be C^-1 times the
classes' means (linear discriminant analysis). The other way round, C times a row of weights points to where the photos
of that class lie. C is taken from the training photos, whole, since they have no classes; noise is what tells two of
them apart. Measured on unseen photos, these prototypes lie closer to real ones than the weights themselves do (cosine
to confidently classified photos 0.48 against 0.37, about the mean).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from searchengine.models.mini.heads import CLASSES, POOLED
from searchengine.resources import resource

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}.", "a close-up of a {}", "a {} in the wild", "two {}s")
SYNONYMS = 3
# Distance from the mean, and noise, each drawn from a range. In their middle, naive label matching finds simulated
# photos by class name about as often as it finds real ones.
DISTANCE, NOISE = (7.7, 14.3), (0.35, 1.05)
# The share of the covariance that is only its diagonal: there are more channels than some people have photos.
SHRINKAGE = 0.2
# "Genus species" says little to a model of plain English.
SCIENTIFIC_NAME = re.compile(r"[A-Z][a-z]+ [a-z]+( [a-z]+)?")


@dataclass(frozen=True)
class ClassTexts:
    """Sentence vectors of what a class is called: `names` (1000, 384), all texts (m, 384), and whose each is (m,)."""

    names: Tensor
    texts: Tensor
    owner: Tensor


def class_texts(encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> ClassTexts:
    texts: list[str] = []
    owner: list[int] = []
    lines = resource("labels/imagenet.txt").read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        name, *synonyms = (part.strip() for part in line.split(","))
        plain = [synonym for synonym in synonyms if not SCIENTIFIC_NAME.fullmatch(synonym)]
        of_class = [template.format(name) for template in TEMPLATES] + plain[:SYNONYMS]
        texts += of_class
        owner += [number] * len(of_class)
    vectors = torch.from_numpy(encode(texts))
    owners = torch.tensor(owner)
    first = torch.searchsorted(owners, torch.arange(CLASSES))  # the bare name is each class's first text
    return ClassTexts(vectors[first], vectors, owners)


class Prototypes:
    """Draws pairs of simulated features and class texts.

    weight, bias: the classifier's, (1000, 1280) and (1000,). features: (n, 3048) of the training photos.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, features: Tensor, texts: ClassTexts, generator: torch.Generator
    ) -> None:
        self._weight, self._bias, self._texts, self._generator = weight, bias, texts, generator
        self._pooled = features[:, :POOLED]
        self._mean = self._pooled.mean(0)
        self._lowest, self._highest = self._pooled.amin(0), self._pooled.amax(0)
        channels = weight.shape[1]
        centred = self._pooled - self._mean
        covariance = centred.T @ centred[:, :channels] / len(centred)  # (2048, 1280)
        square = covariance[:channels]
        square.mul_(1 - SHRINKAGE).diagonal().div_(1 - SHRINKAGE)
        self._directions = (weight - weight.mean(0)) @ covariance.T  # (1000, 2048)
        self._starts = torch.searchsorted(texts.owner, torch.arange(CLASSES))
        self._counts = torch.bincount(texts.owner, minlength=CLASSES)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """`number` different classes: features (number, 3048) and sentence vectors (number, 384)."""
        classes = torch.randperm(CLASSES, generator=self._generator)[:number]
        one, other = torch.randint(len(self._pooled), (2, number), generator=self._generator)
        noise = (self._pooled[one] - self._pooled[other]) / 2**0.5
        towards_class = self._uniform(DISTANCE, number) * self._directions[classes]
        simulated = self._mean + towards_class + self._uniform(NOISE, number) * noise
        pooled = torch.minimum(torch.maximum(simulated, self._lowest), self._highest)
        logits = F.linear(pooled[:, : self._weight.shape[1]], self._weight, self._bias)
        chosen = (torch.rand(number, generator=self._generator) * self._counts[classes]).long()
        return torch.cat([pooled, logits], 1), self._texts.texts[self._starts[classes] + chosen]

    def _uniform(self, bounds: tuple[float, float], number: int) -> Tensor:
        low, high = bounds
        return low + (high - low) * torch.rand(number, 1, generator=self._generator)
