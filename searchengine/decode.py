"""Bytes of a photo -> the upright RGB crop that an encoder takes, and what its EXIF block tells.

The choices, each tested in tests/test_decode.py:

- the short side is resized to the encoder's size (bicubic, antialiased), then the centre is cropped;
- EXIF orientation is applied; an unreadable EXIF block is ignored, the photo is not;
- transparency is laid over white, the page most pictures with holes were drawn for;
- 16-bit and floating-point greys are scaled to 8 bits over their range, CMYK is converted by Pillow;
- of an animation or a file of many pages or sizes one frame is decoded, the first (of an icon, the largest), and the
  others are never looked at: a thousand frames cost what one does, so frames need no limit;
- large JPEGs are decoded at a reduced scale, never below twice the crop (Pillow's ``draft``), which costs a
  fifth of the time at a mean difference of 0.2 grey levels.

What a decoder does to the process it runs in (crash, hang, eat memory) is contained in `isolation.py`.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, UnidentifiedImageError

from searchengine.colours import to_rgb
from searchengine.errors import ImageError
from searchengine.formats import EXTENSIONS_BY_FORMAT, looks_like_photo, register_heif
from searchengine.metadata import PhotoMetadata, read_metadata, read_orientation
from searchengine.stores import KnownStores

if TYPE_CHECKING:
    # numpy is loaded where it is needed: the processes that decode do without it.
    import numpy as np
    from numpy.typing import NDArray

    from searchengine.settings import Settings

T = TypeVar("T")

# Pillow refuses larger pictures by itself; a setting may lower the limit, not raise it.
PILLOW_MAX_PIXELS = 178_956_970

OUT_OF_MEMORY = "needs more memory to decode than there is"
UNDECODABLE = "damaged: its data cannot be decoded"
NONSENSE = "damaged: its data makes no sense"
# What Pillow says, and what that means to people. What is not here and reads like words is passed on.
REASONS = (
    (r"out of memory|insufficient memory|memory alloc|bad_alloc", OUT_OF_MEMORY),
    (
        r"truncated|not enough|too short|eof|end of file|not processed|only got|unpack|incomplete|large enough",
        "damaged: the file is truncated",
    ),
    (
        r"broken data|decoder|overrun|unrecognized data|cannot load|next frame|codec|seek to|to decode|decompressi",
        UNDECODABLE,
    ),
    (r"MAX_TEXT", "it holds more text, or a larger colour profile, than a picture has any use for"),
    (
        r"\bint\(\)|token|seek value|byte must|maxval|closed file|^color$|PCX mode|raw mode|allowed sizes|not a JPEG",
        NONSENSE,
    ),
    (r"^no image data$", "it holds no picture"),
    (r"tile cannot extend", "damaged: a part of the picture lies outside of it"),
)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Beyond this ratio of sides, resizing the short side first would make the long one enormous.
MAX_ASPECT_BEFORE_CROP = 8


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one photo may take. `max_seconds` and `max_memory_bytes` are held where decoding is isolated: see there."""

    max_pixels: int = PILLOW_MAX_PIXELS
    max_file_bytes: int = 256 * 2**20
    max_seconds: float = 60
    max_memory_bytes: int = 2 * 2**30

    @classmethod
    def of(cls, settings: Settings) -> DecodeLimits:
        return cls(
            max_pixels=settings.max_pixels,
            max_file_bytes=settings.max_file_bytes,
            max_seconds=settings.max_decode_seconds,
            max_memory_bytes=settings.max_decode_memory_bytes,
        )


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded photo: `pixels` is a uint8 RGB crop of shape (image_size, image_size, 3)."""

    pixels: NDArray[np.uint8]
    metadata: PhotoMetadata


def decode_file(
    path: str | os.PathLike[str], *, image_size: int, limits: DecodeLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Decode a file, by its path, URL or ARCHIVE!/member, to a uint8 RGB crop (image_size, image_size, 3).

    Raises ImageError with the reason.
    """
    data = KnownStores().read_at(os.fspath(path), max_bytes=limits.max_file_bytes)
    return decode_bytes(data, image_size=image_size, limits=limits).pixels


def decode_bytes(data: bytes, *, image_size: int, limits: DecodeLimits = DEFAULT_LIMITS) -> Photo:
    """Decode an encoded picture. Raises ImageError with a reason that a person understands."""
    import numpy as np

    crop, metadata = decode_crop(data, image_size=image_size, limits=limits)
    return Photo(pixels=np.asarray(crop), metadata=metadata)


def decode_crop(
    data: bytes, *, image_size: int, limits: DecodeLimits = DEFAULT_LIMITS
) -> tuple[Image.Image, PhotoMetadata]:
    """`decode_bytes`, its crop as a picture: RGB, `image_size` wide and high. Raises ImageError."""
    image = open_image(data, limits=limits)
    size = image.size  # of the whole picture: loading may reduce it
    _guarded(lambda: _load_reduced(image, side_px=2 * image_size))
    metadata = _guarded(lambda: read_metadata(image, size=size))
    return _guarded(lambda: crop_of(image, image_size=image_size)), metadata


def inspect_bytes(data: bytes, *, limits: DecodeLimits = DEFAULT_LIMITS) -> PhotoMetadata:
    """Size and EXIF from the header alone; only a PNG is decoded, for its EXIF may follow its pixels.

    Raises ImageError.
    """
    image = open_image(data, limits=limits)
    return _guarded(lambda: read_metadata(image, size=image.size))


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
    register_heif()
    try:
        image = _guarded(lambda: Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS_BY_FORMAT)))
    except UnidentifiedImageError:
        known = looks_like_photo(data[:32])
        reason = "damaged: its header makes no sense" if known else "not a picture in a supported format"
        raise ImageError(reason) from None
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} pixels is more than the limit of {limits.max_pixels:,} (max_pixels)")
    return image


def crop_pixels(image: Image.Image, *, image_size: int) -> NDArray[np.uint8]:
    """Resize the short side to `image_size`, crop the centre, return uint8 RGB (image_size, image_size, 3)."""
    import numpy as np

    return np.asarray(crop_of(image, image_size=image_size))


def crop_of(image: Image.Image, *, image_size: int) -> Image.Image:
    """The same as a picture."""
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
    return _centre(image, width=image_size, height=image_size)


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
    turn = TURNS.get(read_orientation(image))
    return image if turn is None else image.transpose(turn)


def _centre(image: Image.Image, *, width: int, height: int) -> Image.Image:
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _guarded(work: Callable[[], T]) -> T:
    """Run a step of Pillow's; whatever it raises on hostile bytes becomes an ImageError.

    Raises UnidentifiedImageError too, where a file is opened.
    """
    try:
        return work()
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError as error:
        pixels = int("".join(re.findall(r"\d+", str(error))[:1]) or 0)
        raise ImageError(f"{pixels:,} pixels is more than the limit of {PILLOW_MAX_PIXELS:,} (max_pixels)") from None
    except MemoryError:
        raise ImageError(OUT_OF_MEMORY) from None
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files (OSError, SyntaxError, struct.error, ...).
        raise ImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """What a person makes something of: in plain words where Pillow's are for programmers."""
    text = " ".join(str(error).split())
    for pattern, reason in REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return reason
    ours = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, UnicodeError, struct.error)
    if isinstance(error, ours) or not re.fullmatch(r"[A-Za-z][\w,;:/+-]*( [\w,;:/+-]+)+( \([\w ,]+\))?\.?", text):
        return NONSENSE
    return f"damaged or unsupported: {re.sub('^(unsupported|unimplemented|unknown) ', '', text, flags=re.IGNORECASE)}"
