"""How well an encoder finds captioned photos: Recall@K and median rank, text -> image and image -> text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from searchengine.captions import CaptionedPhoto
from searchengine.decode import DEFAULT_LIMITS, decode_bytes
from searchengine.errors import ImageError, ModelMismatch, UsageError
from searchengine.index.reader import Index
from searchengine.stores.local import read_local
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, PixelBatch

T = TypeVar("T")

RECALL_AT = (1, 5, 10)
ROWS_PER_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """`recall[k]` is the share of queries with a right answer among the first k; ranks count from 1."""

    recall: dict[int, float]
    median_rank: float

    def as_dict(self) -> dict[str, float]:
        return {f"recall@{k}": share for k, share in self.recall.items()} | {"median_rank": self.median_rank}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    text_to_image: Retrieval
    image_to_text: Retrieval
    images: int
    captions: int
    failed: list[tuple[Path, str]]
    model: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "text_to_image": self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text.as_dict(),
            "images": self.images,
            "captions": self.captions,
            "failed": len(self.failed),
            "model": self.model,
        }


def evaluate(
    photos: Sequence[CaptionedPhoto],
    *,
    encoder: Encoder,
    index: Index | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Hold `encoder` against captions: the right answer of a caption is its own photo, and the other way round.

    Vectors come from `index` where it has the content, and are computed, but not stored, where it lacks it. Photos
    that cannot be decoded are left out and listed. Raises UsageError if none is left, ModelMismatch if `index` is of
    another encoder.
    """
    if index is not None and index.identity.fingerprint != encoder.fingerprint:
        raise ModelMismatch(
            f"the index at {printable(str(index.folder))} was made by encoder {index.identity.encoder}, not by "
            f"{encoder.name}; evaluate with its own encoder, or without an index"
        )
    kept: list[CaptionedPhoto] = []
    failed: list[tuple[Path, str]] = []
    pieces: list[FloatMatrix] = []
    done = 0
    for batch in _batched(_read_all(photos, encoder, index, workers or os.cpu_count() or 1), batch_size):
        pieces.append(_vectors_of([known for _, known in batch if not isinstance(known, str)], encoder))
        for photo, known in batch:
            if isinstance(known, str):
                failed.append((photo.path, known))
            else:
                kept.append(photo)
        done += len(batch)
        on_progress(done, len(photos))
    if not kept:
        raise UsageError(f"none of the {len(photos):,} photos can be read; the first: {failed[0][0]}: {failed[0][1]}")
    image_vectors = np.concatenate(pieces)
    captions = [caption for photo in kept for caption in photo.captions]
    owner = np.repeat(np.arange(len(kept)), [len(photo.captions) for photo in kept])
    text_vectors = encoder.encode_texts(captions, truncate=True)  # as every published figure does
    return Evaluation(
        text_to_image=text_to_image(text_vectors, image_vectors, owner),
        image_to_text=image_to_text(text_vectors, image_vectors, owner),
        images=len(kept),
        captions=len(captions),
        failed=failed,
        model=encoder.name,
    )


def text_to_image(texts: FloatMatrix, images: FloatMatrix, owner: NDArray[np.integer]) -> Retrieval:
    """Rank of image `owner[i]` for text i. `texts` (m, dim), `images` (n, dim), `owner` (m,)."""
    ranks = []
    for start in range(0, len(texts), ROWS_PER_BLOCK):
        scores = texts[start : start + ROWS_PER_BLOCK] @ images.T
        own = owner[start : start + ROWS_PER_BLOCK]
        ranks.append(_ranks(scores, own[:, None] == np.arange(len(images))))
    return _retrieval(np.concatenate(ranks))


def image_to_text(texts: FloatMatrix, images: FloatMatrix, owner: NDArray[np.integer]) -> Retrieval:
    """Rank of the best of an image's own texts."""
    ranks = []
    for start in range(0, len(images), ROWS_PER_BLOCK):
        scores = images[start : start + ROWS_PER_BLOCK] @ texts.T
        ranks.append(_ranks(scores, np.arange(start, start + len(scores))[:, None] == owner))
    return _retrieval(np.concatenate(ranks))


def _ranks(scores: FloatMatrix, is_own: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Rank of the first right answer in each row of `scores` (q, n); `is_own` (q, n) tells which are right.

    Where scores are equal it is the mean rank over all their orders, so that a constant scores badly: among n equals of
    which r are right, the first right one comes at (n + 1) / (r + 1).
    """
    best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    better = (scores > best).sum(axis=1)
    equal = (scores == best).sum(axis=1)
    right = ((scores == best) & is_own).sum(axis=1)
    ranks: NDArray[np.float64] = better + (equal + 1) / (right + 1)
    return ranks


def _retrieval(ranks: NDArray[np.float64]) -> Retrieval:
    return Retrieval(
        recall={k: float((ranks <= k).mean()) for k in RECALL_AT},
        median_rank=float(np.median(ranks)),
    )


Known = FloatMatrix | PixelBatch | str  # a stored vector (dim,), a crop (size, size, 3), or why there is neither


def _read_all(
    photos: Sequence[CaptionedPhoto], encoder: Encoder, index: Index | None, workers: int
) -> Iterator[tuple[CaptionedPhoto, Known]]:
    def read(photo: CaptionedPhoto) -> Known:
        try:
            data = read_local(str(photo.path), max_bytes=DEFAULT_LIMITS.max_file_bytes)
            vector_id = index.vector_id_by_content(hashlib.sha256(data).digest()) if index else None
            if index is not None and vector_id is not None:
                return index.vector(vector_id)
            return decode_bytes(data, image_size=encoder.image_size).pixels
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        for piece in _batched(photos, 256):  # bounds how far decoding runs ahead
            yield from zip(piece, pool.map(read, piece), strict=True)


def _vectors_of(known: Sequence[FloatMatrix | PixelBatch], encoder: Encoder) -> FloatMatrix:
    """Stored vectors as they are, crops encoded; (n, dim) in the given order."""
    vectors = np.empty((len(known), encoder.dim), dtype=np.float32)
    crops = [i for i, item in enumerate(known) if item.dtype == np.uint8]
    for i, item in enumerate(known):
        if item.dtype != np.uint8:
            vectors[i] = item
    if crops:
        vectors[crops] = encoder.encode_pixels(np.stack([known[i] for i in crops]).astype(np.uint8, copy=False))
    return vectors


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
