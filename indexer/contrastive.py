"""Contrastive learning from the features of frozen towers: pairs of photos and texts, the loss, the steps.

The loss is CLIP's, symmetric InfoNCE with a learned temperature (Radford et al. 2021, arXiv:2103.00020).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from searchengine.metrics import Retrieval, image_to_text, text_to_image

FloatArray = NDArray[np.float32]

BATCH = 512
WEIGHT_DECAY, WARM_UP = 0.05, 0.05
# The temperature learns ten times as fast as the weights, since it is one number.
MAX_SCALE, SCALE_RATE = 100.0, 10.0


class Heads(Protocol):
    """What an encoder makes of its towers' features: unit rows, float32."""

    def image(self, features: FloatArray) -> FloatArray: ...

    def text(self, features: FloatArray) -> FloatArray: ...


class Network(nn.Module, ABC):
    """Heads that learn. `scale` is the logarithm of the inverse temperature."""

    scale: nn.Parameter

    @abstractmethod
    def image(self, features: Tensor) -> Tensor: ...

    @abstractmethod
    def text(self, features: Tensor) -> Tensor: ...

    @abstractmethod
    def mixed(self, first: Tensor, second: Tensor, both: Tensor) -> Tensor:
        """The features of `first` captions (n, n_t), or where `both` (n, 1) says so, those between two captions."""

    def loss(self, features: Tensor, texts: Tensor) -> Tensor:
        """Symmetric InfoNCE over n pairs: features (n, n_i), texts (n, n_t)."""
        logits = self.scale.exp() * self.image(features) @ self.text(texts).T  # (n, n)
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def objective(self, features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """For a batch of a training: its loss, and what is to be made small."""
        loss = self.loss(features, texts)
        return loss, loss


class Pairs:
    """Photos with their captions' features, drawn in batches of random views and captions."""

    def __init__(self, views: Tensor, captions: list[Tensor], network: Network, generator: torch.Generator) -> None:
        self.views = views  # (2, n, n_i)
        self.captions = torch.cat(captions)  # (all, n_t)
        self._counts = torch.tensor([len(c) for c in captions])
        self._starts = self._counts.cumsum(0) - self._counts
        self._network, self._generator = network, generator
        self.size = min(BATCH, views.shape[1])

    def __len__(self) -> int:
        return self.views.shape[1] // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.views.shape[1], generator=self._generator)
        for rows in order[: len(self) * self.size].reshape(-1, self.size):
            view = torch.randint(2, rows.shape, generator=self._generator)
            first, second = self._draw(rows), self._draw(rows)
            # Half of the texts are between two captions: what lies between two ways to say it is a way to say it.
            both = torch.rand(len(rows), 1, generator=self._generator) < 0.5
            yield self.views[view, rows], self._network.mixed(first, second, both)

    def _draw(self, rows: Tensor) -> Tensor:
        offset = (torch.rand(len(rows), generator=self._generator) * self._counts[rows]).long()
        return self.captions[self._starts[rows] + offset]


class Trainer:
    """AdamW with a warm-up and a cosine to zero."""

    def __init__(
        self, network: Network, pairs: Pairs, epochs: int, learning_rate: float, generator: torch.Generator
    ) -> None:
        self._network, self._pairs = network, pairs
        # Dropout draws from torch's global generator, which is lent to it and given back.
        self._dropout_seed = int(torch.randint(2**31, (), generator=generator))
        steps = epochs * len(pairs)
        weights = [p for name, p in network.named_parameters() if name != "scale"]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": weights, "weight_decay": WEIGHT_DECAY},
                {"params": [network.scale], "weight_decay": 0.0, "lr": learning_rate * SCALE_RATE},
            ],
            lr=learning_rate,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser,
            lambda step: min(1, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * min(1, step / steps))) / 2,
        )

    def run_epoch(self) -> float:
        """One pass over the photos. Returns the mean loss."""
        self._network.train()
        losses = []
        with torch.random.fork_rng(devices=[]):
            self._dropout_seed += 1
            torch.manual_seed(self._dropout_seed)
            for features, texts in self._pairs:
                loss, objective = self._network.objective(features, texts)
                self._optimiser.zero_grad()
                objective.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self._schedule.step()
                with torch.no_grad():
                    self._network.scale.clamp_(0, math.log(MAX_SCALE))
                losses.append(float(loss.detach()))
        return sum(losses) / len(losses)


class Best:
    """The state of the epoch that did best on the photos held out; epoch 0 is what was there before."""

    def __init__(self, network: Network, loss: float) -> None:
        self._network = network
        self._epoch, self._loss, self._state = 0, loss, copy.deepcopy(network.state_dict())

    def is_long_past(self, epoch: int, loss: float, *, patience: int) -> bool:
        if loss < self._loss:
            self._epoch, self._loss, self._state = epoch, loss, copy.deepcopy(self._network.state_dict())
        return epoch - self._epoch >= patience

    def restore(self) -> int:
        """Give the network that state; returns its epoch."""
        self._network.load_state_dict(self._state)
        return self._epoch


class Held:
    """The photos held out: their loss, each with its first caption, and their Recall@K over all captions."""

    def __init__(self, features: FloatArray, captions: list[FloatArray]) -> None:
        self._features, self._captions = features, captions

    @torch.no_grad()
    def loss(self, network: Network) -> float:
        network.eval()
        first = np.stack([texts[0] for texts in self._captions])
        return float(network.loss(torch.from_numpy(self._features), torch.from_numpy(first)))

    def recalls(self, heads: Heads) -> Recalls:
        images, texts = heads.image(self._features), heads.text(np.concatenate(self._captions))
        owner = np.repeat(np.arange(len(images)), [len(c) for c in self._captions])
        return Recalls(
            text_to_image=text_to_image(texts, images, owner), image_to_text=image_to_text(texts, images, owner)
        )


@dataclass(frozen=True, kw_only=True)
class Recalls:
    text_to_image: Retrieval
    image_to_text: Retrieval

    def as_dict(self) -> dict[str, Any]:
        return {"text_to_image": self.text_to_image.as_dict(), "image_to_text": self.image_to_text.as_dict()}
