"""Bytes -> upright RGB crop: every format, every orientation, every kind of damage."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from conftest import painted
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from searchengine.colours import to_rgb
from searchengine.decode import (
    DecodeLimits,
    crop_pixels,
    decode_bytes,
    decode_file,
    inspect_bytes,
    open_image,
    thumbnail,
    upright,
)
from searchengine.errors import ImageError
from searchengine.formats import EXTENSIONS, EXTENSIONS_BY_FORMAT, looks_like_photo

SIZE = 32

# Where the stored picture must be put back for each EXIF orientation: the inverse of what a viewer does.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(image: Image.Image, kind: str = "PNG", *, size: int = SIZE, **options: Any) -> np.ndarray:
    return decode_bytes(encoded(image, kind, **options), image_size=size).pixels


SEEDS_BY_KIND = {
    kind: encoded(painted(1), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA", "ICO", "JPEG2000")
}
SEEDS = list(SEEDS_BY_KIND.values())


def reference_crop(image: Image.Image, *, size: int) -> np.ndarray:
    """Short side to `size`, bicubic, then the centre: as plainly as it can be said."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@given(width=st.integers(1, 120), height=st.integers(1, 120), size=st.integers(8, 64), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_the_crop_is_the_short_side_resized_and_the_centre_cut(width: int, height: int, size: int, seed: int) -> None:
    if max(width, height) > 8 * min(width, height):
        width = height
    image = painted(seed, width=width, height=height)
    pixels = pixels_of(image, size=size)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, reference_crop(image, size=size))


def test_the_golden_preprocessing_of_clip_is_matched_within_a_grey_level(data: Path) -> None:
    expected = np.load(data / "golden" / "expected_preprocessed_image.npy")[0]
    path = next((data / "golden").rglob("franz-kafka.jpg"))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    wanted = (expected * std + mean) * 255
    pixels = decode_file(path, image_size=224).transpose(2, 0, 1)
    assert np.abs(pixels - wanted).mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_each_exif_orientation_is_set_upright(orientation: int, kind: str) -> None:
    upright = painted(7, width=80, height=48)
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    photo = decode_bytes(encoded(stored, kind, exif=exif.tobytes(), **options), image_size=SIZE)
    assert (photo.metadata.width, photo.metadata.height) == (80, 48)
    assert difference(photo.pixels, reference_crop(upright, size=SIZE)) < (9 if kind in ("JPEG", "WEBP") else 0.01)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO"]
)
def test_each_usual_format_is_read(kind: str) -> None:
    pillow_heif.register_heif_opener()
    image = painted(3, width=64, height=64)
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF", "HEIF") else {}
    if kind == "ICO":
        options = {"sizes": [(64, 64)]}
    pixels = pixels_of(image, kind, **options)
    lossless = kind in ("PNG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO")
    assert difference(pixels, reference_crop(image, size=SIZE)) < (0.01 if lossless else 8)


def test_the_first_frame_of_an_animation_counts() -> None:
    first, second = painted(1), painted(2)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        pixels = pixels_of(first, kind, save_all=True, append_images=[second], **lossless)
        np.testing.assert_array_equal(pixels, reference_crop(first, size=SIZE), err_msg=kind)


def icon(*, sizes: int) -> bytes:
    picture = encoded(painted(1, width=64, height=64))
    entry = struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 32, len(picture), 6 + 16 * sizes)
    return struct.pack("<HHH", 0, 1, sizes) + entry * sizes + picture


def flic(*, frames: int) -> bytes:
    """An Autodesk animation: a palette of greys, then uncompressed frames."""
    palette = struct.pack("<IHHBB", 6 + 2 + 2 + 768, 4, 1, 0, 0) + bytes(n for n in range(256) for _ in range(3))
    copy = struct.pack("<IH", 6 + 60 * 40, 16) + np.asarray(painted(1).convert("L")).tobytes()
    first, other = (
        struct.pack("<IHH8x", 16 + len(body), 0xF1FA, n) + body for body, n in ((palette + copy, 2), (copy, 1))
    )
    body = first + other * (frames - 1)
    header = struct.pack("<IHHHHHHI", 128 + len(body), 0xAF12, frames, 60, 40, 8, 3, 70)
    return header.ljust(128, b"\0") + body


