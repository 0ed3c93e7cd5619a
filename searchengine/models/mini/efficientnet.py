"""EfficientNet-Lite2: the frozen image tower of the encoder ``mini``. Inference only.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
https://arxiv.org/abs/1905.11946, in the authors' Lite variant
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6
instead of swish, and a stem and a head that keep their width.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from searchengine.errors import UsageError, WeightsError
from searchengine.models.cuda import CudaRows
from searchengine.models.devices import LoneThreads
from searchengine.models.mini.convolution import Conv, IntegerConv, Layer, RoundedConv

IMAGE_SIZE, MAP_SIDE = 260, 9
PIXEL_MEAN, PIXEL_STD = 127, 128
STEM_CHANNELS, FEATURE_CHANNELS, CLASSES = 32, 1280, 1000
BATCH_NORM_EPSILON = 1e-3
Shape = tuple[int, int, int, int]

C = TypeVar("C", covariant=True)  # how far a convolution has been made ready: Layer, then Conv or IntegerConv

# The most photos that a CPU thread takes at a time, in floats and in bytes. glibc still recycles their widest map,
# 13 MB; much larger ones go back to the kernel after every layer, and faulting their pages in again costs more than the
# convolutions.
CPU_BATCH, INTEGER_CPU_BATCH = 2, 4


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


@dataclass(frozen=True)
class Block(Generic[C]):
    """A mobile inverted bottleneck (MBConv): widen, filter each channel by itself, narrow, add what came in."""

    expand: C | None
    depthwise: C
    project: C
    residual: bool


@dataclass(frozen=True)
class Network(Generic[C]):
    """The convolutions, as they were trained or made ready to run."""

    stem: C
    blocks: Sequence[Block[C]]
    head: C


def in_floats(layers: Network[Layer]) -> Network[Conv]:
    blocks = [
        Block(Conv(block.expand) if block.expand else None, Conv(block.depthwise), Conv(block.project), block.residual)
        for block in layers.blocks
    ]
    return Network(Conv(layers.stem), blocks, Conv(layers.head))


def in_integers(layers: Network[Layer]) -> Network[Conv | IntegerConv]:
    """Each convolution reads the levels that the one before it gives.

    The stem and the first block stay in floats: a thirtieth of the work, and half of what rounding would spoil, for
    what they filter out of smooth surfaces is finer than levels are.
    """
    first = layers.blocks[0]
    project = RoundedConv(first.project)
    x = project.levels
    blocks: list[Block[Conv | IntegerConv]] = [Block(None, Conv(first.depthwise), project, residual=False)]
    for block in layers.blocks[1:]:
        # So there is a ReLU6 before every depthwise layer, and what that is padded with, bytes of 0, stands for 0.
        assert block.expand is not None
        expand = IntegerConv(block.expand, x)
        depthwise = IntegerConv(block.depthwise, expand.levels)
        narrow = IntegerConv(block.project, depthwise.levels, x if block.residual else None)
        blocks.append(Block(expand, depthwise, narrow, block.residual))
        x = narrow.levels
    return Network(Conv(layers.stem), blocks, IntegerConv(layers.head, x))


def check_crops(pixels: Tensor) -> None:
    """Raises UsageError for what is not uint8 (n, 260, 260, 3)."""
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UsageError(
            f"pixels are {pixels.dtype} {tuple(pixels.shape)}, expected uint8 (n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
        )


class EfficientNetLite2:
    """The network up to its last feature map, and the weights of its classifier of 1,000 ImageNet classes.

    classifier_weight: float32 (1000, 1280). classifier_bias: float32 (1000,).
    """

    def __init__(self, weights: Checkpoint, *, precision: str, threads: int) -> None:
        layers = weights.layers()
        self._network: Network[Conv | IntegerConv]
        self._network = in_integers(layers) if precision == "int8" else in_floats(layers)
        self._cpu_batch = INTEGER_CPU_BATCH if precision == "int8" else CPU_BATCH
        self.classifier_weight = weights.take("_fc.weight", (CLASSES, FEATURE_CHANNELS))
        self.classifier_bias = weights.take("_fc.bias", (CLASSES,))
        self._threads = threads
        self._pool = LoneThreads(threads)
        device = self.classifier_bias.device
        self._cuda = CudaRows(self._describe, device=device) if device.type == "cuda" else None

    @classmethod
    def from_file(cls, path: Path, *, device: str = "cpu", precision: str = "fp32") -> EfficientNetLite2:
        """Load the published ``efficientnet-lite2-9656183e.pth``, to compute in `precision`: fp32, or int8 on a CPU.

        Raises WeightsError if the file is missing or damaged, or if its tensors are not exactly this network's.
        """
        weights = Checkpoint(path, device)
        threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
        (network,) = LoneThreads(1).map(lambda taken: cls(taken, precision=precision, threads=threads), [weights])
        weights.check_all_taken()
        return network

    def features(self, pixels: Tensor) -> Tensor:
        """The last feature map, after its ReLU6.

        pixels: uint8 (n, 260, 260, 3), RGB, on any device. Returns float32 (n, 1280, 9, 9), channels last in memory, on
        the network's device. Raises UsageError for pixels of another shape or type.
        """
        check_crops(pixels)
        shape = (len(pixels), FEATURE_CHANNELS, MAP_SIDE, MAP_SIDE)
        maps = torch.empty(shape, device=self.classifier_bias.device, memory_format=torch.channels_last)
        self._fill(maps, pixels, self._forward)
        return maps

    def describe(self, pixels: Tensor) -> Tensor:
        """What the heads see of a photo: averages of the last map and of the last stages, and the classifier's logits.

        pixels: as in `features`. Returns float32 (n, 1280 + 88 + 120 + 208 + 352 + 1000) on the host. What a GPU does
        for that is asked for by one thread: two at once crash Apple's (pytorch/pytorch issue 197805).
        Raises UsageError for pixels of another shape or type, ModelUnusable where a GPU lacks the memory for one photo.
        """
        check_crops(pixels)
        if self._cuda is not None and len(pixels):
            return self._cuda.run(pixels)
        rows = torch.empty((len(pixels), POOLED_CHANNELS + CLASSES))
        self._fill(rows, pixels, self._describe)
        return rows

    def _fill(self, out: Tensor, pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        device, batch = self.classifier_bias.device, max(1, len(pixels))
        if device.type == "cpu":
            batch = max(1, min(self._cpu_batch, -(-len(pixels) // self._threads)))

        def fill(start: int) -> None:
            out[start : start + batch] = compute(pixels[start : start + batch].to(device))

        list(self._pool.map(fill, range(0, len(pixels), batch)))

    @torch.no_grad()
    def _forward(self, pixels: Tensor) -> Tensor:
        *_, (head, last) = self._maps(pixels)
        return head.real(last)  # (n, 1280, 9, 9)

    @torch.no_grad()
    def _describe(self, pixels: Tensor) -> Tensor:
        # A residual may be added in place to the map that it follows, so each is averaged as soon as it is there.
        *stages, last = (conv.real(x.mean((2, 3), dtype=torch.float32)) for conv, x in self._maps(pixels))
        # A product adds up in an order that goes by its shape; this one is always the same.
        rows = F.pad(last, (0, 0, 0, max(0, self._cpu_batch - len(last)))) if last.is_cpu else last
        logits = (rows @ self.classifier_weight.T)[: len(last)] + self.classifier_bias
        return torch.cat([last, *stages, logits], 1)  # (n, 3048)

    def _maps(self, pixels: Tensor) -> Iterator[tuple[Conv | IntegerConv, Tensor]]:
        """The outputs of the last stages, then of the head, each with the convolution that gave it."""
        network = self._network
        # The stem has normalisation in its weights, so that what it pads with is the pixel which normalises to zero.
        x = F.pad(pixels, (0, 0, 0, 1, 0, 1), value=PIXEL_MEAN).permute(0, 3, 1, 2).float()  # (n, 3, 261, 261)
        x = network.stem(x)  # (n, 32, 130, 130)
        blocks = iter(network.blocks)
        for number, stage in enumerate(STAGES):
            for block in islice(blocks, stage.repeats):
                # x: (n, c, h, w)
                wide = block.expand(x) if block.expand else x  # (n, 6 c, h, w)
                wide = block.depthwise(wide)  # (n, 6 c, h / stride, w / stride)
                x = block.project(wide, x if block.residual else None)  # (n, c', h / stride, w / stride)
            if number >= len(STAGES) - DESCRIBING_STAGES:
                yield block.project, x  # (n, 352, 9, 9) at the end
        yield network.head, network.head(x)  # (n, 1280, 9, 9)


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

    def layers(self) -> Network[Layer]:
        """All but the classifier."""
        weight, bias, mean, deviation = self._fold("_conv_stem", "_bn0", (STEM_CHANNELS, 3, 3, 3))
        weight = weight / PIXEL_STD
        bias = bias - PIXEL_MEAN * weight.sum((1, 2, 3))
        stem = Layer(weight, bias, mean, deviation, IMAGE_SIZE + 1, stride=2, padding=0)
        side, channels = IMAGE_SIZE // 2, STEM_CHANNELS
        blocks: list[Block[Layer]] = []
        for stage in STAGES:
            for stride in (stage.stride, *[1] * (stage.repeats - 1)):
                name = f"_blocks.{len(blocks)}."
                wide, narrow, k = channels * stage.expansion, stage.channels, stage.kernel
                expand = None
                if stage.expansion > 1:
                    expand = self._layer(name + "_expand_conv", name + "_bn0", (wide, channels, 1, 1), side)
                depthwise = self._layer(
                    name + "_depthwise_conv", name + "_bn1", (wide, 1, k, k), side, stride=stride, groups=wide
                )
                side = -(-side // stride)
                project = self._layer(name + "_project_conv", name + "_bn2", (narrow, wide, 1, 1), side, linear=True)
                blocks.append(Block(expand, depthwise, project, residual=stride == 1 and channels == narrow))
                channels = narrow
        return Network(stem, blocks, self._layer("_conv_head", "_bn1", (FEATURE_CHANNELS, channels, 1, 1), side))

    def _fold(self, name: str, norm: str, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weight and bias with the norm in them, and the mean and deviation of what the norm gives."""
        weight, out = self.take(f"{name}.weight", shape), shape[:1]
        gain, shift = self.take(f"{norm}.weight", out), self.take(f"{norm}.bias", out)
        mean, variance = self.take(f"{norm}.running_mean", out), self.take(f"{norm}.running_var", out)
        self.take(f"{norm}.num_batches_tracked", ())
        scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
        return weight * scale[:, None, None, None], shift - mean * scale, shift, gain.abs()

    def _layer(
        self, name: str, norm: str, shape: Shape, side: int, *, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> Layer:
        weight, bias, mean, deviation = self._fold(name, norm, shape)
        # TensorFlow's "same" padding puts an odd pixel at the right and the bottom, torch pads evenly: a row and a
        # column of zeros in front of the kernel make the two equal, without a copy of the map.
        padding = max((-(-side // stride) - 1) * stride + shape[-1] - side, 0)
        if padding % 2:
            weight = F.pad(weight, (1, 0, 1, 0))
        padding = (padding + 1) // 2
        return Layer(weight, bias, mean, deviation, side, stride=stride, padding=padding, groups=groups, linear=linear)
