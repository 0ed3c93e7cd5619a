"""A deterministic encoder for tests of logic: fast, and similar pictures get similar vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from searchengine.decode import crop_pixels, decode_file
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores, normalise


class FakeEncoder:
    """Projects an 8 x 8 thumbnail, or random numbers seeded by the text. Counts the photos and batches it embeds."""

    def __init__(self, *, name: str = "fake", dim: int = 16, image_size: int = 32) -> None:
        self.name = name
        self.dim = dim
        self.image_size = image_size
        self.logit_scale = 10.0
        self.precision = "fp32"
        self.usual_scores = UsualScores(centre=0.0, spread=0.25)
        self.fingerprint = hashlib.sha256(f"{name} {dim}".encode()).hexdigest()
        self.batches: list[int] = []
        self._projection = np.random.default_rng(0).standard_normal((8 * 8 * 3, dim))

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        rows = [np.random.default_rng(list(text.encode())).standard_normal(self.dim) for text in texts]
        return normalise(np.stack(rows)) if rows else np.empty((0, self.dim), np.float32)

    def encode_images(self, images: Sequence[Any]) -> FloatMatrix:
        crops = [
            crop_pixels(image, image_size=self.image_size)
            if hasattr(image, "getbands")
            else decode_file(image, image_size=self.image_size)
            for image in images
        ]
        return self.encode_pixels(np.stack(crops))

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (self.image_size, self.image_size, 3)
        self.batches.append(len(pixels))
        step = self.image_size // 8
        blocks = pixels.reshape(len(pixels), 8, step, 8, step, 3).mean(axis=(2, 4), dtype=np.float64)
        return normalise(blocks.reshape(len(pixels), -1) @ self._projection + 1e-6)