def layered(*, layers: int) -> bytes:
    """A Photoshop file of empty layers, with the merged picture after them."""
    record = struct.pack(">IIIIH", 0, 0, 1, 1, 3) + b"".join(struct.pack(">hI", channel, 3) for channel in range(3))
    record += b"8BIMnorm\xff\0\0\0" + struct.pack(">I12x", 12)
    block = struct.pack(">h", layers) + record * layers + b"\0\0\x80" * 3 * layers
    block += b"\0" * (len(block) % 2)
    section = struct.pack(">II", len(block) + 4, len(block)) + block
    pixels = np.asarray(painted(1)).transpose(2, 0, 1).tobytes()
    return b"8BPS" + struct.pack(">H6xHIIHHII", 1, 3, 40, 60, 8, 3, 0, 0) + section + b"\0\0" + pixels


def animated(kind: str, *, frames: int, **options: Any) -> bytes:
    pictures = [painted(seed, width=24, height=16) for seed in range(5)]
    if kind == "GIF":
        pictures = [picture.convert("P") for picture in pictures]
    others = [pictures[number % 4 + 1] for number in range(frames - 1)]
    return encoded(pictures[0], kind, save_all=True, append_images=others, **options)


MANY_FRAMES = {
    "GIF": (lambda n: animated("GIF", frames=n), 3000),
    "APNG": (lambda n: animated("PNG", frames=n), 3000),
    "WEBP": (lambda n: animated("WEBP", frames=n, lossless=True, method=0), 3000),
    "TIFF": (lambda n: animated("TIFF", frames=n), 1000),
    "MPO": (lambda n: animated("MPO", frames=n), 300),
    "AVIF": (lambda n: animated("AVIF", frames=n, speed=10), 300),
    "FLI": (lambda n: flic(frames=n), 3000),
    "PSD": (lambda n: layered(layers=n), 3000),
    "ICO": (lambda n: icon(sizes=n), 3000),
}


@pytest.mark.parametrize("kind", MANY_FRAMES)
def test_frames_beyond_the_first_cost_next_to_nothing(kind: str) -> None:
    make, many = MANY_FRAMES[kind]
    seconds, pixels = {}, {}
    for frames in (2, many):
        content = make(frames)
        rounds = []
        for _ in range(3):
            started = time.perf_counter()
            pixels[frames] = decode_bytes(content, image_size=SIZE).pixels
            inspect_bytes(content)
            rounds.append(time.perf_counter() - started)
        seconds[frames] = min(rounds)
    np.testing.assert_array_equal(pixels[2], pixels[many])
    assert seconds[many] < 3 * seconds[2] + 0.05  # decoding all of them takes from 0.3 s (FLI) to 30


def test_transparency_is_laid_over_white() -> None:
    rgba = painted(4).convert("RGBA")
    rgba.putalpha(0)
    grey_alpha = Image.new("LA", (40, 40), (0, 0))
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (pixels_of(rgba) == 255).all()
    assert (pixels_of(grey_alpha) == 255).all()
    assert (pixels_of(palette, transparency=0) == 255).all()
    assert (pixels_of(palette, "GIF", transparency=0) == 255).all()


def test_a_colour_that_is_declared_transparent_is_white_too() -> None:
    image = Image.new("RGB", (40, 40), (10, 20, 30))
    image.paste((200, 0, 0), (0, 0, 20, 40))
    pixels = pixels_of(image, transparency=(10, 20, 30), size=40)
    assert (pixels[:, 25:] == 255).all()
    assert (pixels[:, :15] == (200, 0, 0)).all()
    grey = Image.new("L", (40, 40), 7)
    assert (pixels_of(grey, transparency=7) == 255).all()


