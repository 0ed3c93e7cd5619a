"""What CLIP does to a photo before it looks at it.

The crop is `searchengine.decode`'s: short side to 224 pixels, bicubic and antialiased, then the centre, as uint8 RGB.
For 8-bit RGB and grey pictures it equals OpenAI's own pixel by pixel. Where OpenAI's leaves things to chance (a palette
is resized as if its numbers were colours, transparency shows whatever colour lies below it, CMYK and 16 bits go through
Pillow's plain conversion, EXIF rotation is ignored) the crop is what a person sees, as `searchengine.decode` tells.

Crops travel as uint8, a quarter of the bytes of float32; they are normalised on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Per channel, of OpenAI's training photos, on a scale of 0 to 1 (https://github.com/openai/CLIP, clip/clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STANDARD_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def normalise_pixels(pixels: Tensor) -> Tensor:
    """pixels: uint8 (n, s, s, 3), RGB. Returns float32 of that shape, on the same device."""
    import torch

    mean, deviation = (torch.tensor(values, device=pixels.device) for values in (MEAN, STANDARD_DEVIATION))
    return (pixels / 255 - mean) / deviation
