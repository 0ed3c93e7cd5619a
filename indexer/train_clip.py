"""Training of a CLIP's projections on frozen towers.

What learns is the last, linear step of each tower: y = (W + D) (x + b), where W is the projection as it was published
and D and b begin at zero. Both are of the form that a CLIP has: D goes into the projection, b into the bias of the
layer norm before it. So the result is a checkpoint like any other, for all precisions, with a fingerprint of its own.
Weights decay towards what was published, for D and b are what decays (L2-SP; Li et al. 2018, arXiv:1802.01483), and the
epoch is kept that did best on photos held out: few captions soon teach a CLIP to forget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn import functional as F

from indexer.contrastive import FloatArray, Network
from searchengine.index.layout import write_durably
from searchengine.models.clip.configuration import FORMAT, VERSION
from searchengine.models.clip.encoder import ClipEncoder, bucketed
from searchengine.vectors import normalise

NORM_BIAS, PROJECTION = "norm_post.bias", "projection.weight"


class Side(nn.Module):
    """One tower's last step. `weight` (dim, n) is the published projection."""

    def __init__(self, weight: FloatArray) -> None:
        super().__init__()
        self.register_buffer("published", torch.from_numpy(weight.copy()))
        # Steps are as large as the weights are, whatever checkpoint they are from.
        self.size = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64)))) or 1.0
        self.difference = nn.Parameter(torch.zeros(weight.shape))
        self.bias = nn.Parameter(torch.zeros(weight.shape[1]))

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.published) + self.size * self.difference

    def forward(self, x: Tensor) -> Tensor:
        """(m, n) -> (m, dim), unit rows"""
        return F.normalize(F.linear(x + self.bias, self.weight), dim=1)

    @torch.no_grad()
    def tensors(self, norm_bias: FloatArray) -> dict[str, FloatArray]:
        """What a tower has in their place; `norm_bias` (n,) is its own."""
        return {PROJECTION: self.weight.numpy(), NORM_BIAS: norm_bias + self.bias.numpy()}


class ClipHeads(Network):
    def __init__(self, image: FloatArray, text: FloatArray, *, logit_scale: float) -> None:
        super().__init__()
        self.image_side, self.text_side = Side(image), Side(text)
        self.scale = nn.Parameter(torch.tensor(math.log(logit_scale)))

    def image(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.image_side(features))

    def text(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.text_side(features))

    def mixed(self, first: Tensor, second: Tensor, both: Tensor) -> Tensor:
        return (first + both * second) / (1 + both.float())


class LinearHeads:
    """Implements `indexer.contrastive.Heads`."""

    def __init__(self, image: Side, text: Side) -> None:
        self._image, self._text = image, text

    @torch.no_grad()
    def image(self, features: FloatArray) -> FloatArray:
        return normalise(self._image(torch.from_numpy(features)).numpy())

    @torch.no_grad()
    def text(self, features: FloatArray) -> FloatArray:
        return normalise(self._text(torch.from_numpy(features)).numpy())


class ClipLearner:
    """Implements `indexer.train.Learner`. The towers run where, and in the precision, that `encoder` does."""

    epochs = 60
    learning_rate = 1e-3
    validation_share = 0.1
    keeps_best = True

    def __init__(self, encoder: ClipEncoder) -> None:
        self.name, self.image_size = encoder.name, encoder.image_size
        self._encoder, self._checkpoint = encoder, encoder.checkpoint
        self._image_tensors, self._text_tensors = self._checkpoint.image_tensors(), self._checkpoint.text_tensors()
        self._image_tower, self._text_tower = encoder.bare_towers()

    def describe(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._image_tower.encode(pixels.numpy()))

    def encode(self, texts: Sequence[str]) -> FloatArray:
        tokens = [self._encoder.tokens_of(text, truncate=True) for text in texts]
        rows: dict[tuple[int, ...], FloatArray] = {}
        for batch in bucketed(set(tokens)):
            rows.update(zip(batch, self._text_tower.encode(batch), strict=True))
        return np.stack([rows[text] for text in tokens])

    def before(self) -> LinearHeads:
        untouched = self._network()
        return LinearHeads(untouched.image_side, untouched.text_side)

    def network(self, features: Tensor, generator: torch.Generator) -> ClipHeads:
        return self._network()

    def save(self, network: Network, out: Path, counts: Mapping[str, int]) -> LinearHeads:
        learned = cast(ClipHeads, network)
        tensors = self._checkpoint.with_tensors(
            image=learned.image_side.tensors(self._image_tensors[NORM_BIAS]),
            text=learned.text_side.tensors(self._text_tensors[NORM_BIAS]),
            logit_scale=float(learned.scale.detach().exp()),
        )
        config = self._checkpoint.config
        facts = {
            "version": VERSION,
            "activation": config.activation,
            "image_heads": config.image.heads,
            "text_heads": config.text.heads,
            **counts,
        }
        # One entry, because safetensors writes several in an order that changes from run to run.
        write_durably(out, save(tensors, {FORMAT: json.dumps(facts, sort_keys=True)}))
        return LinearHeads(learned.image_side, learned.text_side)

    def _network(self) -> ClipHeads:
        return ClipHeads(
            self._image_tensors[PROJECTION],
            self._text_tensors[PROJECTION],
            logit_scale=self._checkpoint.logit_scale,
        )
