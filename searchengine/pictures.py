"""The picture of a query: whether words name one, and its vector, from the index where its content is indexed."""

from __future__ import annotations

import os
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from searchengine.errors import ImageError, PhotoNotFound, QueryError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.index.reader import Index
    from searchengine.vectors import Encoder, FloatMatrix, ImageSource


class Picture(NamedTuple):
    """A query's image: its vector (dim,), and the vector's id where the image is indexed."""

    vector: FloatMatrix
    vector_id: int | None


def picture_of(image: ImageSource | int, *, index: Index, encoder: Encoder) -> Picture:
    """An int is the id of an indexed photo. Raises QueryError, PhotoNotFound for an id."""
    if isinstance(image, int | Integral):
        row = index.image(int(image)) if 0 < image < 2**63 else None
        stored = None if row is None else _stored(index, row.vector_id)
        if stored is None:
            raise PhotoNotFound(f"the index has no photo with id {image}; ids are in the results of a search")
        return stored
    known = _vector_id_of(image, index)
    stored = None if known is None else _stored(index, known)
    if stored is not None:
        return stored
    try:
        return Picture(encoder.encode_images([image])[0], None)
    except ImageError as error:
        raise _unusable(image, error) from None


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
    """Whether words are written as a path, and a file is there.

    Raises QueryError where a path to a picture leads to no file: nobody describes a photo that way, and a search for
    the words would find something, too.
    """
    if not is_written_as_path(words):
        return False
    path = expanded(words)
    if os.path.isfile(path):
        return True
    from searchengine.formats import EXTENSIONS

    if os.path.splitext(path)[1].lower() in EXTENSIONS:
        raise QueryError(f"there is no picture {printable(words)}; check the path, or describe the photo in words")
    return False


def _stored(index: Index, vector_id: int) -> Picture | None:
    """None where a compaction has dropped the vector since its row was read."""
    try:
        return Picture(index.vector(vector_id), vector_id)
    except KeyError:
        return None


def _vector_id_of(image: ImageSource, index: Index) -> int | None:
    """The id of the vector of a file whose content is indexed, under whatever name."""
    if not isinstance(image, str | os.PathLike):
        return None
    import hashlib

    from searchengine.decode import DEFAULT_LIMITS
    from searchengine.stores.local import read_local

    try:
        data = read_local(os.fspath(image), max_bytes=DEFAULT_LIMITS.max_file_bytes)
    except ImageError as error:
        raise _unusable(image, error) from None
    return index.vector_id_by_content(hashlib.sha256(data).digest())


def _unusable(image: ImageSource, error: ImageError) -> QueryError:
    shown = printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "given"
    reason = str(error).removeprefix(f"{shown}: ")
    return QueryError(f"the image {shown} cannot be a query: {reason}; use another picture")
