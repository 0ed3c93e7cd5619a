"""The picture of a query: whether words name one, and its vector, from the index where its content is indexed."""

from __future__ import annotations

import os
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from searchengine.errors import ImageError, PhotoNotFound, QueryError
from searchengine.stores import INSIDE, KnownStores, is_url
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.index.protocol import PhotoIndex
    from searchengine.vectors import Encoder, FloatMatrix, ImageSource


class Picture(NamedTuple):
    """A query's image: its vector (dim,), and the vector's id where the image is indexed."""

    vector: FloatMatrix
    vector_id: int | None


def picture_of(image: ImageSource | int, *, index: PhotoIndex, encoder: Encoder) -> Picture:
    """An int is the id of an indexed photo; a text a path, a URL or ARCHIVE!/member.

    Raises QueryError, PhotoNotFound for an id.
    """
    if isinstance(image, int | Integral):
        row = index.image(int(image)) if 0 < image < 2**63 else None
        stored = None if row is None else _stored(index, row.vector_id)
        if stored is None:
            raise PhotoNotFound.by_id(image)
        return stored
    try:
        if isinstance(image, str | os.PathLike):
            return _picture_at(os.fspath(image), index=index, encoder=encoder)
        return Picture(encoder.encode_images([image])[0], None)
    except ImageError as error:
        raise _unusable(image, error) from None


def absolute(place: str) -> str:
    """What a picture is called wherever the question travels: an absolute path, or a URL as it stands."""
    if is_url(place):
        return place
    path, inside, member = expanded(place).partition(INSIDE)
    return os.path.abspath(path) + inside + member


def is_written_as_path(words: str) -> bool:
    """Absolute, or from here (./x) or from home (~/x): words that are no description."""
    here = (f".{os.sep}", f"..{os.sep}", "./", "../")
    return words.startswith(here) or os.path.isabs(expanded(words))


def expanded(path: str) -> str:
    """With the folder in place of ~ or ~name, where there is such a user."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a name that no user can have
        return path


def names_a_picture(words: str) -> bool:
    """Whether words are written as a path, and a file is there, or as a URL that ends as a picture's name does.

    Raises QueryError where a path to a picture leads to no file: nobody describes a photo that way, and a search for
    the words would find something, too.
    """
    if not is_url(words) and not is_written_as_path(words):
        return False
    path = expanded(words)
    if os.path.isfile(path):
        return True
    from searchengine.formats import EXTENSIONS

    named_like_one = os.path.splitext(path.partition("?")[0] if is_url(path) else path)[1].lower() in EXTENSIONS
    if is_url(path):
        return named_like_one and not any(character.isspace() for character in words)
    archive, inside, _ = path.partition(INSIDE)
    if inside and os.path.isfile(archive):
        return True
    if named_like_one:
        raise QueryError(f"there is no picture {printable(words)}; check the path, or describe the photo in words")
    return False


def _stored(index: PhotoIndex, vector_id: int) -> Picture | None:
    """None where a compaction has dropped the vector since its row was read."""
    try:
        return Picture(index.vector(vector_id), vector_id)
    except KeyError:
        return None


def _picture_at(place: str, *, index: PhotoIndex, encoder: Encoder) -> Picture:
    """By its content, if that is indexed, under whatever name. Raises ImageError."""
    import hashlib

    from searchengine.decode import DEFAULT_LIMITS, decode_bytes

    data = KnownStores().read_at(place, max_bytes=DEFAULT_LIMITS.max_file_bytes)
    known = index.vector_id_by_content(hashlib.sha256(data).digest())
    stored = None if known is None else _stored(index, known)
    if stored is not None:
        return stored
    pixels = decode_bytes(data, image_size=encoder.image_size).pixels
    return Picture(encoder.encode_pixels(pixels[None])[0], None)


def _unusable(image: ImageSource, error: ImageError) -> QueryError:
    shown = printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "given"
    reason = str(error).removeprefix(f"{shown}: ")
    return QueryError(f"the image {shown} cannot be a query: {reason}; use another picture")
