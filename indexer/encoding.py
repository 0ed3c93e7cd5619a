"""The stage between reading and writing: threads run the encoder, so that it never waits for rows or disks.

While batches are encoded, the next is decoded and the one before is recorded. Where workers of their own encode
(indexer/engines/), nothing is left to do here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
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

BATCHES_AT_ONCE = 2


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
    """Batches go in, and come back later with their embeddings, in their order."""

    @property
    def hashes_under_way(self) -> set[bytes]: ...

    def hand_over(self, batch: Batch) -> Sequence[Batch]: ...

    def take_back(self, *, wait: bool = True) -> Sequence[Batch]: ...

    def close(self) -> None: ...


class EncodedBefore:
    """For batches of `Encoded`, which come back at once."""

    @property
    def hashes_under_way(self) -> set[bytes]:
        return set()

    def hand_over(self, batch: Batch) -> Sequence[Batch]:
        rows = [item.embedding for item in batch.decoded if isinstance(item, Encoded)]
        if rows:
            batch.embeddings = np.stack(rows)
        return [batch]

    def take_back(self, *, wait: bool = True) -> Sequence[Batch]:
        return []

    def close(self) -> None:
        pass


class EncoderThreads:
    """Encodes two batches at a time; what the encoder raises is raised where the batch is taken back.

    Two, so that cores never wait: at the end of a batch there are fewer photos than cores, and between two batches
    there are none. The first is encoded alone, for it may be what loads the encoder.
    """

    def __init__(self, encoder: Encoder, *, clock: StageClock) -> None:
        self._encoder = encoder
        self._clock = clock
        self._pool = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="encode")
        self._under_way: deque[tuple[Batch, Future[FloatMatrix] | None]] = deque()
        self._is_loaded = False
        self._counting = threading.Lock()
        self._at_work = 0
        self._counted_until = 0.0

    @property
    def hashes_under_way(self) -> set[bytes]:
        return {content_hash for batch, _ in self._under_way for content_hash in batch.hashes}

    def hand_over(self, batch: Batch) -> Sequence[Batch]:
        """Have `batch` encoded; gives the oldest back, with its embeddings, where there are enough without it."""
        most = BATCHES_AT_ONCE if self._is_loaded else 1
        done = [self._oldest()] if len(self._under_way) >= most else []
        crops = [item.photo.pixels for item in batch.decoded if isinstance(item, Decoded)]
        embeddings = self._pool.submit(self._encode, np.stack(crops)) if crops else None
        self._under_way.append((batch, embeddings))
        return done

    def take_back(self, *, wait: bool = True) -> Sequence[Batch]:
        """The batches that are under way, in their order; those that are done, if they are not to be waited for."""
        done = []
        while self._under_way:
            _, embeddings = self._under_way[0]
            if not (wait or embeddings is None or embeddings.done()):
                break
            done.append(self._oldest())
        return done

    def close(self) -> None:
        """Wait for what is being encoded, so that nobody uses the encoder of a run that is over."""
        self._pool.shutdown(cancel_futures=True)

    def _oldest(self) -> Batch:
        batch, embeddings = self._under_way[0]
        if embeddings is not None:
            batch.embeddings = embeddings.result()
            self._is_loaded = True
        self._under_way.popleft()
        return batch

    def _encode(self, pixels: PixelBatch) -> FloatMatrix:
        self._count(begun=True)
        try:
            return self._encoder.encode_pixels(pixels)
        finally:
            self._count(begun=False)

    def _count(self, *, begun: bool) -> None:
        """The time in which a batch was under way; that in which two were counts once."""
        with self._counting:
            now = time.monotonic()
            if self._at_work:
                self._clock.add("encode", now - self._counted_until)
            self._counted_until = now
            self._at_work += 1 if begun else -1
