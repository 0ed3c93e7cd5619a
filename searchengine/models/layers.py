"""Layers of text towers in numpy, for searches that have no seconds to spare for torch's import.

Activations are (width, tokens), a token a column, so that a weight matrix multiplies them as it lies in the file, which
is mapped into memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

GELU_BLOCK = 32_768  # elements that stay in a core's cache through all passes
# OpenBLAS computes a product of at most this many multiplications on the thread that asks for it. Anything larger waits
# for a thread on every core, 8 ms a product when another program keeps one of them busy, as an indexing run does.
SERIAL_PRODUCT = 2**18

# Phi, the normal distribution function, is 1 / (1 + exp(-x q(x^2))). These are -q's coefficients from the highest power
# on, a minimax fit that keeps x Phi(x) within 7e-8, and within 6e-7 in float32.
GELU_COEFFICIENTS = (
    -3.61123262e-09, 2.66892813e-07, -7.93821889e-06, 1.10480317e-04, 6.62599826e-05, -7.26685670e-02, -1.59576843e00
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    weight: FloatArray  # (out, in)
    bias: FloatArray  # (out,)

    def __call__(self, x: FloatArray) -> FloatArray:
        # x: (in, tokens) -> (out, tokens), as serial products of `rows` rows and at most 64 columns
        (outputs, inputs), tokens = self.weight.shape, x.shape[1]
        y = np.empty((outputs, tokens), np.float32)
        most = min(128, outputs & -outputs)  # a power of two that divides them
        start = 0
        while start < tokens:
            # The columns left over go by 16, the width of a vector register: odd widths are half as fast.
            stop = start + (64 if tokens - start >= 64 else min(16, tokens - start))
            rows = min(most, 2 ** max(0, (SERIAL_PRODUCT // (inputs * (stop - start))).bit_length() - 1))
            blocks = self.weight.reshape(-1, rows, inputs)
            np.matmul(blocks, x[:, start:stop], out=y.reshape(-1, rows, tokens)[..., start:stop])
            start = stop
        y += self.bias[:, None]
        return y


@dataclass(frozen=True)
class LayerNorm:
    gain: FloatArray  # (width,)
    shift: FloatArray  # (width,)
    epsilon: float

    def __call__(self, x: FloatArray) -> FloatArray:
        # x: (width, tokens)
        x = x - x.mean(0)
        variance = np.einsum("wt,wt->t", x, x) / np.float32(len(x))
        x /= np.sqrt(variance + np.float32(self.epsilon))
        x *= self.gain[:, None]
        x += self.shift[:, None]
        return x


def attend(query: FloatArray, key: FloatArray, value: FloatArray, *, causal: bool = False) -> FloatArray:
    """(..., head width, length) each -> the same shape; `causal`: no token looks at those after it."""
    head_width, length = query.shape[-2:]
    scale = np.float32(1 / math.sqrt(head_width))
    weights: FloatArray = np.matmul((query * scale).swapaxes(-1, -2), key)  # (..., length, length)
    if causal:
        weights += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    weights -= weights.max(-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(-1, keepdims=True)
    mixed: FloatArray = np.matmul(value, weights.swapaxes(-1, -2))
    return mixed


def gelu(x: FloatArray) -> FloatArray:
    """x Phi(x), in place, for a C-contiguous float32 array (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    flat = x.reshape(-1)
    with np.errstate(over="ignore"):  # exp reaches infinity where Phi reaches 0
        for start in range(0, flat.size, GELU_BLOCK):
            block = flat[start : start + GELU_BLOCK]
            square = block * block
            power = square * GELU_COEFFICIENTS[0]
            for coefficient in GELU_COEFFICIENTS[1:-1]:
                power += coefficient
                power *= square
            power += GELU_COEFFICIENTS[-1]
            power *= block
            np.exp(power, out=power)
            power += 1
            block /= power
    return x
