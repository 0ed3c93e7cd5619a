"""The convolutions of mini's image tower as a processor likes them: in floats, or in 8-bit integers.

torch's public convolution lays the weights out anew at each call and runs ReLU6 as a pass of its own. The operators
that its compiler emits, used here, do neither, and are a sixth faster over the whole network. Where they are missing
(other processors than x86) the public one does the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from searchengine.models.devices import has_fast_integers

RELU6_TOP = 6.0
TOP_LEVEL = 255
# How far the levels of a linear layer's output reach to both sides of its channels' means. Farther, and they lie too
# far apart; less far, and what is cut off costs more than that.
REACH_DEVIATIONS = 5.0
# oneDNN chooses the layout of the weights by a batch like those to come.
USUAL_BATCH = 2


@dataclass(frozen=True)
class Layer:
    """A convolution as it was trained, its batch norm folded in, then ReLU6 unless it is `linear`.

    weight: float32 (out, in / groups, k, k). bias: float32 (out,). mean, deviation: float32 (out,), of what it gave for
    the training photos, before ReLU6; its norm knows them. `side`: the height and width of the maps to come, about.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor
    side: int
    stride: int
    padding: int
    groups: int = 1
    linear: bool = False

    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], self.groups

    def usual_shape(self) -> list[int]:
        return [USUAL_BATCH, self.weight.shape[1] * self.groups, self.side, self.side]


class Conv:
    """`layer` in float32; or the sum of what it gives and a residual, which may be written into that."""

    def __init__(self, layer: Layer) -> None:
        self.geometry, self.linear, self.bias = layer.geometry(), layer.linear, layer.bias
        self.weight = layer.weight.contiguous(memory_format=torch.channels_last)
        self.fused = self.weight.is_cpu and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        if self.fused:
            stride, padding, dilation, groups = self.geometry
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight.contiguous(), padding, stride, dilation, groups, layer.usual_shape()
            )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        if self.fused:
            conv = torch.ops.mkldnn._convolution_pointwise
            arguments = self.weight, self.bias, padding, stride, dilation, groups
            if residual is not None:
                return cast(Tensor, conv.binary(x, residual, *arguments, "add", 1.0, None, [], None))
            activation, bounds = ("none", []) if self.linear else ("hardtanh", [0.0, RELU6_TOP])
            return cast(Tensor, conv(x, *arguments, activation, bounds, ""))
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if not self.linear:
            F.hardtanh_(y, 0.0, RELU6_TOP)
        return y if residual is None else y.add_(residual)

    def real(self, x: Tensor) -> Tensor:
        """The numbers that an output, or an average of it over places, stands for."""
        return x


@dataclass(frozen=True)
class Levels:
    """What the bytes of a map stand for: `least` + `step` * byte.

    mean, variance: float32 (c,), of each channel over the training photos.
    """

    step: float
    least: float
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, layer: Layer, residual: Levels | None) -> Levels:
        """ReLU6 tells by itself where values end. Elsewhere the norms do, so that no photos need be looked at (as
        Nagel et al. 2019, https://arxiv.org/abs/1906.04721, find ranges)."""
        mean, variance = layer.mean, layer.deviation.square()
        if not layer.linear:
            return cls(RELU6_TOP / TOP_LEVEL, 0.0, mean_after_relu6(mean, layer.deviation), variance)
        if residual is not None:
            mean, variance = mean + residual.mean, variance + residual.variance
        reach = REACH_DEVIATIONS * variance.sqrt()
        least, most = float((mean - reach).min()), float((mean + reach).max())
        return cls((most - least) / TOP_LEVEL, least, mean, variance)

    def real(self, x: Tensor) -> Tensor:
        return x.float() * self.step + self.least


class RoundedConv(Conv):
    """`layer`, which is linear, in float32, its output rounded to `levels`: where integers begin."""

    def __init__(self, layer: Layer) -> None:
        self.levels = Levels.of(layer, None)
        step, least = self.levels.step, self.levels.least
        super().__init__(replace(layer, weight=layer.weight / step, bias=(layer.bias - least) / step))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return to_bytes(super().__call__(x, residual))

    def real(self, x: Tensor) -> Tensor:
        return self.levels.real(x)


class IntegerConv:
    """`layer` from bytes to bytes, or the sum of what it gives and a residual, which may be written into that.

    The weights are 8-bit integers with a scale for each output, which also turns the levels `x` of the input into those
    of the output; ReLU6 is then where bytes end. The weights' rounding is made up for in the bias, as far as it shows
    in the mean input.
    """

    def __init__(self, layer: Layer, x: Levels, residual: Levels | None = None) -> None:
        self.geometry, self.levels = layer.geometry(), Levels.of(layer, residual)
        step, least = self.levels.step, self.levels.least
        weight = layer.weight * (x.step / step)
        self.scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127  # (out,)
        integers = (weight / self.scales[:, None, None, None]).round_()
        self.bias = (layer.bias + respond(layer, layer.weight, x.mean) - least) / step
        self.bias -= respond(layer, integers, (x.mean - x.least) / x.step) * self.scales
        self.carried = 0.0
        if residual is not None:
            self.carried = residual.step / step
            self.bias += residual.least / step
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = has_fast_integers()
        self.weight = integers
        if self.packed:
            self.weight = torch.ops.onednn.qconv_prepack(
                integers.to(torch.int8), self.scales, 1.0, 0, *self.geometry, layer.usual_shape()
            )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # x, residual: uint8 (n, c, h, w)
        if not self.packed:
            return self._in_floats(x, residual)
        conv = torch.ops.onednn.qconv2d_pointwise
        inputs = x, 1.0, 0, self.weight, self.scales, self.zeros
        arguments = self.bias, *self.geometry, 1.0, 0, torch.uint8
        if residual is None:
            return cast(Tensor, conv(*inputs, *arguments, "none", [], ""))
        return cast(Tensor, conv.binary(*inputs, residual, *arguments, self.carried, 0, "sum", 1.0, "none", [], ""))

    def _in_floats(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same numbers where the processor does not multiply integers fast, up to ties in the rounding."""
        stride, padding, dilation, groups = self.geometry
        y = F.conv2d(x.float(), self.weight, None, stride, padding, dilation, groups)
        y.mul_(self.scales[:, None, None]).add_(self.bias[:, None, None])
        if residual is not None:
            y.add_(residual, alpha=self.carried)
        return to_bytes(y)

    def real(self, x: Tensor) -> Tensor:
        return self.levels.real(x)


def to_bytes(x: Tensor) -> Tensor:
    # torch turns floats into signed bytes in a fifth of the time that unsigned ones take.
    return x.round_().clamp_(0, TOP_LEVEL).sub_(128).to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def respond(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """What `weight`, in place of that of `layer`, makes of an input whose channels are x (in,) everywhere. (out,)"""
    inputs = x[:, None, None, None] if layer.groups > 1 else x[:, None, None]
    return (weight * inputs).sum((1, 2, 3))


def mean_after_relu6(mean: Tensor, deviation: Tensor) -> Tensor:
    """Of a normal distribution, once ReLU6 has cut it off on both sides."""
    deviation = deviation.clamp_min(1e-6)

    def mean_above(bound: float) -> Tensor:
        z = (mean - bound) / deviation
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        share = (1 + torch.erf(z / math.sqrt(2))) / 2
        return deviation * density + (mean - bound) * share

    return mean_above(0.0) - mean_above(RELU6_TOP)
