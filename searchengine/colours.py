"""Pictures of any mode to RGB: alpha is laid over white, deep greys are scaled to 8 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    # numpy is loaded where it is needed: few photos need it, and the processes that decode start sooner without it.
    import numpy as np
    from numpy.typing import NDArray

STRIP_PIXELS = 2**20
NUMPY_BYTES = 48 * 2**20  # more than it takes when it is loaded


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: alpha over white, deep greys scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return _in_strips(image, _greys_to_rgb(*_range_of(image)))
    if image.has_transparency_data:  # an alpha channel, or one colour that is declared transparent
        return _in_strips(image, _over_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` strip by strip, for what it needs by the way is several times the picture."""
    whole = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        whole.paste(convert(strip), (0, top))
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _range_of(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white."""
    parts = [_finite(strip) for _, strip in _strips(image)]
    low, high = min(0.0, *(float(part.min()) for part in parts)), max(float(part.max()) for part in parts)
    # Data that fits a usual depth keeps that depth's white; otherwise its own maximum is white.
    return low, next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)


def _greys_to_rgb(low: float, white: float) -> Callable[[Image.Image], Image.Image]:
    import numpy as np

    def convert(image: Image.Image) -> Image.Image:
        greys = np.clip((_finite(image) - low) * (255.0 / max(white - low, 1e-6)), 0, 255).astype(np.uint8)
        return Image.fromarray(greys).convert("RGB")

    return convert


def _finite(image: Image.Image) -> NDArray[np.float32]:
    if "numpy" not in sys.modules:
        bytes(NUMPY_BYTES)  # raises MemoryError, where OpenBLAS would end the process
    import numpy as np

    return np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