def test_half_transparent_red_becomes_pink() -> None:
    pixels = pixels_of(Image.new("RGBA", (40, 40), (255, 0, 0, 128)))
    assert np.abs(pixels.astype(int) - (255, 127, 127)).max() <= 1


def test_cmyk_keeps_its_colours() -> None:
    cmyk = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        red, green, blue = pixels_of(cmyk, kind)[16, 16].astype(int)
        assert red > 200, kind
        assert max(green, blue) < 60, kind


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16", "I", "F"])
def test_a_picture_is_converted_in_strips_as_it_is_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((rng.random((43, 31)) * 40_000 - 500 * (mode != "I;16")).astype(kind))
    else:
        image = Image.fromarray(rng.integers(0, 256, (43, 31, 4), dtype=np.uint8))
        image = image.quantize(8) if mode == "P" else image.convert(mode)
        if mode in ("P", "RGB", "L"):
            image.info["transparency"] = {"P": 3, "L": 77}.get(mode, image.getpixel((0, 0)))
    assert image.mode == mode
    whole = to_rgb(image)
    monkeypatch.setattr("searchengine.colours.STRIP_PIXELS", 100)
    assert to_rgb(image).tobytes() == whole.tobytes()
    assert whole.mode == "RGB"


def test_what_has_no_need_to_be_turned_or_converted_is_not_copied() -> None:
    image = painted(1)
    assert to_rgb(upright(image)) is image


def test_a_photo_is_upright_though_its_exif_cannot_be_written_anew() -> None:
    """Some blocks tell the orientation and cannot be encoded again, which Pillow does when it turns a picture."""
    image = painted(1, width=80, height=48)
    image.getexif()[0x0112] = 6
    image.getexif()[0x010E] = object()
    assert upright(image).size == (48, 80)


def test_want_of_memory_in_exif_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(painted(1), "JPEG")

    def exhausted(self: Image.Image) -> Image.Exif:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "getexif", exhausted)
    with pytest.raises(ImageError, match="memory"):
        decode_bytes(content, image_size=SIZE)
    with pytest.raises(ImageError, match="memory"):
        inspect_bytes(content)


def test_one_bit_pictures_become_black_and_white() -> None:
    image = Image.new("1", (40, 40), 1)
    image.paste(0, (0, 0, 20, 40))
    for kind in ("PNG", "TIFF", "BMP"):
        pixels = pixels_of(image, kind, size=40)
        assert (pixels[:, :15] == 0).all(), kind
        assert (pixels[:, 25:] == 255).all(), kind


def test_deep_greys_are_scaled_to_eight_bits() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    wanted = ramp / 65535 * 255
    for name, array, kind in (
        ("16-bit png", ramp.astype(np.uint16), "PNG"),
        ("16-bit tiff", ramp.astype(np.uint16), "TIFF"),
        ("float tiff", (ramp / 65535).astype(np.float32), "TIFF"),
        ("32-bit tiff", ramp.astype(np.int32), "TIFF"),
    ):
        pixels = pixels_of(Image.fromarray(array), kind, size=64)
        assert np.abs(pixels[..., 0] - wanted).max() <= 1.01, name
        assert (pixels[..., 0] == pixels[..., 2]).all(), name


@given(
    values=st.lists(st.floats(width=32), min_size=4, max_size=4),
)
def test_any_floats_become_greys_without_a_crash(values: list[float]) -> None:
    rgb = to_rgb(Image.fromarray(np.array(values, np.float32).reshape(2, 2)))
    assert rgb.mode == "RGB"


@pytest.mark.parametrize(("width", "height"), [(1, 50_000), (50_000, 1), (3, 4000), (9000, 20), (1, 1)])
def test_extreme_shapes_cost_little_and_give_a_crop(width: int, height: int) -> None:
    data = encoded(Image.new("RGB", (width, height), (50, 60, 70)))
    started = time.monotonic()
    pixels = decode_bytes(data, image_size=224).pixels
    assert time.monotonic() - started < 2
    assert pixels.shape == (224, 224, 3)
    assert (pixels == (50, 60, 70)).all()


