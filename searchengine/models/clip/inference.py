"""The towers of `model` made fast: prepared once for a device and a precision, then run over batches.

A product is followed by its activation in one step: QuickGELU(x) = SiLU(1.702 x) / 1.702, whose factors go into the
weights on both sides. On a CPU the products are those of `linear`, photos are shared out to threads that compute alone,
and everything between the products stays float32. On a GPU all of a tower is in the type that `precision` names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from searchengine.models.clip.architecture import QUICK_GELU_SLOPE
from searchengine.models.clip.linear import (
    LEAST_ACTIVATION,
    Fused,
    Int8Linear,
    PackedLinear,
    PixelLinear,
)
from searchengine.models.clip.model import (
    Block,
    ImageTransformer,
    Linear,
    Prompts,
    TextTransformer,
    quick_gelu,
)
from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION, normalise_pixels
from searchengine.models.clip.smoothing import smooth
from searchengine.models.cuda import ROWS_PER_PART, CudaRows
from searchengine.models.devices import LargestBatch, LoneThreads, choose_device, has_fast_bf16
from searchengine.vectors import PixelBatch

Network = TypeVar("Network", ImageTransformer, TextTransformer)
FloatArray = NDArray[np.float32]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The photos that a CPU thread takes at a time: enough to share a pass over the weights, and not so many that what lies
# between two products leaves the cache.
PHOTOS_PER_THREAD = 4
# Fewer tokens than this are for one thread: two would both have to read all of the weights.
TOKENS_WORTH_SHARING = 192


class Tower(Generic[Network]):
    """Raises UsageError for a precision that the device does not have, ModelUnusable for a device that is not there."""

    def __init__(self, network: Network, *, device: str, precision: str) -> None:
        self._device = choose_device(device, precision)
        self._network: Network = prepare(network, device=self._device, precision=precision)
        self._threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        self._pool = LoneThreads(self._threads)


class ImageTower(Tower[ImageTransformer]):
    def __init__(self, network: ImageTransformer, *, device: str, precision: str) -> None:
        super().__init__(network, device=device, precision=precision)
        self._cuda: CudaRows | None = None
        self._largest: LargestBatch | None = None
        self._turn = threading.Lock()
        if self._device.type == "cuda":
            self._cuda = CudaRows(kernels_of(self._network, self._device), device=self._device)
        elif self._device.type != "cpu":
            self._largest = LargestBatch(ROWS_PER_PART)

    def encode(self, pixels: PixelBatch) -> FloatArray:
        """pixels: uint8 (n, s, s, 3). Returns float32 (n, dim), not normalised."""
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        if self._cuda is not None:
            return gather([self._cuda.run(images)])
        if self._largest is not None:
            # Two threads at once crash Apple's GPUs (pytorch/pytorch issue 197805).
            with self._turn:
                return gather(self._largest.run(self._forward, images))
        if len(images) == 1:
            return gather([self._forward(images)])
        share = min(PHOTOS_PER_THREAD, -(-len(images) // self._threads))
        return gather(self._pool.map(self._forward, torch.split(images, share)))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        if isinstance(self._network.patches, PixelLinear):
            return cast(Tensor, self._network(images))
        x = normalise_pixels(images.to(self._device))
        return cast(Tensor, self._network(x.to(self._network.positions.dtype)))


class TextTower(Tower[TextTransformer]):
    def encode(self, texts: Sequence[Sequence[int]]) -> FloatArray:
        """texts: tokens, the end-of-text last. Returns float32 (n, dim), not normalised."""
        threads = self._threads if sum(map(len, texts)) >= TOKENS_WORTH_SHARING else 1
        share = -(-len(texts) // threads)
        shares = [texts[start : start + share] for start in range(0, len(texts), share)]
        return gather(self._pool.map(self._forward, shares))

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        return cast(Tensor, self._network(Prompts.pack(texts).to(self._device)))


def kernels_of(network: ImageTransformer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From pixels on the device, uint8 (n, s, s, 3), to what `network` makes of them, by kernels alone.

    The bits are those of `normalise_pixels`, which copies its constants from the host at each call.
    """
    mean, deviation = (torch.tensor(values, device=device) for values in (MEAN, STANDARD_DEVIATION))

    def compute(pixels: Tensor) -> Tensor:
        return cast(Tensor, network(((pixels / 255 - mean) / deviation).to(network.positions.dtype)))

    return compute


def gather(results: Iterable[Tensor]) -> FloatArray:
    """One below the other, float32 (n, dim)."""
    return torch.cat(list(results)).float().cpu().numpy()


def prepare(network: Network, *, device: torch.device, precision: str) -> Network:
    """Change `network`, in place, into one that computes the same faster; its state dict is of no more use."""
    fold_quick_gelu(network)
    if device.type == "cpu":
        lay_out_for_cpu(network, precision)
        return network
    return network.to(device, DTYPES[precision])


def fold_quick_gelu(network: nn.Module) -> None:
    for block in blocks_of(network):
        if block.activation is quick_gelu:
            block.activation = F.silu
            for parameter, factor in (
                (block.widen.weight, QUICK_GELU_SLOPE),
                (block.widen.bias, QUICK_GELU_SLOPE),
                (block.narrow.weight, 1 / QUICK_GELU_SLOPE),
            ):
                parameter.data = parameter.data * factor


def lay_out_for_cpu(network: ImageTransformer | TextTransformer, precision: str) -> None:
    """Replace the products of `network`. Integers are for those of the blocks, which are nearly all of the work."""
    if precision == "int8":
        smooth(network)
    rounded = DTYPES.get(precision, torch.float32)
    dtype = torch.bfloat16 if precision == "bf16" and has_fast_bf16() else torch.float32

    def packed(linear: nn.Linear, fused: Fused = "none") -> nn.Module:
        return PackedLinear(linear.weight.to(rounded).to(dtype), linear.bias, fused=fused)

    def in_integers(linear: nn.Linear, fused: Fused = "none", least: float | None = None) -> nn.Module:
        return Int8Linear(linear.weight, linear.bias, fused=fused, least=least)

    for block in blocks_of(network):
        fused: Fused = "swish" if block.activation is F.silu else "gelu"
        block.activation = nn.Identity()
        if precision == "int8":
            block.qkv, block.out = in_integers(block.qkv), in_integers(block.out)
            block.widen = in_integers(block.widen, fused)
            block.narrow = in_integers(block.narrow, least=LEAST_ACTIVATION)
        else:
            block.qkv, block.out = packed(block.qkv), packed(block.out)
            block.widen, block.narrow = packed(block.widen, fused), packed(block.narrow)
    if precision == "int8" and isinstance(network, ImageTransformer):
        network.patches = PixelLinear(cast(Tensor, network.patches.weight))
    for name, child in list(network.named_children()):
        if isinstance(child, Linear):
            setattr(network, name, packed(child))


def blocks_of(network: nn.Module) -> list[Any]:
    """The blocks, whose products are about to be other modules than their types say."""
    return [module for module in network.modules() if isinstance(module, Block)]
