"""Before weights and activations become 8-bit integers: move what is large in the one to the other.

A few channels of a trained transformer are ten times larger than the rest, whatever the input, and integers scaled to
them leave little of the others. Dividing a channel by a factor, and multiplying its column of the next weights by it,
changes nothing but evens them out: SmoothQuant, Xiao et al. 2023 (https://arxiv.org/abs/2211.10438), with strength 0.5.
Here the factors go into what comes before the product, so that they cost nothing when it runs. Which channels are large
is seen on noise; photos show the same ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchengine.models.clip.model import Block, ImageTransformer, Prompts, TextTransformer
from searchengine.models.clip.preprocess import normalise_pixels

NOISE_SIDES = (4, 16, 64, 224)  # from large patches of colour to single pixels
NOISE_TEXTS, NOISE_TOKENS = 16, 16


def smooth(network: ImageTransformer | TextTransformer) -> None:
    """Even out the channels that go into the products of each block, but for the last of them, in place."""
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    largest = _largest_inputs(network, [linear for block in blocks for linear in (block.qkv, block.out, block.widen)])
    for block in blocks:
        for norm, linear in ((block.norm_1, block.qkv), (block.norm_2, block.widen)):
            factors = _factors(largest[linear], linear)
            _scale(norm.weight, 1 / factors)
            _scale(norm.bias, 1 / factors)
            _scale(linear.weight, factors)
        # What goes into `out` are means of values, which are the last third of what comes from `qkv`.
        factors = _factors(largest[block.out], block.out)
        of_qkv = torch.cat([torch.ones(2 * len(factors)), 1 / factors])
        _scale(block.qkv.weight, of_qkv[:, None])
        _scale(block.qkv.bias, of_qkv)
        _scale(block.out.weight, factors)


def _factors(largest: Tensor, linear: nn.Linear) -> Tensor:
    """What each input channel is to be divided by. largest: (in,)."""
    of_weights = linear.weight.abs().amax(0)
    factors = (largest.clamp_min(1e-5) / of_weights.clamp_min(1e-5)).sqrt()
    return factors / factors.mean()


def _scale(parameter: Tensor, factors: Tensor) -> None:
    parameter.data = parameter.data * factors


@torch.inference_mode()
def _largest_inputs(network: ImageTransformer | TextTransformer, linears: list[nn.Linear]) -> dict[nn.Linear, Tensor]:
    """The largest absolute value of each input channel (in,) of `linears`, on noise."""
    largest: dict[nn.Linear, Tensor] = {}

    def record(linear: nn.Linear) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            largest[linear] = inputs[0].abs().amax(0)

        return hook

    hooks = [linear.register_forward_pre_hook(record(linear)) for linear in linears]
    network(_noise_pixels(network) if isinstance(network, ImageTransformer) else _noise_texts(network))
    for hook in hooks:
        hook.remove()
    return {linear: values.clone() for linear, values in largest.items()}


def _noise_pixels(network: ImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    side = round((len(network.positions) - 1) ** 0.5) * network.patch_size
    noise = [
        F.interpolate(torch.rand(1, 3, coarse, coarse, generator=generator), side, mode="bilinear")
        for coarse in NOISE_SIDES
    ]
    return normalise_pixels((torch.cat(noise) * 255).byte().permute(0, 2, 3, 1)).contiguous()


def _noise_texts(network: TextTransformer) -> Prompts:
    """Random tokens between the first and the last two of the vocabulary, which are start and end of text."""
    generator = torch.Generator().manual_seed(0)
    start, end = len(network.tokens) - 2, len(network.tokens) - 1
    tokens = torch.randint(0, start, (NOISE_TEXTS, min(NOISE_TOKENS, len(network.positions) - 2)), generator=generator)
    return Prompts.pack([[start, *row, end] for row in tokens.tolist()])