def test_the_centre_of_a_long_strip_is_what_is_seen() -> None:
    strip = Image.new("RGB", (2000, 20), "black")
    strip.paste((255, 0, 0), (980, 0, 1020, 20))
    assert (pixels_of(strip)[:, 4:-4] == (255, 0, 0)).all()


def test_a_big_jpeg_is_decoded_small_and_hardly_differs() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    big = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
    data = encoded(big, "JPEG", quality=90)
    whole = Image.open(io.BytesIO(data))
    whole.load()
    pixels = decode_bytes(data, image_size=224).pixels
    assert difference(pixels, reference_crop(whole, size=224)) < 1


def test_a_photo_of_twenty_megapixels_is_read_in_a_moment() -> None:
    data = encoded(painted(1, width=5472, height=3648), "JPEG")
    started = time.monotonic()
    photo = decode_bytes(data, image_size=224)
    assert time.monotonic() - started < 3
    assert (photo.metadata.width, photo.metadata.height) == (5472, 3648)


def test_the_limit_on_pixels_holds_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (101, 100)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageError, match="101 x 100 pixels is more than the limit of 10,000"):
        decode_bytes(data, image_size=SIZE, limits=DecodeLimits(max_pixels=10_000))


def test_a_png_that_claims_to_be_enormous_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="pixels"):
        decode_bytes(bomb, image_size=SIZE)


