"""EfficientNet-Lite2: the frozen image tower of the encoder ``mini``. Inference only.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
https://arxiv.org/abs/1905.11946, in the authors' Lite variant
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6
instead of swish, and a stem and a head that keep their width.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from searchengine.errors import UsageError, WeightsError
from searchengine.models.devices import lone_threads

IMAGE_SIZE, MAP_SIDE = 260, 9
PIXEL_MEAN, PIXEL_STD = 127, 128
STEM_CHANNELS, FEATURE_CHANNELS, CLASSES = 32, 1280, 1000
BATCH_NORM_EPSILON = 1e-3
Shape = tuple[int, int, int, int]

# The photos that a CPU thread takes at a time. glibc still recycles their widest map, 13 MB; much larger ones go back
# to the kernel after every layer, and faulting their pages in again costs more than the convolutions.
CPU_BATCH = 2


@dataclass(frozen=True)
class Stage:
    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


# Table 1 of the paper, its widths scaled by 1.1 and its depths by 1.2.
STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, channels=24),
    Stage(repeats=3, kernel=5, stride=2, expansion=6, channels=48),
    Stage(repeats=4, kernel=3, stride=2, expansion=6, channels=88),
    Stage(repeats=4, kernel=5, stride=1, expansion=6, channels=120),
    Stage(repeats=5, kernel=5, stride=2, expansion=6, channels=208),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, channels=352),
)
# The stages whose averages describe a photo beside that of the last map: they still see what the classes do not need.
DESCRIBING_STAGES = 4
POOLED_CHANNELS = FEATURE_CHANNELS + sum(stage.channels for stage in STAGES[-DESCRIBING_STAGES:])


class Conv:
    """A convolution with its batch norm folded in, then ReLU6 or the sum with a residual.

    weight: float32 (out, in / groups, k, k). `side` is the height and width of the maps to come; it only helps oneDNN
    to choose the layout of the weights.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, side: int, *, stride: int, padding: int, groups: int = 1, relu6: bool = True
    ) -> None:
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias
        self.stride, self.padding, self.groups, self.relu6 = stride, padding, groups, relu6
        # torch's public convolution lays the weights out anew at each call and runs ReLU6 as a pass of its own. The ops
        # that its compiler emits do neither, and are a sixth faster over the whole network.
        self.fused = self.weight.is_cpu and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        if self.fused:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(), *self._geometry(), [CPU_BATCH, weight.shape[1] * groups, side, side]
            )

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return [self.padding] * 2, [self.stride] * 2, [1, 1], self.groups

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused:
            conv = torch.ops.mkldnn._convolution_pointwise
            arguments = self.weight, self.bias, *self._geometry()
            if residual is not None:
                return cast(Tensor, conv.binary(x, residual, *arguments, "add", 1.0, None, [], None))
            activation, bounds = ("hardtanh", [0.0, 6.0]) if self.relu6 else ("none", [])
            return cast(Tensor, conv(x, *arguments, activation, bounds, ""))
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        if self.relu6:
            F.hardtanh_(y, 0.0, 6.0)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class Block:
    """A mobile inverted bottleneck (MBConv): widen, filter each channel by itself, narrow."""

    expand: Conv | None
    depthwise: Conv
    project: Conv
    residual: bool

    def __call__(self, x: Tensor) -> Tensor:
        # x: (n, c, h, w)
        wide = self.expand(x) if self.expand else x  # (n, 6 c, h, w)
        wide = self.depthwise(wide)  # (n, 6 c, h / stride, w / stride)
        return self.project(wide, x if self.residual else None)  # (n, c', h / stride, w / stride)


