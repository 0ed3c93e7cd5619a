"""Whether vectors that come from files are what they are said to be: unit vectors of that encoder."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexer.exchange.arrivals import Arrival
from indexer.writable import identity_of
from searchengine.decode import DecodeLimits
from searchengine.errors import ImageError, ModelMismatch, UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.isolation import IsolatedDecoder
from searchengine.stores import KnownStores
from searchengine.text import printable
from searchengine.vectors import UNIT_TOLERANCE, Encoder, FloatMatrix, normalise

# A vector that was rounded to float16 is as far from length 1, and no further.
ROUNDED = 0.01
# So like those that the encoder gives must the vectors of a few photos be. One photo's, by two encoders, are not alike.
PHOTOS_TO_COMPARE = 8
SAME_ENCODER = 0.9


def identity_for(said: IndexIdentity | None, encoder: Encoder | None, *, place: Path) -> IndexIdentity:
    """What made the vectors in `place`: as its files say, or else `encoder`.

    Raises UsageError where nobody says, ModelMismatch where both do, and not the same.
    """
    shown = printable(str(place))
    if encoder is None:
        if said is None:
            raise UsageError(f"{shown} does not say which encoder made its vectors; name it with --model")
        return said
    given = identity_of(encoder)
    if said is not None and (said.fingerprint, said.precision) != (given.fingerprint, given.precision):
        raise ModelMismatch(
            f"the vectors in {shown} were made by encoder {printable(said.encoder)} in {said.precision} "
            f"({said.fingerprint[:12]}), not by {printable(given.encoder)} in {given.precision} "
            f"({given.fingerprint[:12]}); leave --model away"
        )
    return given


def unit_rows(matrix: NDArray[np.floating[Any]], *, identity: IndexIdentity, place: Path, first: int) -> FloatMatrix:
    """The vectors float32 (n, dim), of length 1: bit for bit as they came, but for those that rounding took off it.

    `first` counts the photos before them. Raises ModelMismatch for another dim, UsageError for another length.
    """
    if matrix.shape[1] != identity.dim:
        raise ModelMismatch(
            f"the vectors in {printable(str(place))} have {matrix.shape[1]} dimensions, those of encoder "
            f"{printable(identity.encoder)} {identity.dim}; name the one that made them with --model"
        )
    with np.errstate(over="ignore"):
        vectors = np.array(matrix, np.float32, order="C")
        lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= ROUNDED))
    if len(wrong):
        raise UsageError(
            f"vector {first + int(wrong[0]) + 1:,} in {printable(str(place))} has length {lengths[wrong[0]]:.4g}, "
            "not 1; divide each by its length first"
        )
    if matrix.dtype == np.float16:
        return normalise(vectors)
    rounded = np.abs(lengths - 1) > UNIT_TOLERANCE
    if np.any(rounded):
        vectors[rounded] = normalise(vectors[rounded])
    return vectors


def compare(
    arrivals: Sequence[Arrival],
    vectors: FloatMatrix,
    *,
    encoder: Encoder,
    stores: KnownStores,
    limits: DecodeLimits,
    stop: threading.Event,
) -> int:
    """Embed a few of the photos that can be read, and hold that against their `vectors` (n, dim); how many those were.

    Raises ModelMismatch where another encoder must have made the vectors, or they are those of other photos.
    """
    cosines = []
    step = max(len(arrivals) // (4 * PHOTOS_TO_COMPARE), 1)
    with closing(IsolatedDecoder(limits=limits)) as decoder:
        for place in range(0, len(arrivals), step):
            if stop.is_set():
                break
            arrival = arrivals[place]
            try:
                data = stores.read(arrival.store, arrival.key, max_bytes=limits.max_file_bytes)
                pixels = decoder.decode_bytes(data, image_size=encoder.image_size).pixels
            except ImageError:
                continue
            cosines.append(float(encoder.encode_pixels(pixels[None])[0] @ vectors[place]))
            if len(cosines) == PHOTOS_TO_COMPARE:
                break
    if cosines and statistics.median(cosines) < SAME_ENCODER:
        raise ModelMismatch(
            f"the encoder {printable(encoder.name)} did not make these vectors, or they are those of other photos: of "
            f"{len(cosines)} photos that could be read, its own have a cosine of {statistics.median(cosines):.2f} to "
            "those in the files, where it should be 1; name the encoder that made them with --model"
        )
    return len(cosines)
