"""Photos in several files one after the other, so that none grows beyond what programs like to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from indexer.replicas.rows import PhotoRow
from searchengine.vectors import FloatMatrix

# A part is full once it has so many: half a GiB of vectors of 512 dimensions.
PHOTOS_A_PART = 2**18


class Part(Protocol):
    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None: ...

    def close(self) -> None: ...


class Parts(ABC):
    """A writer that begins a new part whenever one is full."""

    def __init__(self) -> None:
        self._parts = 0
        self._written = 0
        self._part: Part | None = None

    @abstractmethod
    def open_part(self, number: int) -> Part:
        """Part `number`, which counts from 0."""

    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None:
        """Row i of `vectors`, float32 (n, dim), is that of photo i."""
        if self._part is None:
            self._part = self.open_part(self._parts)
            self._parts += 1
        self._part.write(photos, vectors)
        self._written += len(photos)
        if self._written >= PHOTOS_A_PART:
            self.close()

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
        self._part, self._written = None, 0
