"""The encoder `clip`: weights from a file, each tower loaded when it is first used.

A text is run only as far as its end-of-text token: attention is causal, so what follows could not change the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from searchengine.errors import UsageError, WeightsError
from searchengine.models.clip.tokenizer import CONTEXT, EOT, VOCABULARY, ClipTokenizer
from searchengine.models.inputs import check_is_list, encode_in_batches
from searchengine.models.published import sha256_of
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores, normalise

if TYPE_CHECKING:
    from searchengine.models.clip.checkpoints import Checkpoint
    from searchengine.models.clip.inference import ImageTower, TextTower
    from searchengine.vectors import ImageSource

# Counted up whenever the same photo or text would give another vector with the same weights.
PREPROCESSING_VERSION = 1

CACHED_TEXTS = 4096
# Tokens, padding included, of the texts that attention takes at once.
TOKENS_PER_BATCH = 4096

Tokens = tuple[int, ...]


class ClipEncoder:
    """Implements `searchengine.vectors.Encoder` with the checkpoint in `weights_file`.

    `sha256`: what the file must hash to, if that is known. When weights are first needed: ModelNotFound, WeightsError,
    UsageError for a precision that `device` does not have, ModelUnusable for a device that is not there.
    """

    def __init__(
        self, *, name: str, weights_file: Path, device: str = "auto", precision: str = "fp32", sha256: str | None = None
    ) -> None:
        self.name = name
        self.precision = precision
        self._weights_file, self._device, self._sha256 = weights_file, device, sha256
        self._known_texts: dict[Tokens, FloatMatrix] = {}

    # Of OpenAI's ViT-B/32, by 1,296 texts and 18 photos whose vectors were published (tests/test_clip_golden.py).
    usual_scores = UsualScores(centre=0.192, spread=0.017)

    @property
    def dim(self) -> int:
        return self._checkpoint.config.dim

    @property
    def image_size(self) -> int:
        return self._checkpoint.config.image_size

    @property
    def logit_scale(self) -> float:
        return self._checkpoint.logit_scale

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"clip preprocessing {PREPROCESSING_VERSION}\n{self._hash}\n".encode())
        if self.precision != "fp32":
            digest.update(f"{self.precision}\n".encode())
        return digest.hexdigest()

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        """Unit rows, float32 (n, dim). CLIP reads 77 tokens; a longer text raises QueryError, or is cut there."""
        check_is_list(texts, "texts")
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        tokens = [self._tokens(text, truncate=truncate) for text in texts]
        rows = {text: self._known_texts[text] for text in set(tokens) if text in self._known_texts}
        for batch in _bucketed(set(tokens) - rows.keys()):
            rows.update(zip(batch, normalise(self._text_tower.encode(batch)), strict=True))
        self._remember(rows)
        return np.stack([rows[text] for text in tokens])

    def encode_images(self, images: Sequence[ImageSource]) -> FloatMatrix:
        """Unit rows, float32 (n, dim), for PIL images or paths. Raises ImageError that names the image."""
        return encode_in_batches(self, images)

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        """Unit rows, float32 (n, dim), for uint8 RGB crops (n, image_size, image_size, 3)."""
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (n, {size}, {size}, 3)")
        if not len(pixels):
            return np.empty((0, self.dim), dtype=np.float32)
        return normalise(self._image_tower.encode(pixels))

    def _tokens(self, text: str, *, truncate: bool) -> Tokens:
        tokens = self._tokenizer.encode(text, truncate=truncate)
        return tuple(tokens[: tokens.index(EOT) + 1])  # a text may spell out an earlier one

    def _remember(self, rows: dict[Tokens, FloatMatrix]) -> None:
        if len(self._known_texts) + len(rows) > CACHED_TEXTS:
            self._known_texts = {}
        if len(rows) <= CACHED_TEXTS:
            self._known_texts |= rows

    @cached_property
    def _tokenizer(self) -> ClipTokenizer:
        return ClipTokenizer.load()

    @cached_property
    def _hash(self) -> str:
        return sha256_of(self._weights_file)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        from searchengine.models.clip.checkpoints import Checkpoint

        checkpoint = Checkpoint(self._weights_file)
        if self._sha256 is not None and self._hash != self._sha256:
            raise WeightsError(
                f"{printable(str(self._weights_file))} has sha256 {self._hash[:12]}, expected {self._sha256[:12]}; "
                f"fetch it again with: searchengine models download {self.name}"
            )
        config = checkpoint.config
        if (config.context, config.vocabulary) != (CONTEXT, VOCABULARY):
            raise WeightsError(
                f"{printable(str(self._weights_file))} reads {config.context} of {config.vocabulary:,} tokens, where "
                f"CLIP's tokenizer has {CONTEXT} of {VOCABULARY:,}; give a CLIP that was trained with it"
            )
        return checkpoint

    @cached_property
    def _image_tower(self) -> ImageTower:
        from searchengine.models.clip.inference import ImageTower

        return ImageTower(self._checkpoint.image_transformer(), device=self._device, precision=self.precision)

    @cached_property
    def _text_tower(self) -> TextTower:
        from searchengine.models.clip.inference import TextTower

        return TextTower(self._checkpoint.text_transformer(), device=self._device, precision=self.precision)


def _bucketed(texts: set[Tokens]) -> Iterator[list[Tokens]]:
    """Texts of like length together; equal beginnings side by side."""
    bucket: list[Tokens] = []
    for text in sorted(texts, key=lambda text: (len(text), text)):
        if bucket and len(text) * (len(bucket) + 1) > TOKENS_PER_BATCH:
            yield bucket
            bucket = []
        bucket.append(text)
    if bucket:
        yield bucket
