"""Training of the projection heads of ``mini``, from the beginning: `projection.py` is what learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.contrastive import Network
from indexer.projection import HeadsNetwork
from indexer.prototypes import Prototypes, class_texts
from searchengine.models.mini.heads import MiniHeads, save_heads
from searchengine.models.mini.parts import IMAGE_SIZE


class ImageTower(Protocol):
    @property
    def classifier_weight(self) -> Tensor: ...

    @property
    def classifier_bias(self) -> Tensor: ...

    def describe(self, pixels: Tensor) -> Tensor: ...


class TextTower(Protocol):
    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]: ...


class MiniLearner:
    """Implements `indexer.train.Learner`. `heads` are those to be held against what is learned.

    The last epoch is kept: dropout and prototypes keep the heads from learning photos by heart, and it is by this that
    the shipped heads come out again.
    """

    image_size = IMAGE_SIZE
    epochs = 40
    learning_rate = 2e-3
    validation_share = 0.03
    keeps_best = False

    def __init__(self, image_tower: ImageTower, text_tower: TextTower, *, heads: MiniHeads, name: str) -> None:
        self.name = name
        self._image_tower, self._text_tower, self._heads = image_tower, text_tower, heads

    def describe(self, pixels: Tensor) -> Tensor:
        return self._image_tower.describe(pixels).float().cpu()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._text_tower.encode(texts, truncate=True)

    def before(self) -> MiniHeads:
        return self._heads

    def network(self, features: Tensor, generator: torch.Generator) -> HeadsNetwork:
        texts = class_texts(self._text_tower.encode)
        tower = self._image_tower
        weight, bias = tower.classifier_weight.float().cpu(), tower.classifier_bias.float().cpu()
        return HeadsNetwork(features, texts, Prototypes(weight, bias, features, texts, generator), generator)

    def save(self, network: Network, out: Path, counts: Mapping[str, int]) -> MiniHeads:
        learned = cast(HeadsNetwork, network)
        save_heads(out, learned.tensors(), logit_scale=float(learned.scale.detach().exp()), counts=counts)
        return MiniHeads.load(out)
