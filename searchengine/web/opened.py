"""An index that is open, with the encoder that made it: what a job of the service works with."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from functools import partial

import numpy as np

from searchengine.errors import PhotoNotFound
from searchengine.index.photos import ImageRow
from searchengine.index.protocol import PhotoIndex, open_index
from searchengine.models.registry import load_encoder
from searchengine.pictures import Picture
from searchengine.prompts import query_vectors
from searchengine.ranker import Ranker
from searchengine.settings import Settings
from searchengine.vectors import FloatMatrix
from searchengine.web.batching import TextBatcher
from searchengine.web.caches import BoundedCache
from searchengine.web.decoders import DecoderPool
from searchengine.web.metrics import Metrics
from searchengine.web.uploads import UploadedImage, crops_of
from searchengine.zeroshot import class_vectors

# How many photos are ranked at once: for the first pages, and for all pages that most people turn. Photos that the
# question itself names are found, too, and left out.
DEPTHS, NAMED_AT_MOST = (200, 1000), 100

CLASSES_BYTES = 16 * 2**20


class Opened:
    """`index`, `encoder` and `ranker` belong together. Raises IndexUnusable, ModelUnusable and their kin."""

    def __init__(self, settings: Settings, *, metrics: Metrics, decoders: DecoderPool) -> None:
        self._metrics = metrics
        self._decoders = decoders
        self._classes: BoundedCache[tuple[tuple[str, ...], ...], FloatMatrix] = BoundedCache(max_bytes=CLASSES_BYTES)
        # One call of the encoder uses all cores.
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._users, self._is_retired = 0, False
        self._own = secrets.token_bytes(8)  # for another reader counts its commits from the same number
        self.index: PhotoIndex = open_index(settings.index_place)
        try:
            known = self.index.identity
            self.encoder = load_encoder(
                known.encoder, device=settings.device, precision=known.precision, models_folder=settings.models_folder
            )
            texts = TextBatcher(partial(query_vectors, encoder=self.encoder), metrics=metrics)
            self.ranker = Ranker(
                self.index, self.encoder, text_vectors=texts, depths=[depth + NAMED_AT_MOST for depth in DEPTHS]
            )
            # What is loaded on first use is used once, so that the first who asks need not wait for it.
            self.index.snapshot()
            self.ranker.text_vectors(["a photo"])
        except BaseException:
            self.index.close()
            raise

    def __enter__(self) -> Opened:
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """Close it as soon as nobody uses it any more."""
        self._is_retired = True
        self._close_if_unused()

    def state(self) -> bytes:
        """Eight bytes that stand for the newest committed state, as this reader sees it, and for the day: a query may
        ask for photos of today."""
        seen = (self._own, date.today(), self.index.snapshot().version)
        return hashlib.sha256(repr(seen).encode()).digest()[:8]

    def pictures(self, images: Sequence[UploadedImage]) -> list[Picture]:
        """Pictures that were sent, from the index where it has their content.

        Raises what `crops_of` does for one that cannot be decoded.
        """
        found = {image: self._stored(image) for image in dict.fromkeys(images)}
        unknown = [image for image, picture in found.items() if picture is None]
        if unknown:
            with self._metrics.timed("decode"):
                crops = crops_of(unknown, decoders=self._decoders, image_size=self.encoder.image_size)
            with self._metrics.timed("encode"), self._turn:
                vectors = self.encoder.encode_pixels(crops)
            found |= {image: Picture(row, None) for image, row in zip(unknown, vectors, strict=True)}
        return [picture for image in images if (picture := found[image]) is not None]

    def image_vectors(self, images: Sequence[UploadedImage]) -> FloatMatrix:
        """The vectors (n, dim) of pictures that were sent."""
        return np.stack([picture.vector for picture in self.pictures(images)])

    def photos(self, ids: Sequence[int]) -> tuple[list[ImageRow], FloatMatrix]:
        """What is known of photos, and their vectors (n, dim). Raises PhotoNotFound."""
        rows = self.index.images(np.array(ids, np.int64))
        vectors = np.empty((len(ids), self.index.dim), np.float32)
        for place, photo in enumerate(ids):
            with suppress(KeyError):
                vectors[place] = self.index.vector(rows[photo].vector_id)
                continue
            raise PhotoNotFound.by_id(photo)
        return [rows[photo] for photo in ids], vectors

    def class_vectors(self, labels: Sequence[str], templates: Sequence[str]) -> FloatMatrix:
        """As `zeroshot.class_vectors`; the last few are remembered. Raises UsageError."""
        key = (tuple(labels), tuple(templates))
        with self._turn:
            vectors = self._classes.get(key)
            if vectors is None:
                with self._metrics.timed("encode"):
                    vectors = class_vectors(self.encoder, labels, templates=templates)
                self._classes.put(key, vectors, size_bytes=vectors.nbytes + 4 * sum(map(len, (*labels, *templates))))
            return vectors

    def _stored(self, image: UploadedImage) -> Picture | None:
        vector_id = self.index.vector_id_by_content(image.content_hash)
        try:
            return None if vector_id is None else Picture(self.index.vector(vector_id), vector_id)
        except KeyError:  # a compaction has dropped it since
            return None

    def _close_if_unused(self) -> None:
        with self._lock:
            if self._is_retired and not self._users:
                self.index.close()
