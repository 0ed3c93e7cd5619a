"""The architectures of CLIP: sizes, and the shapes of the tensors that they give.

Radford et al. 2021, https://arxiv.org/abs/2103.00020, table 20. It knows of no framework, so that a file can be looked
at, and texts encoded, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
QUICK_GELU_SLOPE = 1.702

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    width: int
    layers: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """An architecture. `dim` is the dimension of the shared space, sizes are in pixels, `context` in tokens."""

    dim: int
    image_size: int
    patch_size: int
    image: TransformerConfig
    text: TransformerConfig
    context: int = 77
    vocabulary: int = 49408
    activation: Activation = "quick_gelu"

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def image_shapes(self) -> dict[str, Shape]:
        """Of `model.ImageTransformer`, by its names."""
        width = self.image.width
        return {
            "patches.weight": (width, self.patch_size**2 * 3),
            "class_token": (width,),
            "positions": (1 + self.patches, width),
            "norm_pre.weight": (width,),
            "norm_pre.bias": (width,),
            **_shapes_after_the_first(self.image, self.dim),
        }

    def text_shapes(self) -> dict[str, Shape]:
        """Of `model.TextTransformer`, by its names."""
        width = self.text.width
        return {
            "tokens": (self.vocabulary, width),
            "positions": (self.context, width),
            **_shapes_after_the_first(self.text, self.dim),
        }


def _shapes_after_the_first(side: TransformerConfig, dim: int) -> dict[str, Shape]:
    width = side.width
    block: dict[str, Shape] = {
        "norm_1.weight": (width,),
        "norm_1.bias": (width,),
        "qkv.weight": (3 * width, width),
        "qkv.bias": (3 * width,),
        "out.weight": (width, width),
        "out.bias": (width,),
        "norm_2.weight": (width,),
        "norm_2.bias": (width,),
        "widen.weight": (4 * width, width),
        "widen.bias": (4 * width,),
        "narrow.weight": (width, 4 * width),
        "narrow.bias": (width,),
    }
    shapes = {f"blocks.{number}.{name}": shape for number in range(side.layers) for name, shape in block.items()}
    return shapes | {"norm_post.weight": (width,), "norm_post.bias": (width,), "projection.weight": (dim, width)}


VIT_B_32 = ClipConfig(
    dim=512,
    image_size=224,
    patch_size=32,
    image=TransformerConfig(width=768, layers=12, heads=12),
    text=TransformerConfig(width=512, layers=12, heads=8),
)
VIT_B_16 = ClipConfig(
    dim=512,
    image_size=224,
    patch_size=16,
    image=TransformerConfig(width=768, layers=12, heads=12),
    text=TransformerConfig(width=512, layers=12, heads=8),
)
VIT_L_14 = ClipConfig(
    dim=768,
    image_size=224,
    patch_size=14,
    image=TransformerConfig(width=1024, layers=24, heads=16),
    text=TransformerConfig(width=768, layers=12, heads=12),
)
VIT_L_14_336 = ClipConfig(
    dim=768,
    image_size=336,
    patch_size=14,
    image=TransformerConfig(width=1024, layers=24, heads=16),
    text=TransformerConfig(width=768, layers=12, heads=12),
)
