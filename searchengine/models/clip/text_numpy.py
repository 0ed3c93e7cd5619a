"""The text tower of CLIP in numpy, for a few texts in a process that has no other need of torch, whose import takes
longer than they do.

It computes what `model.TextTransformer` does, to within 1e-5 of features of about 1, a text at a time: so no text
depends on those beside it, and nothing is padded. All of the weights are checked and made float32 when it is made, but
for the table of tokens, most of whose rows no text asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from searchengine.models.clip.architecture import QUICK_GELU_SLOPE, Activation, ClipConfig
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.layers import FloatArray, LayerNorm, Linear, attend, gelu
from searchengine.models.tensors import Array

NORM_EPSILON = 1e-5


def quick_gelu(x: FloatArray) -> FloatArray:
    """As `model.quick_gelu`."""
    with np.errstate(over="ignore"):  # exp reaches infinity where the sigmoid reaches 0
        activated: FloatArray = x / (1 + np.exp(x * np.float32(-QUICK_GELU_SLOPE)))
    return activated


ACTIVATIONS: dict[Activation, Callable[[FloatArray], FloatArray]] = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclass(frozen=True)
class Block:
    norm_1: LayerNorm
    qkv: Linear
    out: Linear
    norm_2: LayerNorm
    widen: Linear
    narrow: Linear
    activation: Callable[[FloatArray], FloatArray]
    heads: int

    def __call__(self, x: FloatArray) -> FloatArray:
        # x: (width, tokens)
        q, k, v = self.qkv(self.norm_1(x)).reshape(3, self.heads, -1, x.shape[1])  # (heads, head width, tokens) each
        x = x + self.out(attend(q, k, v, causal=True).reshape(x.shape))
        return x + self.narrow(self.activation(self.widen(self.norm_2(x))))


class TextTower:
    """Stands in for `inference.TextTower` in fp32 on a CPU. Raises WeightsError for damaged weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, tensors = checkpoint.config, checkpoint.text_tensors(as_stored=("tokens",))
        self._tokens, self._positions = tensors["tokens"], tensors["positions"]
        self._blocks = [_block(tensors, f"blocks.{number}.", config) for number in range(config.text.layers)]
        self._norm_post = _norm(tensors, "norm_post")
        self._projection: FloatArray = tensors["projection.weight"]

    def encode(self, texts: Sequence[Sequence[int]]) -> FloatArray:
        """texts: tokens, the end-of-text last. Returns float32 (n, dim), not normalised."""
        return np.stack([self._encode(np.array(text)) for text in texts])

    def _encode(self, tokens: Array) -> FloatArray:
        embedded = self._tokens[tokens] + self._positions[: len(tokens)]
        x = np.ascontiguousarray(embedded.T, dtype=np.float32)  # (width, tokens)
        for block in self._blocks:
            x = block(x)
        features: FloatArray = self._projection @ self._norm_post(x[:, -1:])[:, 0]
        return features


def _block(tensors: Mapping[str, Array], name: str, config: ClipConfig) -> Block:
    def linear(part: str) -> Linear:
        return Linear(tensors[f"{name}{part}.weight"], tensors[f"{name}{part}.bias"])

    return Block(
        norm_1=_norm(tensors, f"{name}norm_1"),
        qkv=linear("qkv"),
        out=linear("out"),
        norm_2=_norm(tensors, f"{name}norm_2"),
        widen=linear("widen"),
        narrow=linear("narrow"),
        activation=ACTIVATIONS[config.activation],
        heads=config.text.heads,
    )


def _norm(tensors: Mapping[str, Array], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], NORM_EPSILON)