def test_the_limit_on_a_files_size_names_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "big.jpg"
    file.write_bytes(b"x" * 1001)
    with pytest.raises(ImageError, match="1,000 bytes.*max_file_bytes"):
        decode_file(file, image_size=SIZE, limits=DecodeLimits(max_file_bytes=1000))


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    jpeg = encoded(painted(1, width=400, height=400), "JPEG")
    for content, reason in (
        (b"", "empty"),
        (b"Dear diary, this is no picture at all.\n" * 40, "not a picture"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (jpeg[:30], "damaged|truncated|not a picture"),
        (b"%PDF-1.4 hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ):
        with pytest.raises(ImageError, match=reason):
            decode_bytes(content, image_size=SIZE)
    with pytest.raises(ImageError, match="cannot be read"):
        decode_file(tmp_path / "missing.jpg", image_size=SIZE)
    with pytest.raises(ImageError, match="cannot be read"):
        decode_file("a\0b.jpg", image_size=SIZE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_damaged_wherever_it_ends(kind: str) -> None:
    whole = encoded(painted(1, width=300, height=200), kind)
    for share in (0.1, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            decode_bytes(whole[: int(len(whole) * share)], image_size=SIZE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + bytes(40), "damaged: its header makes no sense"),
        (b"P5\n10 10\n70000\n" + bytes(100), "damaged: its data makes no sense"),
        (b"P3\n2 2\n255\n1 2 x 4 5 6 7 8 9 10 11 12\n", "damaged: its data makes no sense"),
        (SEEDS_BY_KIND["WEBP"][:25] + bytes(600), "damaged: its data cannot be decoded"),
        (
            SEEDS_BY_KIND["BMP"][:28] + b"\x07" + SEEDS_BY_KIND["BMP"][29:],
            "damaged or unsupported: BMP pixel depth (7)",
        ),
    ],
)
def test_reasons_are_in_plain_words(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_bytes(content, image_size=SIZE)
    assert str(error.value) == reason


@given(st.sampled_from([KeyError, TypeError, OSError, ValueError, RuntimeError, struct.error, MemoryError]), st.text())
def test_whatever_pillow_says_the_reason_is_one_line_without_names_from_programs(
    kind: type[Exception], said: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ImageError) as error:

        def load(self: Image.Image) -> None:
            raise kind(said)

        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        decode_bytes(SEEDS_BY_KIND["PNG"], image_size=SIZE)
    reason = str(error.value)
    assert reason.isprintable()
    assert len(reason.split()) > 3
    assert kind.__name__ not in reason


def test_the_rare_formats_that_pillow_reads_are_read(data: Path) -> None:
    extensions = "blp cur dcx dds fits fli ftc ftu gbr im imt msp p7 pcx pfm pxr ras rgb sgi spider xbm xpm".split()
    decoded = set()
    for file in (data / "nasty" / "pillow").rglob("*"):
        if file.suffix[1:] in extensions:
            with contextlib.suppress(ImageError):
                decode_file(file, image_size=SIZE)
                decoded.add(file.suffix[1:])
    assert decoded == set(extensions)


def test_formats_that_run_programs_or_open_anything_are_not_read() -> None:
    assert not {"EPS", "WMF", "PDF", "IPTC", "MPEG"} & EXTENSIONS_BY_FORMAT.keys()
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".iim", ".mpg"} & EXTENSIONS
    Image.init()
    assert set(EXTENSIONS_BY_FORMAT) <= set(Image.OPEN)


# -- files whose names have no extension -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", "JPEG PNG WEBP GIF BMP TIFF AVIF HEIF JPEG2000 PPM QOI DDS ICNS MPO".split())
def test_a_picture_is_known_by_its_first_bytes(kind: str) -> None:
    pillow_heif.register_heif_opener()
    head = encoded(painted(3, width=64, height=64), kind)[:32]
    assert looks_like_photo(head)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"B",
        b"BM",
        b"BMW is a maker of cars, and of mo",
        b"BM\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b'#!/bin/sh\nexec python3 "$@"\n',
        b"#define logo_width 16\n#define lo",
        b"/* XPM */\nstatic char *logo[] = {",
        b"/* A header */\n#include <stdio.h>",
        b"GIF89a is a format of pictures, an",
        b"P1 and P2 were sold in Germany on ",
        b"P3 100 people\n",
        b"P6\n",
        b"RIFF is not WEBP, but rhymes with",
        b"II* is how a TIFF begins, and MM",
        b"8BPS\n8BPS\n8BPS\n8BPS\n8BPS\n8BPS\n",
        b"SIMPLE  =                    T / ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%Boundi",
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0>\0\x01\0\0\0",
        b"PK\x03\x04\x14\0\0\0\x08\0",
        b"SQLite format 3\0\x10\0\x01\x01\0@  \0\0",
        b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
        b"\0\0\x02\0\0\0\0\0\0\0\0\0\x40\0\x40\0\x18\0",
        b"\x0a\x05\x01\x08",
        bytes(32),
    ],
)
def test_what_is_no_picture_does_not_look_like_one(head: bytes) -> None:
    assert not looks_like_photo(head[:32])


def test_no_source_text_of_python_looks_like_a_photo() -> None:
    folder = Path(os.__file__).parent
    files = [file for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern)]
    include = Path(sysconfig.get_path("include"))
    files += include.rglob("*.h")
    assert len(files) > 300
    for file in files:
        with open(file, "rb") as opened:
            assert not looks_like_photo(opened.read(32)), file


@given(st.text(max_size=40))
def test_no_text_looks_like_a_photo(text: str) -> None:
    printable = "".join(character for character in text if character.isprintable() or character in "\n\t\r")
    for prefix in (
        "",
        "BM",
        "GIF89a",
        "II*",
        "MM",
        "RIFF",
        "8BPS",
        "qoif",
        "DDS ",
        "P6",
        "icns",
        "FTEX",
        "BLP2",
        "JPEG",
    ):
        assert not looks_like_photo((prefix + printable).encode()[:32]) or re.match(r"P6\s", prefix + printable)


@given(st.binary(max_size=32))
def test_any_bytes_are_looked_at_without_a_crash(head: bytes) -> None:
    assert looks_like_photo(head) in (True, False)


def test_a_damaged_exif_block_costs_the_exif_not_the_photo() -> None:
    image = painted(5)
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 50,
    ):
        photo = decode_bytes(encoded(image, "JPEG", quality=95, exif=exif), image_size=SIZE)
        assert difference(photo.pixels, reference_crop(image, size=SIZE)) < 8


