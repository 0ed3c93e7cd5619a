"""Bytes of a photo -> the upright RGB crop that an encoder takes, and what its EXIF block tells.

The choices, each tested in tests/test_decode.py:

- the short side is resized to the encoder's size (bicubic, antialiased), then the centre is cropped;
- EXIF orientation is applied; an unreadable EXIF block is ignored, the photo is not;
- transparency is laid over white, the page most pictures with holes were drawn for;
- 16-bit and floating-point greys are scaled to 8 bits over their range, CMYK is converted by Pillow;
- of an animation or a multi-page file the first frame counts;
- large JPEGs are decoded at a reduced scale, never below twice the crop (Pillow's ``draft``), which costs a
  fifth of the time at a mean difference of 0.2 grey levels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from searchengine.errors import ImageError
from searchengine.metadata import PhotoMetadata, read_metadata
from searchengine.stores.local import read_local

T = TypeVar("T")

# Decoders that run other programs or read vector graphics (EPS, WMF, PDF) are left out on purpose.
EXTENSIONS_BY_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "ICO": (".ico",),
    "QOI": (".qoi",),
    "PSD": (".psd",),
}
EXTENSIONS = frozenset(extension for group in EXTENSIONS_BY_FORMAT.values() for extension in group)

# Pillow refuses larger pictures by itself; a setting may lower the limit, not raise it.
PILLOW_MAX_PIXELS = 178_956_970

# Beyond this ratio of sides, resizing the short side first would make the long one enormous.
MAX_ASPECT_BEFORE_CROP = 8


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    max_pixels: int = PILLOW_MAX_PIXELS
    max_file_bytes: int = 256 * 2**20


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded photo: `pixels` is a uint8 RGB crop of shape (image_size, image_size, 3)."""

    pixels: NDArray[np.uint8]
    metadata: PhotoMetadata


def decode_file(
    path: str | os.PathLike[str], *, image_size: int, limits: DecodeLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Decode the file at `path` to a uint8 RGB crop (image_size, image_size, 3). Raises ImageError with the reason."""
    data = read_local(os.fspath(path), max_bytes=limits.max_file_bytes)
    return decode_bytes(data, image_size=image_size, limits=limits).pixels


def decode_bytes(data: bytes, *, image_size: int, limits: DecodeLimits = DEFAULT_LIMITS) -> Photo:
    """Decode an encoded picture. Raises ImageError with a reason that a person understands."""
    image = open_image(data, limits=limits)
    size = image.size  # of the whole picture: loading may reduce it
    _guarded(lambda: _load_reduced(image, side_px=2 * image_size))
    metadata = read_metadata(image, size=size)
    pixels = _guarded(lambda: crop_pixels(image, image_size=image_size))
    return Photo(pixels=pixels, metadata=metadata)


def inspect_bytes(data: bytes, *, limits: DecodeLimits = DEFAULT_LIMITS) -> PhotoMetadata:
    """Size and EXIF from the header alone; only a PNG is decoded, for its EXIF may follow its pixels.

    Raises ImageError.
    """
    image = open_image(data, limits=limits)
    return read_metadata(image, size=image.size)


def thumbnail(data: bytes, *, max_side_px: int, limits: DecodeLimits = DEFAULT_LIMITS) -> Image.Image:
    """A small upright RGB copy of the whole picture, sides at most `max_side_px`. Raises ImageError."""
    image = open_image(data, limits=limits)

    def shrink() -> Image.Image:
        _load_reduced(image, side_px=max_side_px)
        small = to_rgb(upright(image))
        small.thumbnail((max_side_px, max_side_px))
        return small

    return _guarded(shrink)


def open_image(data: bytes, *, limits: DecodeLimits = DEFAULT_LIMITS) -> Image.Image:
    """Parse the header only; pixels are decoded later, within the limits. Raises ImageError."""
    if not data:
        raise ImageError("the file is empty")
    _register_heif()
    image = _guarded(lambda: Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS_BY_FORMAT)))
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} pixels is more than the limit of {limits.max_pixels:,} (max_pixels)")
    return image


def crop_pixels(image: Image.Image, *, image_size: int) -> NDArray[np.uint8]:
    """Resize the short side to `image_size`, crop the centre, return uint8 RGB (image_size, image_size, 3)."""
    image = to_rgb(upright(image))
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT_BEFORE_CROP * short:
        image = _centre(image, width=min(width, 4 * short), height=min(height, 4 * short))
        width, height = image.size
    # int(), not round(): the rounding of torchvision's Resize, which published CLIP results went through.
    scaled = (
        (image_size, max(image_size, int(image_size * height / width)))
        if width <= height
        else (max(image_size, int(image_size * width / height)), image_size)
    )
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    pixels: NDArray[np.uint8] = np.asarray(_centre(image, width=image_size, height=image_size))
    return pixels


def _load_reduced(image: Image.Image, *, side_px: int) -> None:
    """Decode the pixels, of a large JPEG no more than it takes for sides of at least `side_px`.

    This comes before anything looks at EXIF: Pillow loads a picture by the way when asked for that, and one that
    failed to load once is taken for loaded, with whatever pixels it has, when it is used again.
    """
    image.draft("RGB", (side_px, side_px))
    image.load()


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block leaves the picture as it is stored."""
    image.load()  # what is damaged here is the picture, and no reason to pass over
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds on damaged blocks
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: alpha over white, deep greys scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:  # an alpha channel, or one colour that is declared transparent
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    finite = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    low, high = min(float(finite.min()), 0.0), float(finite.max())
    # Data that fits a usual depth keeps that depth's white; otherwise its own maximum is white.
    white = next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)
    grey: NDArray[np.uint8] = np.clip((finite - low) * (255.0 / max(white - low, 1e-6)), 0, 255).astype(np.uint8)
    return grey


def _centre(image: Image.Image, *, width: int, height: int) -> Image.Image:
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _guarded(work: Callable[[], T]) -> T:
    """Run a step of Pillow's; whatever it raises on hostile bytes becomes an ImageError."""
    try:
        return work()
    except UnidentifiedImageError:
        raise ImageError("not a picture in a supported format") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from None
    except MemoryError:
        raise ImageError("needs more memory to decode than there is") from None
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files (OSError, SyntaxError, struct.error, ...).
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged or unsupported: {reason}") from None


@cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
