"""The stage between reading and writing: a thread runs the encoder, so that it never waits for rows or disks.

While one batch is encoded, the next is decoded and the one before is recorded. Where workers of their own encode
(indexer/engines/), nothing is left to do here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from indexer.crawl import Change
from indexer.reading import Decoded, Failed, Known
from indexer.report import StageClock
from searchengine.metadata import PhotoMetadata
from searchengine.vectors import Encoder, FloatMatrix, PixelBatch


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """New content that a worker has encoded: a unit vector, float32 (dim,)."""

    change: Change
    content_hash: bytes
    metadata: PhotoMetadata
    embedding: FloatMatrix


Outcome = Decoded | Encoded | Known | Failed


@dataclass(kw_only=True)
class Batch:
    """Photos to be encoded, and known ones that wait, for they may have the same content. Row i is of `decoded[i]`."""

    decoded: Sequence[Decoded | Encoded] = field(default_factory=list)
    waiting: Sequence[Known] = field(default_factory=list)
    embeddings: FloatMatrix = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))

    @property
    def hashes(self) -> list[bytes]:
        return [decoded.content_hash for decoded in self.decoded]

    @property
    def new(self) -> list[tuple[Change, bytes, PhotoMetadata]]:
        """Of each row: the photo, its hash, and what its file tells."""
        return [
            (item.change, item.content_hash, item.photo.metadata if isinstance(item, Decoded) else item.metadata)
            for item in self.decoded
        ]


class Encoding(Protocol):
    """Batches go in, and come back later with their embeddings."""

    @property
    def under_way(self) -> Batch: ...

    def hand_over(self, batch: Batch) -> Batch: ...

    def take_back(self, *, wait: bool = True) -> Batch: ...

    def close(self) -> None: ...


class EncodedBefore:
    """For batches of `Encoded`, which come back at once."""

    def __init__(self) -> None:
        self.under_way = Batch()

    def hand_over(self, batch: Batch) -> Batch:
        rows = [item.embedding for item in batch.decoded if isinstance(item, Encoded)]
        if rows:
            batch.embeddings = np.stack(rows)
        return batch

    def take_back(self, *, wait: bool = True) -> Batch:
        return Batch()

    def close(self) -> None:
        pass


class EncoderThread:
    """Encodes one batch at a time; what the encoder raises is raised where the batch is taken back."""

    def __init__(self, encoder: Encoder, *, clock: StageClock) -> None:
        self._encoder = encoder
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._embeddings: Future[FloatMatrix] | None = None
        self.under_way = Batch()

    def hand_over(self, batch: Batch) -> Batch:
        """Have `batch` encoded once the one before it is; gives that one back, with its embeddings."""
        crops = [item.photo.pixels for item in batch.decoded if isinstance(item, Decoded)]
        pixels = np.stack(crops) if crops else None
        done = self.take_back()
        self.under_way = batch
        if pixels is not None:
            self._embeddings = self._thread.submit(self._encode, pixels)
        return done

    def take_back(self, *, wait: bool = True) -> Batch:
        """The batch that is under way; an empty one if there is none, or if it is not done and not to be waited for."""
        done, embeddings = self.under_way, self._embeddings
        if embeddings is not None:
            if not (wait or embeddings.done()):
                return Batch()
            done.embeddings = embeddings.result()
        self.under_way, self._embeddings = Batch(), None
        return done

    def close(self) -> None:
        """Wait for what is being encoded, so that nobody uses the encoder of a run that is over."""
        self._thread.shutdown(cancel_futures=True)

    def _encode(self, pixels: PixelBatch) -> FloatMatrix:
        with self._clock.working("encode"):
            return self._encoder.encode_pixels(pixels)
