"""The projection heads of ``mini`` as a torch module that learns; `searchengine.models.mini.heads` describes them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from indexer.contrastive import Network
from indexer.prototypes import ClassTexts, Prototypes
from searchengine.models.mini import heads
from searchengine.models.mini.heads import DIM, POOLED, SENTENCE

NETWORKS, HIDDEN, OUTPUTS = 3, 384, 104
DROPOUT = {POOLED: 0.5, SENTENCE: 0.2}
# The temperature starts at CLIP's 1 / 0.07.
INITIAL_SCALE = 14.0
PROTOTYPES_PER_BATCH = 640
# How strongly a class's name is pushed towards the label part of the space, which never forgets.
NAME_WEIGHT = 0.4


class _Side(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, NETWORKS * OUTPUTS)
        self.hidden = nn.Linear(inputs, NETWORKS * HIDDEN)
        self.out = nn.Parameter((torch.rand(NETWORKS, HIDDEN, OUTPUTS) * 2 - 1) / math.sqrt(HIDDEN))
        self.dropout = nn.Dropout(DROPOUT[inputs])

    def caption_part(self, x: Tensor) -> Tensor:
        # Each use of x drops channels of its own. x: (n, inputs) -> (n, 312)
        hidden = self.dropout(F.relu(self.hidden(self.dropout(x))))
        learned = torch.einsum("nmh,mhd->nmd", hidden.reshape(len(x), NETWORKS, HIDDEN), self.out)
        parts = self.linear(self.dropout(x)).reshape(learned.shape) + learned
        return F.normalize(F.normalize(parts, dim=2).reshape(len(x), -1), dim=1)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "linear.weight": self.linear.weight,
            "linear.bias": self.linear.bias,
            "hidden.weight": self.hidden.weight,
            "hidden.bias": self.hidden.bias,
            "out.weight": self.out,
        }


class HeadsNetwork(Network):
    """The heads as `searchengine.models.mini.heads` computes them, in torch and with dropout.

    features: (n, 3048) of the training photos, for their mean and deviation. texts: the classes', for the label part.
    Captions alone would make the heads forget what the towers know, so each batch also holds class `prototypes`.
    """

    def __init__(self, features: Tensor, texts: ClassTexts, prototypes: Prototypes, generator: torch.Generator) -> None:
        super().__init__()
        self._prototypes = prototypes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.image_side, self.text_side = _Side(POOLED), _Side(SENTENCE)
            self.gate = nn.Linear(SENTENCE, 1)
        self.image_gate_bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        pooled = features[:, :POOLED]
        self.mean, self.deviation = pooled.mean(0), pooled.std(0) + 1e-3
        # Principal directions, not centred, of what the class texts span: they keep nearly every dot product.
        directions = torch.linalg.svd(texts.texts, full_matrices=False).Vh
        self.projection = directions[: DIM - NETWORKS * OUTPUTS].T  # (384, 200)
        self.labels = texts.names @ self.projection  # (1000, 200)

    def image(self, features: Tensor) -> Tensor:
        limit = heads.MAX_DEVIATIONS
        x = ((features[:, :POOLED] - self.mean) / self.deviation).clamp(-limit, limit)
        probabilities = torch.from_numpy(heads.likeliest(features[:, POOLED:].numpy()))
        label = F.normalize(probabilities @ self.labels, dim=1)
        return _join(self.image_side.caption_part(x), label, self.image_gate_bias)

    def text(self, sentences: Tensor) -> Tensor:
        x = sentences * heads.SENTENCE_SCALE
        label = F.normalize(sentences @ self.projection, dim=1)
        return _join(self.text_side.caption_part(x), label, self.text_gate(sentences))

    def text_gate(self, sentences: Tensor) -> Tensor:
        gate: Tensor = self.gate(sentences * heads.SENTENCE_SCALE)
        return gate

    def mixed(self, first: Tensor, second: Tensor, both: Tensor) -> Tensor:
        return F.normalize(first + both * second, dim=1)

    def objective(self, features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        class_features, names = self._prototypes.draw(PROTOTYPES_PER_BATCH)
        loss = self.loss(torch.cat([features, class_features]), torch.cat([texts, names]))
        return loss, loss - NAME_WEIGHT * F.logsigmoid(self.text_gate(names)).mean()

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        named = {"labels": self.labels, "projection": self.projection}
        named |= {"image.mean": self.mean, "image.deviation": self.deviation, "image.gate.bias": self.image_gate_bias}
        named |= {"text.gate.weight": self.gate.weight[0], "text.gate.bias": self.gate.bias}
        named |= {f"image.{name}": tensor for name, tensor in self.image_side.tensors().items()}
        named |= {f"text.{name}": tensor for name, tensor in self.text_side.tensors().items()}
        return {name: tensor.detach().numpy() for name, tensor in named.items()}


def _join(caption: Tensor, label: Tensor, gate: Tensor) -> Tensor:
    # The square root of a sigmoid as half its logarithm: the gradient stays finite however closed the gate.
    label_weight, caption_weight = (F.logsigmoid(g).div(2).exp() for g in (gate, -gate))
    return torch.cat([caption * caption_weight, label * label_weight], 1)