def test_every_nasty_file_gives_a_crop_or_a_reason(data: Path) -> None:
    files = [file for file in sorted((data / "nasty").rglob("*")) if file.suffix.lower() in EXTENSIONS]
    assert len(files) > 500
    decoded = 0
    for file in files:
        try:
            pixels = decode_file(file, image_size=SIZE)
        except ImageError as error:
            assert str(error).strip(), file
            assert "\n" not in str(error), file
        else:
            decoded += 1
            assert pixels.shape == (SIZE, SIZE, 3)
            assert pixels.dtype == np.uint8
    assert decoded > len(files) / 4


def test_a_png_is_refused_whenever_pillow_alone_would_refuse_it(data: Path) -> None:
    """Looking at a PNG's metadata may not hide the damage that decoding its pixels would meet."""
    for file in sorted((data / "nasty").rglob("*.png")):
        content = file.read_bytes()
        try:
            open_image(content).load()
        except SyntaxError:
            continue  # damage behind the pixels, which are whole
        except Exception:
            with pytest.raises(ImageError):
                decode_bytes(content, image_size=SIZE)


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes_give_a_crop_or_an_image_error(content: bytes) -> None:
    _crop_or_reason(content)


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=200)
def test_any_damage_to_a_picture_gives_a_crop_or_an_image_error(seed: bytes, changes: list[tuple[float, int]]) -> None:
    content = bytearray(seed)
    for place, value in changes:
        content[int(place * min(len(content), 400))] = value
    _crop_or_reason(bytes(content))


def _crop_or_reason(content: bytes) -> None:
    limits = DecodeLimits(max_pixels=4_000_000)
    try:
        photo = decode_bytes(content, image_size=SIZE, limits=limits)
    except ImageError as error:
        assert str(error)
        return
    assert photo.pixels.shape == (SIZE, SIZE, 3)
    assert photo.metadata.width > 0
    assert photo.metadata.height > 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_inspecting_a_photo_tells_what_decoding_it_tells(kind: str, orientation: int) -> None:
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0110] = "Kiev 88"
    content = encoded(painted(1, width=1200, height=800), kind, exif=exif.tobytes())
    metadata = decode_bytes(content, image_size=SIZE).metadata
    assert inspect_bytes(content) == metadata
    assert metadata.camera == "Kiev 88"
    assert {metadata.width, metadata.height} == {1200, 800}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_inspecting_a_photo_decodes_no_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(painted(1), kind)
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("pixels were decoded"))
    assert inspect_bytes(content).width == 60


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    early = encoded(painted(1), "PNG", exif=exif.tobytes())
    start = early.index(b"eXIf") - 4
    length = struct.unpack(">I", early[start : start + 4])[0] + 12
    chunk, rest = early[start : start + length], early[:start] + early[start + length :]
    late = rest[:-12] + chunk + rest[-12:]
    np.testing.assert_array_equal(
        decode_bytes(late, image_size=SIZE).pixels, decode_bytes(early, image_size=SIZE).pixels
    )
    assert inspect_bytes(late) == inspect_bytes(early)
    assert inspect_bytes(late).width == 40


def test_a_picture_of_the_callers_is_left_as_it_is() -> None:
    image = Image.open(io.BytesIO(encoded(painted(1, width=2000, height=1000), "JPEG")))
    crop_pixels(image, image_size=SIZE)
    assert image.size == (2000, 1000)


def test_a_thumbnail_is_the_whole_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = thumbnail(encoded(painted(1, width=800, height=400), "JPEG", exif=exif.tobytes()), max_side_px=100)
    assert small.size == (50, 100)
    assert small.mode == "RGB"


def test_decoding_is_the_same_in_whatever_order_and_however_often() -> None:
    contents = SEEDS * 2
    digests = [hashlib.sha256(decode_bytes(c, image_size=SIZE).pixels).hexdigest() for c in contents]
    assert digests[: len(SEEDS)] == digests[len(SEEDS) :]


def test_a_picture_in_memory_is_cropped_as_its_file_is() -> None:
    image = painted(9, width=90, height=70)
    np.testing.assert_array_equal(crop_pixels(image, image_size=SIZE), pixels_of(image))