class EfficientNetLite2:
    """The network up to its last feature map, and the weights of its classifier of 1,000 ImageNet classes.

    classifier_weight: float32 (1000, 1280). classifier_bias: float32 (1000,).
    """

    def __init__(self, weights: Checkpoint) -> None:
        self._stem, conv = weights.stem(), weights.conv
        side = IMAGE_SIZE // 2
        self._blocks: list[Block] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for stride in (stage.stride, *[1] * (stage.repeats - 1)):
                name = f"_blocks.{len(self._blocks)}."
                wide, narrow, k = channels * stage.expansion, stage.channels, stage.kernel
                expand = None
                if stage.expansion > 1:
                    expand = conv(name + "_expand_conv", name + "_bn0", (wide, channels, 1, 1), side)
                depthwise = conv(
                    name + "_depthwise_conv", name + "_bn1", (wide, 1, k, k), side, stride=stride, groups=wide
                )
                side = -(-side // stride)
                project = conv(name + "_project_conv", name + "_bn2", (narrow, wide, 1, 1), side, relu6=False)
                self._blocks.append(Block(expand, depthwise, project, residual=stride == 1 and channels == narrow))
                channels = narrow
        self._head = conv("_conv_head", "_bn1", (FEATURE_CHANNELS, channels, 1, 1), side)
        self.classifier_weight = weights.take("_fc.weight", (CLASSES, FEATURE_CHANNELS))
        self.classifier_bias = weights.take("_fc.bias", (CLASSES,))

    @classmethod
    def from_file(cls, path: Path, *, device: str = "cpu") -> EfficientNetLite2:
        """Load the published ``efficientnet-lite2-9656183e.pth``.

        Raises WeightsError if the file is missing or damaged, or if its tensors are not exactly this network's.
        """
        weights = Checkpoint(path, device)
        with lone_threads(1) as pool:
            network = pool.submit(cls, weights).result()
        weights.check_all_taken()
        return network

    def features(self, pixels: Tensor) -> Tensor:
        """The last feature map, after its ReLU6.

        pixels: uint8 (n, 260, 260, 3), RGB, on any device. Returns float32 (n, 1280, 9, 9), channels last in memory, on
        the network's device. Raises UsageError for pixels of another shape or type.
        """
        shape = (len(pixels), FEATURE_CHANNELS, MAP_SIDE, MAP_SIDE)
        maps = torch.empty(shape, device=self.classifier_bias.device, memory_format=torch.channels_last)
        self._fill(maps, pixels, self._forward)
        return maps

    def describe(self, pixels: Tensor) -> Tensor:
        """What the heads see of a photo: averages of the last map and of the last stages, and the classifier's logits.

        pixels: as in `features`. Returns float32 (n, 1280 + 88 + 120 + 208 + 352 + 1000) on the network's device.
        Raises UsageError for pixels of another shape or type.
        """
        rows = torch.empty((len(pixels), POOLED_CHANNELS + CLASSES), device=self.classifier_bias.device)
        self._fill(rows, pixels, self._describe)
        return rows

    def _fill(self, out: Tensor, pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise UsageError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}, expected uint8 (n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
            )
        device = out.device
        batch = CPU_BATCH if device.type == "cpu" else max(1, len(pixels))

        def fill(start: int) -> None:
            out[start : start + batch] = compute(pixels[start : start + batch].to(device))

        with lone_threads(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
            list(pool.map(fill, range(0, len(pixels), batch)))

    @torch.no_grad()
    def _forward(self, pixels: Tensor) -> Tensor:
        *_, last = self._maps(pixels)
        return last  # (n, 1280, 9, 9)

    @torch.no_grad()
    def _describe(self, pixels: Tensor) -> Tensor:
        # A residual may be added in place to the map that it follows, so each is averaged as soon as it is there.
        *stages, last = (x.mean((2, 3)) for x in self._maps(pixels))
        logits = last @ self.classifier_weight.T + self.classifier_bias
        return torch.cat([last, *stages[-DESCRIBING_STAGES:], logits], 1)  # (n, 3048)

    def _maps(self, pixels: Tensor) -> Iterator[Tensor]:
        """The outputs of the stages, then of the head."""
        # The stem has normalisation in its weights, so that what it pads with is the pixel which normalises to zero.
        x = F.pad(pixels, (0, 0, 0, 1, 0, 1), value=PIXEL_MEAN).permute(0, 3, 1, 2).float()  # (n, 3, 261, 261)
        x = self._stem(x)  # (n, 32, 130, 130)
        blocks = iter(self._blocks)
        for stage in STAGES:
            for block in islice(blocks, stage.repeats):
                x = block(x)
            yield x  # (n, 352, 9, 9) at the end
        yield self._head(x)  # (n, 1280, 9, 9)


class Checkpoint:
    """The tensors of a file, each taken once and checked, as convolutions with their batch norms folded in."""

    def __init__(self, path: Path, device: str) -> None:
        self._path, self._device = path, device
        try:
            self._tensors: dict[str, object] = dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"{path} cannot be read as a checkpoint ({reason}); fetch it again") from error

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.pop(name, None)
        if not isinstance(tensor, Tensor):
            raise self._foreign(f"has no tensor {name}")
        if tensor.shape != shape:
            raise self._foreign(f"has {name} of shape {tuple(tensor.shape)}, not {shape}")
        return tensor.to(self._device)

    def check_all_taken(self) -> None:
        if self._tensors:
            raise self._foreign(f"has {len(self._tensors)} unknown entries, such as {min(map(str, self._tensors))}")

    def _foreign(self, finding: str) -> WeightsError:
        return WeightsError(f"{self._path} {finding}, so it is not EfficientNet-Lite2's checkpoint; fetch it again")

    def _fold(self, name: str, norm: str, shape: Shape) -> tuple[Tensor, Tensor]:
        weight, out = self.take(f"{name}.weight", shape), shape[:1]
        gain, shift = self.take(f"{norm}.weight", out), self.take(f"{norm}.bias", out)
        mean, variance = self.take(f"{norm}.running_mean", out), self.take(f"{norm}.running_var", out)
        self.take(f"{norm}.num_batches_tracked", ())
        scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
        return weight * scale[:, None, None, None], shift - mean * scale

    def stem(self) -> Conv:
        weight, bias = self._fold("_conv_stem", "_bn0", (STEM_CHANNELS, 3, 3, 3))
        weight = weight / PIXEL_STD
        bias = bias - PIXEL_MEAN * weight.sum((1, 2, 3))
        return Conv(weight, bias, IMAGE_SIZE + 1, stride=2, padding=0)

    def conv(
        self, name: str, norm: str, shape: Shape, side: int, *, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> Conv:
        weight, bias = self._fold(name, norm, shape)
        # TensorFlow's "same" padding puts an odd pixel at the right and the bottom, torch pads evenly: a row and a
        # column of zeros in front of the kernel make the two equal, without a copy of the map.
        padding = max((-(-side // stride) - 1) * stride + shape[-1] - side, 0)
        if padding % 2:
            weight = F.pad(weight, (1, 0, 1, 0))
        return Conv(weight, bias, side, stride=stride, padding=(padding + 1) // 2, groups=groups, relu6=relu6)
