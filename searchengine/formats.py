"""The formats that are read: their names in Pillow, extensions and signatures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image

from searchengine.stores import MANIFEST

if TYPE_CHECKING:
    from searchengine.stores import ImageStore

# All that Pillow reads by itself. Left out on purpose is what runs other programs or draws vectors (EPS, WMF, PDF), and
# IPTC, whose plugin opens whatever is inside. The content tells the format: formats are tried in this order, and those
# that begin with nothing in particular come last.
EXTENSIONS_BY_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "ICO": (".ico",),
    "QOI": (".qoi",),
    "PSD": (".psd",),
    "BLP": (".blp",),
    "CUR": (".cur",),
    "DCX": (".dcx",),
    "DDS": (".dds",),
    "FITS": (".fits",),
    "FLI": (".fli", ".flc"),
    "FTEX": (".ftc", ".ftu"),
    "GBR": (".gbr",),
    "ICNS": (".icns",),
    "MSP": (".msp",),
    "PCX": (".pcx",),
    "PIXAR": (".pxr",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras", ".sun", ".im1", ".im8", ".im24", ".im32"),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "XVTHUMB": (".p7",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "IM": (".im",),
    "PCD": (".pcd",),
    "IMT": (".imt",),
    "SPIDER": (".spider",),
}
EXTENSIONS = frozenset(extension for group in EXTENSIONS_BY_FORMAT.values() for extension in group)

# Formats whose first bytes are enough to know them by, in a file whose name has no extension.
SIGNED_FORMATS = tuple("JPEG PNG WEBP GIF TIFF AVIF HEIF JPEG2000 QOI PSD BLP DCX DDS FLI FTEX ICNS SUN".split())
NETPBM = re.compile(rb"P([14]|[2356]\s+\d{1,5}(?=\s+\d{1,5}\s+\d))\s+\d{1,5}\s+\d{1,5}\s")
# BITMAPCOREHEADER, BITMAPINFOHEADER and its successors, by their sizes.
BITMAP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
# No text holds them, and the headers of all signed formats do.
CONTROL_CHARACTERS = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")


def is_photo(store: ImageStore, key: str) -> bool:
    """Whether a listed file counts as a photo: by its extension, or by its first bytes where its name has none.

    Raises ImageError where these cannot be had.
    """
    if store.name.startswith(MANIFEST):  # a list names photos, by whatever a URL ends in
        return True
    extension = os.path.splitext(key)[1].lower()
    return extension in EXTENSIONS if extension else looks_like_photo(store.head(key))


def looks_like_photo(head: bytes) -> bool:
    """Whether a file that begins with the 32 bytes `head` is a picture: no text, script or C header ever is.

    Only formats with a signature of some strength count, known by what Pillow asks before it opens a file.
    """
    if NETPBM.match(head):
        return True
    if CONTROL_CHARACTERS.isdisjoint(head):
        return False
    return any(accepts(head) is True for accepts in _signatures()) or _is_bitmap(head)


def _is_bitmap(head: bytes) -> bool:
    """Windows bitmaps begin with two letters, as words do; bytes 14 to 17 tell which kind of header follows."""
    return head.startswith(b"BM") and len(head) >= 18 and int.from_bytes(head[14:18], "little") in BITMAP_HEADERS


@cache
def _signatures() -> tuple[Callable[[bytes], bool | str], ...]:
    load_plugins()
    return tuple(accepts for name in SIGNED_FORMATS if (accepts := Image.OPEN[name][1]))


def load_plugins(*, threads: int | None = None) -> None:
    """Load the decoders of all formats, which otherwise happens when one is needed.

    `threads` is how many AVIF and HEIC may use for one picture; they take memory in proportion to it.
    """
    register_heif()
    Image.init()
    if threads is not None:
        import pillow_heif
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = threads
        pillow_heif.options.DECODE_THREADS = threads


@cache
def register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
