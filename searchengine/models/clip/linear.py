"""Matrix products laid out for a CPU: weights packed once as oneDNN likes them, and 8-bit integers.

torch's public product packs the weights anew at each call; the operators that its compiler emits, used here, do not,
and apply the activation on the way. Where they are missing (other processors than x86) the public ones do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION
from searchengine.models.devices import has_fast_integers, has_packed_products

Fused = Literal["none", "swish", "gelu"]

FUNCTIONS: dict[Fused, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": partial(F.silu, inplace=True),
    "gelu": F.gelu,
}
# What GELU and SiLU do not fall below (SiLU: -0.2785).
LEAST_ACTIVATION = -0.279
TINY = torch.tensor(1e-12)  # what a row of zeros is divided by
MIDDLE_GREY = 116  # about the mean of photos
TOKENS_HINT = 400  # only helps oneDNN to choose the layout of the weights


class PackedLinear(nn.Module):
    """activation(x W^T + b), in the type of `weight`; input and output are float32.

    weight: float32 or bfloat16 (out, in). bias: float32 (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, fused: Fused = "none") -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.packed = has_packed_products()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS_HINT) if self.packed else weight
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return FUNCTIONS[self.fused](F.linear(x, self.weight, self.bias))
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, self.fused, [], "none")
        return cast(Tensor, y.float())


class IntegerProduct:
    """(q - zero_point) W^T for q in uint8 (..., in); W in 8-bit integers, with a scale for each output.

    weight: float32 (out, in). The result is float32 (..., out). row_sums: what the rows of W, so rounded, add up to.
    """

    def __init__(self, weight: Tensor) -> None:
        self.scales = weight.abs().amax(1).clamp_min(1e-12) / 127  # (out,)
        integers = (weight / self.scales[:, None]).round_()  # (out, in)
        self.row_sums = integers.sum(1) * self.scales
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = has_fast_integers()
        self.weight = torch.ops.onednn.qlinear_prepack(integers.to(torch.int8), None) if self.packed else integers

    def __call__(self, q: Tensor, zero_point: int, bias: Tensor | None = None) -> Tensor:
        if not self.packed:
            y = F.linear(q.float() - zero_point, self.weight) * self.scales
            return y if bias is None else y + bias
        return cast(
            Tensor,
            torch.ops.onednn.qlinear_pointwise(
                q, 1.0, zero_point, self.weight, self.scales, self.zeros, bias,
                1.0, 0, torch.float32, "none", [], "",
            ),
        )  # fmt: skip


class PixelLinear(nn.Module):
    """normalised(x) W^T for x in uint8, RGB by turns (..., in): bytes are integers already, normalising is in W.

    Grey is taken off first: the rounding of W would count as often as a pixel is bright.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        mean, deviation = (torch.tensor(values).repeat(weight.shape[1] // 3) for values in (MEAN, STANDARD_DEVIATION))
        scaled = weight.detach() / deviation  # (out, in)
        self.product = IntegerProduct(scaled / 255)
        self.bias = scaled @ (MIDDLE_GREY / 255 - mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, MIDDLE_GREY, self.bias)


class Int8Linear(nn.Module):
    """activation(x W^T + b) with W in 8-bit integers, a scale for each output, and x so, a scale for each row.

    weight: float32 (out, in). bias: float32 (out,). `least`: what no value of x falls below, if that is known: the
    integers then cover just what can occur. oneDNN takes x unsigned, hence the shift.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, fused: Fused = "none", least: float | None = None
    ) -> None:
        super().__init__()
        weight = weight.detach()
        self.product = IntegerProduct(weight)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach()
        self.least = least
        if least is not None:
            self.bias = self.bias + least * self.product.row_sums
        self.fused = FUNCTIONS[fused]

    def forward(self, x: Tensor) -> Tensor:
        # x: (..., in)
        if self.least is None:
            step = torch.add(TINY, x.abs().amax(-1, keepdim=True), alpha=1 / 127)  # (..., 1)
            q, zero_point = x / step, 128
        else:
            step = torch.add(TINY - self.least / 255, x.amax(-1, keepdim=True), alpha=1 / 255)
            q, zero_point = (x / step).sub_(self.least / step + 128), 0
        # torch turns floats into signed bytes in a seventh of the time that unsigned ones take.
        unsigned = q.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        return self.fused(self.product(unsigned, zero_point).mul_(step).add_(self.bias))
