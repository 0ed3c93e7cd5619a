"""The few processes in which the service decodes what it is sent, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import LifoQueue

import numpy as np
from numpy.typing import NDArray

from searchengine.decode import DecodeLimits, Photo
from searchengine.isolation import IsolatedDecoder


class DecoderPool:
    """`size` decoders for all threads: who comes when all are busy waits for one. Each starts when it is first needed.

    Every method raises SearchEngineError where no process can be started.
    """

    def __init__(self, *, limits: DecodeLimits, size: int = 2) -> None:
        self._decoders = [IsolatedDecoder(limits=limits) for _ in range(size)]
        # Last in, first out: while one is enough, the others need no process.
        self._idle: LifoQueue[IsolatedDecoder] = LifoQueue()
        for decoder in reversed(self._decoders):
            self._idle.put(decoder)

    def decode_bytes(self, data: bytes, *, image_size: int) -> Photo:
        """The crop that an encoder takes, and what EXIF tells. Raises ImageError."""
        with self._one() as decoder:
            return decoder.decode_bytes(data, image_size=image_size)

    def thumbnail(self, data: bytes, *, max_side_px: int) -> NDArray[np.uint8]:
        """The whole picture, upright, uint8 RGB (height, width, 3), sides at most `max_side_px`. Raises ImageError."""
        with self._one() as decoder:
            return decoder.thumbnail(data, max_side_px=max_side_px)

    def close(self) -> None:
        """End the processes; what is under way fails at once."""
        for decoder in self._decoders:
            decoder.close()

    @contextmanager
    def _one(self) -> Iterator[IsolatedDecoder]:
        decoder = self._idle.get()
        try:
            yield decoder
        finally:
            self._idle.put(decoder)
